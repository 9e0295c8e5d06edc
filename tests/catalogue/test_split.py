"""Splitting a mapping: what is refused, both halves, and the sessions of each."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.split import Split
from proxy.routing.shard_map import Kind
from tests.support.catalogue import MAP, Stores
from tests.support.operating import (
    Killed,
    Operating,
    Pauses,
    fail_at,
    in_background,
    kill_at,
    until,
)

INT4_MIN = -(2**31)


@pytest_asyncio.fixture(params=[Kind.LIST, Kind.HASH])
async def other_kind(stores: Stores, request: pytest.FixtureRequest) -> AsyncIterator[Operating]:
    found = Operating(stores, request.param)
    await found.set_up()
    yield found
    await found.close()


async def add(operating: Operating, low: int | None, high: int | None, shard: str = "one") -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(low, high), shard))


def split(operating: Operating, key: int, **more: object) -> Split:
    return Split(operating.map, operating.key(key), **more)  # type: ignore[arg-type]


async def test_s12_a_mapping_is_split_inside_and_keeps_what_it_had(operating: Operating) -> None:
    await add(operating, 0, 10)
    whole = await operating.mapping(1)
    token = await operating.lock(0, 10)
    operation = split(operating, 5, token=token)
    assert len(await operating.plan(operation)) == 2
    assert await operating.run(operation)
    lower, upper = await operating.mapping(4), await operating.mapping(5)
    assert lower["mapping_id"] == whole["mapping_id"] != upper["mapping_id"]
    assert (lower["lo"], lower["hi"]) == operating.bounds(0, 5)
    assert (upper["lo"], upper["hi"]) == operating.bounds(5, 10)
    for half, planned in ((lower, operation.after), (upper, operation.upper)):
        assert (half["epoch"], half["status"], half["op_id"]) == (2, "online", None)
        assert half["lock_owner"] == token
        assert half["locked_until"] == lower["locked_until"] is not None
        assert (half["mapping_id"], half["lo"], half["hi"]) == (
            planned.mapping_id,
            planned.lo,
            planned.hi,
        )
    await operating.check_settled()


@pytest.mark.parametrize(("low", "high"), [(0, 10), (None, None), (None, 10), (0, None)])
async def test_s12_at_a_bound_or_beyond_it_is_no_split(
    operating: Operating, low: int | None, high: int | None
) -> None:
    await add(operating, low, high)
    for bound in (low, high):
        if bound is not None:
            assert await operating.refusal(split(operating, bound)) == ("not_inside", "22023")
    if low is not None:
        beyond = await operating.refusal(split(operating, low - 1))
        assert beyond == ("mapping_not_found", "3D000")
    if high is not None:
        beyond = await operating.refusal(split(operating, high + 1))
        assert beyond == ("mapping_not_found", "3D000")
    if low is None:
        assert await operating.refusal(split(operating, INT4_MIN)) == ("not_inside", "22023")
        assert await operating.run(split(operating, INT4_MIN + 1))
        await operating.check_settled()


async def test_s12_a_hash_map_is_split_at_a_number_and_a_list_map_is_not(
    other_kind: Operating,
) -> None:
    operating = other_kind
    is_list = operating.map.spec.kind is Kind.LIST
    lo, hi = operating.key(0), operating.key(0) + b"\0" if is_list else None
    await operating.run(AddMapping(operating.map, lo, hi, "one"))
    operation = Split(operating.map, bytes.fromhex("c0000000"))
    if is_list:
        assert await operating.refusal(operation) == ("no_split_of_a_list", "22023")
        return
    assert await operating.run(operation)
    rows = await operating.fetch(MAP, "select lo, hi from shardmap.mapping order by lo")
    middle = bytes.fromhex("c0000000")
    assert [tuple(row) for row in rows] == [(lo, middle), (middle, None)]
    await operating.check_settled()


async def test_s11_a_stale_epoch_and_a_foreign_lock_are_refused(operating: Operating) -> None:
    await add(operating, 0, 10)
    assert await operating.refusal(split(operating, 5, expect=2)) == ("stale_epoch", "40001")
    await operating.lock(0, 10)
    assert await operating.refusal(split(operating, 5)) == ("locked", "55P03")
    assert not (await operating.mapping(1))["op_id"]


async def test_s53_sessions_are_registered_for_their_half_and_end_with_it(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(4) as low, operating.session(5) as high:
        assert low.verdict == high.verdict == "ok"
        operation = split(operating, 5)
        await operating.run(operation)
        assert await operating.registered() == {
            low.pid: operation.after.mapping_id,
            high.pid: operation.upper.mapping_id,
        }
        assert await low.lives()
        assert await high.lives()
        offline = TakeOffline(operating.map, *operating.bounds(5, 10))
        await operating.run(offline)
        assert offline.sessions_ended == 1
        assert await low.lives()
        assert not await high.lives()
        async with operating.session(4) as more:
            assert more.verdict == "ok"
    await operating.check_settled()


async def test_an_offline_mapping_has_two_offline_halves(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
    await operating.run(split(operating, 5))
    assert [row["status"] for row in await operating.local("one")] == ["offline", "offline"]
    await operating.run(TakeOnline(operating.map, *operating.bounds(5, 10)))
    await operating.check_settled()


async def waits(operating: Operating) -> bool:
    """Return whether a backend of the shard waits for a lock."""
    query = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
    return bool(await operating.fetch("one", query))


async def test_r1_an_admit_in_flight_is_registered_for_its_half(operating: Operating) -> None:
    """It holds the row's lock: the split waits for it, and reads the registry after it."""
    await add(operating, 0, 10)
    async with operating.session(7, commit=False) as session:
        operation = split(operating, 5)
        pauses = Pauses("local")
        async with in_background(operating.run(operation, pauses)) as task:
            await pauses.reached("local")
            pauses.resume("local")
            await until(partial(waits, operating), "the split waits for the admit")
            await session.connection.execute("commit")
            await task
        assert await operating.registered() == {session.pid: operation.upper.mapping_id}


