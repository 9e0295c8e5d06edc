"""A dial: from a target to a session that is ready for its first query.

For: the order of look-up, credential, connect and login, the bound on concurrent connects, and the
retries. A retry is possible within `connect_timeout_seconds`, because the client has had no answer
yet; no statement is ever sent twice. Not for: the steps themselves (`address_lookup`, `connector`,
`login`), nor which failure is retried (`retry`).
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.upstream.address_lookup import AddressLookup, LoginNames, Target
from proxy.upstream.connector import Connector
from proxy.upstream.login import ANSWER_SECONDS_MAX, Login
from proxy.upstream.missing_databases import MissingDatabases
from proxy.upstream.name_lookup import Addresses
from proxy.upstream.phases import ConnectPhase, DialPhases, RecordPhase
from proxy.upstream.retry import CONNECT_RETRY_SECONDS, Retry
from proxy.upstream.upstream_session import Admit, Prepared, UpstreamSession
from proxy.wire.options import Setting
from proxy.wire.startup import StartupMessage
from proxy.wire.upstream_message import UnpooledSetting, pooled_message, upstream_message
from proxy.workspace.credential import Credential

# Concurrent connects to one target. A front end limits the rate of connections and a database forks
# for each; clients that reconnect together are served sooner in order than all at once, where they
# time out together. 50 handshakes keep both sides busy.
CONNECTS_MAX: Final = 50

# What would be sent for clients, by their StartupMessage of 10 kB at most; the oldest makes room.
PREPARED_MAX: Final = 256

# How often the server checks whether the client of a running query is still connected. The check
# does not end a COMMIT that waits for synchronous replicas, which a CancelRequest would.
CONNECTION_CHECK_SECONDS: Final = 2
_CHECK_NAME: Final = "client_connection_check_interval"
_CONNECTION_CHECK: Final = (
    Setting(_CHECK_NAME.encode(), str(1000 * CONNECTION_CHECK_SECONDS).encode()),
)
# What PostgreSQL before version 14 and on other systems than Linux, and PgBouncer say of it.
_NO_CHECK_TEXTS: Final = ("unrecognized", "unsupported", "must be set to 0 on this platform")

_log = get_logger(__name__)
# For one try, from TCP to ReadyForQuery. A login to a database that wakes can hang where the next
# one succeeds; a try gets half of the dial's time at most, so that there is a next one.
TRY_SECONDS_MAX: Final = 20.0

# The error kind when the connect timeout expires in this phase.
_TIMED_OUT: Final = {
    ConnectPhase.MINT: ErrorKind.API_UNREACHABLE,
    ConnectPhase.DNS: ErrorKind.UPSTREAM_DNS,
    ConnectPhase.TCP: ErrorKind.UPSTREAM_UNREACHABLE,
    ConnectPhase.TLS: ErrorKind.UPSTREAM_TIMEOUT,
    ConnectPhase.LOGIN: ErrorKind.UPSTREAM_TIMEOUT,
}


class CredentialSource(Protocol):
    """Where a dial gets its credential: the tokens of an account, or a password file."""

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""

    def is_fresh(self, credential: Credential) -> bool:
        """Return whether a credential that was got some time ago may still be used."""

    def reject(self, credential: Credential) -> bool:
        """Invalidate a refused credential. Return whether a retry would use a different one."""


@dataclass(slots=True)
class _Dial:
    """One client's dial: the credential of its present try, and the failures of those before."""

    client: StartupMessage
    phases: DialPhases
    retry: Retry
    started_at: float
    fallback: StartupMessage | None = None
    admit: Admit | None = None
    credential: Credential | None = None
    failures: list[ProxyError] = field(default_factory=list)
    ahead: bool = False
    """No client waits for it: it takes no slot that one waits for."""


class _NoSlot(Exception):
    """All slots are in use, and the dial is ahead of any client."""


