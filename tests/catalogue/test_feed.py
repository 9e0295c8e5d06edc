"""The feed against real PostgreSQL: a change is known soon, and nothing is missed for long."""

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from proxy.catalogue.feed import COALESCE_SECONDS, FeedState
from proxy.catalogue.followed_map import FollowedMap
from proxy.catalogue.map_state import Change
from proxy.catalogue.model import Status
from proxy.catalogue.store import HIDDEN_VERSION, SHOW_MAP
from proxy.errors import ErrorKind, ProxyError
from tests.support.catalogue import MAP, insert_map, insert_mapping, insert_shard
from tests.support.followed import (
    SECONDS_MAX,
    Changes,
    FollowedCatalogue,
    key,
    real_times,
    running,
    short_times,
    until,
    where,
)
from tests.support.running import eventually


async def test_a_change_is_known_at_once_and_only_what_changed_is_read(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed()) as followed:
        assert followed.status().feed is FeedState.LISTENING
        assert (where(followed, 5), where(followed, 15), where(followed, 25)) == (
            "one",
            None,
            "two",
        )
        before, changes = catalogue.queries.copy(), Changes(followed)
        mapping_id = await catalogue.insert(1, 10, 20)
        await until(lambda: where(followed, 15) == "two", followed)
        await catalogue.set_status(mapping_id, "offline")
        await until(lambda: _status(followed, 15) is Status.OFFLINE, followed)
        await catalogue.delete(mapping_id)
        await until(lambda: where(followed, 15) is None, followed)
        assert catalogue.queries - before == {"changes": 3}
        assert changes.mapping_ids == {mapping_id}
        assert not changes.everything
        assert followed.feed_counts.reloads == 1
        assert followed.age_seconds == 0.0
        assert catalogue.open_now == 1


def _status(followed: FollowedMap, value: int) -> Status | None:
    located = followed.source.peek(key(value))
    return None if located is None else located.mapping.status


async def test_s67_a_shards_change_reads_no_mapping(catalogue: FollowedCatalogue) -> None:
    async with running(catalogue.followed()) as followed:
        before, changes = catalogue.queries.copy(), Changes(followed)
        await catalogue.execute(
            "update shardmap.shard set host = 'new.example.com' where shard_id = $1",
            catalogue.shards[0],
        )
        await until(lambda: bool(changes.seen), followed)
        found = followed.source.peek(key(5))
        assert found is not None
        assert found.shard.host == "new.example.com"
        assert catalogue.queries - before == {"changes": 1}
        assert {one for change in changes.seen for one in change.shard_ids} == {catalogue.shards[0]}
        assert changes.mapping_ids == set()


@pytest.mark.parametrize(
    "payload",
    ["no json", '{"m": "MAP", "v": "3"}', '{"m": "MAP", "v": 9, "ids": ["zz"]}'],
)
async def test_s55_what_is_no_notification_of_ours_is_counted_and_the_map_is_read(
    catalogue: FollowedCatalogue, payload: str
) -> None:
    times = short_times()
    async with running(catalogue.followed(times)) as followed:
        await catalogue.notify(payload.replace("MAP", str(catalogue.map_id)))
        await until(lambda: followed.feed_counts.reloads == 2, followed)
        assert followed.feed_counts.bad_payloads == 1
        assert followed.status().feed is FeedState.LISTENING
        await catalogue.insert(0, 10, 20)
        await until(lambda: where(followed, 15) == "one", followed)


@pytest.mark.parametrize("ahead", [1, 2, 10**9])
async def test_s55_a_gap_or_a_change_without_ids_is_followed_by_a_reload(
    catalogue: FollowedCatalogue, ahead: int
) -> None:
    times = short_times()
    async with running(catalogue.followed(times)) as followed:
        version = await catalogue.version()
        found = {"m": str(catalogue.map_id), "v": version + ahead}
        if ahead > 1:
            found["ids"] = [str(catalogue.mappings[0])]
        await catalogue.notify(json.dumps(found))
        await until(lambda: followed.feed_counts.reloads == 2, followed)
        assert followed.feed_counts.gaps == 1
        # It goes on from the version that was read, whatever the notification said.
        await catalogue.insert(0, 10, 20)
        await until(lambda: followed.status().version == version + 1, followed)
        assert where(followed, 15) == "one"


