"""A catalogue that was lost or restored, made again from its shards; also amid an operation."""

from typing import Any

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.move import Move
from proxy.catalogue.operation import points
from proxy.catalogue.rebuild import Rebuild
from proxy.catalogue.shard_status import TakeShardOffline
from tests.support.catalogue import MAP, SHARD_NAMES
from tests.support.operating import Killed, Operating, distinct, kill_at
from tests.support.recovering import (
    attaching,
    check_equal,
    insert_local,
    lose_catalogue,
    restore,
    saved,
)

MAPPINGS = "select lo, hi, shard_id, status, epoch, mapping_id from shardmap.mapping order by lo"


async def filled(operating: Operating) -> None:
    for low, high, shard in ((None, 0, "one"), (0, 10, "two"), (10, None, "one")):
        await operating.run(AddMapping(operating.map, *operating.bounds(low, high), shard))
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))


async def rows(operating: Operating) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await operating.fetch(MAP, MAPPINGS)]


async def rebuilt(operating: Operating) -> Rebuild:
    operation = Rebuild(operating.map)
    await operating.run(operation)
    return operation


async def attached(operating: Operating) -> None:
    for name in SHARD_NAMES:
        await operating.run(await attaching(operating, name))


async def test_a_lost_catalogue_comes_back_as_it_was(operating: Operating) -> None:
    await filled(operating)
    before = await rows(operating)
    async with operating.session(50) as session:
        await lose_catalogue(operating)
        await attached(operating)
        assert await rows(operating) == []
        assert await operating.fetch(MAP, "select 1 from shardmap.shard_map where version < 1")
        operation = await rebuilt(operating)
        assert await session.lives()
    assert operation.row_changes.repaired == 3
    assert await rows(operating) == before
    assert await operating.fetch(MAP, "select 1 from shardmap.shard_map where version > 1")
    roles = await operating.fetch(MAP, "select session_roles from shardmap.shard_map")
    assert [tuple(row) for row in roles] == [([operating.stores.roles.session],)]
    await check_equal(operating)


async def test_a_token_is_not_needed_where_the_catalogue_has_lost_the_lock(
    operating: Operating,
) -> None:
    await filled(operating)
    token = await operating.lock(0, 10)
    await lose_catalogue(operating)
    await attached(operating)
    await operating.run(Rebuild(operating.map, token))
    await check_equal(operating)


async def test_a_shard_that_was_offline_is_offline_again(operating: Operating) -> None:
    await filled(operating)
    await operating.run(TakeShardOffline(operating.map, "one"))
    await lose_catalogue(operating)
    await attached(operating)
    await rebuilt(operating)
    await check_equal(operating)
    shards = await operating.fetch(MAP, "select name, status from shardmap.shard order by name")
    assert [tuple(row) for row in shards] == [("one", "offline"), ("two", "online")]


# What a move leaves in its source and its target, by its states: status and epoch, if any.
MOVES: dict[str, tuple[tuple[str, int] | None, tuple[str, int] | None, str]] = {
    "begun": (("online", 3), None, "one"),
    "fenced": (("offline", 4), None, "one"),
    "target_ready": (("offline", 4), ("offline", 5), "two"),
    "source_cleared": (None, ("offline", 5), "two"),
    "opened": (None, ("online", 6), "two"),
}


@pytest.mark.parametrize("state", MOVES)
async def test_a_catalogue_lost_in_the_middle_of_a_move(operating: Operating, state: str) -> None:
    *sides, owner = MOVES[state]
    mapping_id = None
    for name, side in zip(SHARD_NAMES, sides, strict=True):
        if side is not None:
            status, epoch = side
            mapping_id = await insert_local(
                operating, name, 0, 10, status=status, epoch=epoch, mapping_id=mapping_id
            )
    await lose_catalogue(operating)
    await attached(operating)
    await rebuilt(operating)
    ((_, _, shard_id, status, epoch, found_id),) = await rows(operating)
    status_before, epoch_before = [side for side in sides if side is not None][-1]
    assert (shard_id, found_id) == (operating.shards[owner].shard_id, mapping_id)
    assert (status, epoch) == (status_before, epoch_before)
    await check_equal(operating)


