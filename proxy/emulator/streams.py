"""One connection of the gateway as a byte stream, first plain, then TLS, that records its end.

TLS uses memory buffers instead of the event loop's TLS, because the gateway must choose record
sizes, stop in the middle of a handshake, and distinguish a close_notify from a bare FIN.

Invariant: memory is bounded. `write` waits for the peer to read, and bytes are read only when the
caller requests them.
"""

import asyncio
import contextlib
import socket
import ssl
from enum import Enum
from struct import Struct
from typing import Final

# The size of the TLS records that Lakebase's front end sends to the client.
RECORD_BYTES_MAX: Final = 8192
# One read of the relay. A session holds this per direction, and asyncio's buffer of twice the size.
READ_BYTES_MAX: Final = 64 * 1024
# What a peer may send while its bytes are not processed: while a compute wakes, or a fault hangs.
HELD_BYTES_MAX: Final = 1024 * 1024

# How long sending the last bytes may take if the peer does not read.
RELEASE_SECONDS_MAX: Final = 1.0

_LINGER_NOTHING: Final = Struct("ii").pack(1, 0)  # close sends RST


class EndedBy(Enum):
    """How the peer ended its stream."""

    CLOSE_NOTIFY = "close_notify"
    FIN = "fin"
    RESET = "reset"
    TLS_ERROR = "tls_error"


class StreamEnded(Exception):
    """The peer ended its stream while more was expected; `Stream.ended_by` says how."""


class _NamedSslObject(ssl.SSLObject):
    """A server-side TLS object that records the client's SNI."""

    sni: str | None = None


class Stream:
    """Reads and writes one accepted connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended_by: EndedBy | None = None
        self.sni: str | None = None
        self._reader = reader
        self._writer = writer
        self._held = bytearray()
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()

    @property
    def secure(self) -> bool:
        """Whether TLS is established."""
        return self._tls is not None

    @property
    def held_bytes(self) -> int:
        """The number of bytes that were received and not yet returned."""
        return len(self._held)

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Run the server's side of the handshake. Raises StreamEnded."""
        context.sslobject_class = _NamedSslObject
        context.sni_callback = _record_server_name
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                if not await self._feed():
                    raise StreamEnded from None
            except ssl.SSLError as error:
                self._flush()  # the alert
                self.ended_by = EndedBy.TLS_ERROR
                raise StreamEnded from error
        self._flush()
        assert isinstance(tls, _NamedSslObject)
        self._tls, self.sni = tls, tls.sni

    async def read(self) -> bytes:
        """Return received bytes, at most READ_BYTES_MAX per read, or b"" after the peer's end."""
        if self._held:
            held = bytes(self._held)
            self._held.clear()
            return held
        return await self._receive()

    async def read_exactly(self, count: int) -> bytes:
        """Return exactly this many bytes and hold the rest. Raises StreamEnded."""
        while len(self._held) < count:
            received = await self._receive()
            if not received:
                raise StreamEnded
            self._held += received
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken

    async def wait_for_end(self) -> None:
        """Wait until the peer ends its stream; hold what it sends, at most HELD_BYTES_MAX."""
        while len(self._held) < HELD_BYTES_MAX:
            received = await self._receive()
            if not received:
                return
            self._held += received
        await asyncio.get_running_loop().create_future()

    async def write(self, content: bytes) -> None:
        """Send, in TLS records of RECORD_BYTES_MAX, and wait while the peer does not read.

        Bytes for a peer that has ended are discarded, as a socket does.
        """
        if self._tls is None:
            self._send(content)
        else:
            view = memoryview(content)
            with contextlib.suppress(ssl.SSLError):  # the peer broke TLS; `read` records it
                for start in range(0, len(view), RECORD_BYTES_MAX):
                    self._tls.write(view[start : start + RECORD_BYTES_MAX])
            self._flush()
        try:
            await self._writer.drain()
        except OSError:
            self.ended_by = self.ended_by or EndedBy.RESET

    async def finish(self, seconds_max: float) -> None:
        """End cleanly: close_notify if there is TLS, then FIN; wait for the peer's end."""
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):  # raised as the peer's has not come yet
                self._tls.unwrap()
            self._flush()
        self._send_fin()
        await self.linger(seconds_max)

    async def finish_bare(self, seconds_max: float) -> None:
        """End with a FIN, without close_notify; wait for the peer's end."""
        self._send_fin()
        await self.linger(seconds_max)

    async def linger(self, seconds_max: float | None) -> None:
        """Read and discard until the peer ends, for at most `seconds_max` if there is a bound."""
        try:
            async with asyncio.timeout(seconds_max):
                while await self.read():
                    pass
        except TimeoutError:
            pass

    def reset(self) -> None:
        """End with RST."""
        if not self._writer.transport.is_closing():
            connection = self._writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # some systems refuse it after a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOTHING)
        self._writer.transport.abort()

    async def release(self) -> None:
        """Close the socket; wait up to RELEASE_SECONDS_MAX for the write buffer to be sent."""
        try:
            self._writer.close()
            async with asyncio.timeout(RELEASE_SECONDS_MAX):
                await self._writer.wait_closed()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._writer.transport.abort()

    def _send_fin(self) -> None:
        """Send FIN, unless the peer has reset the connection, which the kernel may know first."""
        if not self._writer.transport.is_closing():
            with contextlib.suppress(OSError):
                self._writer.write_eof()

    async def _receive(self) -> bytes:
        if self.ended_by is not None:
            return b""
        while True:
            try:
                if self._tls is not None:
                    received = self._tls.read(READ_BYTES_MAX)
                    if not received:
                        self.ended_by = EndedBy.CLOSE_NOTIFY
                    return received
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLZeroReturnError:  # a close_notify after ours was sent
                self.ended_by = EndedBy.CLOSE_NOTIFY
                return b""
            except ssl.SSLError:
                self.ended_by = EndedBy.TLS_ERROR
                return b""
            if not await self._feed():
                return b""
            if self._tls is None:
                return self._incoming.read()

    async def _feed(self) -> bool:
        """Move bytes from the socket to the TLS buffer. Return False if the peer has ended."""
        try:
            received = await self._reader.read(READ_BYTES_MAX)
        except OSError:
            self.ended_by = EndedBy.RESET
            return False
        if not received:
            self.ended_by = EndedBy.FIN
            return False
        self._incoming.write(received)
        return True

    def _flush(self) -> None:
        self._send(self._outgoing.read())

    def _send(self, content: bytes) -> None:
        if content and not self._writer.transport.is_closing():  # where uvloop's would raise
            self._writer.write(content)


def _record_server_name(tls: object, name: str | None, context: ssl.SSLContext) -> None:
    assert isinstance(tls, _NamedSslObject)
    tls.sni = name