@pytest.mark.parametrize("kind", ["ids", "s"])
async def test_s55_a_forged_notification_hides_no_change(
    catalogue: FollowedCatalogue, kind: str
) -> None:
    """Any login may notify. A forged next version made the change that really had it go unseen."""
    async with running(catalogue.followed(short_times())) as followed:
        version = await catalogue.version() + 1
        forged = {"m": str(catalogue.map_id), "v": version, kind: [str(uuid4())]}
        await catalogue.notify(json.dumps(forged))
        await until(lambda: followed.status().version == version, followed)
        await catalogue.insert(0, 10, 20)
        await until(lambda: where(followed, 15) == "one", followed)
        assert followed.status().version == version


async def test_s55_a_forged_version_hides_no_change_while_the_feed_is_lost(
    catalogue: FollowedCatalogue,
) -> None:
    """The change had the version that was known already: the map was not read again."""
    async with running(catalogue.followed(short_times())) as followed:
        version = await catalogue.version() + 1
        forged = {"m": str(catalogue.map_id), "v": version, "ids": [str(uuid4())]}
        await catalogue.notify(json.dumps(forged))
        await until(lambda: followed.status().version == version, followed)
        catalogue.is_down = True
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        await until(lambda: followed.status().feed is FeedState.DOWN, followed)
        await catalogue.insert(0, 10, 20)
        assert await catalogue.version() == version
        catalogue.is_down = False
        await until(lambda: where(followed, 15) == "one", followed)
        assert followed.status().version == version


async def test_s55_a_forged_version_is_not_saved(
    catalogue: FollowedCatalogue, tmp_path: Path
) -> None:
    file = str(tmp_path / "map.snapshot")
    async with running(catalogue.followed(snapshot_file=file)) as followed:
        version = await catalogue.version() + 1
        forged = {"m": str(catalogue.map_id), "v": version, "ids": [str(uuid4())]}
        await catalogue.notify(json.dumps(forged))
        await until(lambda: followed.status().version == version, followed)
    await catalogue.insert(0, 10, 20)
    assert await catalogue.version() == version
    async with running(catalogue.followed(snapshot_file=file)) as followed:
        await until(lambda: where(followed, 15) == "one", followed)


async def test_a_version_that_was_read_and_notified_is_gone_on_from(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(short_times(), poll_seconds=1)) as followed:
        await catalogue.insert(0, 10, 20)
        version = await catalogue.version()
        await until(lambda: followed.state.read_version == version, followed)
        opened = catalogue.opened
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        await until(lambda: catalogue.opened > opened, followed)
        await until(lambda: followed.status().feed is FeedState.LISTENING, followed)
        assert (where(followed, 15), followed.feed_counts.reloads) == ("one", 1)


async def test_s55_a_notification_that_names_another_maps_mapping_brings_none_of_it(
    catalogue: FollowedCatalogue,
) -> None:
    other = await insert_map(catalogue.admin, "others")
    shard = await insert_shard(catalogue.admin, other, "one", "other.example.com", "app")
    foreign = await insert_mapping(catalogue.admin, other, shard, b"", None)
    async with running(catalogue.followed()) as followed:
        changes = Changes(followed)
        forged = {"m": str(catalogue.map_id), "v": await catalogue.version() + 1}
        await catalogue.notify(json.dumps({**forged, "ids": [str(foreign)]}))
        await until(lambda: foreign in changes.mapping_ids, followed)
        assert (where(followed, 5), where(followed, 25)) == ("one", "two")
        assert followed.status().mappings == 2


