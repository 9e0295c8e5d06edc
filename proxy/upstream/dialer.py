"""From a target to a session that is ready for its first query.

Name, TCP, SSLRequest, TLS, StartupMessage, credential, ReadyForQuery; each step's failure becomes
one ProxyError. What is transient is tried again within `connect_timeout_seconds`, which is possible
because the client has been told nothing yet; no statement is ever replayed.
"""

import asyncio
import random
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from aiohappyeyeballs import AddrInfoType, start_connection

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.observe.metrics import ConnectPhase
from proxy.transport.link import Link
from proxy.transport.sockets import bound_unacknowledged
from proxy.upstream.credentials import CredentialSource
from proxy.upstream.diagnosis import diagnose, diagnose_network
from proxy.upstream.retry import Retry
from proxy.upstream.scram import SCRAM_SHA_256, Scram
from proxy.upstream.targets import Login, Target, Targets
from proxy.upstream.workspace import Credential
from proxy.wire.messages import BackendKeyData
from proxy.wire.startup import CancelRequest, StartupMessage
from proxy.wire.upstream_startup import (
    PasswordRequested,
    SASLContinued,
    SASLFinished,
    SASLRequested,
    TLSAccepted,
    TLSRefused,
    UpstreamDisconnected,
    UpstreamEvent,
    UpstreamReady,
    UpstreamRefused,
    UpstreamStartup,
    UpstreamViolated,
    upstream_message,
)
from proxy.wire.violations import UnsupportedAuthentication

# For all addresses of the host together; a name resolves to several, some of which may be dead.
TCP_CONNECT_SECONDS_MAX: Final = 10.0
# An address that does not answer for so long is not waited for alone (RFC 8305).
NEXT_ADDRESS_SECONDS: Final = 0.25
CANCEL_SECONDS_MAX: Final = 10.0  # delivered later it could hit another query (W40)

# What a dial is doing now, and what it means when its time ends there.
_phase_now: Final[ContextVar[ConnectPhase]] = ContextVar("phase", default=ConnectPhase.MINT)
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
    """Opens upstream sessions and forwards cancel requests."""

    def __init__(
        self,
        targets: Targets,
        credentials: CredentialSource,
        phase_took: Callable[[ConnectPhase, float], None],
        *,
        connect_timeout_seconds: float,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
        resolve: Callable[[Target], Awaitable[Sequence[AddrInfoType]]] | None = None,
    ) -> None:
        """`resolve` gives a target's addresses, in the order in which to try them."""
        self._targets = targets
        self._credentials = credentials
        self._phase_took = phase_took
        self._timeout_seconds = connect_timeout_seconds
        self._jitter = jitter
        self._clock = clock
        self._resolve = resolve or _resolve

    async def dial(self, client: StartupMessage) -> UpstreamSession:
        """Return a session for this client, within `connect_timeout_seconds`.

        Raises ProxyError; and ClientViolation for a StartupMessage that cannot be passed on.
        """
        failures: list[ProxyError] = []
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._dial_until_ready(client, failures)
        except TimeoutError as error:
            detail = f"no session within {self._timeout_seconds:g} seconds"
            silence = ProxyError(_SILENCE[_phase_now.get()], detail)
            raise (failures[-1] if failures else silence) from error

    async def cancel(
        self, target: Target, key: BackendKeyData, *, still_wanted: Callable[[], bool]
    ) -> bool:
        """Forward a cancel and wait until the upstream has closed, which means delivered (W39).

        Returns False when it was not wanted any more once the connection stood: nothing is sent
        then. Raises ProxyError, or TimeoutError after CANCEL_SECONDS_MAX.
        """
        async with asyncio.timeout(CANCEL_SECONDS_MAX):
            link = await self._connect(target)
            try:
                await self._start_tls(link, UpstreamStartup(), target)
                if not still_wanted():
                    return False
                link.write(CancelRequest(key.pid, key.key).encode())
                while await link.receive():
                    pass  # nothing is ever said on such a connection
                return True
            finally:
                link.transport.close()

    async def _dial_until_ready(
        self, client: StartupMessage, failures: list[ProxyError]
    ) -> UpstreamSession:
        retry = Retry(self._jitter)
        started_at = self._clock()
        while True:  # bounded by dial's timeout
            # First: the front end gives a connection 15 s from accept to StartupMessage. What the
            # API fails with is not tried again here: that is done once for all who wait.
            with self._phase(ConnectPhase.MINT):
                credential = await self._credentials.fresh()
            try:
                return await self._dial_once(client, credential)
            except ProxyError as error:
                failures.append(error)
                if error.original is None:  # else PostgreSQL itself spoke: the host is right
                    self._targets.forget_host()
                from_cache = credential.requested_at < started_at
                delay = retry.delay(error, from_cache=from_cache)
                if delay is None:
                    raise
                if error.kind.value.disposition is Disposition.REMINT:
                    self._credentials.reject(credential)
                await asyncio.sleep(delay)

    async def _dial_once(self, client: StartupMessage, credential: Credential) -> UpstreamSession:
        target = await self._targets.target()
        login = await self._targets.login(client)
        message = upstream_message(client, login.user, login.database)
        link = await self._connect(target)
        try:
            startup = UpstreamStartup()
            await self._start_tls(link, startup, target)
            with self._phase(ConnectPhase.LOGIN):
                await _Authentication(link, startup, login, credential).run(message)
            return UpstreamSession(link, startup, target)
        except BaseException:
            # Cancelled, timed out or refused: no orphan session stays upstream (W54).
            link.transport.close()
            raise

    # -- name, TCP, TLS --------------------------------------------------------------------------

    async def _connect(self, target: Target) -> Link:
        loop = asyncio.get_running_loop()
        with self._phase(ConnectPhase.DNS):
            addresses = await self._resolve(target)
        with self._phase(ConnectPhase.TCP):
            try:
                async with asyncio.timeout(TCP_CONNECT_SECONDS_MAX):
                    sock = await start_connection(
                        addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1
                    )
                _, link = await loop.create_connection(Link, sock=sock)
            except OSError as error:  # a TimeoutError is one
                raise diagnose_network(error, f"{target.host}:{target.port}") from error
        bound_unacknowledged(link.transport)
        return link

    async def _start_tls(self, link: Link, startup: UpstreamStartup, target: Target) -> None:
        with self._phase(ConnectPhase.TLS):
            link.write(startup.request_tls())
            match await _next_events(link, startup):
                case [TLSAccepted()]:
                    pass
                case [TLSRefused()]:
                    raise ProxyError(ErrorKind.UPSTREAM_NO_TLS, target.host)
                case [event, *_]:
                    raise _failure(event)
            context = tls_context(target.sslmode, target.ssl_root_cert)
            try:
                await link.start_tls(context, server_hostname=target.host)
            except OSError as error:
                raise diagnose_network(error, target.host) from error
            except ValueError as error:  # a name that no certificate can have
                raise ProxyError(ErrorKind.UPSTREAM_CERTIFICATE, target.host) from error
            startup.tls_started()

    @contextmanager
    def _phase(self, phase: ConnectPhase) -> Iterator[None]:
        """Record how long a phase took, if it succeeded."""
        _phase_now.set(phase)
        begun = time.perf_counter()
        yield
        self._phase_took(phase, time.perf_counter() - begun)


