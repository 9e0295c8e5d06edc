"""From a target to a TLS connection: DNS, TCP, SSLRequest, TLS. It needs no credential.

For: the dialer, which then logs in, and cancel requests, which need no login. Not for: retries.
A failure is one ProxyError; its caller decides what follows.

Invariant: only SSLRequest is sent before the upstream has answered S, and no Postgres message
before its certificate was verified as far as `sslmode` says (W52).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohappyeyeballs import start_connection

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.transport.key_exchange import Curves
from proxy.transport.sockets import set_user_timeout
from proxy.transport.stream import StartupStream
from proxy.transport.tls import TLSTransport, client_context
from proxy.upstream.address_lookup import Target
from proxy.upstream.diagnosis import diagnose_event, diagnose_network
from proxy.upstream.name_lookup import Addresses
from proxy.upstream.phases import ConnectPhase, DialPhases
from proxy.wire.messages import BackendKeyData
from proxy.wire.startup import CancelRequest
from proxy.wire.upstream_startup import (
    TLSAccepted,
    TLSRefused,
    UpstreamEvent,
    UpstreamStartup,
)

# For all addresses of the host together: a name may resolve to several, and some may be dead.
TCP_CONNECT_SECONDS_MAX: Final = 10.0
# After this time without an answer the next address is tried as well (RFC 8305).
NEXT_ADDRESS_SECONDS: Final = 0.25
# A front end gives a connection as long. An upstream that accepts TCP and then stays silent must
# leave time for another address.
TLS_SECONDS_MAX: Final = 15.0
CANCEL_SECONDS_MAX: Final = 10.0  # delivered later, it could cancel another query (W40)

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection under TLS, and its machine, which sends the StartupMessage next."""

    stream: StartupStream
    startup: UpstreamStartup


class Connector:
    """Opens TLS connections to targets, and forwards cancel requests over them."""

    def __init__(
        self,
        resolve: Callable[[Target], Awaitable[Addresses]],
        *,
        tls_seconds_max: float = TLS_SECONDS_MAX,
    ) -> None:
        self._resolve = resolve
        self._tls_seconds_max = tls_seconds_max
        self._curves = Curves()

    async def addresses(self, target: Target, phases: DialPhases) -> Addresses:
        """Return the target's addresses now. Raises ProxyError. The caller bounds the time."""
        phases.start(ConnectPhase.DNS)
        found = await self._resolve(target)
        phases.finish()
        return found

    async def connect(self, target: Target, addresses: Addresses, phases: DialPhases) -> Connection:
        """Return a connection under TLS, within the bounds above. Raises ProxyError."""
        stream = await self._connect_tcp(target, addresses, phases)
        startup = UpstreamStartup()
        try:
            phases.start(ConnectPhase.TLS)
            async with asyncio.timeout(self._tls_seconds_max):
                await self._start_tls(stream, startup, target, phases)
            phases.finish()
        except TimeoutError as error:
            self._curves.invalidate(target)
            stream.transport.close()
            detail = f"{target.host}: no TLS within {self._tls_seconds_max:g} seconds"
            raise ProxyError(ErrorKind.UPSTREAM_TIMEOUT, detail) from error
        except BaseException:
            self._curves.invalidate(target)  # it may be the cause: the next try starts without it
            stream.transport.close()
            raise
        return Connection(stream, startup)

    async def cancel(
        self, target: Target, key: BackendKeyData, *, still_wanted: Callable[[], bool]
    ) -> bool:
        """Send a CancelRequest; return when the upstream has closed, which means delivered (W39).

        Returns False, and sends nothing, if it was not wanted any more once connected. Raises
        ProxyError, or TimeoutError after CANCEL_SECONDS_MAX.
        """
        async with asyncio.timeout(CANCEL_SECONDS_MAX):
            phases = DialPhases()  # not counted: a cancel is not a session's connect
            addresses = await self.addresses(target, phases)
            stream = (await self.connect(target, addresses, phases)).stream
            try:
                if not still_wanted():
                    return False
                await _send_cancel(stream, key)
                return True
            finally:
                stream.transport.close()

    async def _connect_tcp(
        self, target: Target, addresses: Addresses, phases: DialPhases
    ) -> StartupStream:
        """Return a TCP connection to the first of the addresses that answers."""
        phases.start(ConnectPhase.TCP)
        try:
            async with asyncio.timeout(TCP_CONNECT_SECONDS_MAX):
                stream = await _first_to_answer(addresses)
        except OSError as error:  # a TimeoutError is one
            raise diagnose_network(error, f"{target.host}:{target.port}") from error
        phases.finish()
        set_user_timeout(stream.transport)
        return stream

    async def _start_tls(
        self, stream: StartupStream, startup: UpstreamStartup, target: Target, phases: DialPhases
    ) -> None:
        stream.write(startup.request_tls())
        # Meanwhile the upstream handles the request.
        tls = _prepare_tls(stream, target, self._curves.find(target))
        phases.flush()
        _check_answer(await next_events(stream, startup), startup, target)
        try:
            await stream.switch_to(tls)
        except OSError as error:
            raise diagnose_network(error, target.host) from error
        startup.tls_started()
        if tls.asked_curve is not None:
            self._curves.keep(target, tls.asked_curve)


