"""Clients that leave at random, through a relay in Python and through lanes: one verdict.

What goes upstream is the same, too, to the byte, and a model of PostgreSQL that reads it owes
nothing where the upstream is kept. A failure shows its seed: NATIVE_SEED replays it,
NATIVE_SESSIONS makes the run long.
"""

import asyncio
import os
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import pytest

from proxy.pool.pool_counts import RetireReason
from proxy.session.relay import Relay
from tests.native.relayed import Relayed, pythons, relayed
from tests.property.test_terminate import ATOMS
from tests.support.cuts import at_offsets
from tests.support.model_upstream import ModelUpstream
from tests.support.peer import Peer
from tests.support.running import eventually
from tests.transport.peers import Contexts
from tests.wire.driving import TERMINATE

SESSIONS: Final = int(os.environ.get("NATIVE_SESSIONS", "60"))
ENDINGS: Final = {
    "terminate": TERMINATE,
    "more": TERMINATE + b"Q\0\0\0\x07ok\0",
    "cut": TERMINATE[:3],
    "end": b"",
    "reset": b"",
}


@dataclass(frozen=True)
class Script:
    """What a client does."""

    writes: tuple[bytes, ...]
    answered: frozenset[int]
    """The writes after which the client reads all that it is answered."""
    terminate_at: int | None
    """Where the stream has a Terminate, or its first bytes."""
    ending: str


@dataclass(frozen=True)
class Verdict:
    """How the session ended, and what its upstream was sent."""

    kept: bool
    retired: RetireReason | None
    sent_upstream: bytes


def script_at_random(rng: random.Random) -> Script:
    atoms = rng.choices(ATOMS, k=rng.randrange(0, 5))
    content, whole = b"".join(atoms), not atoms or rng.random() < 0.8
    if not whole:  # what follows is content of a message, as far as it is not finished
        content = content[: len(content) - rng.randrange(1, 5)]
    offsets = rng.sample(range(len(content) + 1), k=min(rng.randrange(6), len(content)))
    writes = [piece for piece in at_offsets(content, offsets) if piece]
    answered = {number for number in range(len(writes)) if rng.random() < 0.7}
    if rng.random() < 0.6:
        answered.add(len(writes) - 1)
    ending = rng.choice(tuple(ENDINGS))
    if rng.random() < 0.3 and writes:
        writes[-1] += ENDINGS[ending]
    elif ENDINGS[ending]:
        writes.append(ENDINGS[ending])
    at = len(content) if ENDINGS[ending] and whole else None
    return Script(tuple(writes), frozenset(answered), at, ending)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
async def test_p12_to_p15_clients_at_random_leave_the_same_with_lanes_and_without(
    tls: Contexts, encrypted: bool
) -> None:
    first = int(os.environ.get("NATIVE_SEED", random.randrange(1 << 32)))
    kept = 0
    for seed in range(first, first + SESSIONS):
        script = script_at_random(random.Random(seed))
        verdicts = []
        for laned in (False, True):
            print(f"seed {seed}, {laned=}: {script}")  # noqa: T201 - shown where it fails
            contexts = (tls if laned else pythons(tls)) if encrypted else None
            async with (
                asyncio.timeout(30),
                relayed(laned=laned, tls=contexts, keeps_upstream=True) as setting,
            ):
                verdicts.append(await played(setting, script))
        assert verdicts[0] == verdicts[1]
        kept += verdicts[0].kept
    assert "NATIVE_SEED" in os.environ or 0 < kept < SESSIONS


async def played(setting: Relayed, script: Script) -> Verdict:
    """Play a script. Return the verdict, which the model of the upstream must agree to."""
    upstream, sent = ModelUpstream(), 0
    for number, written in enumerate(script.writes):
        sent += len(written)
        await setting.client.send(written)
        await eventually(partial(has_read, setting.relay, sent), "it is read")
        passed = sent
        if script.terminate_at is not None and sent > script.terminate_at:
            is_cut = sent < script.terminate_at + len(TERMINATE)
            passed = script.terminate_at if setting.relay.over or is_cut else sent
        upstream.receive(await setting.upstream.receive_exactly(passed - len(upstream.received)))
        if setting.relay.over:
            break
        if number in script.answered:
            await answer(setting, upstream)
    if not setting.relay.over:
        await leave(setting, script, upstream)
    return await verdict(setting, upstream)


def has_read(relay: Relay, count: int) -> bool:
    return relay.over or relay.from_client.received_bytes == count


async def answer(setting: Relayed, upstream: ModelUpstream) -> None:
    """Send the client what the model has said."""
    said = upstream.take(1 << 30)
    await setting.upstream.send(said)
    assert await setting.client.receive_exactly(len(said)) == said


async def leave(setting: Relayed, script: Script, upstream: ModelUpstream) -> None:
    """End the session from the side that ends it."""
    if upstream.ended:
        await answer(setting, upstream)
        setting.upstream.end_orderly()
        assert await setting.client.receive_rest() == b""
        setting.client.close()  # else its end is waited for
    elif script.ending == "reset":
        setting.client.reset()
    else:
        setting.client.end()


async def verdict(setting: Relayed, upstream: ModelUpstream) -> Verdict:
    """Wait for the end, and return how it was. Nothing more may have gone upstream."""
    rest = asyncio.create_task(rest_of(setting.upstream))
    await asyncio.wait((rest, setting.running), return_when=asyncio.FIRST_COMPLETED)
    if rest.done():
        setting.upstream.close()
    end = await setting.end()
    if end.kept:
        assert upstream.quiet
        setting.upstream_transport.write(b"next")
        setting.upstream_transport.close()
        assert await rest == b"next"
    else:
        assert await rest == b""
    setting.client.abort()
    setting.upstream.abort()
    return Verdict(end.kept, end.retired, bytes(upstream.received))


async def rest_of(peer: Peer) -> bytes:
    """Return all that is received until the stream ends."""
    received = bytearray()
    with suppress(ConnectionError):
        while piece := await peer.receive(None):
            received += piece
    return bytes(received)
