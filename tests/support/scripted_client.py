"""A client that does what a script says, byte for byte, and keeps all that it is answered.

For: the same bytes sent to two servers, and what came back from each. Not for: understanding the
answers; it looks at message types only, to know when the next step may be sent.

Invariant: no step waits longer than WAIT_SECONDS_MAX, and every connection is gone afterwards.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from struct import Struct
from typing import Final, cast

from proxy.wire.messages import Frame

WAIT_SECONDS_MAX: Final = 20.0
_LENGTH: Final = Struct("!I")
_HEADER_BYTES: Final = 5

Connect = Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]
Cut = Callable[[bytes], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Step:
    """Send bytes on one connection, then wait.

    `wait` names the types of the messages that must arrive before the step is over, a letter as
    often as it must come; `ends` waits for the server's end of the stream instead, and `bare` for
    so many bytes without a frame, as SSLRequest is answered with one. The end of the stream ends
    every wait.
    """

    content: bytes
    wait: bytes = b"Z"
    ends: bool = False
    bare: int = 0
    on: int = 0


@dataclass(slots=True)
class Transcript:
    """What came back on one connection: bytes outside frames, frames, an unfinished rest."""

    bare: bytes = b""
    frames: list[Frame] = field(default_factory=list)
    rest: bytes = b""
    ended: bool = False


def whole(content: bytes) -> Iterator[bytes]:
    """Send in one piece."""
    yield content


def byte_by_byte(content: bytes) -> Iterator[bytes]:
    """Send in pieces of one byte."""
    for index in range(len(content)):
        yield content[index : index + 1]


def at_random(seed: str, bytes_max: int = 11) -> Cut:
    """Send in pieces of 1 to `bytes_max` bytes; a seed gives the same pieces again."""
    # Seeded, and nobody's secret depends on it.
    chance = random.Random(seed)

    def cut(content: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(content):
            size = chance.randint(1, bytes_max)
            yield content[position : position + size]
            position += size

    return cut


async def run_script(
    connect: Connect, steps: Sequence[Step], opening: Step, cut: Cut = whole
) -> tuple[Transcript, ...]:
    """Return what the server said, a transcript a connection.

    Connections are opened when a step first names them, with `opening` unless that is the first
    connection: there the script speaks from the first byte on.
    """
    clients: list[_Client] = []
    try:
        for step in steps:
            while len(clients) <= step.on:
                client = _Client()
                await connect(partial(_itself, client))
                clients.append(client)
                if len(clients) > 1:
                    await clients[-1].run(opening, cut)
            await clients[step.on].run(step, cut)
    finally:
        for client in clients:
            client.abort()
    return tuple(client.transcript for client in clients)


class _Client(asyncio.Protocol):
    """One connection. A protocol, since a StreamReader drops what it holds when a write fails."""

    def __init__(self) -> None:
        self.transcript = Transcript()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._changed = asyncio.Event()
        self._buffer = bytearray()
        self._gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own are no subclasses

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._changed.set()

    def eof_received(self) -> None:
        self._gone = True
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        # With or without an error: a server that closes before it has read all resets.
        self._gone = True
        self._changed.set()

    def abort(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    async def run(self, step: Step, cut: Cut) -> None:
        transcript = self.transcript
        begun = len(transcript.frames)
        bare = len(transcript.bare) + step.bare
        wanted = Counter(step.wait)
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                await self._send(step.content, cut)
                while len(transcript.bare) < bare and await self._receive(bare):
                    pass
                while step.ends or (not step.bare and not _has(transcript.frames[begun:], wanted)):
                    if not await self._receive(bare):
                        break
        except TimeoutError:
            types = b"".join(frame.type for frame in transcript.frames)
            raise AssertionError(f"{step} still waits after {types!r}") from None

    async def _send(self, content: bytes, cut: Cut) -> None:
        assert self._transport is not None
        for piece in cut(content):
            if self._transport.is_closing():
                return
            self._transport.write(piece)
            await asyncio.sleep(0)  # the other side, which shares the loop, may read this much

    async def _receive(self, bare: int) -> bool:
        """Take what there is; False at the end of the stream."""
        while not self._received and not self._gone:
            self._changed.clear()
            await self._changed.wait()
        transcript, received = self.transcript, bytes(self._received)
        self._received.clear()
        self._buffer += received
        missing = bare - len(transcript.bare)
        transcript.bare += self._buffer[:missing]
        del self._buffer[:missing]
        transcript.frames += _taken(self._buffer)
        transcript.rest = bytes(self._buffer)
        transcript.ended = not received
        return bool(received)


def _itself(client: "_Client") -> "_Client":
    return client


def _has(frames: Sequence[Frame], wanted: Counter[int]) -> bool:
    return wanted <= Counter(frame.type[0] for frame in frames)


def _taken(buffer: bytearray) -> list[Frame]:
    """Take the whole messages out of the buffer."""
    frames, position = [], 0
    while len(buffer) - position >= _HEADER_BYTES:
        (length,) = _LENGTH.unpack_from(buffer, position + 1)
        end = position + 1 + max(length, 4)
        if end > len(buffer):
            break
        payload = bytes(buffer[position + _HEADER_BYTES : end])
        frames.append(Frame(bytes(buffer[position : position + 1]), payload))
        position = end
    del buffer[:position]
    return frames
