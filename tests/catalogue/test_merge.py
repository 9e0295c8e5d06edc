"""Merging neighbours: what is refused, what stays, their sessions, and all runs of a map."""

from functools import partial
from uuid import uuid4

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.merge import Merge, Run, find_runs
from proxy.catalogue.model import SessionsMode, Status
from proxy.catalogue.split import Split
from proxy.catalogue.transactions import transaction
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


async def add(
    operating: Operating,
    low: int | None,
    high: int | None,
    shard: str = "one",
    status: Status = Status.ONLINE,
) -> None:
    bounds = operating.bounds(low, high)
    await operating.run(AddMapping(operating.map, *bounds, shard, status=status))


async def add_three(operating: Operating) -> None:
    for low in (0, 10, 20):
        await add(operating, low, low + 10)


def merge(operating: Operating, key: int, **more: object) -> Merge:
    return Merge.at(operating.map, operating.key(key), **more)  # type: ignore[arg-type]


def run_of(operating: Operating, low: int, high: int) -> Merge:
    return Merge(operating.map, *operating.bounds(low, high))


async def bounds_of(operating: Operating) -> list[tuple[bytes, bytes | None]]:
    rows = await operating.fetch(MAP, "select lo, hi from shardmap.mapping order by lo")
    return [(row["lo"], row["hi"]) for row in rows]


async def test_s12_neighbours_of_one_shard_become_one(operating: Operating) -> None:
    await add_three(operating)
    left = await operating.mapping(1)
    token = await operating.lock(0, 10)
    # The right one has a higher epoch than the left one.
    right = operating.bounds(10, 20)
    await operating.run(TakeOffline(operating.map, *right))
    await operating.run(TakeOnline(operating.map, *right))
    operation = merge(operating, 10, token=token)
    assert len(await operating.plan(operation)) == 2
    assert await operating.run(operation)
    merged = await operating.mapping(15)
    assert (merged["lo"], merged["hi"]) == operating.bounds(0, 20)
    assert merged["mapping_id"] == left["mapping_id"] == operation.after.mapping_id
    assert merged["epoch"] == operation.after.epoch == 4
    assert (merged["lock_owner"], merged["op_id"]) == (token, None)
    assert await bounds_of(operating) == [operating.bounds(0, 20), operating.bounds(20, 30)]
    await operating.check_settled()


async def test_s12_a_run_becomes_one(operating: Operating) -> None:
    await add_three(operating)
    assert await operating.run(run_of(operating, 0, 30))
    assert await bounds_of(operating) == [operating.bounds(0, 30)]
    assert (await operating.mapping(29))["epoch"] == 2
    await operating.check_settled()
    assert not await operating.run(run_of(operating, 0, 30))  # nothing is left to merge


async def test_s12_what_cannot_be_one_is_refused(operating: Operating) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20, "two")
    await add(operating, 30, 40)
    await add(operating, 40, 50, status=Status.OFFLINE)
    refused = {
        key: await operating.refusal(merge(operating, key)) for key in (10, 40, 20, 30, 0, 50, 15)
    }
    assert refused == dict.fromkeys(refused, ("not_adjacent", "22023"))
    for key in (25, 60, -1):
        unknown = await operating.refusal(merge(operating, key))
        assert unknown == ("mapping_not_found", "3D000")
    for low, high in ((0, 20), (0, 40), (0, 15), (60, 70)):
        gone = await operating.refusal(run_of(operating, low, high))
        assert gone == ("not_adjacent", "22023")


