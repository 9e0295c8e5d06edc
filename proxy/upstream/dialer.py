"""From a target to a session that is ready for its first query: credential, retry, login.

The connection itself is the connector's; here it gets its StartupMessage and its credential, until
ReadyForQuery; each step's failure becomes one ProxyError. What is transient is tried again within
`connect_timeout_seconds`, which is possible because the client has been told nothing yet; no
statement is ever replayed.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.transport.stream import StartupStream
from proxy.upstream.address_lookup import AddressLookup, LoginNames, Target
from proxy.upstream.connector import (
    Addresses,
    Connection,
    Connector,
    diagnose_event,
    next_events,
)
from proxy.upstream.diagnosis import LoginAttempt, diagnose
from proxy.upstream.phases import ConnectPhase, PhaseTimer, RecordPhase
from proxy.upstream.retry import Retry
from proxy.upstream.scram import SCRAM_SHA_256, Scram
from proxy.wire.startup import StartupMessage
from proxy.wire.upstream_startup import (
    PasswordRequested,
    SASLContinued,
    SASLFinished,
    SASLRequested,
    UpstreamEvent,
    UpstreamReady,
    UpstreamRefused,
    UpstreamStartup,
    upstream_message,
)
from proxy.workspace.credential import Credential

# Sessions being opened at a time, for one target. A front end limits the rate of connections, a
# database forks for each, and a storm that is served in order is over sooner than one that times
# out together; 50 handshakes keep both sides busy.
CONNECTS_MAX: Final = 50

# What a front end does before it asks for the password needs no database, which may be asleep: that
# one is waited for afterwards, as long as connect_timeout_seconds allows.
ANSWER_SECONDS_MAX: Final = 15.0

# What it means when a dial's time ends in a phase.
_TIMED_OUT: Final = {
    ConnectPhase.MINT: ErrorKind.API_UNREACHABLE,
    ConnectPhase.DNS: ErrorKind.UPSTREAM_DNS,
    ConnectPhase.TCP: ErrorKind.UPSTREAM_UNREACHABLE,
    ConnectPhase.TLS: ErrorKind.UPSTREAM_TIMEOUT,
    ConnectPhase.LOGIN: ErrorKind.UPSTREAM_TIMEOUT,
}


@dataclass(frozen=True, slots=True)
class _Dial:
    """One client's dial: what is tried, and what became of the tries so far."""

    client: StartupMessage
    phases: PhaseTimer
    retry: Retry
    started_at: float
    failures: list[ProxyError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UpstreamSession:
    """A session that is ready: its connection, and the machine that holds its welcome."""

    stream: StartupStream
    startup: UpstreamStartup
    target: Target


class CredentialSource(Protocol):
    """Where a dial gets its credential: the tokens of an account, or a password file."""

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""

    def is_fresh(self, credential: Credential) -> bool:
        """Return whether a credential that was got some time ago may still be used."""

    def reject(self, credential: Credential) -> bool:
        """Invalidate a refused credential. Return whether a retry would use a different one."""


class Dialer:
    """Opens upstream sessions."""

    def __init__(
        self,
        connector: Connector,
        address_lookup: AddressLookup,
        credentials: CredentialSource,
        record_phase: RecordPhase,
        *,
        connect_timeout_seconds: float,
        connects_max: int = CONNECTS_MAX,
        answer_seconds_max: float = ANSWER_SECONDS_MAX,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`connects_max` sessions are opened at a time; in each the upstream has to say something
        within `answer_seconds_max`. `jitter` returns a number from 0 to 1.
        """
        self._connector = connector
        self._address_lookup = address_lookup
        self._credentials = credentials
        self._record_phase = record_phase
        self._timeout_seconds = connect_timeout_seconds
        self._connects_max = connects_max
        self._connects = asyncio.Semaphore(connects_max)  # first come, first served
        self._answer_seconds_max = answer_seconds_max
        self._jitter = jitter
        self._clock = clock

    async def dial(self, client: StartupMessage) -> UpstreamSession:
        """Return a session for this client, within `connect_timeout_seconds`.

        Raises ProxyError; and ClientViolation for a StartupMessage that cannot be passed on.
        """
        dial = _Dial(client, PhaseTimer(self._record_phase), Retry(self._jitter), self._clock())
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._dial_until_ready(dial)
        except TimeoutError as error:
            if dial.failures:
                raise dial.failures[-1] from error
            raise self._timed_out(dial.phases) from error
        finally:
            dial.phases.flush()

    def _timed_out(self, phases: PhaseTimer) -> ProxyError:
        """Return what it means that the time ended where it did."""
        if phases.current is None:
            detail = (
                f"waited for one of {self._connects_max} places (upstream.connects_max) "
                f"until {self._timeout_seconds:g} seconds were over"
            )
            return ProxyError(ErrorKind.UPSTREAM_BUSY, detail)
        kind = _TIMED_OUT[phases.current]
        is_api = kind is ErrorKind.API_UNREACHABLE
        what = "the workspace API did not answer" if is_api else "no session"
        return ProxyError(kind, f"{what} within {self._timeout_seconds:g} seconds")

    async def _dial_until_ready(self, dial: _Dial) -> UpstreamSession:
        while True:  # bounded by dial's timeout
            try:
                target, names, addresses = await self._look_up(dial)
            except ProxyError as error:
                await self._before_retry(dial, error)
                continue
            # Last, so that it is fresh when it is shown, and before TCP: the front end gives a
            # connection 15 s from accept to StartupMessage. What the API fails with is not tried
            # again here: that is done once for all who wait.
            credential = await self._credential(dial.phases)
            try:
                async with self._slot(dial.phases) as queued:
                    if queued and not self._credentials.is_fresh(credential):
                        credential = await self._credential(dial.phases)
                    message = upstream_message(dial.client, names.user, names.database)
                    connection = await self._connector.connect(target, addresses, dial.phases)
                    await self._log_in(connection, message, names, credential, dial.phases)
                    return UpstreamSession(connection.stream, connection.startup, target)
            except ProxyError as error:
                await self._before_retry(dial, error, credential)

    async def _look_up(self, dial: _Dial) -> tuple[Target, LoginNames, Addresses]:
        """Return where this try goes, and as whom. Raises ProxyError."""
        dial.phases.start(ConnectPhase.MINT)  # not its time, but the workspace may be asked
        target = await self._address_lookup.target()
        names = await self._address_lookup.login_names(dial.client)
        addresses = await self._connector.addresses(target, dial.phases)
        # An address that takes TCP and does nothing good with it is not the first one again.
        first = len(dial.failures) % len(addresses)
        return target, names, (*addresses[first:], *addresses[:first])

    async def _before_retry(
        self, dial: _Dial, error: ProxyError, credential: Credential | None = None
    ) -> None:
        """Return when it is time for another try; raise the error when there shall be none."""
        dial.failures.append(error)
        if error.original is None:  # else PostgreSQL itself spoke: the host is right
            self._address_lookup.invalidate_host()
        delay = dial.retry.delay(error, from_cache=self._is_replaced(dial, error, credential))
        if delay is None:
            raise error
        # Without a place: who sleeps opens nothing upstream and keeps nobody from trying.
        await asyncio.sleep(delay)

    def _is_replaced(self, dial: _Dial, error: ProxyError, credential: Credential | None) -> bool:
        """Tell whether the error is a cached token's, and the next one asked for will be another.

        A role that is refused with a new token as well is not the token's fault: then it is not.
        """
        if credential is None or error.kind.value.disposition is not Disposition.REMINT:
            return False
        return credential.requested_at < dial.started_at and self._credentials.reject(credential)

    @asynccontextmanager
    async def _slot(self, phases: PhaseTimer) -> AsyncIterator[bool]:
        """Hold one of `connects_max` places while the block runs; tell whether it was waited for.

        The time spent waiting belongs to no phase: nothing is done for this client in it.
        """
        if queued := self._connects.locked():
            phases.pause()
        async with self._connects:
            yield queued

    async def _credential(self, phases: PhaseTimer) -> Credential:
        phases.start(ConnectPhase.MINT)
        credential = await self._credentials.fresh()
        phases.finish()
        return credential

    async def _log_in(
        self,
        connection: Connection,
        message: StartupMessage,
        names: LoginNames,
        credential: Credential,
        phases: PhaseTimer,
    ) -> None:
        """Return when the upstream is ready; otherwise close the connection. Raises ProxyError."""
        authentication = _Authentication(connection, names, credential)
        try:
            phases.start(ConnectPhase.LOGIN)
            authentication.begin(message)
            phases.flush()
            await authentication.run(self._answer_seconds_max)
            phases.finish()
        except BaseException:
            # Cancelled, timed out or refused: no orphan session stays upstream (W54).
            connection.stream.transport.close()
            raise


class _Authentication:
    """StartupMessage to ReadyForQuery on one connection."""

    def __init__(self, connection: Connection, names: LoginNames, credential: Credential) -> None:
        self._stream = connection.stream
        self._startup = connection.startup
        self._names = names
        self._credential = credential
        self._scram: Scram | None = None

    def begin(self, message: StartupMessage) -> None:
        """Send the StartupMessage."""
        self._stream.write(self._startup.startup(message))

    async def run(self, answer_seconds_max: float) -> None:
        """Return when the upstream is ready. Raises ProxyError."""
        events = await self._first_events(answer_seconds_max)
        while True:  # bounded by the machine, which lets a password be asked once
            for event in events:
                if isinstance(event, UpstreamReady):
                    return
                self._stream.write(self._answer(event))
            events = await next_events(self._stream, self._startup)

    async def _first_events(self, seconds_max: float) -> list[UpstreamEvent]:
        try:
            async with asyncio.timeout(seconds_max):
                return await next_events(self._stream, self._startup)
        except TimeoutError as error:
            detail = f"no answer to the StartupMessage within {seconds_max:g} seconds"
            raise ProxyError(ErrorKind.UPSTREAM_TIMEOUT, detail) from error

    def _answer(self, event: UpstreamEvent) -> bytes:
        match event:
            case PasswordRequested():
                return self._startup.password(self._credential.secret)
            case SASLRequested(mechanisms):
                if not self._credential.is_password:
                    raise ProxyError(ErrorKind.UNSUPPORTED_AUTH, "SASL, which takes no token")
                self._scram = Scram(mechanisms, self._credential.secret)
                return self._startup.sasl_initial_response(
                    SCRAM_SHA_256, self._scram.client_first()
                )
            case SASLContinued(data) if self._scram is not None:
                return self._startup.sasl_response(self._scram.client_final(data))
            case SASLFinished(data) if self._scram is not None:
                self._scram.verify_server(data)
                return b""
            case UpstreamRefused(error):
                raise diagnose(error, self._shown())
            case _:
                raise diagnose_event(event)

    def _shown(self) -> LoginAttempt:
        return LoginAttempt(
            self._names.user.decode("utf-8", "replace"),
            self._names.database.decode("utf-8", "replace"),
            self._credential.secret,
            self._credential.is_password,
        )
