"""Repairing one shard, from the catalogue or the shard: every kind of difference and damage."""

from typing import Any
from uuid import uuid4

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.operation import points
from proxy.catalogue.repair import Repair
from proxy.catalogue.repair_plan import EPOCH_MAX
from proxy.routing.shard_map import Kind
from tests.catalogue.test_operations import failing_at
from tests.support.catalogue import MAP, Stores
from tests.support.operating import Killed, Operating, distinct, kill_at
from tests.support.recovering import (
    SIDES,
    check_equal,
    insert_local,
    repair,
    repairing,
    restore,
    saved,
    told,
)


async def add(operating: Operating, low: int, high: int, shard: str = "one") -> Any:
    await operating.run(AddMapping(operating.map, *operating.bounds(low, high), shard))
    return await operating.mapping(low)


async def refusal(operating: Operating, operation: Repair) -> CatalogueError:
    before = await operating.state()
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert await operating.state() == before
    return refused.value


@pytest.mark.parametrize("source", SIDES)
async def test_s33_s35_another_epoch_is_reported_and_repaired(
    operating: Operating, source: str
) -> None:
    row = await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 7")
    assert await told(operating, "one") == [("0", "10")]
    async with operating.session(5, epoch=7) as session:
        assert session.verdict == "ok"
        operation = await repair(operating, "one", source)
        assert await session.lives()
    assert operation.row_changes.repaired == 1
    repaired = await operating.mapping(5)
    assert (repaired["mapping_id"], repaired["epoch"]) == (row["mapping_id"], 8)
    await check_equal(operating)


@pytest.mark.parametrize("source", SIDES)
async def test_s41_r5_a_shard_restored_to_yesterday(operating: Operating, source: str) -> None:
    await add(operating, 0, 10)
    kept = await saved(operating, "one")
    bounds = operating.bounds(0, 10)
    await operating.run(TakeOffline(operating.map, *bounds))
    await operating.run(TakeOnline(operating.map, *bounds))
    await restore(operating, "one", kept)
    async with operating.session(5) as session:
        assert session.verdict == "shard_behind"
    await repair(operating, "one", source)
    async with operating.session(5) as session:
        assert session.verdict == "ok"
    assert (await operating.mapping(5))["epoch"] == 4
    await check_equal(operating)


@pytest.mark.parametrize("source", SIDES)
async def test_the_catalogue_restored_to_yesterday(operating: Operating, source: str) -> None:
    await add(operating, 0, 10)
    kept = await saved(operating, MAP)
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
    await add(operating, 10, 20)
    await restore(operating, MAP, kept)
    assert await told(operating, "one") == [("0", "10"), ("10", "20")]
    await repair(operating, "one", source)
    rows = await operating.fetch(MAP, "select status, epoch from shardmap.mapping order by lo")
    expected = {"catalogue": [("online", 3)], "shard": [("offline", 3), ("online", 2)]}
    assert [tuple(row) for row in rows] == expected[source]
    await check_equal(operating)


async def test_s34_s35_keys_of_another_shard_from_the_catalogue(operating: Operating) -> None:
    await add(operating, 1, 6, "one")
    await add(operating, 6, 10, "two")
    hi = operating.key(11)
    await operating.fetch("one", "update shardmap_local.mapping set hi = $1", hi)
    assert await told(operating, "one") == [("6", "10"), ("10", "11")]
    async with operating.session(5) as session:
        await repair(operating, "one", "catalogue")
        assert not await session.lives()  # its mapping has lost keys
    await check_equal(operating)


async def test_i1_keys_of_another_shard_are_taken_out_there_first(operating: Operating) -> None:
    await add(operating, 1, 6, "one")
    await add(operating, 6, 10, "two")
    await add(operating, 10, 20, "two")
    await operating.fetch(
        "one", "update shardmap_local.mapping set hi = $1, status = 'offline'", operating.key(11)
    )
    async with operating.session(7) as lost, operating.session(15) as cut:
        await repair(operating, "one", "shard")
        assert not await lost.lives()
        assert not await cut.lives()  # its mapping has lost the key 10
    await check_equal(operating)
    rows = await operating.fetch(MAP, "select lo, hi from shardmap.mapping order by lo")
    assert [tuple(row) for row in rows] == [operating.bounds(1, 11), operating.bounds(11, 20)]
    async with operating.session(15) as session:
        assert session.verdict == "ok"


