"""Adding and deleting one mapping."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.file_operation import AddFile
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_rows import CHECKS_MAX, check_not_served
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.model import Shard, Status
from proxy.catalogue.move import Move
from proxy.catalogue.operation import Operation
from proxy.catalogue.reassign import Reassign
from proxy.routing.map_builder import LineMapping
from tests.catalogue.test_operations import statuses
from tests.support.catalogue import MAP
from tests.support.operating import Databases, Killed, Operating, kill_at
from tests.support.recovering import repair, repairing, restore, saved, told


async def add(
    operating: Operating, low: int | None, high: int | None, shard: str = "one"
) -> AddMapping:
    operation = AddMapping(operating.map, *operating.bounds(low, high), shard)
    assert await operating.run(operation)
    return operation


async def refusal(operating: Operating, operation: AddMapping | DeleteMapping) -> CatalogueError:
    before = await operating.state()
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert await operating.state() == before
    assert refused.value.op_id is None
    return refused.value


async def test_s5_a_mapping_is_added_to_the_shard_and_to_the_catalogue(
    operating: Operating,
) -> None:
    operation = await add(operating, 10, 20)
    row = await operating.mapping(10)
    assert (row["status"], row["epoch"], row["op_id"]) == ("online", 1, None)
    (local,) = await operating.local("one")
    assert local["mapping_id"] == row["mapping_id"] == operation.after.mapping_id
    assert (local["status"], local["epoch"]) == ("online", 1)
    assert await operating.local("two") == []
    assert await operating.fetch(MAP, "select * from shardmap.op_log") == []
    await operating.check_invariants()


async def test_s5_a_mapping_is_added_offline(operating: Operating) -> None:
    bounds = operating.bounds(None, None)
    await operating.run(AddMapping(operating.map, *bounds, "one", status=Status.OFFLINE))
    assert (await operating.mapping(0))["status"] == "offline"
    assert (await operating.local("one"))[0]["status"] == "offline"
    async with operating.session(0) as session:
        assert session.verdict == "offline"


OVERLAPPING = [
    (5, 15),
    (5, 7),
    (-5, 5),
    (-5, 15),
    (15, 25),
    (0, 5),
    (20, 40),
    (0, 10),
    (None, None),
]


async def test_s6_s7_overlapping_mappings_are_refused(operating: Operating) -> None:
    await add(operating, 0, 10)
    await add(operating, 20, 30)
    for low, high in OVERLAPPING:
        bounds = operating.bounds(low, high)
        error = await refusal(operating, AddMapping(operating.map, *bounds, "two"))
        assert (error.reason, error.sqlstate) == ("overlap", "23P01")
    await add(operating, 10, 20, "two")
    await operating.check_invariants()


async def test_s7_deleted_keys_can_be_added_again(operating: Operating) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    await operating.run(TakeOffline(operating.map, *bounds))
    await operating.run(DeleteMapping(operating.map, *bounds))
    assert await operating.local("one") == []
    await add(operating, 0, 10, "two")
    await operating.check_invariants()


async def test_s8_only_an_offline_mapping_is_deleted(operating: Operating) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    error = await refusal(operating, DeleteMapping(operating.map, *bounds))
    assert (error.reason, error.sqlstate) == ("not_offline", "55006")
    await operating.run(TakeOffline(operating.map, *bounds))
    error = await refusal(operating, DeleteMapping(operating.map, *bounds, expect=1))
    assert (error.reason, error.sqlstate) == ("stale_epoch", "40001")
    await operating.run(DeleteMapping(operating.map, *bounds, expect=2))
    error = await refusal(operating, DeleteMapping(operating.map, *bounds))
    assert (error.reason, error.sqlstate) == ("unknown_mapping", "42704")


async def test_an_unknown_shard_is_refused(operating: Operating) -> None:
    error = await refusal(operating, AddMapping(operating.map, b"", None, "three"))
    assert (error.reason, error.sqlstate) == ("unknown_shard", "42704")


async def test_a_plan_says_what_would_be_done_and_changes_nothing(operating: Operating) -> None:
    before = await operating.state()
    async with operating.operator() as operator:
        plan = await operator.plan(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    assert len(plan) == 3
    assert "[0, 10)" in plan[0]
    assert await operating.state() == before


async def test_a_database_that_is_not_the_shard_is_refused_and_left_alone(
    operating: Operating,
) -> None:
    other = "update shardmap_local.identity set location = 'branch.example.com:5432/app'"
    await operating.fetch("one", other)
    error = await refusal_in_shard(operating)
    assert (error.reason, error.sqlstate) == ("wrong_shard", "55000")
    await operating.fetch("one", "delete from shardmap_local.identity")
    assert (await refusal_in_shard(operating)).reason == "wrong_shard"
    await operating.fetch("one", "drop schema shardmap_local cascade")
    error = await refusal_in_shard(operating, "drop")
    assert (error.reason, error.sqlstate) == ("store_missing", "55000")


async def test_s38_an_older_shard_is_not_written_to(operating: Operating) -> None:
    await operating.fetch("one", "update shardmap_local.identity set store_major = 2")
    error = await refusal_in_shard(operating)
    assert (error.reason, error.sqlstate) == ("store_version", "55000")


async def refusal_in_shard(operating: Operating, *missing: str) -> CatalogueError:
    """Return why the shard does not take a mapping; the catalogue is as before."""
    with pytest.raises(CatalogueError) as refused:
        await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    assert refused.value.op_id is None
    assert await operating.fetch(MAP, "select 1 from shardmap.mapping") == []
    assert await operating.fetch(MAP, "select 1 from shardmap.op_log") == []
    if not missing:
        assert await operating.local("one") == []
    return refused.value


# -- what the catalogue does not know ------------------------------------------------------------


@pytest.mark.parametrize("changed_since", [False, True])
async def test_r5_undoing_an_add_in_a_restored_catalogue_leaves_what_is_in_use(
    operating: Operating, changed_since: bool
) -> None:
    """It was completed since: undoing it took the row from under its sessions."""
    bounds = operating.bounds(0, 10)
    operation = AddMapping(operating.map, *bounds, "one")
    with pytest.raises(Killed):
        await operating.run(operation, kill_at("end"))
    kept = await saved(operating, MAP)
    async with operating.operator() as operator:
        await operator.resume(operation.op_id)
    if changed_since:
        await operating.run(TakeOffline(operating.map, *bounds))
        await operating.run(TakeOnline(operating.map, *bounds))
    local = await operating.local("one")
    async with AsyncExitStack() as stack:
        sessions = []
        if not changed_since:
            sessions.append(await stack.enter_async_context(operating.session(5)))
        await restore(operating, MAP, kept)
        async with operating.operator() as operator:
            await operator.undo(operation.op_id)
        assert await operating.local("one") == local
        assert all([await session.lives() for session in sessions])
    assert await told(operating, "one") == [("0", "10")]
    await repair(operating, "one", "shard")
    await operating.check_settled()


@pytest.mark.parametrize("point", ["local.record", "end"])
async def test_r5_the_epoch_does_not_go_down_when_a_delete_is_undone(
    operating: Operating, point: str
) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    await operating.run(TakeOffline(operating.map, *bounds))
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 9")
    operation = DeleteMapping(operating.map, *bounds)
    with pytest.raises(Killed):
        await operating.run(operation, kill_at(point))
    async with operating.operator() as operator:
        await operator.undo(operation.op_id)
    assert (await operating.mapping(5))["epoch"] == 10
    await operating.check_settled()


async def test_i1_keys_that_a_shard_serves_beside_the_catalogue_are_not_added(
    operating: Operating,
) -> None:
    """A shard that was attached serves its keys to proxies that know them, until it is repaired."""
    await add(operating, 0, 10)
    await operating.fetch(MAP, "delete from shardmap.mapping")
    before = await operating.state()
    line = LineMapping(7, *operating.bounds(20, 30), "two")
    operations: tuple[Operation, ...] = (
        AddMapping(operating.map, *operating.bounds(5, 15), "two"),
        AddFile(operating.map, [line]),
    )
    calls: tuple[Callable[[Operation], Awaitable[object]], ...] = (operating.plan, operating.run)
    for operation, do in product(operations, calls):
        with pytest.raises(CatalogueError) as refused:
            await do(operation)
        assert (refused.value.reason, refused.value.sqlstate) == ("overlap", "23P01")
        assert "shard one serves [0, 10)" in refused.value.message
        assert statuses(await operating.state()) == statuses(before)
    await add(operating, 10, 15, "two")
    await repair(operating, "one", "shard")
    await operating.run(AddFile(operating.map, [line]))
    await operating.check_settled()


async def test_i1_a_shard_that_serves_keys_beside_the_catalogue_gets_others_once_it_is_repaired(
    operating: Operating,
) -> None:
    """With its first mapping it was no shard any more whose keys were looked at."""
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    bounds = operating.bounds(20, 30)
    await operating.run(AddMapping(operating.map, *bounds, "two", status=Status.OFFLINE))
    await operating.fetch(MAP, "delete from shardmap.mapping where status = 'online'")
    before = await operating.state()
    operations: tuple[Operation, ...] = (
        AddMapping(operating.map, *operating.bounds(40, 50), "one"),
        Move(operating.map, *bounds, "one"),
        Reassign(operating.map, *bounds, "one"),
        await repairing(operating, "one", "shard", ("0", "10")),
    )
    calls: tuple[Callable[[Operation], Awaitable[object]], ...] = (operating.plan, operating.run)
    for operation, do in product(operations, calls):
        with pytest.raises(CatalogueError) as refused:
            await do(operation)
        assert (refused.value.reason, refused.value.sqlstate) == ("overlap", "23P01")
        assert "shard one serves [" in refused.value.message
        assert statuses(await operating.state()) == statuses(before)
    await repair(operating, "one", "catalogue", ("10", "20"))
    await repair(operating, "one", "shard", ("0", "10"))
    await operating.run(Reassign(operating.map, *bounds, "one"))
    await operating.check_settled()


async def test_a_shard_without_mappings_that_is_down_does_not_keep_others_from_growing(
    operating: Operating,
) -> None:
    def fail(name: str) -> None:
        if name == "two":
            raise ConnectionRefusedError("no server")

    operating.databases.fail = fail
    await add(operating, 0, 10)
    assert any("not known which keys it serves" in text for text in operating.told)
    operating.databases.fail = lambda _: None
    await operating.check_settled()


class Hanging(Databases):
    """Dials to shards named `dead...` take for ever."""

    dials = 0
    dials_max = 0

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Any]:
        if shard.name.startswith("dead"):
            self.dials += 1
            self.dials_max = max(self.dials, self.dials_max)
            try:
                await asyncio.Event().wait()
            finally:
                self.dials -= 1
        async with super().shard(shard) as connection:
            yield connection


async def test_shards_without_mappings_are_asked_together_and_for_a_limited_time(
    operating: Operating,
) -> None:
    """An addition took a minute for each shard that was down, one after the other."""
    await add(operating, 0, 10)
    databases = Hanging(operating.stores)
    tools = replace(operating.tools, databases=databases)
    one = operating.shards["one"]
    dead = [replace(one, name=f"dead{number}") for number in range(3 * CHECKS_MAX)]
    bounds = operating.bounds(5, 6)
    async with asyncio.timeout(20):
        await check_not_served(tools, operating.map, dead, bounds, seconds_max=0.2)
        assert (databases.dials, databases.dials_max) == (0, CHECKS_MAX)
        assert sum("no answer in time" in text for text in operating.told) == len(dead)
        shards = [*dead[:5], one]
        with pytest.raises(CatalogueError) as refused:
            await check_not_served(tools, operating.map, shards, bounds, seconds_max=2)
    assert refused.value.reason == "overlap"