async def test_s12_offline_mappings_are_of_one_status_if_their_sessions_are(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    keep = TakeOffline(operating.map, *operating.bounds(0, 10), sessions=SessionsMode.KEEP)
    await operating.run(keep)
    await operating.run(TakeOffline(operating.map, *operating.bounds(10, 20)))
    assert await operating.refusal(merge(operating, 10)) == ("not_adjacent", "22023")
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
    assert await operating.run(merge(operating, 10))
    assert (await operating.mapping(15))["status"] == "offline"
    await operating.check_settled()


async def test_s12_the_keys_of_a_list_map_stay_apart(stores: Stores) -> None:
    operating = Operating(stores, Kind.LIST)
    await operating.set_up()
    for key in (b"a", b"a\0"):  # they meet
        await operating.run(AddMapping(operating.map, key, key + b"\0", "one"))
    refused = await operating.refusal(Merge.at(operating.map, b"a\0"))
    assert refused == ("not_adjacent", "22023")
    async with stores.connect(MAP) as catalogue:
        assert await find_runs(catalogue, operating.map) == []
    await operating.close()


@pytest.mark.parametrize("low", [0, 10])
async def test_s13_a_locked_one_is_merged_with_its_token_only(
    operating: Operating, low: int
) -> None:
    await add_three(operating)
    token = await operating.lock(low, low + 10)
    assert await operating.refusal(merge(operating, 10)) == ("locked", "55P03")
    other = merge(operating, 10, token=uuid4())
    assert await operating.refusal(other) == ("lock_not_owned", "55P03")
    assert await operating.run(merge(operating, 10, token=token))
    assert (await operating.mapping(1))["lock_owner"] == (token if low == 0 else None)


async def test_s53_sessions_of_all_of_them_are_registered_for_the_merged_one(
    operating: Operating,
) -> None:
    await add_three(operating)
    async with operating.session(1) as first, operating.session(25) as last:
        operation = run_of(operating, 0, 30)
        await operating.run(operation)
        merged = operation.after.mapping_id
        assert await operating.registered() == {first.pid: merged, last.pid: merged}
        await operating.run(Split(operating.map, operating.key(20)))
        offline = TakeOffline(operating.map, *operating.bounds(0, 20))
        await operating.run(offline)
        assert offline.sessions_ended == 1
        assert not await first.lives()
        assert await last.lives()


async def waits(operating: Operating) -> bool:
    """Return whether a backend of the shard waits for a lock."""
    query = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
    return bool(await operating.fetch("one", query))


async def test_r1_an_admit_in_flight_is_registered_for_the_merged_one(
    operating: Operating,
) -> None:
    await add_three(operating)
    async with operating.session(15, commit=False) as session:
        operation = merge(operating, 10)
        async with in_background(operating.run(operation)) as task:
            await until(partial(waits, operating), "the merge waits for the admit")
            await session.connection.execute("commit")
            await task
        assert await operating.registered() == {session.pid: operation.after.mapping_id}


async def test_r14_a_merge_ends_a_session_that_keeps_its_admit_open(operating: Operating) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    async with operating.session(1, commit=False) as session:
        assert await operating.run(merge(operating, 10))
        assert operating.slept.seconds == []
        assert not await session.lives()
    await operating.check_settled()


async def test_between_shard_and_catalogue_a_session_of_the_right_one_finds_no_mapping(
    operating: Operating,
) -> None:
    await add_three(operating)
    pauses = Pauses("end")
    async with in_background(operating.run(merge(operating, 10), pauses)) as task:
        await pauses.reached("end")
        for key, verdict in ((5, "stale"), (15, "mapping_missing")):
            assert (await operating.mapping(key))["op_id"] is not None  # a proxy parks clients
            async with operating.session(key) as refused:
                assert refused.verdict == verdict
        pauses.resume("end")
        await task


async def test_a_shard_that_has_other_mappings_does_not_merge_them(operating: Operating) -> None:
    await add_three(operating)
    await operating.fetch(
        "one",
        "update shardmap_local.mapping set status = 'offline' where lo = $1",
        operating.key(10),
    )
    before = await operating.state()
    with pytest.raises(CatalogueError) as refused:
        await operating.run(merge(operating, 10))
    assert (refused.value.reason, refused.value.sqlstate) == ("step_failed", "58000")
    assert await operating.state() == before


async def test_a_merge_that_is_undone_gives_each_session_its_mapping_again(
    operating: Operating,
) -> None:
    await add_three(operating)
    ids = [(await operating.mapping(key))["mapping_id"] for key in (1, 11, 21)]
    async with (
        operating.session(1) as one,
        operating.session(15) as two,
        operating.session(25) as three,
    ):
        with pytest.raises(CatalogueError):
            await operating.run(run_of(operating, 0, 30), fail_at("end.commit"))
        pids = one.pid, two.pid, three.pid
        assert await operating.registered() == dict(zip(pids, ids, strict=True))
        assert [(await operating.mapping(key))["epoch"] for key in (1, 11, 21)] == [3, 3, 3]
        assert await three.lives()
    await operating.check_settled()
    assert await operating.run(run_of(operating, 0, 30))


@pytest.mark.parametrize("kind", ["split", "merge"])
@pytest.mark.parametrize("word", ["resume", "undo"])
async def test_s27_what_another_process_left_is_completed_or_undone(
    operating: Operating, kind: str, word: str
) -> None:
    await add_three(operating)
    before = await bounds_of(operating)
    operation = merge(operating, 10) if kind == "merge" else Split(operating.map, operating.key(5))
    async with operating.session(7) as low, operating.session(15) as right:
        with pytest.raises(Killed):
            await operating.run(operation, kill_at("end"))
        async with operating.operator() as operator:
            await getattr(operator, word)(operation.op_id)
        assert (await bounds_of(operating) == before) is (word == "undo")
        for session, key in ((low, 7), (right, 15)):
            mapping = await operating.mapping(key)
            assert (await operating.registered())[session.pid] == mapping["mapping_id"]
    await operating.check_settled()


# -- all runs of a map ---------------------------------------------------------------------------


async def runs(operating: Operating, shard: str = "", token: object = None) -> list[Run]:
    async with operating.stores.connect(MAP) as catalogue, transaction(catalogue, read_only=True):
        return await find_runs(
            catalogue,
            operating.map,
            shard=operating.shards[shard] if shard else None,
            token=token,  # type: ignore[arg-type]
        )


async def test_runs_end_at_gaps_shards_statuses_locks_and_operations(operating: Operating) -> None:
    for low, shard, status in (
        *((low, "one", Status.ONLINE) for low in (0, 10, 20)),
        *((low, "two", Status.ONLINE) for low in (30, 40)),
        *((low, "two", Status.OFFLINE) for low in (50, 60)),
        *((low, "one", Status.ONLINE) for low in (80, 90, 100, 110, 120, 130)),
    ):
        await add(operating, low, low + 10, shard, status)

    def run(low: int, high: int, token: object = None) -> Run:
        return Run(*operating.bounds(low, high), token)  # type: ignore[arg-type]

    of_one, of_two = [run(0, 30), run(80, 140)], [run(30, 50), run(50, 70)]
    assert await runs(operating) == [of_one[0], *of_two, of_one[1]]
    assert await runs(operating, "one") == of_one
    assert await runs(operating, "two") == of_two
    token = await operating.lock(100, 110)
    assert (await runs(operating, "one"))[1:] == [run(80, 100), run(110, 140)]
    assert (await runs(operating, "one", uuid4()))[1:] == [run(80, 100), run(110, 140)]
    assert (await runs(operating, "one", token)) == [run(0, 30), run(80, 140, token)]
    offline = TakeOffline(operating.map, *operating.bounds(10, 20))
    with pytest.raises(Killed):
        await operating.run(offline, kill_at("fence"))
    assert (await runs(operating, "one", token)) == [run(80, 140, token)]
