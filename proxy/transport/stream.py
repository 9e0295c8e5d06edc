"""A connection during startup: received bytes wait in it until a coroutine reads them.

When the session is ready the transport gets one of the relay's protocols, and this object is
released. The invariant: at most `INBOX_BYTES_MAX` plus one read wait; then reading stops.
"""

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, cast

from proxy.transport.graceful_close import LINGER_SECONDS, close_gracefully
from proxy.transport.sockets import has_hung_up, set_tcp_options
from proxy.transport.tls import TLSTransport

if TYPE_CHECKING:
    from proxy.native.tls import ClientContext

# A startup is a few KiB each way. More comes from a client that pipelines its first queries.
INBOX_BYTES_MAX: Final = 64 * 1024
# While reading is stopped the peer's end has to be polled for.
PAUSED_POLL_SECONDS: Final = 0.05


class StartupStream(asyncio.Protocol):
    """One connection, the protocol of its transport until `hand_over`.

    `gone` is done when the peer has ended its stream or the connection is lost, even if it is not
    read because too many bytes wait.
    """

    __slots__ = ("_inbox", "_paused", "_poll_timer", "_waiting", "gone", "silent", "transport")

    transport: asyncio.Transport

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._inbox = bytearray()
        # Set while a coroutine waits for bytes. An asyncio.Event would take 800 bytes.
        self._waiting: asyncio.Future[None] | None = None
        self._paused = False
        self._poll_timer: asyncio.TimerHandle | None = None
        self.silent = True
        """Whether the peer has sent nothing yet."""

    # -- the protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the connected transport."""
        self.transport = cast(asyncio.Transport, transport)
        set_tcp_options(transport)

    def data_received(self, data: bytes) -> None:
        """Store bytes until they are read."""
        self.silent = False
        self._inbox += data
        self._wake()
        if len(self._inbox) > INBOX_BYTES_MAX and not self._paused:
            self._paused = True
            self.transport.pause_reading()
            self._schedule_poll()

    def eof_received(self) -> bool:
        """Register the end of the peer's stream; ours stays open for an answer."""
        self._end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Register the loss of the connection. A reader does not need its cause."""
        self._end()

    # -- what the session does with it -----------------------------------------------------------

    async def receive(self) -> bytes:
        """Return what has been received, at least one byte; empty when the peer has ended."""
        if not self._inbox and not self.gone.done():
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self.take()

    @property
    def at_hand(self) -> bytes:
        """The bytes that wait unread."""
        return bytes(self._inbox)

    def take(self) -> bytes:
        """Remove and return the bytes that wait unread."""
        taken = bytes(self._inbox)
        self._inbox.clear()
        if self._paused:
            self._paused = False
            if self._poll_timer is not None:
                self._poll_timer.cancel()
            self.transport.resume_reading()
        return taken

    def unread(self, data: bytes) -> None:
        """Put back bytes that were received and belong to the next reader."""
        self._inbox[:0] = data

    def write(self, data: bytes) -> None:
        """Send. Do nothing for no bytes, and on a lost connection."""
        if data and not self.transport.is_closing():  # where uvloop's transport would raise
            self.transport.write(data)

    async def start_tls(
        self,
        context: "ssl.SSLContext | ClientContext",
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        first: bytes = b"",
    ) -> ssl.SSLObject:
        """Start TLS on the connection; `first` is a ClientHello that was read already.

        Raises ssl.SSLError or ConnectionError. No plaintext may wait unread at this moment: it
        would be taken for encrypted data.
        """
        upper = TLSTransport(
            self.transport,
            self,
            context,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        return await self.switch_to(upper, first)

    def prepare_tls(
        self, context: "ssl.SSLContext | ClientContext", server_hostname: str
    ) -> TLSTransport:
        """Return TLS for `switch_to`, with its ClientHello computed and not sent.

        Raises ValueError for a name that no certificate can have.
        """
        upper = TLSTransport(self.transport, self, context, server_hostname=server_hostname)
        upper.prepare()
        return upper

    async def switch_to(self, upper: TLSTransport, first: bytes = b"") -> ssl.SSLObject:
        """Start TLS that was prepared: `prepare_tls` and this are `start_tls` in two steps."""
        if self._inbox:
            raise ConnectionAbortedError("plaintext left at the switch to TLS")
        if self.gone.done():  # the handshake would not hear of it
            raise ConnectionResetError("the peer ended before the TLS handshake")
        await upper.handshake(first)
        self.transport = upper
        return cast(ssl.SSLObject, upper.get_extra_info("ssl_object"))

    def hand_over(self, protocol: asyncio.Protocol) -> bytes:
        """Pass the connection to another protocol. Return the bytes that wait unread.

        This object receives nothing from now on. Release it: a session needs the transport only.
        """
        self.transport.set_protocol(protocol)
        return self.take()

    async def close(self) -> None:
        """Close the connection after sending what was written."""
        linger_seconds = 0.0 if self.gone.done() else LINGER_SECONDS
        await close_gracefully(self.transport, linger_seconds=linger_seconds)

    # -- inside ----------------------------------------------------------------------------------

    def _schedule_poll(self) -> None:
        loop = asyncio.get_running_loop()
        self._poll_timer = loop.call_later(PAUSED_POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        if self.transport.is_closing() or has_hung_up(self.transport):
            self._end()
        elif not self.gone.done():
            self._schedule_poll()

    def _end(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
