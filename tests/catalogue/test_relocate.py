"""Relocating a shard: renamed, restored elsewhere, and beside a database that still answers."""

from dataclasses import replace

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.model import Shard
from proxy.catalogue.move import Move
from proxy.catalogue.operation import points
from proxy.catalogue.pending_elsewhere import lead_pending
from proxy.catalogue.relocate import Relocate
from proxy.catalogue.verify import reading
from tests.catalogue.test_operations import failing_at
from tests.catalogue.test_repair import add
from tests.support.catalogue import MAP
from tests.support.operating import (
    Killed,
    Operating,
    Pauses,
    distinct,
    in_background,
    kill_at,
)
from tests.support.recovering import (
    RENAMED,
    check_equal,
    insert_local,
    restore,
    saved,
    shard_row,
    told,
)


async def relocating(operating: Operating, *, at: str = "one") -> Relocate:
    """Return the operation that leads shard one to another host, which is the server `at`."""
    row = await shard_row(operating, "one")
    new = replace(row, host=RENAMED)
    operating.databases.hosts[RENAMED] = at
    async with reading(operating.databases, operating.map, new) as verified:
        found = [one async for one in verified.differences()]
    return Relocate(operating.map, "one", new, found)


async def relocated(operating: Operating, *, at: str = "one") -> Shard:
    operation = await relocating(operating, at=at)
    await operating.run(operation)
    operating.shards["one"] = await shard_row(operating, "one")
    assert operating.shards["one"].host == RENAMED
    return operating.shards["one"]


async def test_s37_a_renamed_shard_has_no_differences(operating: Operating) -> None:
    await add(operating, 0, 10)
    before = await operating.mapping(5)
    async with operating.session(5) as session:
        operation = await relocating(operating)
        await operating.run(operation)
        assert await session.lives()
    assert operation.differences == []
    operating.shards["one"] = await shard_row(operating, "one")
    assert await operating.mapping(5) == before
    await check_equal(operating)
    (identity,) = await operating.fetch("one", "select location from shardmap_local.identity")
    assert identity["location"] == operating.shards["one"].location
    async with operating.session(5) as session:
        assert session.verdict == "ok"


async def test_s37_r5_restored_to_yesterday_at_another_host(operating: Operating) -> None:
    await add(operating, 0, 10)
    kept = await saved(operating, "one")
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 5")
    await operating.fetch(MAP, "update shardmap.mapping set epoch = 5")
    await insert_local(operating, "one", 20, 30)
    await restore(operating, "one", kept)
    await relocated(operating)
    assert (await operating.mapping(5))["epoch"] == 6  # above both
    await check_equal(operating)