async def test_r14_a_split_ends_a_session_that_keeps_its_admit_open(operating: Operating) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    async with operating.session(1, commit=False) as session:
        assert await operating.run(split(operating, 5))
        assert operating.slept.seconds == []
        assert not await session.lives()
    await operating.check_settled()


async def test_between_shard_and_catalogue_a_session_of_the_whole_is_stale(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    pauses = Pauses("end")
    async with in_background(operating.run(split(operating, 5), pauses)) as task:
        await pauses.reached("end")
        assert (await operating.mapping(7))["op_id"] is not None  # so that a proxy parks clients
        async with operating.session(7) as refused:
            assert refused.verdict == "stale"
        await operating.check_invariants()
        pauses.resume("end")
        await task
    async with operating.session(7) as admitted:
        assert admitted.verdict == "ok"


async def test_s29_an_operator_waits_for_none_on_another_shard_and_is_refused_on_the_same(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20, "two")
    pauses = Pauses("end")
    async with in_background(operating.run(split(operating, 5), pauses)) as first:
        await pauses.reached("end")
        assert await operating.run(split(operating, 15))
        for key in (3, 5, 7):
            with pytest.raises(CatalogueError) as refused:
                await operating.run(split(operating, key))
            assert (refused.value.reason, refused.value.sqlstate) == ("operation_pending", "55P03")
        assert operating.slept.seconds == []  # at once, without another try
        pauses.resume("end")
        assert await first
    await operating.check_settled()


async def test_s29_of_many_concurrent_splits_none_is_lost_or_doubled(operating: Operating) -> None:
    await add(operating, 0, 100)
    await add(operating, 100, 200, "two")
    keys = [key for low in (10, 20, 30, 40) for key in (low, low + 100, low)]

    async def split_once(key: int) -> str:
        """Return how it has ended. A refusal is that of a split that goes on."""
        words: list[str] = []

        async def has_ended() -> bool:
            try:
                await operating.run(split(operating, key))
            except CatalogueError as error:
                if error.reason != "operation_pending":
                    words.append(error.reason)
            else:
                words.append("done")
            return bool(words)

        await until(has_ended, f"the split at {key}")
        return words[0]

    words = await asyncio.gather(*map(split_once, keys))
    # Each key is split once, the first time; the second one finds that it is a bound.
    assert sorted(words) == ["done"] * 8 + ["not_inside"] * 4
    rows = await operating.fetch(MAP, "select lo from shardmap.mapping order by lo")
    assert [row["lo"] for row in rows] == [operating.key(key) for key in sorted({0, 100, *keys})]
    await operating.check_settled()


async def test_a_plan_names_the_halves_where_another_operation_is_settled_first(
    operating: Operating,
) -> None:
    """It said that the mapping would be split into the whole and the upper half."""
    await add(operating, 0, 10)
    await add(operating, 20, 30)
    with pytest.raises(Killed):
        await operating.run(split(operating, 25), kill_at("end"))
    settled, planned, _ = await operating.plan(split(operating, 5))
    assert settled.startswith("Undo the operation ")
    assert planned == "Split the mapping [0, 10) on shard one into [0, 5) and [5, 10)."


async def test_a_shard_that_has_other_bounds_is_not_split(operating: Operating) -> None:
    await add(operating, 0, 10)
    await operating.fetch("one", "update shardmap_local.mapping set hi = $1", operating.key(9))
    with pytest.raises(CatalogueError) as refused:
        await operating.run(split(operating, 5))
    assert (refused.value.reason, refused.value.sqlstate) == ("step_failed", "58000")
    assert (await operating.mapping(1))["op_id"] is None
    assert len(await operating.local("one")) == 1


async def test_a_split_that_is_undone_leaves_one_mapping_and_its_sessions(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(4) as low, operating.session(7) as high:
        whole = (await operating.mapping(1))["mapping_id"]
        with pytest.raises(CatalogueError):
            await operating.run(split(operating, 5), fail_at("end.commit"))
        assert await operating.registered() == {low.pid: whole, high.pid: whole}
        row = await operating.mapping(7)
        assert (row["lo"], row["hi"]) == operating.bounds(0, 10)
        assert row["epoch"] == 3  # above what the halves had
        assert await low.lives()
        assert await high.lives()
    await operating.check_settled()
    assert await operating.run(split(operating, 5))
