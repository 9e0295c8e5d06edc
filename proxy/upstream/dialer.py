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
from dataclasses import dataclass
from typing import Final

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.observe.metrics import ConnectPhase
from proxy.transport.link import Link
from proxy.upstream.connector import (
    Connection,
    Connector,
    PhaseTook,
    Progress,
    failure,
    next_events,
)
from proxy.upstream.credentials import CredentialSource
from proxy.upstream.diagnosis import Shown, diagnose
from proxy.upstream.retry import Retry
from proxy.upstream.scram import SCRAM_SHA_256, Scram
from proxy.upstream.targets import Login, Target, Targets
from proxy.upstream.workspace import Credential
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

# Sessions being opened at a time, for one target. A front end limits the rate of connections, a
# database forks for each, and a storm that is served in order is over sooner than one that times
# out together; 50 handshakes keep both sides busy.
CONNECTS_MAX: Final = 50

# What it means when a dial's time ends in a phase.
_SILENCE: Final = {
    ConnectPhase.MINT: ErrorKind.API_UNREACHABLE,
    ConnectPhase.DNS: ErrorKind.UPSTREAM_DNS,
    ConnectPhase.TCP: ErrorKind.UPSTREAM_UNREACHABLE,
    ConnectPhase.TLS: ErrorKind.UPSTREAM_TIMEOUT,
    ConnectPhase.LOGIN: ErrorKind.UPSTREAM_TIMEOUT,
}


@dataclass(frozen=True, slots=True)
class UpstreamSession:
    """A session that is ready: its connection, and the machine that holds its welcome."""

    link: Link
    startup: UpstreamStartup
    target: Target


class Dialer:
    """Opens upstream sessions."""

    def __init__(
        self,
        connector: Connector,
        targets: Targets,
        credentials: CredentialSource,
        phase_took: PhaseTook,
        *,
        connect_timeout_seconds: float,
        connects_max: int = CONNECTS_MAX,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`connects_max` sessions are opened at a time; `jitter` returns a number from 0 to 1."""
        self._connector = connector
        self._targets = targets
        self._credentials = credentials
        self._phase_took = phase_took
        self._timeout_seconds = connect_timeout_seconds
        self._connects_max = connects_max
        self._places = asyncio.Semaphore(connects_max)  # first come, first served
        self._jitter = jitter
        self._clock = clock

    async def dial(self, client: StartupMessage) -> UpstreamSession:
        """Return a session for this client, within `connect_timeout_seconds`.

        Raises ProxyError; and ClientViolation for a StartupMessage that cannot be passed on.
        """
        failures: list[ProxyError] = []
        progress = Progress(self._phase_took)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._dial_until_ready(client, progress, failures)
        except TimeoutError as error:
            if failures:
                raise failures[-1] from error
            raise self._silence(progress) from error

    def _silence(self, progress: Progress) -> ProxyError:
        """Return what it means that the time ended where it did."""
        if progress.now is None:
            detail = (
                f"waited for one of {self._connects_max} places (upstream.connects_max) "
                f"until {self._timeout_seconds:g} seconds were over"
            )
            return ProxyError(ErrorKind.UPSTREAM_BUSY, detail)
        detail = f"no session within {self._timeout_seconds:g} seconds"
        return ProxyError(_SILENCE[progress.now], detail)

    async def _dial_until_ready(
        self, client: StartupMessage, progress: Progress, failures: list[ProxyError]
    ) -> UpstreamSession:
        retry = Retry(self._jitter)
        started_at = self._clock()
        while True:  # bounded by dial's timeout
            # First: the front end gives a connection 15 s from accept to StartupMessage. What the
            # API fails with is not tried again here: that is done once for all who wait.
            credential = await self._credential(progress)
            try:
                target = await self._targets.target()
                login = await self._targets.login(client)
                async with self._place(progress) as queued:
                    if queued and not self._credentials.is_fresh(credential):
                        credential = await self._credential(progress)
                    return await self._dial_once(client, target, login, credential, progress)
            except ProxyError as failed:
                failures.append(failed)
            error = failures[-1]
            if error.original is None:  # else PostgreSQL itself spoke: the host is right
                self._targets.forget_host()
            delay = retry.delay(error, from_cache=credential.requested_at < started_at)
            if delay is None:
                raise error
            if error.kind.value.disposition is Disposition.REMINT:
                self._credentials.reject(credential)
            # Without a place: who sleeps opens nothing upstream and keeps nobody from trying.
            await asyncio.sleep(delay)

    @asynccontextmanager
    async def _place(self, progress: Progress) -> AsyncIterator[bool]:
        """Hold one of `connects_max` places while the block runs; tell whether it was waited for.

        The time spent waiting belongs to no phase: nothing is done for this client in it.
        """
        if queued := self._places.locked():
            progress.wait()
        async with self._places:
            yield queued

    async def _credential(self, progress: Progress) -> Credential:
        progress.begin(ConnectPhase.MINT)
        credential = await self._credentials.fresh()
        progress.done()
        return credential

    async def _dial_once(
        self,
        client: StartupMessage,
        target: Target,
        login: Login,
        credential: Credential,
        progress: Progress,
    ) -> UpstreamSession:
        message = upstream_message(client, login.user, login.database)
        connection = await self._connector.connect(target, progress)
        try:
            progress.begin(ConnectPhase.LOGIN)
            await _Authentication(connection, login, credential).run(message)
            progress.done()
        except BaseException:
            # Cancelled, timed out or refused: no orphan session stays upstream (W54).
            connection.link.transport.close()
            raise
        return UpstreamSession(connection.link, connection.startup, target)


class _Authentication:
    """StartupMessage to ReadyForQuery on one connection."""

    def __init__(self, connection: Connection, login: Login, credential: Credential) -> None:
        self._link = connection.link
        self._startup = connection.startup
        self._login = login
        self._credential = credential
        self._scram: Scram | None = None

    async def run(self, message: StartupMessage) -> None:
        """Return when the upstream is ready. Raises ProxyError."""
        self._link.write(self._startup.startup(message))
        while True:  # bounded by the machine, which lets a password be asked once
            for event in await next_events(self._link, self._startup):
                if isinstance(event, UpstreamReady):
                    return
                self._link.write(self._answer(event))

    def _answer(self, event: UpstreamEvent) -> bytes:
        match event:
            case PasswordRequested():
                return self._startup.password(self._credential.secret)
            case SASLRequested(mechanisms):
                if not self._credential.is_password:
                    raise ProxyError(ErrorKind.UNSUPPORTED_AUTH, "SASL, which takes no token")
                self._scram = Scram(mechanisms, self._credential.secret)
                return self._startup.sasl_initial_response(SCRAM_SHA_256, self._scram.first())
            case SASLContinued(data) if self._scram is not None:
                return self._startup.sasl_response(self._scram.proof(data))
            case SASLFinished(data) if self._scram is not None:
                self._scram.check(data)
                return b""
            case UpstreamRefused(error):
                raise diagnose(error, self._shown())
            case _:
                raise failure(event)

    def _shown(self) -> Shown:
        return Shown(
            self._login.user.decode("utf-8", "replace"),
            self._login.database.decode("utf-8", "replace"),
            self._credential.secret,
            self._credential.is_password,
        )