class BusyCatalogue(FollowedCatalogue):
    """Another map changes while it is not known yet which map is ours."""

    def _count(self, purpose: str) -> None:
        super()._count(purpose)
        if purpose == "map":
            payload = json.dumps({"m": str(uuid4()), "v": 10**6})
            self.stores.execute(MAP, f"select pg_notify('shardmap', '{payload}')")


async def test_another_maps_change_during_the_first_load_reads_nothing_again(
    catalogue: FollowedCatalogue,
) -> None:
    busy = BusyCatalogue(catalogue.stores, catalogue.admin, catalogue.map_id, catalogue.shards)
    async with running(busy.followed()) as followed:
        await busy.insert(0, 10, 20)
        await until(lambda: where(followed, 15) == "one", followed)
        assert followed.feed_counts.reloads == 1
        assert followed.feed_counts.gaps == 0


async def test_an_old_version_is_ignored(catalogue: FollowedCatalogue) -> None:
    async with running(catalogue.followed()) as followed:
        before = catalogue.queries.copy()
        payload = {"m": str(catalogue.map_id), "v": await catalogue.version()}
        await catalogue.notify(json.dumps(payload))
        await catalogue.insert(0, 10, 20)
        await until(lambda: where(followed, 15) == "one", followed)
        assert catalogue.queries - before == {"changes": 1}


async def test_another_maps_changes_read_nothing_of_this_one(catalogue: FollowedCatalogue) -> None:
    async with running(catalogue.followed()) as followed:
        for version in range(1, 30):
            await catalogue.notify(json.dumps({"m": str(uuid4()), "v": version}))
        await until(lambda: followed.feed_counts.foreign == 29, followed)
        await until(lambda: catalogue.queries["version"] >= 2, followed)
        assert followed.feed_counts.reloads == 1
        assert catalogue.queries["version"] <= 4


async def test_s44_ten_thousand_changes_become_one_reload_and_the_end_is_right(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed()) as followed:
        # In one statement: more than 64 rows are notified without their ids.
        await catalogue.execute(
            "insert into shardmap.mapping (map_id, shard_id, lo, hi) select $1, $2,"
            " int4send(n), int4send(n + 1) from generate_series(1000, 11999) n",
            catalogue.map_id,
            catalogue.shards[0],
        )
        await until(lambda: followed.status().mappings == 11_002, followed)
        # One by one, in one transaction: ten thousand notifications at once.
        await catalogue.execute(
            "do $$ declare m uuid; begin"
            " for m in select mapping_id from shardmap.mapping where lo < int4send(12000) loop"
            " update shardmap.mapping set epoch = 7 where mapping_id = m; end loop; end $$"
        )
        version = await catalogue.version()
        await until(lambda: followed.status().version == version, followed)
        # More than a few thousand are pending only if they come faster than they are read.
        assert followed.feed_counts.reloads in (2, 3)
        assert catalogue.queries["changes"] < 50
        ids = await catalogue.admin.fetch("select mapping_id, epoch from shardmap.mapping")
        assert {row["mapping_id"]: row["epoch"] for row in ids} == {
            row["mapping_id"]: found.epoch
            for row in ids
            if (found := followed.state.by_id(row["mapping_id"])) is not None
        }


async def test_a_change_that_follows_another_is_read_soon_and_many_are_read_together(
    catalogue: FollowedCatalogue,
) -> None:
    """The few changes of a move came together: the last, that it is online, was read 50 ms late."""
    first, last = COALESCE_SECONDS
    pauses: list[float] = []
    times = real_times()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await times.sleep(seconds)

    async def changed() -> int:
        await catalogue.set_status(catalogue.mappings[0], "online")
        return await catalogue.version()

    async with running(catalogue.followed(replace(times, sleep=sleep))) as followed:
        version = await changed()
        await until(lambda: followed.status().version == version, followed)
        await eventually(lambda: bool(pauses), "a pause")
        assert pauses[0] == first
        async with asyncio.timeout(SECONDS_MAX):
            while last not in pauses:  # a flood
                await changed()
        assert all(two in (first, min(2 * one, last)) for one, two in pairwise(pauses))
        # A pause in which nothing comes is followed by a short one.
        async with asyncio.timeout(SECONDS_MAX):
            while pauses[-1] != first:
                await changed()
                await times.sleep(last)