class Dialer:
    """Opens the sessions of one target."""

    def __init__(
        self,
        connector: Connector,
        address_lookup: AddressLookup,
        credentials: CredentialSource,
        record_phase: RecordPhase,
        *,
        connect_timeout_seconds: float,
        connect_retry_seconds: float = CONNECT_RETRY_SECONDS,
        connects_max: int = CONNECTS_MAX,
        connection_check: bool = False,
        answer_seconds_max: float = ANSWER_SECONDS_MAX,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open at most `connects_max` sessions at a time.

        With `connection_check` the server is asked to end the query of a client that disconnects.
        An upstream has `answer_seconds_max` for its first answer to a StartupMessage. `jitter`
        returns a number from 0 to 1.
        """
        self._connector = connector
        self._address_lookup = address_lookup
        self._credentials = credentials
        self._record_phase = record_phase
        self._timeout_seconds = connect_timeout_seconds
        self._try_seconds = min(TRY_SECONDS_MAX, connect_timeout_seconds / 2)
        self._retry_seconds = connect_retry_seconds
        self._connects_max = connects_max
        self._connects = asyncio.Semaphore(connects_max)  # first come, first served
        self._defaults = _CONNECTION_CHECK if connection_check else ()
        self._answer_seconds_max = answer_seconds_max
        self._jitter = jitter
        self._clock = clock
        self._missing = MissingDatabases()
        self._known: dict[StartupMessage, Prepared] = {}
        self._known_for: Target | None = None

    def prepare(
        self, client: StartupMessage, fallback: StartupMessage | None = None
    ) -> Prepared | None:
        """Return what a dial for this client would send first; None while that is not known.

        Nothing is waited for. Raises ProxyError or ClientViolation as `dial` does.
        """
        client = self._existing(client, fallback)
        target = self._address_lookup.known_target
        if target is not self._known_for:
            self._known.clear()
            self._known_for = target
        prepared = self._known.get(client)
        if prepared is None and target is not None:
            names = self._address_lookup.known_names(client)
            if names is not None:
                prepared = self._prepared(client, target, names)
                if not (client.may_be_remembered and prepared.message.may_be_remembered):
                    return prepared
                if len(self._known) >= PREPARED_MAX:
                    del self._known[next(iter(self._known))]
                self._known[client] = prepared
        return prepared

    async def dial_ahead(
        self, client: StartupMessage, fallback: StartupMessage | None = None
    ) -> UpstreamSession | None:
        """Return a session of one try, for which no client waits; None if no slot is free.

        Raises ProxyError or ClientViolation.
        """
        client = self._existing(client, fallback)
        dial = _Dial(client, DialPhases(), Retry(self._jitter, 0), self._clock(), ahead=True)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._try_once(dial)
        except _NoSlot:
            return None
        except TimeoutError as error:
            raise self._timed_out(dial.phases) from error

    async def dial(
        self,
        client: StartupMessage,
        phases: DialPhases | None = None,
        fallback: StartupMessage | None = None,
        *,
        admit: Admit | None = None,
        timeout_seconds: float | None = None,
    ) -> UpstreamSession:
        """Return a session for this client, within `connect_timeout_seconds`.

        `phases` shows meanwhile what the dial waits for. `fallback` is sent in place of `client`
        if the upstream has no database of that name. `admit` is a part of each try, after the
        login. `timeout_seconds` is what another dial for the same client has left of the time.
        Raises ProxyError; and ClientViolation for a StartupMessage that cannot be passed on.
        """
        if fallback is not None and client.get(b"database") in self._missing:
            client, fallback = fallback, None
        phases = phases or DialPhases()
        phases.record = self._record_phase
        retry = Retry(self._jitter, self._retry_seconds)
        dial = _Dial(client, phases, retry, self._clock(), fallback, admit)
        if timeout_seconds is None:
            timeout_seconds = self._timeout_seconds
        try:
            async with asyncio.timeout(timeout_seconds):
                session = await self._dial_until_ready(dial)
            dial.phases.succeed()
            return session
        except TimeoutError as error:
            raise (dial.failures or [self._timed_out(dial.phases)])[-1] from error
        finally:
            dial.phases.flush()

    def _existing(self, client: StartupMessage, fallback: StartupMessage | None) -> StartupMessage:
        """Return the message whose database is not known to be missing."""
        is_missing = fallback is not None and client.get(b"database") in self._missing
        return fallback if is_missing and fallback is not None else client

    @property
    def known_target(self) -> Target | None:
        """The target by what is known now; None before the first look-up."""
        return self._address_lookup.known_target

    async def _dial_until_ready(self, dial: _Dial) -> UpstreamSession:
        while True:  # bounded by dial's timeout
            try:
                target, names, addresses = await self._look_up(dial)
            except ProxyError as error:
                await self._before_retry(dial, error)
                continue
            # As late as possible, so that it is fresh, but before TCP: a front end gives a
            # connection 15 seconds from accept to StartupMessage. A failure of the API is not
            # retried here: the token source does that, once for all dials.
            credential = await self._credential(dial)
            # Not before: in an outage of the API it is of no use.
            prepared = self._prepared(dial.client, target, names)
            try:
                return await self._open(dial, prepared, addresses, credential)
            except ProxyError as error:
                await self._before_retry(dial, error)

    async def _try_once(self, dial: _Dial) -> UpstreamSession:
        """Do the steps of one try. Raises ProxyError or ClientViolation."""
        target, names, addresses = await self._look_up(dial)
        credential = await self._credential(dial)
        prepared = self._prepared(dial.client, target, names)
        return await self._open(dial, prepared, addresses, credential)

    async def _look_up(self, dial: _Dial) -> tuple[Target, LoginNames, Addresses]:
        """Return where this try goes. Raises ProxyError."""
        dial.phases.start(ConnectPhase.MINT)  # not measured, but the workspace may be asked
        target = await self._address_lookup.target()
        names = await self._address_lookup.login_names(dial.client)
        addresses = await self._connector.addresses(target, dial.phases)
        # An address that accepted TCP and then failed is not tried first again.
        first = len(dial.failures) % len(addresses)
        return target, names, (*addresses[first:], *addresses[:first])

    def _prepared(self, client: StartupMessage, target: Target, names: LoginNames) -> Prepared:
        """Return what is sent for this client. Raises ProxyError or ClientViolation."""
        try:
            if target.pooled:
                message = pooled_message(client, names.user, names.database)
            else:
                message = upstream_message(client, names.user, names.database, self._defaults)
        except UnpooledSetting as unpooled:
            raise ProxyError(ErrorKind.POOLER_PARAMETER, unpooled.name) from None
        return Prepared(target, names, message)

    async def _credential(self, dial: _Dial) -> Credential:
        """Return a credential for this try. Raises ProxyError."""
        dial.phases.start(ConnectPhase.MINT)
        dial.credential = await self._credentials.fresh()
        dial.phases.finish()
        return dial.credential

    async def _open(
        self, dial: _Dial, prepared: Prepared, addresses: Addresses, credential: Credential
    ) -> UpstreamSession:
        """Connect and log in, in one of the slots. Raises ProxyError."""
        if dial.ahead and self._connects.locked():
            raise _NoSlot
        async with self._slot(dial.phases) as waited:
            if waited and not self._credentials.is_fresh(credential):
                credential = await self._credential(dial)
            try:
                async with asyncio.timeout(self._try_seconds):
                    return await self._try(dial, prepared, addresses, credential)
            except TimeoutError as error:
                raise self._try_timed_out(dial.phases, prepared.target) from error

    async def _try(
        self, dial: _Dial, prepared: Prepared, addresses: Addresses, credential: Credential
    ) -> UpstreamSession:
        """Connect and log in one time. Raises ProxyError. The caller bounds the time."""
        target = prepared.target
        connection = await self._connector.connect(target, addresses, dial.phases)
        stream, startup = connection.stream, connection.startup
        login = Login(connection, prepared.names, credential, pooled=target.pooled)
        await login.run(prepared.message, dial.phases, self._answer_seconds_max)
        ticket = None
        if dial.admit is not None:
            # What came after the login's ReadyForQuery is of no statement: it comes first.
            stream.unread(startup.trailing_data())
            ticket = await dial.admit(stream, None)
        # A cancel goes to the address of its session, and waits for no look-up.
        peer = stream.transport.get_extra_info("peername")
        reached = replace(target, hostaddr=peer[0]) if peer else target
        return UpstreamSession(stream, startup, reached, prepared=prepared, ticket=ticket)

    @asynccontextmanager
    async def _slot(self, phases: DialPhases) -> AsyncIterator[bool]:
        """Hold one of `connects_max` slots while the block runs; yield whether it was waited for.

        The wait belongs to no phase: nothing is done for this client meanwhile.
        """
        if waited := self._connects.locked():
            phases.wait_for_slot()
        async with self._connects:
            yield waited

    async def _before_retry(self, dial: _Dial, error: ProxyError) -> None:
        """Wait until it is time for another try; raise the error if there is none."""
        dial.phases.failed(error)
        if dial.fallback is not None and error.kind is ErrorKind.DATABASE_MISSING:
            self._missing.add(dial.client.get(b"database") or b"")
            dial.client, dial.fallback = dial.fallback, None
            return  # no failure of the upstream: it has answered
        dial.failures.append(error)
        if self._defaults and _refuses_check(error):
            self._defaults = ()
            self._known.clear()
            _log.info(
                "the upstream does not check connections: the query of a client that disconnects "
                'continues, unless upstream.cancel_method = "cancel_request"'
            )
            return
        if error.original is None:  # else PostgreSQL itself answered, and the host is right
            self._address_lookup.invalidate_host()
        now = asyncio.get_running_loop().time()
        delay = dial.retry.delay(error, from_cache=self._is_replaced(dial, error), now=now)
        if delay is None or error.final:
            raise error
        # Without a slot: a dial that sleeps opens nothing, and does not delay other dials.
        await asyncio.sleep(delay)

    def _is_replaced(self, dial: _Dial, error: ProxyError) -> bool:
        """Return whether a cached token was refused and a retry would use a different one.

        A token that was minted for this dial is not replaced: it is not the cause.
        """
        credential = dial.credential
        if credential is None or error.kind.value.disposition is not Disposition.REMINT:
            return False
        return credential.requested_at < dial.started_at and self._credentials.reject(credential)

    def _try_timed_out(self, phases: DialPhases, target: Target) -> ProxyError:
        """Return the error for a try whose time ended in the current phase."""
        assert phases.current is not None
        kind = _TIMED_OUT[phases.current]
        if phases.current is ConnectPhase.LOGIN:
            kind = ErrorKind.LOGIN_TIMEOUT
        detail = f"{target.host}: no session within {self._try_seconds:g} seconds"
        return ProxyError(kind, detail)

    def _timed_out(self, phases: DialPhases) -> ProxyError:
        """Return the error for a dial whose time ended in the current phase."""
        if phases.current is None:
            detail = (
                f"all {self._connects_max} connects (upstream.connects_max) were in use "
                f"for {self._timeout_seconds:g} seconds"
            )
            return ProxyError(ErrorKind.UPSTREAM_BUSY, detail)
        kind = _TIMED_OUT[phases.current]
        is_api = kind is ErrorKind.API_UNREACHABLE
        if is_api and (failure := self._address_lookup.api_failure):
            return failure
        what = "the workspace API did not answer" if is_api else "no session"
        return ProxyError(kind, f"{what} within {self._timeout_seconds:g} seconds")


def _refuses_check(error: ProxyError) -> bool:
    """Return whether an upstream has refused client_connection_check_interval."""
    original = error.original
    text = error.detail if original is None else f"{original.message} {original.text(b'D')}"
    return _CHECK_NAME in text and any(word in text for word in _NO_CHECK_TEXTS)
