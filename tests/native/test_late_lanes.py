"""Lanes that are opened in the middle of a session: nothing is lost, twice or out of order."""

import asyncio
import os
import random

import pytest

from proxy.session.session import READS_BEFORE_LANES
from tests.native.relayed import Relayed, pythons, relayed
from tests.native.test_kept_sessions import SESSIONS, played, script_at_random
from tests.support.running import eventually
from tests.transport.peers import Contexts
from tests.wire.driving import TERMINATE, message

QUERY = message(b"Q", b"SELECT 1\0")
ANSWER = message(b"D", b"\0\1\0\0\0\1x") + message(b"Z", b"I")
BULK_BYTES = 4 * 1024 * 1024  # more than the buffers of both ends


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
async def test_p12_to_p15_clients_at_random_leave_the_same_when_lanes_open_late(
    tls: Contexts, encrypted: bool
) -> None:
    first = int(os.environ.get("NATIVE_SEED", random.randrange(1 << 32)))
    for seed in range(first, first + SESSIONS):
        script = script_at_random(random.Random(seed))
        verdicts = []
        for reads in (0, 1 + seed % 4):  # 0 stands for a relay in Python alone
            print(f"seed {seed}, {reads=}: {script}")  # noqa: T201 - shown where it fails
            contexts = (tls if reads else pythons(tls)) if encrypted else None
            async with (
                asyncio.timeout(30),
                relayed(
                    laned=reads > 0, tls=contexts, keeps_upstream=True, reads_before_lanes=reads
                ) as setting,
            ):
                verdicts.append(await played(setting, script))
        assert verdicts[0] == verdicts[1]


async def ask(setting: Relayed) -> None:
    await setting.client.send(QUERY)
    assert await setting.upstream.receive_exactly(len(QUERY)) == QUERY
    await setting.upstream.send(ANSWER)
    assert await setting.client.receive_exactly(len(ANSWER)) == ANSWER


async def test_a_session_of_one_query_has_no_lanes_and_a_longer_one_has(tls: Contexts) -> None:
    for asked in (1, 2):
        async with relayed(
            tls=tls, keeps_upstream=True, reads_before_lanes=READS_BEFORE_LANES
        ) as setting:
            for _ in range(asked):
                await ask(setting)
            assert len(setting.lanes) == (0 if asked == 1 else 2)
            await setting.client.send(TERMINATE)
            end = await setting.end()
            assert end.kept
            assert end.client_bytes == asked * len(QUERY) + len(TERMINATE)
            assert len(setting.lanes) == 0
            setting.client.close()
            setting.upstream_transport.abort()


async def test_lanes_that_open_within_a_bulk_keep_its_order(tls: Contexts) -> None:
    bulk = random.Random(1).randbytes(BULK_BYTES)
    rows = message(b"d", bulk) + message(b"Z", b"I")
    data = message(b"d", bulk)
    async with relayed(tls=tls, keeps_upstream=True, reads_before_lanes=2) as setting:
        await setting.client.send(QUERY)
        assert await setting.upstream.receive_exactly(len(QUERY)) == QUERY
        sending = asyncio.create_task(setting.upstream.send(rows))
        # The client reads nothing yet: it is full when the lanes open.
        await eventually(lambda: len(setting.lanes) > 0, "its lanes are open")
        assert await setting.client.receive_exactly(len(rows)) == rows
        await sending
        sending = asyncio.create_task(setting.client.send(data))
        assert await setting.upstream.receive_exactly(len(data)) == data
        await sending


async def test_a_drain_that_begins_before_the_lanes_open_has_none(tls: Contexts) -> None:
    read: list[None] = []
    async with relayed(tls=tls, keeps_upstream=True, reads_before_lanes=1) as setting:
        setting.relay.follow_reads(lambda: read.append(None))
        await ask(setting)
        assert (len(read), len(setting.lanes)) == (2, 0)


async def test_a_drain_that_begins_in_the_moment_in_which_lanes_open_has_none(
    tls: Contexts,
) -> None:
    async with relayed(tls=tls, keeps_upstream=True, reads_before_lanes=1) as setting:
        setting.relay.from_client.data_received(QUERY)  # they open with the next turn of the loop
        setting.relay.follow_reads(lambda: None)
        assert await setting.upstream.receive_exactly(len(QUERY)) == QUERY
        assert len(setting.lanes) == 0
