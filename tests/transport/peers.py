"""A stream under test with its far end, and a protocol that writes down what it is told."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trustme

from proxy import native
from proxy.transport.stream import StartupStream
from tests.support.peer import WAIT_SECONDS_MAX, Peer, tcp_pair

if TYPE_CHECKING:
    from proxy.native.tls import ClientContext

HOST: Final = "db.example.com"


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


@asynccontextmanager
async def linked(buffer_bytes: int = 0) -> AsyncIterator[tuple[StartupStream, Peer]]:
    """Return a stream and the far end of its TCP connection; both are cut at the end."""
    near, far = tcp_pair(buffer_bytes)
    peer = Peer(far)
    peer.server_name = HOST
    _, stream = await asyncio.get_running_loop().create_connection(StartupStream, sock=near)
    try:
        yield stream, peer
    finally:
        peer.abort()
        if not stream.transport.is_closing():
            stream.transport.abort()
        await asyncio.sleep(0)  # both hear of their end while the loop still runs


@asynccontextmanager
async def secured(
    tls: Contexts, *, server_side: bool, protocol: asyncio.Protocol | None = None
) -> AsyncIterator[tuple[StartupStream, Peer]]:
    """Return a stream with TLS up, and its peer. `protocol` takes the place of the stream."""
    async with linked() as (stream, peer):
        async with asyncio.TaskGroup() as group:
            group.create_task(
                peer.handshake(tls.of(server_side=not server_side), server_side=not server_side)
            )
            await start(stream, tls, server_side=server_side)
        if protocol is not None:
            early = stream.hand_over(protocol)
            if early:
                protocol.data_received(early)
        yield stream, peer


async def start(
    stream: StartupStream, tls: Contexts, *, server_side: bool, first: bytes = b""
) -> ssl.SSLObject:
    """Start TLS on the stream."""
    hostname = None if server_side else HOST
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        return await stream.start_tls(
            tls.ours(server_side=server_side),
            server_side=server_side,
            server_hostname=hostname,
            first=first,
        )


def resident_bytes() -> int:
    """Return this process' memory."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - a pseudo file, read often
        return int(statm.read().split()[1]) * 4096