async def test_s43_changes_while_the_feed_is_cut_are_known_after_it_comes_back(
    catalogue: FollowedCatalogue,
) -> None:
    times = short_times()
    async with running(catalogue.followed(times)) as followed:
        catalogue.is_down = True
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        await until(lambda: followed.status().feed is FeedState.DOWN, followed)
        assert followed.failure is not None
        assert followed.failure.kind is ErrorKind.CATALOGUE_UNREACHABLE
        await catalogue.execute(
            "update shardmap.mapping set shard_id = $2, epoch = 2 where mapping_id = $1",
            catalogue.mappings[0],
            catalogue.shards[1],
        )
        # What is known is served meanwhile.
        assert (await followed.source.find(key(5))).shard.name == "one"
        catalogue.is_down = False
        await until(lambda: where(followed, 5) == "two", followed)
        assert followed.status().feed is FeedState.LISTENING
        assert followed.failure is None


async def test_a_feed_that_comes_back_to_the_same_version_reads_no_map(
    catalogue: FollowedCatalogue,
) -> None:
    times = short_times()
    async with running(catalogue.followed(times)) as followed:
        await asyncio.get_running_loop().run_in_executor(None, catalogue.end_connections)
        await until(lambda: catalogue.opened == 2, followed)
        await until(lambda: followed.status().feed is FeedState.LISTENING, followed)
        assert followed.feed_counts.reloads == 1


async def test_a_change_whose_notification_is_lost_is_found_by_comparing_versions(
    catalogue: FollowedCatalogue,
) -> None:
    await catalogue.execute("alter table shardmap.mapping disable trigger user")
    async with running(catalogue.followed(poll_seconds=1)) as followed:
        await catalogue.insert(0, 10, 20)
        await catalogue.execute("update shardmap.shard_map set version = version + 1")
        await until(lambda: where(followed, 15) == "one", followed)
        assert followed.feed_counts.gaps == 1


async def test_a_map_that_is_dropped_and_created_anew_is_followed(
    catalogue: FollowedCatalogue,
) -> None:
    times = short_times()
    async with running(catalogue.followed(times, poll_seconds=1)) as followed:
        for table in ("mapping", "shard", "shard_map"):
            await catalogue.execute(f"delete from shardmap.{table}")
        await until(lambda: followed.state.map is None, followed)
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(5))
        assert caught.value.kind is ErrorKind.CATALOGUE_MAP_MISSING
        await catalogue.execute(
            "insert into shardmap.shard_map (name, kind, key_type)"
            " values ('tenants', 'list', 'text')"
        )
        await until(lambda: followed.status().kind == "list", followed)
        await until(lambda: followed.failure is None, followed)


@pytest.mark.parametrize("load", ["eager", "lazy"])
async def test_poll_compares_versions_and_keeps_no_connection(
    catalogue: FollowedCatalogue, load: str
) -> None:
    polling = catalogue.followed(feed="poll", poll_seconds=1, load=load)
    async with running(polling) as followed:
        await until(lambda: followed.status().feed is FeedState.POLLING, followed)
        assert (await followed.source.find(key(5))).shard.name == "one"
        await catalogue.execute(
            "update shardmap.mapping set shard_id = $2, epoch = 2 where mapping_id = $1",
            catalogue.mappings[0],
            catalogue.shards[1],
        )
        await until(lambda: where(followed, 5) == "two", followed)
        await until(lambda: catalogue.open_now == 0, followed)


async def test_off_reads_the_map_once_and_keeps_no_connection(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(feed="off")) as followed:
        await until(lambda: catalogue.open_now == 0, followed)
        assert followed.status().feed is FeedState.OFF
        assert where(followed, 5) == "one"
        queries = catalogue.queries.total()
        await catalogue.insert(0, 10, 20)
        assert (await followed.source.find(key(5))).shard.name == "one"
        assert catalogue.queries.total() == queries + 1  # the hit, which is no question


