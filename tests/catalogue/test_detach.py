"""Detaching a shard: fenced first if it can be reached, and only of this map."""

from uuid import uuid4

import pytest

from proxy.catalogue.detach import CONFIRMED, Detach
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.operation import points
from proxy.catalogue.shard_status import TakeShardOffline
from tests.catalogue.test_operations import failing_at
from tests.catalogue.test_repair import add
from tests.support.catalogue import MAP
from tests.support.operating import Killed, Operating, Pauses, distinct, in_background, kill_at
from tests.support.recovering import detached, insert_local


async def gone(operating: Operating) -> None:
    """Fail unless the catalogue has neither shard nor mapping, and nothing is pending."""
    assert await operating.fetch(MAP, "select name from shardmap.shard") == [("two",)]
    assert await operating.fetch(MAP, "select 1 from shardmap.mapping") == []
    assert await operating.fetch(MAP, "select 1 from shardmap.op_log") == []


async def test_a_shard_that_is_online_needs_force(operating: Operating) -> None:
    await add(operating, 0, 10)
    before = await operating.state()
    with pytest.raises(CatalogueError) as refused:
        await operating.run(Detach(operating.map, "one"))
    assert (refused.value.reason, refused.value.sqlstate) == ("not_offline", "55006")
    assert await operating.state() == before
    await operating.run(TakeShardOffline(operating.map, "one"))
    await operating.run(Detach(operating.map, "one"))
    await gone(operating)


async def test_s13_a_locked_mapping_is_detached_with_its_token_only(operating: Operating) -> None:
    """The mappings of another operator were deleted, whatever they were locked for."""
    await add(operating, 0, 10)
    token = await operating.lock(0, 10)
    before = await operating.state()
    for given, reason in ((None, "locked"), (uuid4(), "lock_not_owned")):
        with pytest.raises(CatalogueError) as refused:
            await operating.run(Detach(operating.map, "one", force=True, token=given))
        assert (refused.value.reason, refused.value.sqlstate) == (reason, "55P03")
    with pytest.raises(CatalogueError) as refused:
        await operating.run(Detach(operating.map, "two", force=True, token=token))
    assert refused.value.reason == "lock_not_owned"
    assert await operating.state() == before
    await operating.run(Detach(operating.map, "one", force=True, token=token))
    await gone(operating)


async def test_sessions_end_before_the_catalogue_changes(operating: Operating) -> None:
    await add(operating, 0, 10)
    pauses = Pauses("end")
    operation = Detach(operating.map, "one", force=True)
    async with (
        operating.session(5) as session,
        in_background(operating.run(operation, pauses)) as running,
    ):
        await pauses.reached("end")
        assert not await session.lives()
        assert len(await operating.fetch(MAP, "select 1 from shardmap.mapping")) == 1
        pauses.resume("end")
        await running
    await gone(operating)
    (identity,) = await operating.fetch("one", "select * from shardmap_local.identity")
    assert (identity["status"], identity["version"]) == ("offline", -2)
    assert len(await operating.local("one")) == 1


async def test_a_database_that_is_another_one_is_told_from_one_that_is_down(
    operating: Operating,
) -> None:
    await operating.fetch("one", "update shardmap_local.identity set location = 'other:1/app'")
    detach = await detached(operating, "one")
    assert (detach.fenced, detach.reached_other) == (False, True)
    await gone(operating)


async def test_s56_the_other_maps_of_the_database_stay(operating: Operating) -> None:
    await add(operating, 0, 10)
    other = uuid4()
    await operating.fetch(
        "one",
        "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
        " hash_version, shard_id, location, version)"
        " values ($1, 'others', 'range', 'int4', 'none', 1, $2, $3, 1)",
        *(other, uuid4(), operating.shards["one"].location),
    )
    await operating.fetch(
        "one",
        "insert into shardmap_local.mapping values ($1, $2, '', null, 'online', 1)",
        *(uuid4(), other),
    )
    await detached(operating, "one")
    rows = await operating.fetch(
        "one", "select status, version from shardmap_local.identity where map_id = $1", other
    )
    assert rows == [("online", 1)]
    assert await operating.fetch(
        "one", "select status from shardmap_local.mapping where map_id = $1", other
    ) == [("online",)]


async def test_another_database_at_the_location_is_not_fenced(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.identity set location = 'branch:1/app'")
    detach = await detached(operating, "one")
    assert not detach.fenced
    assert await operating.fetch("one", "select status from shardmap_local.identity") == [
        ("online",)
    ]
    await gone(operating)


@pytest.mark.slow
async def test_a_detach_left_at_any_point_is_completed_or_was_never_begun(
    operating: Operating,
) -> None:
    passed = distinct(points(Detach))[2:-1]
    for point in passed:
        if not await operating.fetch(MAP, "select 1 from shardmap.shard where name = 'one'"):
            await operating.fetch("one", "delete from shardmap_local.identity")
            await operating.add_shard("one")
        await operating.clear()
        await add(operating, 0, 10)
        with pytest.raises(Killed):
            await operating.run(Detach(operating.map, "one", force=True), kill_at(point))
        await operating.check_invariants()
        async with operating.operator() as operator:
            (row,) = await operator.pending()
            if row.state == CONFIRMED.name:
                with pytest.raises(CatalogueError) as refused:
                    await operator.undo(row.op_id)
                assert refused.value.reason == "not_undoable"
            await operator.resume(row.op_id)
        await gone(operating)


async def test_s26_the_catalogue_fails_in_the_end_and_the_next_writer_completes(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    with pytest.raises(CatalogueError) as refused:
        await operating.run(Detach(operating.map, "one", force=True), failing_at("end.commit"))
    assert refused.value.op_id is not None
    with pytest.raises(CatalogueError) as unknown:
        await insert_and_add(operating)
    assert unknown.value.reason == "unknown_shard"
    await gone(operating)


async def insert_and_add(operating: Operating) -> None:
    await insert_local(operating, "one", 20, 30)
    await add(operating, 40, 50)