class _Authentication:
    """StartupMessage to ReadyForQuery on one connection."""

    def __init__(
        self, link: Link, startup: UpstreamStartup, login: Login, credential: Credential
    ) -> None:
        self._link = link
        self._startup = startup
        self._user = login.user.decode("utf-8", "replace")
        self._credential = credential
        self._scram: Scram | None = None

    async def run(self, message: StartupMessage) -> None:
        """Return when the upstream is ready. Raises ProxyError."""
        self._link.write(self._startup.startup(message))
        while True:  # bounded by the machine, which lets a password be asked once
            for event in await _next_events(self._link, self._startup):
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
                raise diagnose(error, user=self._user)
            case _:
                raise _failure(event)


async def _resolve(target: Target) -> Sequence[AddrInfoType]:
    """Return the addresses to try, in the resolver's order."""
    loop = asyncio.get_running_loop()
    name = target.hostaddr or target.host
    try:
        return await loop.getaddrinfo(name, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ProxyError(ErrorKind.UPSTREAM_DNS, f"{name}: {error.strerror or error}") from error
    except UnicodeError as error:  # a label too long or empty: no resolver is even asked
        raise ProxyError(ErrorKind.UPSTREAM_DNS, f"{name}: not a name that DNS can have") from error


async def _next_events(link: Link, startup: UpstreamStartup) -> list[UpstreamEvent]:
    """Return what the upstream says next, one thing or several that came together."""
    while True:  # ends with the stream; the time is dial's
        data = await link.receive()
        events = startup.receive_data(data) if data else startup.receive_eof()
        if events:
            return events


def _failure(event: UpstreamEvent) -> ProxyError:
    match event:
        case UpstreamViolated(violation):
            if isinstance(violation, UnsupportedAuthentication):
                return ProxyError(ErrorKind.UNSUPPORTED_AUTH, violation.message)
            return ProxyError(ErrorKind.UPSTREAM_PROTOCOL, violation.message)
        case UpstreamDisconnected():
            return ProxyError(ErrorKind.UPSTREAM_LOST)
        case _:
            return ProxyError(ErrorKind.UPSTREAM_PROTOCOL, f"{type(event).__name__} out of order")


@lru_cache(maxsize=64)  # reading the system's certificates takes tens of milliseconds
def tls_context(sslmode: str, ssl_root_cert: str) -> ssl.SSLContext:
    """Return the context for an upstream. `verify-full` checks chain and name."""
    cafile = None if ssl_root_cert == "system" else ssl_root_cert
    context = ssl.create_default_context(cafile=cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = sslmode == "verify-full"
    if sslmode == "require":
        context.verify_mode = ssl.CERT_NONE
    return context
