"""Pooled sessions of validated shards while their mappings move (P33).

The sessions of a shard serve all of its keys, one after the other.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID

import pytest
import pytest_asyncio

from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.move import Move
from proxy.observe.pool_stats import PoolRow
from proxy.server.app import App
from tests.support.catalogue import Stores
from tests.support.operating import Operating, in_background
from tests.support.pooling import SESSION_MODE
from tests.support.running import eventually
from tests.support.sidecars import (
    ENDED,
    Start,
    connect,
    lives,
    named_shards,
    parked,
    session,
    started_sidecars,
    until_followed,
)

CLIENTS: Final = 50
POOL: Final = {**SESSION_MODE, "pool_idle_max": CLIENTS}


@pytest_asyncio.fixture
async def operating(stores: Stores) -> AsyncIterator[Operating]:
    """Return a map with [0, 100) and [100, 200) on shard one; a table on both names its shard."""
    async with named_shards(stores) as found:
        yield found


@pytest_asyncio.fixture
async def start(stores: Stores) -> AsyncIterator[Start]:
    """Return a function that starts a sidecar; keyword arguments are of [catalogue]."""
    async with started_sidecars(stores) as started:
        yield started


def row(app: App, shard: str = "one") -> PoolRow:
    """Return the numbers of a shard's pool."""
    (found,) = [one for one in app.metrics.pools.rows() if one.target == f"tenants/{shard}"]
    return found


async def until_idle(app: App, count: int) -> None:
    """Wait until so many sessions of shard one are idle, and no other one is open."""

    def is_idle() -> bool:
        now = row(app).present
        return (now.idle, now.in_use, now.resetting) == (count, 0, 0)

    await eventually(is_idle, f"{count} are idle")


async def visit(app: App, key: int) -> tuple[int, str]:
    """Return the backend and the shard of a client that connects and leaves."""
    client = await connect(app, key)
    try:
        found = await client.fetchrow("select pg_backend_pid(), name from here")
    finally:
        await client.close()
    return found[0], found[1]


async def move(operating: Operating, to: str) -> Move:
    """Move the keys below 100."""
    moving = Move(operating.map, *operating.bounds(0, 100), to)
    await operating.run(moving)
    return moving


async def registered_for(operating: Operating, pid: int) -> UUID:
    return (await operating.registered())[pid]


async def test_p33_a_reused_session_is_registered_for_the_key_of_its_client(
    operating: Operating, start: Start
) -> None:
    app = await start(upstream=POOL)
    pid, _ = await visit(app, 5)
    await until_idle(app, 1)
    mapping = (await operating.mapping(5))["mapping_id"]
    assert await registered_for(operating, pid) == mapping, "between clients a fence finds it"
    async with session(app, 150) as other:
        assert await other.fetchval("select pg_backend_pid()") == pid
        assert await registered_for(operating, pid) == (await operating.mapping(150))["mapping_id"]
        assert (await move(operating, "two")).sessions_ended == 0
        assert await lives(other), "its key did not move"
    await until_followed(app, operating)
    assert (await visit(app, 5))[1] == "two"
    await until_idle(app, 1)
    assert (await visit(app, 151))[0] == pid
    assert row(app).takes == {"reused": 2, "dialled": 1, "waited": 0}


async def test_p33_a_shard_that_does_not_admit_a_reused_session_costs_the_client_nothing_else(
    operating: Operating, start: Start
) -> None:
    app = await start(upstream=POOL, feed="off")
    pid, _ = await visit(app, 150)
    await until_idle(app, 1)
    await visit(app, 5)  # the mapping is known from now on, and no feed tells that it moves
    await until_idle(app, 1)
    await move(operating, "two")
    await visit(app, 150)
    await until_idle(app, 1)
    assert (await visit(app, 5))[1] == "two"
    await until_idle(app, 0)
    assert row(app).retired["check_failed"] == 1
    assert app.metrics.value("startup_failures_total") == 0
    assert (await visit(app, 150))[0] != pid, "it was given to no other client"


async def test_p33_a_move_ends_idle_sessions_of_its_keys_and_no_others(
    operating: Operating, start: Start
) -> None:
    app = await start(upstream=POOL)
    clients = [await connect(app, key) for key in (*range(CLIENTS - 1), 150)]
    for client in clients:
        await client.close()
    await until_idle(app, CLIENTS)
    moving = await move(operating, "two")
    assert moving.sessions_ended == CLIENTS - 1
    await until_idle(app, 1)
    retired = {reason: count for reason, count in row(app).retired.items() if count}
    assert retired == {"upstream_ended": CLIENTS - 1}
    assert (await visit(app, 5))[1] == "two"
    assert (await visit(app, 150))[1] == "one"
    await operating.check_settled()


@pytest.mark.slow
async def test_p33_clients_that_come_and_go_during_moves_are_served_by_the_shard_of_their_key(
    operating: Operating, start: Start
) -> None:
    app = await start(upstream=POOL)
    placed, served = {"one"}, 0

    async def come_and_go(key: int) -> None:
        nonlocal served
        while True:
            possible = set(placed)
            try:
                _, shard = await visit(app, key)
            except ENDED:  # by the move, before or after its welcome, as without a pool
                continue
            # It moved at most from where it was at the connect to where it is by now.
            assert shard in possible | placed
            served += 1

    async def more_served() -> None:
        before = served
        await eventually(lambda: served > before + 24, "they are served")

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(come_and_go(key)) for key in range(12)]
        for to in ("two", "one"):
            await more_served()
            placed.add(to)
            await move(operating, to)
            placed.intersection_update({to})
        await more_served()
        for client in clients:
            client.cancel()
    await operating.check_settled()


async def test_p33_an_offline_mapping_parks_its_clients_although_sessions_are_idle(
    operating: Operating, start: Start
) -> None:
    app = await start(upstream=POOL)
    bounds = operating.bounds(0, 100)
    pid, _ = await visit(app, 150)
    await until_idle(app, 1)
    await operating.run(TakeOffline(operating.map, *bounds))
    await until_followed(app, operating)
    async with in_background(visit(app, 5)) as waiting:
        await eventually(lambda: parked(app) == 1, "it is parked")
        assert (await visit(app, 150))[0] == pid
        await operating.run(TakeOnline(operating.map, *bounds))
        assert (await waiting)[1] == "one"
