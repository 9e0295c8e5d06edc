"""A connection while a session starts: bytes wait here for the coroutine that asks for them.

When the session is ready the connection is handed over to the relay's protocols, and this object
is done. The invariant: at most `INBOX_BYTES_MAX` plus one read wait; then reading stops.
"""

import asyncio
import ssl
from typing import TYPE_CHECKING, Final, cast

from proxy.transport.graceful_close import LINGER_SECONDS, close_gracefully
from proxy.transport.sockets import tune
from proxy.transport.tls import TLSTransport

if TYPE_CHECKING:
    from proxy.native.tls import ClientContext

# A session's start is a few KiB each way; more is a client that pipelines its first queries.
INBOX_BYTES_MAX: Final = 64 * 1024


class StartupStream(asyncio.Protocol):
    """One connection. It is the protocol of its transport until `hand_over`.

    `gone` is done as soon as the peer has ended its stream or the connection is lost.
    """

    __slots__ = ("_inbox", "_paused", "_waiting", "gone", "transport")

    transport: asyncio.Transport

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._inbox = bytearray()
        # What waits for bytes. No asyncio.Event: that takes 800 bytes, for a session's whole life.
        self._waiting: asyncio.Future[None] | None = None
        self._paused = False

    # -- the protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connected transport."""
        self.transport = cast(asyncio.Transport, transport)
        tune(transport)

    def data_received(self, data: bytes) -> None:
        """Keep bytes until they are asked for."""
        self._inbox += data
        self._wake()
        if len(self._inbox) > INBOX_BYTES_MAX and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """Take the end of the peer's stream; our own stays open for an answer."""
        self._end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the loss of the connection; its cause is no news to whoever waits for bytes."""
        self._end()

    # -- what the session does with it -----------------------------------------------------------

    async def receive(self) -> bytes:
        """Return what has arrived, at least one byte; empty only when the peer has ended."""
        if not self._inbox and not self.gone.done():
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self._take()

    def write(self, data: bytes) -> None:
        """Send. Does nothing for no bytes, and on a lost connection."""
        if data and not self.transport.is_closing():  # then uvloop's would raise
            self.transport.write(data)

    async def start_tls(
        self,
        context: "ssl.SSLContext | ClientContext",
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        first: bytes = b"",
    ) -> ssl.SSLObject:
        """Put TLS on the connection and return its object; `first` is a hello already read.

        Raises ssl.SSLError or ConnectionError. Plaintext that waits unread at this moment would
        cross into the encrypted stream, so there must be none.
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
        """Return a client's TLS for `switch_to`, its first message computed and not yet sent.

        Raises ValueError for a name that no certificate can have.
        """
        upper = TLSTransport(self.transport, self, context, server_hostname=server_hostname)
        upper.prepare()
        return upper

    async def switch_to(self, upper: TLSTransport, first: bytes = b"") -> ssl.SSLObject:
        """Put prepared TLS on the connection: what `start_tls` does, in two steps."""
        if self._inbox:
            raise ConnectionAbortedError("plaintext left at the switch to TLS")
        if self.gone.done():  # which nobody would tell the handshake again
            raise ConnectionResetError("the peer ended before the TLS handshake")
        await upper.handshake(first)
        self.transport = upper
        return cast(ssl.SSLObject, upper.get_extra_info("ssl_object"))

    def hand_over(self, protocol: asyncio.Protocol) -> bytes:
        """Give the connection to another protocol; return the bytes that wait unread.

        This object receives nothing any more. Release it: a session keeps the transport alone.
        """
        self.transport.set_protocol(protocol)
        return self._take()

    async def close(self) -> None:
        """End the connection so that the peer gets what was written and sees a clean end."""
        linger_seconds = 0.0 if self.gone.done() else LINGER_SECONDS
        await close_gracefully(self.transport, linger_seconds=linger_seconds)

    # -- inside ----------------------------------------------------------------------------------

    def _take(self) -> bytes:
        taken = bytes(self._inbox)
        self._inbox.clear()
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        return taken

    def _end(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