async def _first_to_answer(addresses: Addresses) -> StartupStream:
    """Return a connection to the first address that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    if len(addresses) == 1 and (single := addresses[0])[0] == socket.AF_INET:
        # Nothing to race: letting the loop make the socket takes half the time.
        host, port = single[4][:2]
        _, stream = await loop.create_connection(StartupStream, host, port)
        return stream
    sock = await start_connection(
        addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1
    )
    _, stream = await loop.create_connection(StartupStream, sock=sock)
    return stream


async def _send_cancel(stream: StartupStream, key: BackendKeyData) -> None:
    """Send a CancelRequest; return when the upstream has closed."""
    stream.write(CancelRequest(key.pid, key.key).encode())
    while await stream.receive():
        pass  # an upstream sends nothing on such a connection


async def next_events(stream: StartupStream, startup: UpstreamStartup) -> list[UpstreamEvent]:
    """Return what the upstream sends next: one event, or several that came together."""
    while True:  # ends with the stream; the caller bounds the time
        data = await stream.receive()
        events = startup.receive_data(data) if data else startup.receive_eof()
        if events:
            return events


def _check_answer(events: list[UpstreamEvent], startup: UpstreamStartup, target: Target) -> None:
    """Return if the upstream accepts TLS and sends nothing else. Raises ProxyError."""
    match events:
        case [TLSAccepted()]:
            pass
        case [TLSRefused()]:
            raise ProxyError(ErrorKind.UPSTREAM_NO_TLS, target.host)
        case [event, *_]:
            if startup.plaintext:
                _log.warning(
                    "upstream sent an error in plaintext",
                    host=target.host,
                    text=_printable(startup.plaintext),
                )
            raise diagnose_event(event)


def _printable(text: bytes) -> str:
    """Return the text for a log line, with blanks in place of control characters."""
    characters = text.decode("utf-8", "replace")
    return "".join(one if one.isprintable() else " " for one in characters).strip()


def _prepare_tls(stream: StartupStream, target: Target, curve: str | None) -> TLSTransport:
    try:
        context = client_context(
            target.sslmode, target.ssl_root_cert, curve, accelerated=target.accelerated
        )
    except OSError as error:  # it could be read at the start
        detail = f"{target.ssl_root_cert}: {error.strerror or error}"
        raise ProxyError(ErrorKind.UPSTREAM_CERTIFICATE, detail) from error
    try:
        return stream.prepare_tls(context, target.server_name)
    except ValueError as error:  # no certificate can have this name
        raise ProxyError(ErrorKind.UPSTREAM_CERTIFICATE, target.host) from error
