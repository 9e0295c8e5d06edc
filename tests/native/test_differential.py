"""Sessions at random, through a relay in Python and through lanes: the same bytes, the same end.

What the ending side sent arrives whole; what the other one sent meanwhile arrives in order, as far
as it does. A failure shows its seed: NATIVE_SEED replays it, NATIVE_SESSIONS makes the run long.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import pytest

from proxy.session.end_reason import EndReason
from tests.native.relayed import Relayed, pythons, relayed
from tests.support.peer import Peer
from tests.transport.peers import Contexts

SESSIONS: Final = int(os.environ.get("NATIVE_SESSIONS", "60"))
SIZES: Final = (1, 5, 100, 1000, 16_384, 16_385, 70_000, 300_000, 900_000)
PATTERN: Final = random.Random(0).randbytes(1 << 22)
Receive = Callable[[], Awaitable[bytes]]
Send = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class Script:
    """What both peers do."""

    there: tuple[int, ...]
    back: tuple[int, ...]
    ender: str
    ending: str
    reads_late: tuple[bool, bool]
    """Whether client and upstream read nothing until they have sent everything."""
    small: bool

    @property
    def reasons(self) -> set[EndReason]:
        closed, lost = EndReason.UPSTREAM_CLOSED, EndReason.UPSTREAM_LOST
        if self.ender == "client":
            closed, lost = EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST
        # A kernel reports a reset once: if a write got it, a read sees an end of the stream.
        return {lost, closed} if self.ending == "reset" else {closed}


def script_at_random(rng: random.Random) -> Script:
    return Script(
        there=tuple(rng.choice(SIZES) for _ in range(rng.randrange(0, 6))),
        back=tuple(rng.choice(SIZES) for _ in range(rng.randrange(0, 6))),
        ender=rng.choice(("client", "upstream")),
        ending=rng.choice(("fin", "fin", "close_notify", "reset")),
        # If neither read, neither could end.
        reads_late=rng.choice(((False, False), (True, False), (False, True))),
        small=rng.random() < 0.5,
    )


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
async def test_sessions_at_random_are_the_same_with_lanes_and_without(
    tls: Contexts, encrypted: bool
) -> None:
    first = int(os.environ.get("NATIVE_SEED", random.randrange(1 << 32)))
    for seed in range(first, first + SESSIONS):
        script = script_at_random(random.Random(seed))
        for laned in (False, True):
            contexts = (tls if laned else pythons(tls)) if encrypted else None
            async with (
                asyncio.timeout(30),
                relayed(laned=laned, tls=contexts, small=script.small) as setting,
            ):
                assert len(setting.lanes) == 2 * laned
                end = await played(setting, script)
                assert end in script.reasons, (end, seed, laned, script)
                assert len(setting.lanes) == 0


async def played(setting: Relayed, script: Script) -> EndReason:
    """Play a script, compare both streams, and return why the session ended."""
    there, back = sum(script.there), sum(script.back)
    received = bytearray(), bytearray()
    sent = asyncio.Event(), asyncio.Event()

    async def client_reads() -> None:
        await after(sent[0], script.reads_late[0])
        await read_into(received[0], setting.client.receive)
        setting.client.abort()

    async def upstream_reads() -> None:
        await after(sent[1], script.reads_late[1])
        await read_into(received[1], setting.upstream.receive)
        setting.upstream.abort()

    async def client_sends() -> None:
        await send_all(script.there, setting.client.send)
        if script.ender == "client":
            end(setting.client, script.ending)
        sent[0].set()

    async def upstream_sends() -> None:
        await send_all(script.back, setting.upstream.send)
        if script.ender == "upstream":
            end(setting.upstream, script.ending)
        sent[1].set()

    async with asyncio.TaskGroup() as group:
        for part in (client_reads, upstream_reads, client_sends, upstream_sends):
            group.create_task(part())
        over = await setting.end()
    for stream in received:
        assert bytes(stream) == PATTERN[: len(stream)]
    if script.ending != "reset" and script.ender == "client":
        assert (len(received[1]), over.client_bytes) == (there, there)
    elif script.ending != "reset":
        assert (len(received[0]), over.upstream_bytes) == (back, back)
    return over.reason


async def after(sent: asyncio.Event, reads_late: bool) -> None:
    if reads_late:
        await sent.wait()


def end(peer: Peer, ending: str) -> None:
    if not peer.open:
        return
    if ending == "reset":
        peer.reset()
        return
    if ending == "close_notify" and peer.tls is not None:
        peer.send_close_notify()
    peer.end()


async def read_into(received: bytearray, receive: Receive) -> None:
    with suppress(OSError):  # a reset, or our own socket closed by the script
        while piece := await receive():
            received += piece


async def send_all(sizes: tuple[int, ...], send: Send) -> None:
    """Send pieces of the one pattern, until the other side has ended."""
    at = 0
    with suppress(OSError, TimeoutError):
        for size in sizes:
            await send(PATTERN[at : at + size])
            at += size
