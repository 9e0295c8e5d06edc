"""The client's connection from accept until its session is relayed: first packets, TLS, answer.

For: the socket side of `wire/client_startup.py`. Not for: what the client gets (`session`). When
the connection goes to the relay, the session releases this object.
"""

import asyncio
import ssl

from proxy.session.relay import Relay
from proxy.transport.stream import StartupStream
from proxy.transport.tls import ALPN_PROTOCOL
from proxy.upstream.upstream_session import UpstreamSession
from proxy.wire.client_startup import (
    CancelReceived,
    ClientEvent,
    ClientStartup,
    ClientState,
    DirectTLSReceived,
    Disconnected,
    EncryptionAnswered,
    StartupReceived,
    VersionNegotiated,
    Violated,
)
from proxy.wire.messages import BackendKeyData, ErrorResponse


class ClientGone(Exception):
    """The client disconnected before its session was ready."""


class _WhileConnected:
    """Cancels its block when the client has gone, as `asyncio.timeout` does after its time."""

    __slots__ = ("_before", "_gone", "_is_cancelled", "_over", "_task")

    def __init__(self, gone: asyncio.Future[None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._gone = gone
        self._is_cancelled = self._over = False
        self._before = 0

    def __enter__(self) -> None:
        self._before = self._task.cancelling()
        self._gone.add_done_callback(self._cancel)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over = True  # a callback that is scheduled already cannot be removed
        self._gone.remove_done_callback(self._cancel)
        is_ours = self._is_cancelled and self._task.uncancel() <= self._before
        if is_ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientGone from None

    def _cancel(self, _gone: object) -> None:
        if not self._over:
            self._is_cancelled = True
            self._task.cancel()


class StartingClient:
    """One client that has no session yet; `tls` is the context that it is offered."""

    __slots__ = ("_machine", "_stream", "_tls", "negotiated_at")

    def __init__(self, stream: StartupStream, tls: ssl.SSLContext | None) -> None:
        self._stream = stream
        self._tls = tls
        self._machine = ClientStartup(tls_offered=tls is not None)
        self.negotiated_at: float | None = None
        """When the client was told another protocol version, or of an unknown option."""

    @property
    def transport(self) -> asyncio.Transport:
        """The client's transport; with TLS if the client has started it."""
        return self._stream.transport

    @property
    def is_gone(self) -> bool:
        """Whether the client has ended its stream, or the connection is lost."""
        return self._stream.gone.done()

    @property
    def awaits_session(self) -> bool:
        """Whether the client has sent its StartupMessage and no answer has been sent."""
        return self._machine.state is ClientState.AWAIT_BACKEND

    def startup_at_hand(self) -> StartupReceived | None:
        """Return the client's StartupMessage if it is here, and one that came before.

        So it is with nearly every client of a pool: nothing is waited for, and nothing sent.
        """
        event = self._machine.receive_known(self._stream.at_hand)
        if event is not None:
            self._stream.take()
        return event

    async def receive_startup(self) -> StartupReceived | CancelReceived | Violated | Disconnected:
        """Return what the client asks for, when it is complete. The caller sets the timeout.

        Raises ssl.SSLError or ConnectionError if TLS fails.
        """
        while True:
            events = await self._next_events()
            for event in events:
                self._stream.write(event.reply)
                match event:
                    # Another event after this one: plaintext came with the request (W3).
                    case EncryptionAnswered(b"S") if event is events[-1]:
                        await self._start_tls(b"")
                    case DirectTLSReceived(hello):
                        await self._start_tls(hello)
                    case VersionNegotiated():
                        self.negotiated_at = asyncio.get_running_loop().time()
                    case StartupReceived() | CancelReceived() | Violated() | Disconnected():
                        return event

    def while_connected(self) -> "_WhileConnected":
        """Run the block; if the client disconnects, cancel it and raise ClientGone."""
        return _WhileConnected(self._stream.gone)

    def refuse(self, error: ErrorResponse) -> None:
        """Send the client the error that ends its connection."""
        self._stream.write(self._machine.refuse(error))

    def welcome(self, upstream: UpstreamSession, key: BackendKeyData | None) -> None:
        """Send the client its welcome: from here on it cannot be refused.

        It is AuthenticationOk, the upstream's ParameterStatus messages, BackendKeyData (`key`,
        which the client cancels with) and ReadyForQuery, in one write.
        """
        self._stream.write(self._machine.accept(upstream.startup.welcome(key)))

    def start_relay(self, relay: Relay, upstream: UpstreamSession) -> None:
        """Pass both connections to the relay, after the welcome."""
        stream = upstream.stream
        # What either side sent early comes after what the other one is sent first.
        if early := upstream.startup.trailing_data() + stream.hand_over(relay.from_upstream):
            relay.from_upstream.data_received(early)
        if early := self._machine.trailing_data() + self._stream.hand_over(relay.from_client):
            relay.from_client.data_received(early)
        if stream.gone.done():
            relay.from_upstream.eof_received()

    async def close(self) -> None:
        """Close the connection after sending what was written."""
        await self._stream.close()

    # -- inside ----------------------------------------------------------------------------------

    async def _next_events(self) -> list[ClientEvent]:
        data = await self._stream.receive()
        return self._machine.receive_data(data) if data else self._machine.receive_eof()

    async def _start_tls(self, hello: bytes) -> None:
        """Start TLS. A client that begins with a ClientHello must select ALPN for it (W5)."""
        assert self._tls is not None
        tls = await self._stream.start_tls(self._tls, server_side=True, first=hello)
        if hello and tls.selected_alpn_protocol() != ALPN_PROTOCOL:
            raise ConnectionError("direct TLS without ALPN")
        self._machine.tls_started()
