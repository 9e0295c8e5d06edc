"""Adding a file of mappings: all or none."""

import tracemalloc
from collections.abc import Iterator, Sequence
from uuid import uuid4

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.file_operation import AddFile
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.operation import UNDO_POINTS, points
from proxy.routing.keys import KeyType
from proxy.routing.map_builder import LineMapping, mappings_from_csv
from proxy.routing.shard_map import Kind, MapSpec
from tests.catalogue.test_operations import failing_at
from tests.support.catalogue import MAP, SHARD_NAMES
from tests.support.operating import Killed, Operating, Pauses, distinct, in_background, kill_at


def file(operating: Operating, *lines: str) -> AddFile:
    rows = mappings_from_csv(["low,high,shard", *lines], operating.map.spec, SHARD_NAMES)
    return AddFile(operating.map, rows)


def test_a_mapping_of_a_file_takes_little_memory() -> None:
    """A million took 400 MB: an object each for mapping, bounds, line and id."""
    count = 10_000
    lines = ["low,high,shard", *(f"{low},{low + 1},one" for low in range(count))]
    owner = CatalogueMap(uuid4(), "tenants", MapSpec(Kind.RANGE, KeyType.INT8), 1)
    tracemalloc.start()
    try:
        operation = AddFile(owner, mappings_from_csv(lines, owner.spec, SHARD_NAMES))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(operation) == count
    assert held / count < 120


def ten(operating: Operating) -> AddFile:
    lines = [f"{low},{low + 10},{SHARD_NAMES[low // 10 % 2]}" for low in range(0, 100, 10)]
    return file(operating, *lines)


async def counts(operating: Operating) -> Sequence[int]:
    found = [await operating.fetch(MAP, "select count(*) from shardmap.mapping")]
    found += [
        await operating.fetch(name, "select count(*) from shardmap_local.mapping")
        for name in SHARD_NAMES
    ]
    return [rows[0][0] for rows in found]


async def test_s57_a_file_is_added_in_one_change(operating: Operating) -> None:
    version = "select version from shardmap.shard_map"
    operation, pauses = ten(operating), Pauses("end")
    async with in_background(operating.run(operation, pauses)) as running:
        await pauses.reached("end")
        (before,) = await operating.fetch(MAP, version)
        assert await counts(operating) == [0, 5, 5]
        marks = await operating.fetch(MAP, "select op_id from shardmap.shard")
        assert [row[0] for row in marks] == 2 * [operation.op_id]
        pauses.resume("end")
        assert await running
    assert await counts(operating) == [10, 5, 5]
    (after,) = await operating.fetch(MAP, version)
    assert after[0] == before[0] + 2  # the mappings, and the marks of the shards
    async with operating.session(15) as session:
        assert session.verdict == "ok"
    await operating.check_settled()


class Counted(list[LineMapping]):
    """Counts how often all of them are read."""

    passes = 0

    def __iter__(self) -> Iterator[LineMapping]:
        self.passes += 1
        return super().__iter__()


async def test_a_file_is_not_read_once_for_each_shard(operating: Operating) -> None:
    """A million lines on 100 shards took minutes more than on two."""
    mappings = Counted(
        LineMapping(low, *operating.bounds(low, low + 10), SHARD_NAMES[low // 10 % 2])
        for low in range(0, 100, 10)
    )
    assert await operating.run(AddFile(operating.map, mappings))
    assert await counts(operating) == [10, 5, 5]
    assert mappings.passes == 3  # to find the shards, to check, and for the catalogue
    await operating.check_settled()


async def test_s57_lines_that_overlap_what_is_there_are_named(operating: Operating) -> None:
    for keys in ((5, 7), (50, 60)):
        await operating.run(AddMapping(operating.map, *operating.bounds(*keys), "one"))
    before = await operating.state()
    operation = file(operating, "0,5,one", "5,6,two", "7,10,two", "100,+inf,one", "55,70,one")
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert (refused.value.reason, refused.value.sqlstate) == ("overlap", "23P01")
    assert [line.split()[:2] for line in refused.value.message.splitlines()[1:]] == [
        ["line", "3"],
        ["line", "6"],
    ]
    assert await operating.state() == before


async def test_s57_twenty_bad_lines_are_shown(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, b"", None, "one"))
    lines = [f"{low},{low + 1},one" for low in range(30)]
    with pytest.raises(CatalogueError) as refused:
        await operating.run(file(operating, *lines))
    assert len(refused.value.message.splitlines()) == 1 + 20 + 1
    assert refused.value.message.endswith("and 10 more")


async def test_s57_a_shard_that_is_gone_is_refused(operating: Operating) -> None:
    await operating.fetch(MAP, "delete from shardmap.shard where name = 'two'")
    with pytest.raises(CatalogueError) as refused:
        await operating.run(ten(operating))
    assert refused.value.reason == "unknown_shard"


async def test_while_a_file_is_added_no_other_operation_of_the_map_runs(
    operating: Operating,
) -> None:
    pauses = Pauses("local")
    async with in_background(operating.run(ten(operating), pauses)) as running:
        await pauses.reached("local")
        with pytest.raises(CatalogueError) as refused:
            await operating.run(AddMapping(operating.map, *operating.bounds(500, 510), "one"))
        assert refused.value.reason == "operation_pending"
        pauses.resume("local")
        assert await running


async def test_s26_a_file_that_fails_is_undone_and_the_same_call_succeeds(
    operating: Operating,
) -> None:
    for point in [point for point in points(AddFile) if point.endswith(".commit")]:
        await operating.clear()
        with pytest.raises(CatalogueError) as refused:
            await operating.run(ten(operating), failing_at(point))
        assert (refused.value.reason, refused.value.op_id) == ("step_failed", None)
        assert await counts(operating) == [0, 0, 0]
        assert await operating.run(ten(operating), failing_at(point, times=1))
        assert await counts(operating) == [10, 5, 5]


async def test_a_file_whose_process_ends_at_any_point_is_undone_by_the_next_writer(
    operating: Operating,
) -> None:
    for point in [*distinct(points(AddFile)), *distinct(UNDO_POINTS)]:
        await operating.clear()
        failing, killing = failing_at("end.commit"), kill_at(point)

        async def reach(passed: str, failing=failing, killing=killing) -> None:  # type: ignore[no-untyped-def]
            await killing(passed)
            await failing(passed)

        with pytest.raises(Killed):
            await operating.run(ten(operating), reach if point in UNDO_POINTS else killing)
        await operating.check_invariants()
        await operating.run(AddMapping(operating.map, *operating.bounds(500, 510), "two"))
        await operating.check_settled()
        added = 10 if point == "end.done" else 0
        assert await counts(operating) == [added + 1, added // 2, added // 2 + 1], point


async def test_a_file_that_was_left_can_only_be_undone(operating: Operating) -> None:
    with pytest.raises(Killed):
        await operating.run(ten(operating), kill_at("local.done"))
    async with operating.operator() as operator:
        (row,) = await operator.pending()
        with pytest.raises(CatalogueError) as refused:
            await operator.resume(row.op_id)
        assert refused.value.op_id == row.op_id
        await operator.undo(row.op_id)
    assert await counts(operating) == [0, 0, 0]


async def test_the_plan_of_a_file(operating: Operating) -> None:
    async with operating.operator() as operator:
        assert len(await operator.plan(ten(operating))) == 3
    assert await counts(operating) == [0, 0, 0]