async def test_i1_keys_are_not_given_while_another_shard_has_them_online(
    operating: Operating,
) -> None:
    await add(operating, 0, 10, "one")
    await operating.fetch("one", "delete from shardmap_local.mapping")
    await insert_local(operating, "two", 5, 6, epoch=9)
    refused = await refusal(operating, await repairing(operating, "one", "catalogue"))
    assert (refused.reason, refused.sqlstate) == ("overlap", "23P01")
    assert "shard two" in refused.message
    await repair(operating, "two", "catalogue")
    await repair(operating, "one", "catalogue")
    await check_equal(operating)


Bound = int | bytes | None
DAMAGE: dict[str, tuple[tuple[Bound, Bound, str, int], ...]] = {
    "an extra row": ((50, 60, "online", 1),),
    "one around it": ((-5, 15, "online", 3),),
    "one inside it": ((3, 7, "offline", 3),),
    "overlaps": ((-5, 5, "online", 1), (4, 30, "offline", 2), (6, 7, "online", 3)),
    "all keys": ((None, None, "offline", 1 << 41),),
    "no keys": ((b"\x01", b"\x02", "online", 1), (b"\x80\x00", None, "online", 1)),
    "long bounds": ((b"\xff" * 300, None, "online", 1), (b"\x7f" * 200, b"\x80", "online", 1)),
    "large epochs": ((70, 80, "online", (1 << 63) - 1), (80, 90, "online", EPOCH_MAX)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind.RANGE, Kind.LIST, Kind.HASH])
async def test_s35_garbage_is_reported_and_repaired(stores: Stores, kind: Kind) -> None:
    operating = Operating(stores, kind)
    await operating.set_up()
    try:
        for damage in DAMAGE:
            for source in SIDES:
                await check_damage(operating, kind, source, damage)
    finally:
        await operating.close()


async def check_damage(operating: Operating, kind: Kind, source: str, damage: str) -> None:
    await operating.clear()
    for low, high in ((0, 10), (10, 20)):
        hi = operating.key(low) + b"\0" if kind is Kind.LIST else operating.key(high)
        await operating.run(AddMapping(operating.map, operating.key(low), hi, "one"))
    for begin, end, status, epoch in DAMAGE[damage]:
        await insert_local(operating, "one", begin, end, status=status, epoch=epoch)
    assert await told(operating, "one") != []
    await repair(operating, "one", source)
    assert await told(operating, "one") == [], (damage, source)
    await check_equal(operating)
    if source == "catalogue":
        count = "select count(*) from shardmap_local.mapping"
        assert await operating.fetch("one", count) == [(2,)]


@pytest.mark.parametrize("source", SIDES)
async def test_s35_rows_of_a_map_that_is_in_neither(operating: Operating, source: str) -> None:
    await add(operating, 0, 10)
    insert = (
        "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
        " hash_version, shard_id, location, version)"
        " values ($1, $2, 'range', 'int4', 'none', 1, $3, $4, 1)"
    )
    ghost, other = uuid4(), uuid4()
    here = operating.shards["one"].location
    await operating.fetch("one", insert, ghost, "ghosts", uuid4(), "elsewhere:1/app")
    await operating.fetch("one", insert, other, "others", uuid4(), here)
    for map_id in (ghost, other):
        await operating.fetch(
            "one",
            "insert into shardmap_local.mapping (mapping_id, map_id, lo, status, epoch)"
            " values ($1, $2, '\\x01', 'online', 1)",
            *(uuid4(), map_id),
        )
    # It may be a map of another catalogue, which reaches the shard by another name: its rows went.
    assert await told(operating, "one") == [("-inf", "+inf")]
    operation = await repairing(operating, "one", source)
    assert not await operating.run(operation)
    assert operation.left == [ghost]
    await repair(operating, "one", source, ("-inf", "+inf"))
    assert await told(operating, "one") == []
    rows = await operating.fetch("one", "select map_id from shardmap_local.identity")
    assert {row["map_id"] for row in rows} == {operating.map.map_id, other}


