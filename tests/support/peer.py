"""The far end of a connection, as a test drives it: bytes, TLS, Postgres messages, and the end.

For: every fake client and every fake server. It is a bare socket, so that nothing is read that was
not asked for, and TLS runs over memory buffers, so that a test decides which bytes travel together
and sees how the other side ended. Every wait has a deadline.
"""

import asyncio
import select
import socket
import ssl
import struct
from contextlib import suppress
from typing import Final

from proxy.emulator.streams import EndedBy
from proxy.wire.messages import BackendMessage, ErrorResponse, Frame, decode_backend
from tests.support.cuts import Cut, whole

# Far more than anything takes on a machine that is busy with something else.
WAIT_SECONDS_MAX: Final = 20.0
READ_BYTES: Final = 256 * 1024
_REFUSED_TIMES: Final = 200
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_RECORD_HEADER_BYTES: Final = 5
_APPLICATION_DATA: Final = 23  # TLS record type
_MESSAGE_HEADER: Final = struct.Struct("!cI")


class Peer:
    """One connection's far end: plain, or TLS after `handshake`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a piece is a segment
        self.sock = sock
        self.tls: ssl.SSLObject | None = None
        self.server_name: str | None = None  # what a handshake as client asks for and checks
        self.read_bytes = READ_BYTES  # how much one read takes at most
        self.sent_bytes = 0
        self.ended_by: EndedBy | None = None
        self.record_bytes: list[int] = []  # lengths of application data records, with overhead
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._held = bytearray()  # received and not taken
        self._records = bytearray()
        self._reading: asyncio.Task[bytes] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def open(self) -> bool:
        """Whether our own end was not closed."""
        return self.sock.fileno() >= 0

    @property
    def stalled(self) -> bool:
        """Whether the kernel takes no more, since the other side does not read."""
        return not select.select([], [self.sock], [], 0)[1]

    @property
    def close_notify(self) -> bool:
        """Whether the other side has ended with close_notify."""
        return self.ended_by is EndedBy.CLOSE_NOTIFY

    # -- sending ---------------------------------------------------------------------------------

    async def send(self, content: bytes, cut: Cut = whole) -> None:
        """Send all of it; encrypted where there is TLS. Wait while the other side does not read."""
        for piece in cut(content):
            await self.send_raw(self.encrypted(piece) if self.tls else piece)

    async def send_raw(self, content: bytes, cut: Cut = whole) -> None:
        """Send bytes as they are, be there TLS or not. Between pieces other tasks may run."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            for piece in cut(content):
                await self._send(piece)
                await asyncio.sleep(0)

    def encrypted(self, content: bytes) -> bytes:
        """Return content as TLS records, after what TLS itself has to say."""
        assert self.tls is not None
        rest = memoryview(content)
        while rest:
            rest = rest[self.tls.write(rest) :]
        return self._outgoing.read()

    # -- receiving -------------------------------------------------------------------------------

    async def receive(self, seconds_max: float | None = WAIT_SECONDS_MAX) -> bytes:
        """Return some bytes, none at the end. Raises TimeoutError when nothing comes."""
        return self._take(len(self._held)) or await self.receive_new(seconds_max)

    async def receive_new(self, seconds_max: float | None = WAIT_SECONDS_MAX) -> bytes:
        """Return bytes that have not been received yet, none at the end."""
        async with asyncio.timeout(seconds_max):
            return await (self.receive_raw() if self.tls is None else self._decrypt(self.tls))

    async def receive_raw(self) -> bytes:
        """Return bytes as the socket has them, be there TLS or not; none at the end.

        One that is cancelled loses nothing: the next one returns what it would have returned.
        """
        if not self.open:
            raise ConnectionAbortedError("closed by the test")
        if self._reading is None:
            read = asyncio.get_running_loop().sock_recv(self.sock, self.read_bytes)
            self._reading = asyncio.ensure_future(read)
        reading = self._reading
        await asyncio.wait((reading,))
        self._reading = None
        try:
            received = reading.result()
        except asyncio.CancelledError:
            raise ConnectionAbortedError("closed by the test") from None
        except OSError:
            self.ended_by = EndedBy.RESET
            raise
        if not received:
            self.ended_by = self.ended_by or EndedBy.FIN
        return received

    async def receive_exactly(self, count: int) -> bytes:
        """Return so many bytes. Raises EOFError when the stream ends before."""
        await self._hold(count)
        return self._take(count)

    async def receive_rest(self) -> bytes:
        """Return everything up to the end."""
        rest = bytearray()
        while received := await self.receive():
            rest += received
        return bytes(rest)

    def receive_now(self) -> bytes:
        """Return what the kernel holds, without a turn of the event loop."""
        received = bytearray()
        with suppress(BlockingIOError):
            while piece := self.sock.recv(READ_BYTES):
                received += piece
        return bytes(received)

    async def message(self) -> BackendMessage | Frame:
        """Return the next message. Raises EOFError at the end."""
        await self._hold(_MESSAGE_HEADER.size)
        kind, length = _MESSAGE_HEADER.unpack_from(self._held)
        await self._hold(1 + length)
        return decode_backend(Frame(kind, self._take(1 + length)[_MESSAGE_HEADER.size :]))

    async def messages_until(self, kind: type) -> list[BackendMessage | Frame]:
        """Return the messages up to and with the first of a kind. Raises EOFError."""
        messages = [await self.message()]
        while not isinstance(messages[-1], kind):
            messages.append(await self.message())
        return messages

    async def error(self) -> ErrorResponse:
        """Return the next ErrorResponse and drop what is before it. Raises EOFError."""
        last = (await self.messages_until(ErrorResponse))[-1]
        assert isinstance(last, ErrorResponse)
        return last

    def unread(self, content: bytes) -> None:
        """Put bytes back, to be received again."""
        self._held[:0] = content

    # -- TLS -------------------------------------------------------------------------------------

    async def handshake(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        cut: Cut = whole,
        tail: bytes = b"",
    ) -> None:
        """Do the TLS handshake; `tail` is sent in the write that ends it."""
        self._incoming.write(self._take(len(self._held)))
        server_name = None if server_side else self.server_name
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side, server_name)
        try:
            while not await self._step(tls, cut):
                pass
            if tail:
                tls.write(tail)
        finally:
            with suppress(OSError):  # an alert, for one that may have left
                await self.send_raw(self._outgoing.read(), cut)
        self.tls = tls

    async def _step(self, tls: ssl.SSLObject, cut: Cut) -> bool:
        """Go on with the handshake; return whether it is over. Raises EOFError."""
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await self.send_raw(self._outgoing.read(), cut)
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                if not await self._feed():
                    raise EOFError("ended during the handshake") from None
            return False
        except ssl.SSLError:
            self.ended_by = EndedBy.TLS_ERROR
            raise
        return True

    # -- the end ---------------------------------------------------------------------------------

    def send_close_notify(self) -> None:
        """Send close_notify and nothing else. It needs room in the kernel's buffer."""
        assert self.tls is not None
        with suppress(ssl.SSLError):  # the other side's need not have come
            self.tls.unwrap()
        self.sock.sendall(self._outgoing.read())

    def end(self) -> None:
        """Send FIN."""
        self.sock.shutdown(socket.SHUT_WR)

    def end_orderly(self) -> None:
        """Send close_notify where there is TLS, and FIN."""
        with suppress(OSError):  # the other side has gone
            if self.tls is not None:
                self.send_close_notify()
            self.end()

    def close(self) -> None:
        """End orderly and receive nothing more."""
        if self.open:
            self.end_orderly()
        self.abort()

    def abort(self) -> None:
        """Drop the connection without close_notify. What is sent or awaited fails."""
        for task in (*self._sending, *([self._reading] if self._reading else [])):
            task.cancel()  # until then the event loop keeps the socket open
        self.sock.close()

    def reset(self) -> None:
        """End with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.abort()

    async def ended(self) -> EndedBy:
        """Drop what comes until the other side ends; return how it did."""
        with suppress(OSError):
            while await self.receive(None):
                pass
        assert self.ended_by is not None
        return self.ended_by

    # --------------------------------------------------------------------------------------------

    async def _send(self, content: bytes) -> None:
        if not self.open:
            raise ConnectionAbortedError("closed by the test")
        write = asyncio.get_running_loop().sock_sendall(self.sock, content)
        sending = asyncio.ensure_future(write)
        self._sending.add(sending)
        try:
            await sending
        except asyncio.CancelledError:
            if self.open:
                raise
            raise ConnectionAbortedError("closed by the test") from None
        finally:
            self._sending.discard(sending)
        self.sent_bytes += len(content)

    async def _hold(self, count: int) -> None:
        """Receive until so many bytes are held. Raises EOFError."""
        while len(self._held) < count:
            received = await self.receive_new()
            if not received:
                raise EOFError(bytes(self._held))
            self._held += received

    def _take(self, count: int) -> bytes:
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken

    async def _decrypt(self, tls: ssl.SSLObject) -> bytes:
        """Return what TLS has, none at the end."""
        while True:
            try:
                received = tls.read(READ_BYTES)
            except ssl.SSLWantReadError:
                if pending := self._outgoing.read():  # the answer to a key update
                    await self.send_raw(pending)
                if not await self._feed():
                    return b""
                continue
            except ssl.SSLZeroReturnError:  # close_notify, once we have sent ours
                received = b""
            except ssl.SSLError:
                self.ended_by = EndedBy.TLS_ERROR
                raise
            if not received:
                self.ended_by = EndedBy.CLOSE_NOTIFY
            return received

    async def _feed(self) -> bool:
        """Move bytes from the socket into the TLS buffer; False at the end."""
        received = await self.receive_raw()
        self._incoming.write(received)
        self._records += received
        while len(self._records) >= _RECORD_HEADER_BYTES:
            length = int.from_bytes(self._records[3:5], "big")
            if len(self._records) < _RECORD_HEADER_BYTES + length:
                break
            if self._records[0] == _APPLICATION_DATA:
                self.record_bytes.append(length)
            del self._records[: _RECORD_HEADER_BYTES + length]
        return bool(received)


def tcp_pair(buffer_bytes: int = 0) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection; `buffer_bytes` bounds what the kernel holds for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.socket()
        for end in (server, far) if buffer_bytes else ():
            bound_buffers(end, buffer_bytes)  # before: a window that was offered is not taken back
        far.connect(server.getsockname())
        near, _ = server.accept()
    return near, far


def bound_buffers(sock: socket.socket, count: int) -> None:
    """Set how many bytes the kernel holds for a socket, in each direction."""
    for name in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, name, count)


async def send_until_stalled(peer: Peer, content: bytes) -> int:
    """Send until nothing is taken any more, however often it is tried; return how much was."""
    sent = refused = 0
    while refused < _REFUSED_TIMES and sent < len(content):
        try:
            sent += peer.sock.send(content[sent : sent + 65536])
            refused = 0
        except BlockingIOError:
            refused += 1
            await asyncio.sleep(0.001)
    return sent
