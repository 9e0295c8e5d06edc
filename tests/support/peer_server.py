"""Fake servers: each connection is a `Peer` that goes through steps or runs a test's own code."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from proxy.emulator.streams import EndedBy
from proxy.wire.messages import AuthenticationCleartextPassword
from proxy.wire.startup import SSLRequest
from tests.support.peer import WAIT_SECONDS_MAX, Peer
from tests.support.script import (
    Expect,
    ExpectMessage,
    ExpectPacket,
    PeerEnded,
    Send,
    StartTLS,
    Step,
    play,
)

_PASSWORD_HEADER_BYTES: Final = 5


class PeerServer:
    """Listens on a port of its own and serves each connection in a task."""

    def __init__(self) -> None:
        self.port = 0
        self.accepted = 0
        self.open = 0
        self.ends: list[EndedBy | None] = []
        self.failures: list[str] = []
        self._changed = asyncio.Condition()
        self._peers: dict[asyncio.Task[None], Peer] = {}

    async def converse(self, peer: Peer) -> None:
        """Send and read what the server has to; afterwards wait for its client to end."""
        raise NotImplementedError

    def accept(self, listening: socket.socket) -> None:
        """Serve the connection that waits."""
        peer = Peer(listening.accept()[0])
        self._peers[asyncio.create_task(self._serve(peer))] = peer

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something is true of what came."""
        async with asyncio.timeout(WAIT_SECONDS_MAX), self._changed:
            await self._changed.wait_for(happened)

    async def until_open(self, count: int) -> None:
        """Wait until so many connections are open."""
        await self.until(lambda: self.open == count)

    async def stop(self) -> None:
        """Cut what is still open."""
        for task in self._peers:
            task.cancel()
        if self._peers:
            await asyncio.wait(self._peers)
        for task, peer in self._peers.items():
            peer.abort()  # a task that was cancelled before it began has not
            if not task.cancelled():
                task.result()
        self._peers.clear()

    async def tell(self) -> None:
        """Wake up those who wait for something to be true."""
        async with self._changed:
            self._changed.notify_all()

    async def _serve(self, peer: Peer) -> None:
        self.accepted += 1
        self.open += 1
        await self.tell()
        try:
            await self.converse(peer)
            if peer.open:
                await peer.ended()
        except (PeerEnded, EOFError, OSError):
            pass  # the client left in the middle, which a test may want; `ends` says how
        except AssertionError as error:
            self.failures.append(str(error))
        except asyncio.CancelledError:
            peer.reset()  # the test is over, or cuts it
        finally:
            peer.abort()
            self.ends.append(peer.ended_by)
            self.open -= 1
            await self.tell()


class ScriptedServer(PeerServer):
    """Goes through the same steps on every connection. `packets` are what the steps have read."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.scripted_most = 0  # connections at once whose script had not come to its end
        self.packets: list[bytes] = []
        self._steps = steps
        self._scripted = 0

    async def until_read(self, count: int) -> None:
        """Wait until so many packets were read."""
        await self.until(lambda: len(self.packets) >= count)

    async def converse(self, peer: Peer) -> None:
        """Go through the steps."""
        self._scripted += 1
        self.scripted_most = max(self._scripted, self.scripted_most)
        try:
            for step in self._steps:
                self.packets += (await play(peer, step)).packets
                await self.tell()
        finally:
            self._scripted -= 1


Server = TypeVar("Server", bound=PeerServer)


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    """Serve while the block runs; then no step may have failed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.port = listening.getsockname()[1]
        asyncio.get_running_loop().add_reader(listening, server.accept, listening)
        try:
            yield server
        finally:
            asyncio.get_running_loop().remove_reader(listening)
            await server.stop()
    assert server.failures == []


@asynccontextmanager
async def scripted(*steps: Step) -> AsyncIterator[ScriptedServer]:
    """Serve the steps while the block runs."""
    async with serving(ScriptedServer(steps)) as server:
        yield server


def tls_opening(context: ssl.SSLContext) -> tuple[Step, ...]:
    """Return the steps of an honest server up to and with the StartupMessage."""
    return (Expect(SSLRequest().encode()), Send(b"S"), StartTLS(context), ExpectPacket())


def password_opening(context: ssl.SSLContext) -> tuple[Step, ...]:
    """Return the steps of an honest server up to and with the token."""
    asked = Send(AuthenticationCleartextPassword().encode())
    return (*tls_opening(context), asked, ExpectMessage(b"p"))


def password_in(packet: bytes) -> bytes:
    """Return what a PasswordMessage holds."""
    assert packet[:1] == b"p"
    return packet[_PASSWORD_HEADER_BYTES:].rstrip(b"\0")
