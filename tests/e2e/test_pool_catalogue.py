"""A pool in front of shards that admit each session: every take is admitted anew (P33)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.support.catalogue import Stores
from tests.support.operator import Operator, Placed
from tests.support.pooling import (
    both_relays,
    count,
    pooling,
    retired,
    settled,
    taken,
    visit,
    visitor,
)
from tests.support.running import WAIT_SECONDS_MAX, eventually
from tests.support.sidecars import Start, started_sidecars

FIRST: Final = "app@5"
OTHER: Final = "app@25"


@pytest_asyncio.fixture
async def start(stores: Stores) -> AsyncIterator[Start]:
    """Return a function that starts a sidecar; keyword arguments are of [catalogue]."""
    async with started_sidecars(stores) as started:
        yield started


async def registered(operator: Operator, name: str = "one") -> dict[str, Any]:
    """Return the mapping of each backend that is registered in a shard."""
    return {str(row["pid"]): row["mapping_id"] for row in await operator.registered(name)}


@both_relays
async def test_p33_each_take_is_admitted_and_registered_for_its_own_client(
    start: Start, operator: Operator, placed: Placed, *, accelerated: bool
) -> None:
    other = await operator.add("20", "30", "one")
    app = await start(**pooling(accelerated=accelerated))
    pid = await visit(app, database=FIRST)
    await settled(app, idle=1)
    assert await registered(operator) == {pid: placed.mapping_id}
    for database, mapping in ((OTHER, other), (FIRST, placed), (FIRST, placed)):
        async with visitor(app) as client:
            assert await client.enter(database=database) == pid
            assert await registered(operator) == {pid: mapping.mapping_id}
            await client.leave()
        await settled(app, idle=1)
    assert taken(app) == {"dialled": 1, "reused": 3}
    assert app.metrics.value("admit_total", verdict="ok") == 4


async def test_p33_a_spare_is_admitted_when_a_client_takes_it(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(**pooling(pool_spare_min=1))
    async with visitor(app) as one, visitor(app) as two:
        first = await one.enter(database=FIRST)
        await settled(app, idle=1, in_use=1)
        assert await registered(operator) == {first: placed.mapping_id}
        second = await two.enter(database=FIRST)
        assert await registered(operator) == dict.fromkeys((first, second), placed.mapping_id)


async def test_p33_a_kill_that_hits_an_idle_session_only_retires_it(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(**pooling())
    pid = await visit(app, database=FIRST)
    await settled(app, idle=1)
    await operator.end_sessions(placed)
    await eventually(lambda: retired(app) == {"upstream_ended": 1}, "it is retired")
    assert await visit(app, database=FIRST) != pid


async def test_p47_a_shards_pool_that_is_made_within_a_drain_keeps_nothing(
    start: Start, operator: Operator, placed: Placed
) -> None:
    # It kept its sessions until the process ended: new connections are accepted for a while.
    app = await start(**pooling(pool_spare_min=1))
    draining = asyncio.create_task(app.drain(30, accept_seconds=30))
    await eventually(lambda: app.lifecycle.draining, "it drains")
    await visit(app, database=FIRST)
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        for pool in app.snapshot.pools:
            await pool.wait_closed()
    await app.drain(0)
    assert await draining == 0


async def test_p33_a_session_that_is_not_admitted_is_retired_and_the_refusal_is_the_clients(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(**pooling())
    await visit(app, database=FIRST)
    await settled(app, idle=1)
    async with operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.identity set store_major = 2")
    async with visitor(app) as client:
        with pytest.raises(AssertionError, match="reason=store_version"):
            await client.enter(database=FIRST)
    await eventually(lambda: retired(app) == {"check_failed": 1}, "it is retired")
    assert count(app, "sessions") == 0