@pytest.mark.parametrize("feed", ["listen", "off"])
async def test_the_catalogue_is_tried_until_it_answers(
    catalogue: FollowedCatalogue, feed: str
) -> None:
    catalogue.is_down = True
    times = short_times()
    async with running(catalogue.followed(times, feed=feed), loaded=False) as followed:
        async with asyncio.timeout(SECONDS_MAX):
            failure = await followed.first_try()
        assert failure is not None
        assert failure.kind is ErrorKind.CATALOGUE_UNREACHABLE
        assert not followed.is_loaded
        assert followed.age_seconds is None
        catalogue.is_down = False
        await until(lambda: followed.is_loaded, followed)
        assert where(followed, 5) == "one"


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("truncate shardmap.shard_map cascade", ErrorKind.CATALOGUE_MAP_MISSING),
        ("update shardmap.shard_map set key_type = 'int8'", ErrorKind.MAP_MISMATCH),
        ("update shardmap.store_version set major = 2", ErrorKind.STORE_VERSION),
        ("revoke select on shardmap.mapping from READER", ErrorKind.CATALOGUE_REFUSED),
        ("drop schema shardmap cascade", ErrorKind.CATALOGUE_REFUSED),
    ],
)
async def test_s38_what_no_time_helps_is_raised_at_the_first_try(
    catalogue: FollowedCatalogue, sql: str, kind: ErrorKind
) -> None:
    reader = f'"{catalogue.stores.roles.reader}"'
    await catalogue.execute(sql.replace("READER", reader))
    settings = catalogue.stores.settings(
        catalogue.stores.roles.session, **{"shard_maps.tenants": {"key_type": "int4"}}
    )
    followed = FollowedMap(settings, catalogue.open, real_times(), lambda _result: None)
    async with running(followed, loaded=False):
        with pytest.raises(ProxyError) as caught:
            async with asyncio.timeout(SECONDS_MAX):
                await followed.first_try()
        assert caught.value.kind is kind


async def test_lazily_nothing_is_read_before_it_is_asked_for_and_then_it_is_kept_current(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed(load="lazy")) as followed:
        assert followed.status().mappings == 0
        assert followed.status().shards == 2
        assert (await followed.source.find(key(5))).shard.name == "one"
        before = catalogue.queries.copy()
        await catalogue.set_status(catalogue.mappings[0], "offline")
        await until(lambda: _status(followed, 5) is Status.OFFLINE, followed)
        # Of mappings that are not known nothing is read.
        await catalogue.set_status(catalogue.mappings[1], "offline")
        await catalogue.set_status(catalogue.mappings[0], "online")
        await until(lambda: _status(followed, 5) is Status.ONLINE, followed)
        assert catalogue.queries - before == {"changes": 2}
        assert followed.status().mappings == 1


async def test_a_map_that_is_lost_is_served_from_the_cache_until_it_has_its_mappings_back(
    catalogue: FollowedCatalogue,
) -> None:
    times = short_times()
    changes: list[Change] = []
    async with running(catalogue.followed(times, poll_seconds=1)) as followed:
        followed.state.subscribe(changes.append)
        await catalogue.execute("truncate shardmap.shard_map cascade")
        await until(lambda: followed.state.is_lost, followed)
        assert (await followed.source.find(key(5))).shard.name == "one"
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(500))
        assert caught.value.kind is ErrorKind.CATALOGUE_UNREACHABLE
        await catalogue.execute(
            "insert into shardmap.shard_map (map_id, name, kind, key_type, version)"
            " values ($1, 'tenants', 'range', 'int4', $2)",
            *(catalogue.map_id, HIDDEN_VERSION),
        )
        await until(lambda: "its mappings back" in str(followed.failure), followed)
        assert where(followed, 5) == "one"
        assert changes == []
        await catalogue.execute(SHOW_MAP, catalogue.map_id)
        await until(lambda: followed.failure is None, followed)
        assert where(followed, 5) is None