async def test_an_empty_shard_does_not_show_a_map_that_has_no_mappings_yet(
    operating: Operating,
) -> None:
    # Proxies that see it forget all that they know: every key would be unknown until the rebuild.
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    await lose_catalogue(operating)
    await attached(operating)  # the second one has no mappings
    assert await operating.fetch(MAP, "select 1 from shardmap.shard_map where version < 1")
    await rebuilt(operating)
    assert await operating.fetch(MAP, "select 1 from shardmap.shard_map where version > 1")


async def test_a_rebuild_shows_a_map_without_mappings(operating: Operating) -> None:
    await lose_catalogue(operating)
    await attached(operating)
    await rebuilt(operating)
    assert await operating.fetch(MAP, "select 1 from shardmap.shard_map where version > 1")


async def test_a_catalogue_restored_to_the_middle_of_a_move_that_is_done(
    operating: Operating,
) -> None:
    # The move is pending again. Undone, it would give the keys back to the source, online, while
    # the target has them online (I1).
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    for point in ("fenced.done", "drained.done", "target_ready.done", "source_cleared.done"):
        owner = operating.name_of((await operating.mapping(5))["shard_id"])
        other = "two" if owner == "one" else "one"
        with pytest.raises(Killed):
            await operating.run(
                Move(operating.map, *operating.bounds(0, 10), other), kill_at(point)
            )
        catalogue = await saved(operating, MAP)
        async with operating.operator() as operator:
            (row,) = await operator.pending()
            await operator.resume(row.op_id)
        await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
        await operating.run(TakeOnline(operating.map, *operating.bounds(0, 10)))
        (local,) = await operating.local(other)
        await restore(operating, MAP, catalogue)
        await rebuilt(operating)
        await check_equal(operating)
        (after,) = await operating.local(other)
        assert (after["status"], after["epoch"]) == ("online", local["epoch"]), point
        assert await operating.local(owner) == [], point


async def test_both_restored_to_different_days(operating: Operating) -> None:
    await filled(operating)
    catalogue, one = await saved(operating, MAP), await saved(operating, "one")
    await operating.run(TakeOffline(operating.map, *operating.bounds(10, None)))
    two = await saved(operating, "two")
    await restore(operating, MAP, catalogue)
    await restore(operating, "one", one)
    await restore(operating, "two", two)
    await rebuilt(operating)
    await check_equal(operating)


async def test_keys_of_which_neither_is_right_are_named(operating: Operating) -> None:
    await filled(operating)
    await insert_local(operating, "two", 20, 30, epoch=8)
    before = await operating.state()
    operation = await rebuilt(operating)
    conflict = operation.conflict()
    assert conflict is not None
    assert (conflict.reason, conflict.sqlstate) == ("overlap", "23P01")
    assert "[20, 30): one (online, epoch 1) and two (online, epoch 8)" in conflict.message
    assert await operating.state() == before


async def test_a_shard_that_cannot_be_reached_leaves_all_as_it_was(operating: Operating) -> None:
    await filled(operating)
    before = await operating.state()

    def fail(name: str) -> None:
        if name == "two":
            raise ConnectionRefusedError("no server")

    operating.databases.fail = fail
    with pytest.raises(CatalogueError) as refused:
        await operating.run(Rebuild(operating.map))
    assert (refused.value.reason, refused.value.op_id) == ("step_failed", None)
    assert await operating.state() == before


@pytest.mark.slow
@pytest.mark.parametrize("undo", [False, True])
async def test_a_rebuild_left_at_any_point_can_be_completed_and_undone(
    operating: Operating, undo: bool
) -> None:
    for point in distinct(points(Rebuild))[2:-1]:
        await operating.clear()
        await filled(operating)
        await insert_local(operating, "one", 5, 6, status="offline")
        await operating.fetch("two", "update shardmap_local.mapping set epoch = 9")
        before = await operating.state()
        with pytest.raises(Killed):
            await operating.run(Rebuild(operating.map), kill_at(point))
        async with operating.operator() as operator:
            (row,) = await operator.pending()
            await (operator.undo if undo else operator.resume)(row.op_id)
        if undo:
            assert await operating.state() == before, point
        else:
            await check_equal(operating)
