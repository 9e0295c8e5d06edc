"""A client that goes through an exchange and keeps all that it is answered."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from proxy.wire.messages import Frame
from tests.differential.frontend import OPENING, Exchange, On
from tests.support.client import Address, Client, connected
from tests.support.cuts import Cut, whole
from tests.support.peer import WAIT_SECONDS_MAX
from tests.support.script import Step, play


@dataclass(slots=True)
class Transcript:
    """What came back on one connection: bytes outside frames, frames, an unfinished rest."""

    bare: bytes = b""
    frames: list[Frame] = field(default_factory=list)
    rest: bytes = b""
    ended: bool = False


class ReadingClient(Client):
    """Reads whether it is asked or not, so that no server ever waits for it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.transcript = Transcript()
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()

    async def receive_raw(self) -> bytes:
        """Return bytes that have arrived; none at the end, which remains the end."""
        received = await self._arrived.get()
        if not received:
            self.arrive(b"")
        return received

    def arrive(self, received: bytes) -> None:
        """Take what was read."""
        self._arrived.put_nowait(received)

    async def read(self) -> None:
        """Read up to the end. A server that closes before it has read everything resets."""
        received = b"not the end"
        while received:
            try:
                received = await super().receive_raw()
            except ConnectionError:
                received = b""
            self.arrive(received)

    async def go(self, steps: tuple[Step, ...], cut: Cut) -> None:
        """Go through steps and keep what is answered."""
        transcript = self.transcript
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                script = await play(self, *steps, cut=cut)
        except TimeoutError:
            types = b"".join(frame.type for frame in transcript.frames)
            raise AssertionError(f"{steps} still waits after {types!r}") from None
        transcript.bare += script.bare
        transcript.frames += script.messages
        transcript.rest = script.trailing_data()
        transcript.ended |= script.ended


Reading = TypeVar("Reading", bound=ReadingClient)


@asynccontextmanager
async def reading(kind: type[Reading], address: Address) -> AsyncIterator[Reading]:
    """Connect a client that reads until the block ends."""
    async with connected(kind, address) as client:
        task = asyncio.create_task(client.read())
        try:
            yield client
        finally:
            task.cancel()
            await asyncio.wait((task,))


async def run(
    kind: type[Reading], exchange: Exchange, address: Address, cut: Cut = whole
) -> list[Reading]:
    """Go through an exchange; return its clients, a connection each.

    Connections are opened when a step first names them. All but the first begin with OPENING: on
    the first one the exchange speaks from the first byte on.
    """
    clients: list[Reading] = []
    async with AsyncExitStack() as stack:
        for step in exchange.steps:
            number, steps = (step.connection, step.steps) if isinstance(step, On) else (0, (step,))
            while len(clients) <= number:
                clients.append(await stack.enter_async_context(reading(kind, address)))
                if len(clients) > 1:
                    await clients[-1].go(OPENING, cut)
            await clients[number].go(steps, cut)
    return clients