async def test_the_old_location_is_fenced_if_another_database_answers_there(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    old = operating.shards["one"]
    kept = await saved(operating, "one")
    await operating.fetch(MAP, "delete from shardmap.shard where name = 'two'")
    await restore(operating, "two", kept)  # the shard was restored to the server of two
    async with operating.session(5) as session:
        await relocated(operating, at="two")
        assert not await session.lives()
    (there,) = await operating.fetch("one", "select * from shardmap_local.identity")
    assert (there["location"], there["status"]) == (old.location, "offline")
    assert there["version"] < 0
    (here,) = await operating.fetch("two", "select * from shardmap_local.identity")
    assert (here["location"], here["status"]) == (operating.shards["one"].location, "online")
    assert await told(operating, "one") == []


@pytest.mark.parametrize("point", ["old_fenced", "old_fenced.record"])
async def test_what_may_be_fenced_at_the_old_location_is_not_undone(
    operating: Operating, point: str
) -> None:
    """Killed before it had recorded the fence, it was undone: the old location stayed offline."""
    await add(operating, 0, 10)
    kept = await saved(operating, "one")
    await operating.fetch(MAP, "delete from shardmap.shard where name = 'two'")
    await restore(operating, "two", kept)
    operation = await relocating(operating, at="two")
    with pytest.raises(Killed):
        await operating.run(operation, kill_at(point))
    async with operating.operator() as operator:
        with pytest.raises(CatalogueError) as refused:
            await operator.undo(operation.op_id)
        assert refused.value.reason == "not_undoable"
        await operator.resume(operation.op_id)
    operating.shards["one"] = await shard_row(operating, "one")
    assert await told(operating, "one") == []
    (there,) = await operating.fetch("one", "select status from shardmap_local.identity")
    assert there["status"] == "offline"


async def test_an_old_location_that_does_not_answer_is_left(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch(MAP, "delete from shardmap.shard where name = 'two'")
    await restore(operating, "two", await saved(operating, "one"))
    operation = await relocating(operating, at="two")
    old = operating.shards["one"]

    def fail_at(shard: Shard) -> None:
        if shard.host == old.host:
            raise ConnectionRefusedError("no server")

    operating.databases.fail_at = fail_at
    await operating.run(operation)
    assert any("it is not fenced there" in text for text in operating.told)
    operating.databases.fail_at = lambda shard: None
    assert (await shard_row(operating, "one")).host == RENAMED


async def test_what_is_not_the_shard_is_refused(operating: Operating) -> None:
    await add(operating, 0, 10)
    before = await operating.state()
    operation = await relocating(operating, at="two")
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert refused.value.reason == "wrong_shard"
    assert await operating.state() == before


async def test_a_location_that_another_shard_has_is_refused(operating: Operating) -> None:
    two = operating.shards["two"]
    row = await shard_row(operating, "one")
    new = replace(row, host=two.host)
    with pytest.raises(CatalogueError) as refused:
        await operating.run(Relocate(operating.map, "one", new))
    assert refused.value.reason == "exists"


async def damaged(operating: Operating) -> Relocate:
    """Make shard one have another host and epoch, a row too many, and keys of shard two."""
    await operating.fetch(
        MAP, "update shardmap.shard set host = $1 where name = 'one'", operating.shards["one"].host
    )
    await operating.fetch(
        "one", "update shardmap_local.identity set location = $1", operating.shards["one"].location
    )
    await operating.clear()
    await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 4")
    await insert_local(operating, "one", 5, 6)
    await add(operating, 20, 30, "two")
    await insert_local(operating, "one", 25, 40, status="offline", epoch=9)
    return await relocating(operating)


async def locations(operating: Operating) -> tuple[str, str]:
    (identity,) = await operating.fetch("one", "select location from shardmap_local.identity")
    return identity["location"], (await shard_row(operating, "one")).location


@pytest.mark.slow
async def test_s26_a_step_that_fails_leaves_all_as_it_was_or_is_completed(
    operating: Operating,
) -> None:
    for point in [one for one in points(Relocate) if one.endswith(".commit")]:
        operation = await damaged(operating)
        before = await operating.state(), await locations(operating)
        with pytest.raises(CatalogueError) as refused:
            await operating.run(operation, failing_at(point))
        if refused.value.op_id is None:
            assert (await operating.state(), await locations(operating)) == before, point
        else:
            assert point == "end.commit"
        await operating.run(await relocating(operating))
        await check_relocated(operating)


async def check_relocated(operating: Operating) -> None:
    old = operating.shards["one"]
    operating.shards["one"] = await shard_row(operating, "one")
    assert operating.shards["one"].host == RENAMED
    await check_equal(operating)
    operating.shards["one"] = old


@pytest.mark.slow
@pytest.mark.parametrize("undo", [False, True])
async def test_a_relocation_left_at_any_point_can_be_completed_and_undone_before_the_fence(
    operating: Operating, undo: bool
) -> None:
    for point in distinct(points(Relocate))[2:-1]:
        operation = await damaged(operating)
        before = await operating.state(), await locations(operating)
        with pytest.raises(Killed):
            await operating.run(operation, kill_at(point))
        async with operating.operator() as operator:
            (row,) = await operator.pending()
            if undo and row.state not in {"local", "old_fenced"}:
                await operator.undo(row.op_id)
                assert (await operating.state(), await locations(operating)) == before, point
                continue
            await operator.resume(row.op_id)
        await check_relocated(operating)


@pytest.mark.parametrize("point", ["fenced.done", "flipped.done"])
async def test_s37_what_is_pending_on_a_shard_whose_host_is_gone_goes_with_it(
    operating: Operating, point: str
) -> None:
    """It was settled where the shard had been: neither it nor `relocate` could ever go on."""
    await add(operating, 0, 10)
    old = await shard_row(operating, "two")
    move = Move(operating.map, *operating.bounds(0, 10), "two")
    with pytest.raises(Killed):
        await operating.run(move, kill_at(point))

    def is_gone(shard: Shard) -> None:
        if shard.host == old.host:
            raise ConnectionRefusedError

    operating.databases.fail_at = is_gone
    operating.databases.hosts[RENAMED] = "two"
    new = replace(old, host=RENAMED)
    assert await lead_pending(operating.databases, operating.map, old, new) == 1
    async with reading(operating.databases, operating.map, new) as verified:
        found = [one async for one in verified.differences()]
    await operating.run(Relocate(operating.map, "two", new, found))
    operating.shards["two"] = await shard_row(operating, "two")
    assert operating.shards["two"].host == RENAMED
    name = "two" if point == "flipped.done" else "one"
    assert operating.name_of((await operating.mapping(5))["shard_id"]) == name
    await check_equal(operating)


async def test_what_is_pending_stays_where_the_shard_answers_or_its_process_lives(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    old = await shard_row(operating, "two")
    operating.databases.hosts[RENAMED] = "two"
    new = replace(old, host=RENAMED)
    assert await lead_pending(operating.databases, operating.map, old, new) == 0
    pauses = Pauses("flipped.done")
    move = Move(operating.map, *operating.bounds(0, 10), "two")
    async with in_background(operating.run(move, pauses)):
        await pauses.reached("flipped.done")
        assert await lead_pending(operating.databases, operating.map, old, new) == 0  # it answers

        def is_gone(shard: Shard) -> None:
            if shard.host == old.host:
                raise ConnectionRefusedError

        operating.databases.fail_at = is_gone
        with pytest.raises(CatalogueError) as refused:
            await lead_pending(operating.databases, operating.map, old, new)
        assert refused.value.reason == "operation_pending"
        assert await shard_row(operating, "two") == old
