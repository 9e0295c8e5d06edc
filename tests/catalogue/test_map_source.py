"""Finding keys against real PostgreSQL: what is asked, how often, and what a failure means."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from proxy.catalogue import store
from proxy.catalogue.catalogue_reader import refusal
from proxy.catalogue.followed_map import FollowedMap, MapProgress
from proxy.catalogue.lookups import IDLE_SECONDS
from proxy.catalogue.map_state import MISSES_MAX, Times
from proxy.catalogue.model import Status
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import hash_key
from tests.support.followed import (
    SECONDS_MAX,
    Changes,
    FollowedCatalogue,
    key,
    real_times,
    running,
    until,
    where,
)

OFF = {"feed": "off"}


class Clock:
    """The real time, with what a test adds to it."""

    def __init__(self) -> None:
        self.added = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.added


@pytest_asyncio.fixture
async def clock() -> AsyncIterator[Clock]:
    yield Clock()


def times(clock: Clock) -> Times:
    return replace(real_times(), clock=clock)


async def test_s14_an_eager_map_asks_nothing_a_lazy_one_once_a_mapping(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        for value in (5, 6, 25):
            await followed.source.find(key(value))
        assert catalogue.queries["lookup"] == 0
        assert catalogue.queries["hit"] == 3
    async with running(catalogue.followed(feed="off", load="lazy")) as followed:
        for value in (5, 5, 6, 25, 29):
            await followed.source.find(key(value))
        assert catalogue.queries["lookup"] == 2
        assert catalogue.queries["miss"] == 2
        assert catalogue.queries["hit"] == 3 + 3
        assert followed.status().mappings == 2


async def test_s50_a_thousand_sessions_of_an_unknown_key_are_one_question(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off", load="lazy")) as followed:
        before = catalogue.queries["lookup"]
        found = await asyncio.gather(*(followed.source.find(key(5)) for _ in range(1000)))
        assert {located.shard.name for located in found} == {"one"}
        assert catalogue.queries["lookup"] - before == 1


async def test_s50_a_thousand_sessions_share_a_failure(catalogue: FollowedCatalogue) -> None:
    async with running(catalogue.followed(feed="off", load="lazy")) as followed:
        await until(lambda: catalogue.open_now == 0, followed)
        catalogue.is_down = True
        tries = (followed.source.find(key(5)) for _ in range(1000))
        found = await asyncio.gather(*tries, return_exceptions=True)
        kinds = {one.kind for one in found if isinstance(one, ProxyError)}
        assert kinds == {ErrorKind.CATALOGUE_UNREACHABLE}
        assert len(found) == 1000


async def test_s5_a_key_without_a_mapping_is_asked_for_once_a_second(
    catalogue: FollowedCatalogue, clock: Clock
) -> None:
    async with running(catalogue.followed(times(clock), feed="off")) as followed:
        for expected in (1, 1, 1):
            with pytest.raises(ProxyError) as caught:
                await followed.source.find(key(15))
            assert caught.value.kind is ErrorKind.MAPPING_NOT_FOUND
            assert catalogue.queries["lookup"] == expected
        clock.added += 1.0
        with pytest.raises(ProxyError):
            await followed.source.find(key(15))
        assert catalogue.queries["lookup"] == 2
        assert catalogue.queries["negative"] == 2


async def test_a_change_of_the_map_ends_the_memory_of_keys_without_a_mapping(
    catalogue: FollowedCatalogue, clock: Clock
) -> None:
    async with running(catalogue.followed(times(clock))) as followed:
        with pytest.raises(ProxyError):
            await followed.source.find(key(15))
        changes = Changes(followed)
        await catalogue.insert(1, 10, 20)
        await until(lambda: bool(changes.seen), followed)
        assert (await followed.source.find(key(15))).shard.name == "two"


async def test_keys_without_a_mapping_are_remembered_up_to_a_bound(
    catalogue: FollowedCatalogue,
) -> None:
    # The clock stands still: each is remembered for a second.
    now = time.monotonic()
    at_one_time = replace(real_times(), clock=lambda: now)
    async with running(catalogue.followed(at_one_time, feed="off")) as followed:
        state = followed.state
        with state.flight() as flight:
            for number in range(MISSES_MAX + 5):
                assert state.set_missing(hash_key(number.to_bytes(4)), flight)
        assert not state.is_missed(hash_key((4).to_bytes(4)))
        assert state.is_missed(hash_key((5).to_bytes(4)))
        assert state.is_missed(hash_key((MISSES_MAX + 4).to_bytes(4)))


async def test_s60_an_uncovered_key_reads_one_row(catalogue: FollowedCatalogue) -> None:
    await catalogue.execute(
        "insert into shardmap.mapping (map_id, shard_id, lo, hi) select $1, $2,"
        " int4send(n), int4send(n + 1) from generate_series(1, 20000) n",
        catalogue.map_id,
        catalogue.shards[0],
    )
    await catalogue.execute("analyze shardmap.mapping")
    async with running(catalogue.followed(feed="off")) as followed:
        with pytest.raises(ProxyError):
            await followed.source.find((30_000).to_bytes(4))

    plan = await catalogue.admin.fetchval(
        f"explain (analyze, format json) {store._LOCATE}", catalogue.map_id, (30_000).to_bytes(4)
    )
    assert '"Rows Removed by Filter": 1' in plan
    assert '"Actual Rows": 20000' not in plan


async def test_s19_a_key_whose_mapping_was_deleted_is_not_found_after_a_refusal(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        located = await followed.source.find(key(5))
        changes = Changes(followed)
        await catalogue.delete(catalogue.mappings[0])
        # The shard has refused the session: the catalogue is asked.
        with pytest.raises(ProxyError) as caught:
            await followed.source.refresh(key(5), located)
        assert caught.value.kind is ErrorKind.MAPPING_NOT_FOUND
        assert where(followed, 5) is None
        assert changes.mapping_ids == {catalogue.mappings[0]}
        assert followed.status().mappings == 1


async def test_a_refresh_finds_where_the_key_is_now_and_many_are_one_question(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        located = await followed.source.find(key(5))
        await catalogue.execute(
            "update shardmap.mapping set shard_id = $2, epoch = 2 where mapping_id = $1",
            catalogue.mappings[0],
            catalogue.shards[1],
        )
        before = catalogue.queries["refresh"]
        keys = [key(value) for value in range(10)] * 50
        found = await asyncio.gather(*(followed.source.refresh(one, located) for one in keys))
        assert {(one.shard.name, one.mapping.epoch) for one in found} == {("two", 2)}
        assert catalogue.queries["refresh"] - before == 1


async def test_after_a_split_each_key_of_the_old_mapping_finds_its_own(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        located = await followed.source.find(key(5))
        await catalogue.execute(
            "update shardmap.mapping set hi = $2, epoch = 2 where mapping_id = $1",
            catalogue.mappings[0],
            key(4),
        )
        upper = await catalogue.insert(1, 4, 10)
        low, high = await asyncio.gather(
            followed.source.refresh(key(1), located), followed.source.refresh(key(8), located)
        )
        assert (low.mapping.mapping_id, low.shard.name) == (catalogue.mappings[0], "one")
        assert (high.mapping.mapping_id, high.shard.name) == (upper, "two")


async def test_s20_failed_dials_ask_once_and_then_not_until_the_back_off_is_over(
    catalogue: FollowedCatalogue, clock: Clock
) -> None:
    async with running(catalogue.followed(times(clock), feed="off")) as followed:
        source = followed.source
        located = await source.find(key(5))

        async def ten_failures() -> int:
            before = catalogue.queries["refresh"]
            for _ in range(10):
                assert (await source.dial_failed(key(5), located)).shard.name == "one"
            return catalogue.queries["refresh"] - before

        assert await ten_failures() == 1
        assert source.backoff_seconds == 5.0
        for seconds, longer in (
            (4.5, 0),
            (0.6, 10.0),
            (9.0, 0),
            (2.0, 20.0),
            (21, 30.0),
            (31, 30.0),
        ):
            clock.added += seconds
            assert await ten_failures() == (1 if longer else 0)
            if longer:
                assert source.backoff_seconds == longer
        source.dial_succeeded(located)
        assert source.backoff_seconds == 0
        assert await ten_failures() == 1
        assert source.backoff_seconds == 5.0


async def test_s20_a_failed_dial_finds_a_mapping_that_moved(catalogue: FollowedCatalogue) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        located = await followed.source.find(key(5))
        await catalogue.execute(
            "update shardmap.mapping set shard_id = $2, epoch = 2 where mapping_id = $1",
            catalogue.mappings[0],
            catalogue.shards[1],
        )
        assert (await followed.source.dial_failed(key(5), located)).shard.name == "two"


async def test_what_is_offline_is_asked_for_once_a_second_so_that_off_learns_of_it(
    catalogue: FollowedCatalogue, clock: Clock
) -> None:
    await catalogue.set_status(catalogue.mappings[0], "offline")
    async with running(catalogue.followed(times(clock), feed="off")) as followed:
        for _ in range(5):
            found = await followed.source.find(key(5))
            assert found.mapping.status is Status.OFFLINE
        assert catalogue.queries["refresh"] == 1
        await catalogue.set_status(catalogue.mappings[0], "online")
        assert (await followed.source.find(key(5))).mapping.status is Status.OFFLINE
        clock.added += 1.0
        assert (await followed.source.find(key(5))).mapping.status is Status.ONLINE
        assert catalogue.queries["refresh"] == 2


async def test_a_shard_that_is_offline_is_asked_for_again(
    catalogue: FollowedCatalogue, clock: Clock
) -> None:
    sql = "update shardmap.shard set status = $1"
    await catalogue.execute(sql, "offline")
    async with running(catalogue.followed(times(clock), feed="off")) as followed:
        assert (await followed.source.find(key(5))).shard.status is Status.OFFLINE
        await catalogue.execute(sql, "online")
        clock.added += 1.0
        changes = Changes(followed)
        assert (await followed.source.find(key(5))).shard.status is Status.ONLINE
        assert [change.shard_ids for change in changes.seen] == [{catalogue.shards[0]}]


async def test_s42_a_catalogue_that_is_down_serves_what_is_known_and_refuses_the_rest_in_time(
    catalogue: FollowedCatalogue,
) -> None:
    quick = replace(real_times(), jitter=lambda: 0.1)
    async with running(catalogue.followed(quick)) as followed:
        catalogue.is_down = True
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        await until(lambda: followed.failure is not None, followed)
        assert followed.status().state is MapProgress.STALE
        assert (await followed.source.find(key(5))).shard.name == "one"
        began = time.monotonic()
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(15), deadline=began + 1.0)
        assert caught.value.kind is ErrorKind.CATALOGUE_UNREACHABLE
        assert caught.value.response().sqlstate == "08001"
        assert catalogue.queries["miss"] == 1
        # One that waits is served as soon as the catalogue is back.
        await catalogue.insert(1, 10, 20)
        waiting = asyncio.create_task(
            followed.source.find(key(15), deadline=time.monotonic() + SECONDS_MAX)
        )
        await asyncio.sleep(0)
        catalogue.is_down = False
        assert (await waiting).shard.name == "two"
        await until(lambda: followed.failure is None, followed)
        assert followed.status().state is MapProgress.READY


async def test_s42_a_catalogue_that_does_not_answer_is_given_up_in_time(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        await until(lambda: catalogue.open_now == 0, followed)
        catalogue.paused = asyncio.Event()
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(15), deadline=time.monotonic() + 0.2)
        assert caught.value.kind is ErrorKind.CATALOGUE_UNREACHABLE
        catalogue.paused.set()


async def test_s42_without_validation_what_is_known_is_served_for_a_while_only(
    catalogue: FollowedCatalogue, clock: Clock
) -> None:
    unvalidated = {"validate": False, "allow_unvalidated": True, "max_stale_seconds": 300}
    quick = replace(times(clock), jitter=lambda: 0.1)
    async with running(catalogue.followed(quick, **unvalidated)) as followed:
        clock.added += 1000
        assert (await followed.source.find(key(5))).shard.name == "one"
        catalogue.is_down = True
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        await until(lambda: followed.failure is not None, followed)
        clock.added += 290
        assert (await followed.source.find(key(5))).shard.name == "one"
        clock.added += 20
        age = followed.age_seconds
        assert age is not None
        assert age > 300
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(5))
        assert caught.value.kind is ErrorKind.CATALOGUE_STALE
        catalogue.is_down = False
        await until(lambda: followed.failure is None, followed)
        assert (await followed.source.find(key(5))).shard.name == "one"


async def test_a_client_that_comes_before_the_map_is_loaded_waits_for_it(
    catalogue: FollowedCatalogue,
) -> None:
    catalogue.paused = asyncio.Event()
    async with running(catalogue.followed(), loaded=False) as followed:
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(5), deadline=time.monotonic() + 0.1)
        assert caught.value.kind is ErrorKind.CATALOGUE_UNREACHABLE
        waiting = asyncio.create_task(
            followed.source.find(key(5), deadline=time.monotonic() + SECONDS_MAX)
        )
        await asyncio.sleep(0)
        catalogue.paused.set()
        assert (await waiting).shard.name == "one"
        assert catalogue.queries["lookup"] == 0


async def test_look_ups_use_one_connection_and_close_it_when_it_is_idle(
    catalogue: FollowedCatalogue,
) -> None:
    assert IDLE_SECONDS <= 5
    async with running(catalogue.followed(load="lazy")) as followed:
        found = await asyncio.gather(
            *(followed.source.find(key(value)) for value in (1, 2, 3, 21, 22)),
            followed.source.find(key(15)),
            return_exceptions=True,
        )
        assert sum(isinstance(one, ProxyError) for one in found) == 1
        assert catalogue.open_now == 2
        assert catalogue.opened == 2


async def test_a_connection_that_was_closed_while_idle_is_opened_again_unseen(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off", load="lazy")) as followed:
        await followed.source.find(key(5))
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        assert (await followed.source.find(key(25))).shard.name == "two"


async def test_a_look_up_that_a_change_overtakes_is_asked_again(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off", load="lazy")) as followed:
        state = followed.state
        found = await followed.source.find(key(5))
        with state.flight() as flight:
            state.set_mappings([found.mapping.mapping_id], [])
            assert not state.set_located(found, flight)
            assert not state.set_missing(key(5), flight)
        assert where(followed, 5) is None
        with state.flight() as flight:
            assert state.set_located(found, flight)
        assert where(followed, 5) == "one"


async def test_s63_the_shard_of_a_row_that_cannot_be_right_is_refused_and_others_serve(
    catalogue: FollowedCatalogue,
) -> None:
    await catalogue.execute(
        "insert into shardmap.mapping (map_id, shard_id, lo, hi) values ($1, $2, $3, $4)",
        catalogue.map_id,
        catalogue.shards[0],
        b"no int4",
        b"no int5",
    )
    async with running(catalogue.followed()) as followed:
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(5))
        assert caught.value.kind is ErrorKind.SHARD_ROW_INVALID
        assert "shard one: a bound has another size" in caught.value.detail
        assert (await followed.source.find(key(25))).shard.name == "two"
        # The row is corrected, and another one is not.
        await catalogue.execute("delete from shardmap.mapping where lo = 'no int4'")
        await until(lambda: _serves(followed, 5), followed)
        await catalogue.execute(
            "update shardmap.mapping set hi = $2 where mapping_id = $1",
            catalogue.mappings[1],
            b"\xff\xff\xff",
        )
        await until(lambda: where(followed, 25) is None, followed)
        with pytest.raises(ProxyError):
            await followed.source.find(key(25))
        assert (await followed.source.find(key(5))).shard.name == "one"


async def test_s63_a_name_that_cannot_be_right_is_in_no_log_and_its_shard_is_refused(
    catalogue: FollowedCatalogue,
) -> None:
    await catalogue.execute("alter table shardmap.shard drop constraint shard_name_check")
    sql = "update shardmap.shard set name = $2 where shard_id = $1"
    await catalogue.execute(sql, catalogue.shards[0], "x\n[error] all is lost")
    async with running(catalogue.followed(feed="off")) as followed:
        for _ in range(2):
            with pytest.raises(ProxyError) as caught:
                await followed.source.find(key(5))
            assert caught.value.kind is ErrorKind.SHARD_ROW_INVALID
            assert "all is lost" not in str(caught.value)
            assert str(catalogue.shards[0]) in caught.value.detail
        assert (await followed.source.find(key(25))).shard.name == "two"
        await catalogue.execute(sql, catalogue.shards[0], "one")
        located = followed.source.peek(key(5))
        assert located is not None
        assert (await followed.source.refresh(key(5), located)).shard.name == "one"


@pytest.mark.parametrize("feed", ["listen", "off"])
async def test_s63_a_status_that_cannot_be_right_refuses_its_shard_alone(
    catalogue: FollowedCatalogue, feed: str
) -> None:
    """One such row failed the reading of all shards."""
    for table in ("shard", "mapping"):
        await catalogue.execute(
            f"alter table shardmap.{table} drop constraint {table}_status_check"
        )
    await catalogue.execute("alter table shardmap.mapping drop constraint mapping_sessions_check")
    sql = "update shardmap.shard set status = $2 where shard_id = $1"
    await catalogue.execute(sql, catalogue.shards[0], "x\n[error] all is lost")
    async with running(catalogue.followed(feed=feed)) as followed:
        for _ in range(2):
            with pytest.raises(ProxyError) as caught:
                await followed.source.find(key(5))
            assert caught.value.kind is ErrorKind.SHARD_ROW_INVALID
            assert caught.value.detail == "shard one: its status is none"
        assert (await followed.source.find(key(25))).shard.name == "two"
        await catalogue.execute(sql, catalogue.shards[0], "online")
        located = followed.source.peek(key(5))
        assert located is not None
        assert (await followed.source.refresh(key(5), located)).shard.name == "one"
        # A mapping's is offline, however it is read.
        await catalogue.execute("update shardmap.mapping set status = 'x', sessions = 'y'")
        found = await followed.source.refresh(key(5), located)
        assert (found.mapping.status, found.mapping.sessions) == ("offline", "kill")


def _serves(followed: FollowedMap, value: int) -> bool:
    located = followed.source.peek(key(value))
    return located is not None and followed.state.refusal(located.shard) is None


async def test_an_error_of_the_dial_is_the_catalogues(catalogue: FollowedCatalogue) -> None:
    error = refusal(ProxyError(ErrorKind.UPSTREAM_UNREACHABLE, "10.0.0.1: refused"))
    assert error.kind is ErrorKind.CATALOGUE_UNREACHABLE
    assert "10.0.0.1: refused" in error.detail
