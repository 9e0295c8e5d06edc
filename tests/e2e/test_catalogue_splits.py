"""Splits, merges and changed shards under a running sidecar: its clients notice nothing."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from proxy.catalogue.alter_shard import AlterShard, ShardChanges
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.merge import Merge
from proxy.catalogue.operation import Operation
from proxy.catalogue.shard_store import reader_statements
from proxy.catalogue.split import Split
from tests.support.catalogue import MAP, Stores
from tests.support.operating import Operating, Pauses, in_background, until
from tests.support.running import eventually
from tests.support.sidecars import (
    Start,
    connect,
    lives,
    moved,
    parked,
    session,
    started_sidecars,
    until_followed,
)

SECONDS_MAX: Final = 20.0
MANY: Final = 12


@pytest_asyncio.fixture
async def operating(stores: Stores) -> AsyncIterator[Operating]:
    """Return a map with [0, 100) on shard one, which sidecars may read."""
    found = Operating(stores)
    await found.set_up()
    for statement in reader_statements(stores.roles.reader):
        await found.fetch(MAP, statement)
    await found.run(AddMapping(found.map, *found.bounds(0, 100), "one"))
    yield found
    await found.close()


@pytest_asyncio.fixture
async def start(stores: Stores) -> AsyncIterator[Start]:
    """Return a function that starts a sidecar; keyword arguments are of [catalogue]."""
    async with started_sidecars(stores) as started:
        yield started


def split(operating: Operating, key: int) -> Split:
    return Split(operating.map, operating.key(key))


def merge(operating: Operating, key: int) -> Merge:
    return Merge.at(operating.map, operating.key(key))


@pytest.mark.parametrize("feed", ["listen", "off"])
async def test_s53_live_sessions_stay_over_splits_and_merges_and_end_with_their_half_alone(
    operating: Operating, start: Start, feed: str
) -> None:
    app = await start(feed=feed)
    async with session(app, 10) as low, session(app, 60) as high:
        pids = [await one.fetchval("select pg_backend_pid()") for one in (low, high)]
        for operation in (split(operating, 50), split(operating, 20), merge(operating, 20)):
            await operating.run(operation)
        async with session(app, 10) as new_low, session(app, 60) as new_high:
            assert await lives(new_low)
            assert await lives(new_high)
        ids = [(await operating.mapping(key))["mapping_id"] for key in (10, 60)]
        expected = dict(zip(pids, ids, strict=True))

        async def is_registered() -> bool:
            return await operating.registered() == expected

        await until(is_registered, "the two that live are registered for their mappings of now")
        assert moved(app) == 0
        assert await lives(low)
        assert await lives(high)

        upper = operating.bounds(50, 100)
        offline = TakeOffline(operating.map, *upper)
        await operating.run(offline)
        assert offline.sessions_ended == 1
        assert not await lives(high)
        assert await lives(low)
        if feed == "listen":  # without one the proxy only sees that its upstream has ended
            await eventually(lambda: moved(app) == 1, "the end is counted")
        await operating.run(TakeOnline(operating.map, *upper))
        await operating.run(merge(operating, 50))
        async with session(app, 60) as again:
            assert await lives(again)
        assert await lives(low)
    await operating.check_settled()


@pytest.mark.parametrize("feed", ["listen", "off"])
@pytest.mark.parametrize("kind", ["split", "merge"])
async def test_clients_that_come_in_the_middle_are_parked_and_served(
    operating: Operating, start: Start, kind: str, feed: str
) -> None:
    """Their shard has the new bounds, and the catalogue the old ones."""
    operation: Operation = split(operating, 50)
    if kind == "merge":
        await operating.run(operation)
        operation = merge(operating, 50)
    app = await start(feed=feed)
    async with session(app, 10) as low, session(app, 60) as high:
        pauses = Pauses("local", "end")
        async with in_background(operating.run(operation, pauses)) as task:
            await pauses.reached("local")  # it has begun, and the shard is as it was
            async with session(app, 11) as early:
                assert await lives(early)
            pauses.resume("local")
            await pauses.reached("end")
            coming = [
                asyncio.ensure_future(connect(app, key)) for key in (12, 62) for _ in range(MANY)
            ]
            await eventually(lambda: parked(app) == 2 * MANY, "all of them are parked")
            pauses.resume("end")
            await task
            for connection in await asyncio.gather(*coming):
                assert await lives(connection)
                connection.terminate()
        assert app.metrics.value("park_total", result="served") == len(coming)
        assert app.metrics.value("startup_failures_total") == 0
        assert await lives(low)
        assert await lives(high)
        assert moved(app) == 0
    await operating.check_settled()


async def test_a_changed_shard_is_dialled_anew_and_its_sessions_go_on(
    operating: Operating, start: Start
) -> None:
    app = await start()
    stores = operating.stores
    operating.databases.aliases["uno"] = "one"
    async with session(app, 10) as old:
        assert app.metrics.value("sessions_active", target="tenants/one") == 1
        instance = stores.lakebase["one"].instance
        changes = ShardChanges(name="uno", instance=instance.name)
        await operating.run(AlterShard(operating.map, "one", changes))
        await until_followed(app, operating)
        async with session(app, 10) as new:
            assert await lives(new)
            assert app.metrics.value("sessions_active", target="tenants/uno") == 1
            assert await lives(old)
            assert app.metrics.value("sessions_active", target="tenants/one") == 1
        assert moved(app) == 0