async def test_s35_rows_of_a_map_that_nothing_knows_are_deleted(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch(
        "one",
        "alter table shardmap_local.mapping drop constraint mapping_map_id_fkey",
    )
    await operating.fetch(
        "one",
        "insert into shardmap_local.mapping (mapping_id, map_id, lo, status, epoch)"
        " values ($1, $2, '\\x01', 'online', 1)",
        *(uuid4(), uuid4()),
    )
    await repair(operating, "one", "catalogue")
    await check_equal(operating)


@pytest.mark.parametrize("source", SIDES)
async def test_the_shards_own_status_is_repaired(operating: Operating, source: str) -> None:
    await add(operating, 0, 10)
    await operating.fetch(MAP, "update shardmap.shard set status = 'offline' where name = 'one'")
    assert await told(operating, "one") == [("-inf", "+inf")]
    async with operating.session(5) as session:
        await repair(operating, "one", source)
        assert await session.lives() is (source == "shard")
    await check_equal(operating)


async def test_a_shard_that_has_lost_its_schema_is_one_again(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch(
        MAP,
        "update shardmap.shard_map set session_roles = array[$1]",
        operating.stores.roles.session,
    )
    await operating.fetch("one", "drop schema shardmap_local cascade")
    assert await told(operating, "one") == [("-inf", "+inf"), ("0", "10")]
    refused = await refusal_of_lost(operating)
    assert refused.reason == "wrong_shard"
    await repair(operating, "one", "catalogue")
    await check_equal(operating)
    async with operating.session(5) as session:
        assert session.verdict == "ok"


async def refusal_of_lost(operating: Operating) -> CatalogueError:
    with pytest.raises(CatalogueError) as refused:
        await operating.run(await repairing(operating, "one", "shard"))
    return refused.value


async def test_s36_chosen_ranges(operating: Operating) -> None:
    for low in (0, 10, 20):
        await add(operating, low, low + 10)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 5")
    assert await told(operating, "one") == [("0", "10"), ("10", "20"), ("20", "30")]
    operation = await repairing(operating, "one", "shard", ("20", "30"), ("0", "0010"))
    await operating.run(operation)
    assert operation.row_changes.repaired == 2
    assert await told(operating, "one") == [("10", "20")]


async def test_s36_a_range_that_is_not_in_the_report(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 5")
    for bad in (("0", "9"), ("5", "4"), ("no", "key")):
        refused = await refusal(operating, await repairing(operating, "one", "shard", bad))
        assert (refused.reason, refused.sqlstate) == ("range_not_in_report", "22023")


async def test_s36_a_report_serves_once(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 5")
    operation = await repairing(operating, "one", "shard")
    report = operation.body()["report"]
    await operating.run(operation)
    again = await repairing(operating, "one", "shard", report=report)
    refused = await refusal(operating, again)
    assert (refused.reason, refused.sqlstate) == ("report_stale", "22023")


async def test_s36_what_changes_before_the_plan_is_found(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 5")
    operation = await repairing(operating, "one", "shard")
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 6")
    refused = await refusal(operating, operation)
    assert refused.reason == "report_stale"


async def test_a_repair_of_nothing_changes_nothing(operating: Operating) -> None:
    await add(operating, 0, 10)
    before = await operating.state()
    assert not await operating.run(await repairing(operating, "one", "catalogue"))
    assert await operating.state() == before


# -- what goes wrong on the way ------------------------------------------------------------------


async def damaged(operating: Operating) -> None:
    """Make shard one have keys of shard two, another epoch, and garbage."""
    await operating.clear()
    await add(operating, 0, 10, "one")
    await add(operating, 20, 30, "two")
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 4")
    await insert_local(operating, "one", 25, 40, status="offline", epoch=9)
    await insert_local(operating, "one", b"\x01", b"\x02")


@pytest.mark.slow
@pytest.mark.parametrize("source", SIDES)
async def test_s26_a_step_that_fails_leaves_all_as_it_was(
    operating: Operating, source: str
) -> None:
    for point in [one for one in points(Repair) if one.endswith(".commit")]:
        await damaged(operating)
        before = await operating.state()
        operation = await repairing(operating, "one", source)
        with pytest.raises(CatalogueError) as refused:
            await operating.run(operation, failing_at(point))
        assert (refused.value.reason, refused.value.sqlstate) == ("step_failed", "58000"), point
        assert await operating.state() == before, point
        report = operation.body()["report"]
        await operating.run(await repairing(operating, "one", source, report=report))
        await check_equal(operating)


@pytest.mark.slow
@pytest.mark.parametrize("source", SIDES)
@pytest.mark.parametrize("undo", [False, True])
async def test_a_repair_left_at_any_point_can_be_completed_and_undone(
    operating: Operating, source: str, undo: bool
) -> None:
    for point in distinct(points(Repair))[2:-1]:
        await damaged(operating)
        before = await operating.state()
        with pytest.raises(Killed):
            await operating.run(await repairing(operating, "one", source), kill_at(point))
        async with operating.operator() as operator:
            (row,) = await operator.pending()
            await (operator.undo if undo else operator.resume)(row.op_id)
        if undo:
            assert await operating.state() == before, point
        else:
            await check_equal(operating)
