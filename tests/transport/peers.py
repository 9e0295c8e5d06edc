"""The other end of a connection under test, and a protocol that writes down what it is told.

The peer's TLS runs over memory buffers here, so that a test decides which bytes travel together.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trustme

from proxy import native
from proxy.transport.stream import StartupStream

if TYPE_CHECKING:
    from proxy.native.tls import ClientContext

HOST: Final = "db.example.com"
WAIT_SECONDS_MAX: Final = 5.0
READ_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Contexts:
    """A server's TLS context for HOST, and a client's that trusts it."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    authority: trustme.CA
    compiled: "ClientContext | None" = None
    """The client's for the compiled TLS, if that is under test."""

    def of(self, *, server_side: bool) -> ssl.SSLContext:
        return self.server if server_side else self.client

    def ours(self, *, server_side: bool) -> "ssl.SSLContext | ClientContext":
        """Return that of the end under test."""
        return (
            self.of(server_side=server_side) if server_side or not self.compiled else self.compiled
        )


def contexts(*, compiled: bool = False) -> Contexts:
    """Make an authority and its contexts."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    if not compiled:
        return Contexts(server, client, authority)
    with authority.cert_pem.tempfile() as cafile:
        own = native.tls.ClientContext(client, cafile)
    return Contexts(server, client, authority, own)


class Notes(asyncio.Protocol):
    """Keeps everything; `until` waits for something to be true of it."""

    def __init__(self, *, keep_open: bool = True) -> None:
        self.received = bytearray()
        self.told: list[str] = []  # data, eof, lost, pause, resume; data once in a row
        self.error: Exception | None = None
        self._keep_open = keep_open
        self._changed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.told[-1:] != ["data"]:
            self._tell("data")
        self._changed.set()

    def eof_received(self) -> bool:
        self._tell("eof")
        return self._keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self._tell("lost")

    def pause_writing(self) -> None:
        self._tell("pause")

    def resume_writing(self) -> None:
        self._tell("resume")

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not happened():
                self._changed.clear()
                await self._changed.wait()

    async def until_told(self, word: str) -> None:
        await self.until(lambda: word in self.told)

    async def until_received(self, count: int) -> None:
        await self.until(lambda: len(self.received) >= count)

    async def until_more(self) -> None:
        """Wait for more bytes, or for the end."""
        taken = len(self.received)
        await self.until(lambda: len(self.received) > taken or "eof" in self.told)

    def _tell(self, word: str) -> None:
        self.told.append(word)
        self._changed.set()


class Peer:
    """The far end: plain, or TLS after `handshake`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.close_notify = False
        self.fin = False
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls: ssl.SSLObject | None = None

    def start(self, context: ssl.SSLContext, *, server_side: bool) -> ssl.SSLObject:
        """Prepare TLS without sending anything."""
        hostname = None if server_side else HOST
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side, hostname)
        return self.tls

    async def handshake(
        self, context: ssl.SSLContext, *, server_side: bool, split: bool = False, tail: bytes = b""
    ) -> None:
        """Shake hands; `split` sends byte by byte, `tail` is sent in the last flight's write."""
        tls = self.start(context, server_side=server_side)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self.flush(split=split)
                    assert await self.feed(), "ended during the handshake"
            if tail:
                tls.write(tail)
            await self.flush(split=split)

    async def flush(self, *, split: bool = False) -> None:
        """Send what TLS has produced."""
        content = self.outgoing.read()
        if not split:
            self.writer.write(content)
        for index in range(len(content) if split else 0):
            self.writer.write(content[index : index + 1])
            await asyncio.sleep(0)
        await self.writer.drain()

    async def feed(self) -> bool:
        """Read ciphertext; False at the end."""
        content = await self.reader.read(READ_BYTES)
        self.incoming.write(content)
        return bool(content)

    def encrypted(self, content: bytes) -> bytes:
        """Return content as TLS records."""
        assert self.tls is not None
        rest = memoryview(content)
        while rest:
            rest = rest[self.tls.write(rest) :]
        return self.outgoing.read()

    async def send(self, content: bytes) -> None:
        """Send, and wait until the transport's buffer has room."""
        self.writer.write(self.encrypted(content) if self.tls else content)
        await self.writer.drain()

    async def receive(self) -> bytes:
        """Return what comes next; empty at the end, which `close_notify` and `fin` tell apart."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while True:
                if self.tls is None:
                    content = await self.reader.read(READ_BYTES)
                    self.fin = not content
                    return content
                try:
                    content = self.tls.read(READ_BYTES)
                    self.close_notify = not content
                    return content
                except ssl.SSLWantReadError:
                    if not await self.feed():
                        self.fin = True
                        return b""
                except ssl.SSLZeroReturnError:
                    self.close_notify = True
                    return b""

    async def receive_exactly(self, count: int) -> bytes:
        """Return so many bytes."""
        content = bytearray()
        while len(content) < count:
            piece = await self.receive()
            assert piece, f"ended after {len(content)} bytes"
            content += piece
        assert len(content) == count
        return bytes(content)

    async def receive_all(self) -> bytes:
        """Return everything up to the end."""
        content = bytearray()
        while piece := await self.receive():
            content += piece
        return bytes(content)

    async def until_fin(self) -> None:
        """Wait for the end of the plain stream."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while await self.reader.read(READ_BYTES):
                pass
        self.fin = True

    def say_close_notify(self) -> None:
        """Send close_notify and nothing else."""
        assert self.tls is not None
        with suppress(ssl.SSLError):  # the other side's need not have come
            self.tls.unwrap()
        self.writer.write(self.outgoing.read())

    def end(self) -> None:
        """Send FIN."""
        self.writer.write_eof()

    def reset(self) -> None:
        """Send RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[StartupStream, Peer]]:
    """Give a Link and the other end of its TCP connection; both are cut at the end."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Peer] = loop.create_future()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(Peer(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, link = await loop.create_connection(StartupStream, "127.0.0.1", port)
    peer = await accepted
    server.close()
    try:
        yield link, peer
    finally:
        peer.writer.transport.abort()
        if not link.transport.is_closing():
            link.transport.abort()
        await asyncio.sleep(0)  # both hear of their end while the loop still runs


@asynccontextmanager
async def secured(
    tls: Contexts, *, server_side: bool, protocol: asyncio.Protocol | None = None
) -> AsyncIterator[tuple[StartupStream, Peer]]:
    """Give a Link with TLS up, and its peer. `protocol` takes the Link's place."""
    async with linked() as (link, peer):
        async with asyncio.TaskGroup() as group:
            group.create_task(
                peer.handshake(tls.of(server_side=not server_side), server_side=not server_side)
            )
            await start(link, tls, server_side=server_side)
        if protocol is not None:
            early = link.hand_over(protocol)
            if early:
                protocol.data_received(early)
        yield link, peer


async def start(
    link: StartupStream, tls: Contexts, *, server_side: bool, first: bytes = b""
) -> ssl.SSLObject:
    """Put TLS on the Link."""
    hostname = None if server_side else HOST
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        return await link.start_tls(
            tls.ours(server_side=server_side),
            server_side=server_side,
            server_hostname=hostname,
            first=first,
        )


def resident_bytes() -> int:
    """Return this process' memory."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - a pseudo file, read often
        return int(statm.read().split()[1]) * 4096
