"""Random exchanges against a real PostgreSQL: after idle the server says nothing unasked.

The scripted exchanges are written by hand. These are made of the same pieces in any
order, cut anywhere, with answers that arrive at any moment; a failure names its seed. A tracker
that says idle inside an answer would let a drain put a FATAL there (W47). One whose Terminate is
withheld must be reset as a new session is: what was owed would be the next client's (P12).
"""

import asyncio
import random
import socket
from contextlib import suppress
from typing import Final

import pytest

from proxy.wire.messages import Frame, ReadyForQuery
from proxy.wire.session_reset import ResetDone, ResetEvent, SessionReset
from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    COPY_DONE,
    FLUSH,
    SYNC,
    TERMINATE,
    copy_data,
    copy_fail,
    extended,
    message,
    parse,
    query,
    startup,
)
from tests.support.activity_pair import ActivityPair
from tests.support.client import Client, connected
from tests.support.cuts import at_offsets, byte_by_byte

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

LANES: Final = 8
EXCHANGES_A_SEED: Final = 80
PAUSES_SECONDS: Final = (0, 0.001, 0.004, 0.02)
REST_SECONDS: Final = 0.03  # longer than the longest statement
READ_BYTES: Final = (1, 5, 6, 7, 100, 65536)
ASYNCHRONOUS: Final = b"NSA"

# A COPY into `early` fails before it reads any data, one into `nowhere` before it asks for them.
TABLES: Final = query(
    "CREATE TEMP TABLE t (n int, s text); CREATE TEMP TABLE early (n int, s text);"
    "CREATE FUNCTION pg_temp.no() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN RAISE EXCEPTION ''no''; END';"
    "CREATE TRIGGER no BEFORE INSERT ON early FOR EACH STATEMENT EXECUTE FUNCTION pg_temp.no()"
)
SLOW: Final = "SELECT pg_sleep(0.01)"
NO_TRANSACTION: Final = query("SELECT now() = statement_timestamp()")
IS_TRUE: Final = Frame(b"D", b"\0\1\0\0\0\1t")
ROW: Final = copy_data("1\ta\n")
BAD_ROW: Final = copy_data("x\ty\n")
COPY: Final = extended("COPY t FROM STDIN")
EARLY: Final = extended("COPY early FROM STDIN")
ATOMS: Final = (
    *(query(text) for text in ("SELECT 1", "SELEC", "", "BEGIN", "COMMIT", SLOW)),
    *(query(f"COPY {name} FROM STDIN") for name in ("t", "nowhere", "early")),
    query("COPY t FROM STDIN; COPY t FROM STDIN"),
    query("COPY t TO STDOUT"),
    *(extended(text) for text in ("SELECT 1", "SELEC", "COPY t TO STDOUT", SLOW)),
    *(COPY, EARLY, SYNC, SYNC, SYNC, FLUSH, COPY_DONE, copy_fail("x"), ROW, BAD_ROW),
    *(message(kind, b"S\0") for kind in (b"D", b"C")),
    parse("SELECT 1"),
    message(b"F", bytes((0, 0, 0, 1, 0, 0, 0, 0, 0, 0))),
)
GROUPS: Final = (
    (COPY, SYNC),
    (COPY, SYNC, ROW, COPY_DONE, SYNC),
    (COPY, FLUSH),
    (ROW, COPY_DONE, SYNC),
    (ROW, COPY_DONE),
    (ROW, COPY_DONE, query("SELECT 1")),
    (BAD_ROW, COPY_DONE, SYNC),
    (extended("SELECT 1"), SYNC),
    (extended(SLOW), SYNC),
    (parse("SELECT 1"), query(SLOW)),
    (EARLY, SYNC, ROW, COPY_DONE, SYNC),
    (EARLY, SYNC, ROW, COPY_DONE, SYNC, extended(SLOW), SYNC),
    (query("COPY early FROM STDIN"), ROW, COPY_DONE),
    (query("SELECT 1"),),
)


class Follower(Client):
    """A client both of whose directions a tracker follows."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.activity = ActivityPair(walks_ahead=True)
        self.idle_moments = 0
        self.unasked = b""

    async def start(self) -> None:
        """Log in and create the tables."""
        for content in (startup(), TABLES):
            await self.send(content)
            await self.messages_until(ReadyForQuery)

    async def say(self, content: bytes) -> None:
        ahead = self.activity.client_ahead(content)
        with suppress(ConnectionError):  # the server ends a session that it cannot follow
            await self.send(ahead)

    async def leave_and_reset(self) -> bool:
        """Leave, in pieces. Reset a session that can be kept, and return whether it was one."""
        for piece in byte_by_byte(TERMINATE):
            await self.say(piece)
        if not self.activity.withheld:
            return False
        await self.send(NO_TRANSACTION)  # the reset would commit one that was not ended
        assert IS_TRUE in await self.messages_until(ReadyForQuery)
        reset = SessionReset({})
        await self.send(reset.begin())
        events: list[ResetEvent] = []
        while not events:
            events = reset.receive_data(await self.receive_raw())
        assert isinstance(events[0], ResetDone), events
        assert reset.trailing_data() == b""
        return True

    async def follow(self, chance: random.Random) -> None:
        """Read to the end, in reads of any size."""
        with suppress(ConnectionError):
            while received := await self.receive_raw():
                if self.activity.idle and received[:1] not in ASYNCHRONOUS:
                    self.unasked = self.unasked or received
                self.activity.upstream_sent(received)
                self.idle_moments += self.activity.idle
                self.read_bytes = chance.choice(READ_BYTES)


async def exchange(both: DirectAndProxied, seed: str) -> tuple[int, bool]:
    """Follow one random exchange; return how often it was idle, and whether it was kept."""
    chance = random.Random(seed)
    async with connected(Follower, both.cluster.socket_path) as client:
        await client.start()
        following = asyncio.create_task(client.follow(random.Random(f"{seed} read")))
        try:
            for _ in range(chance.randint(2, 14)):
                group = chance.choice(GROUPS) if chance.random() < 0.9 else (chance.choice(ATOMS),)
                content = b"".join(group)
                offsets = chance.sample(range(1, len(content)), k=chance.choice((0, 0, 1, 3)))
                for piece in at_offsets(content, offsets):
                    await client.say(piece)
                    await asyncio.sleep(chance.choice((0, 0, 0.0005)))
                if chance.random() < 0.7:
                    await asyncio.sleep(chance.choice(PAUSES_SECONDS))
            await asyncio.sleep(chance.choice((0, REST_SECONDS, REST_SECONDS)))
        finally:
            following.cancel()
            await asyncio.wait([following])
        kept = await client.leave_and_reset()
    assert client.unasked == b"", f"seed {seed}: idle, and then came {client.unasked!r}"
    return client.idle_moments, kept


@pytest.mark.parametrize("seed", range(LANES))
async def test_p12_nothing_comes_unasked_once_it_was_idle(
    both: DirectAndProxied, seed: int
) -> None:
    idle_moments = kept = 0
    for first in range(0, EXCHANGES_A_SEED, LANES):
        names = [f"{seed}.{number}" for number in range(first, first + LANES)]
        for idle, was_kept in await asyncio.gather(*(exchange(both, name) for name in names)):
            idle_moments, kept = idle_moments + idle, kept + was_kept
    assert idle_moments > 0  # it was not busy for ever throughout
    assert kept > 0
