"""A proxy that starts while the catalogue cannot be reached, from what it saved before."""

import asyncio
import stat
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import pytest

from proxy.catalogue.feed import FeedState
from proxy.catalogue.followed_map import FollowedMap, place_of
from proxy.catalogue.map_state import MapState, Times
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.packed_rows import RowChunk
from proxy.catalogue.snapshot_file import CataloguePlace, SavedMap, opened, write
from proxy.catalogue.snapshot_keeper import WRITE_PAUSE_SECONDS, SnapshotKeeper
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.followed import (
    FollowedCatalogue,
    key,
    real_times,
    running,
    short_times,
    until,
    where,
)
from tests.support.mappings import MAP_ID, SHARDS, chunk_of, mapping


def saved_rows(catalogue: FollowedCatalogue, file: Path) -> int:
    with opened(file, place_of(catalogue.settings()), "tenants") as (_saved, chunks):
        return sum(map(len, chunks))


async def test_it_serves_from_the_file_and_goes_on_when_the_catalogue_is_back(
    catalogue: FollowedCatalogue, tmp_path: Path
) -> None:
    file = tmp_path / "map.snapshot"
    async with running(catalogue.followed(snapshot_file=str(file))) as followed:
        assert followed.status().source == "catalogue"
        await until(file.exists, followed)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    catalogue.is_down = True
    await catalogue.execute(
        "update shardmap.mapping set shard_id = $2, epoch = 2 where mapping_id = $1",
        catalogue.mappings[1],
        catalogue.shards[0],
    )
    async with running(catalogue.followed(short_times(), snapshot_file=str(file))) as followed:
        await until(lambda: followed.failure is not None, followed)
        status = followed.status()
        assert (status.source, status.feed, status.mappings) == ("snapshot", FeedState.DOWN, 2)
        assert status.age_seconds is None
        assert (await followed.source.find(key(25))).shard.name == "two"
        catalogue.is_down = False
        await until(lambda: where(followed, 25) == "one", followed)
        assert followed.status().source == "catalogue"


async def test_a_file_of_the_same_version_saves_the_load(
    catalogue: FollowedCatalogue, tmp_path: Path
) -> None:
    file = tmp_path / "map.snapshot"
    async with running(catalogue.followed(snapshot_file=str(file))) as followed:
        await until(file.exists, followed)
    before = catalogue.queries["load"]
    async with running(catalogue.followed(snapshot_file=str(file))) as followed:
        await until(lambda: followed.status().feed is FeedState.LISTENING, followed)
        assert followed.status().source == "catalogue"
        assert catalogue.queries["load"] == before


async def test_changes_are_written_once_in_a_while_and_at_the_end(
    catalogue: FollowedCatalogue, tmp_path: Path
) -> None:
    file = tmp_path / "map.snapshot"
    waits: list[float] = []
    goes_on = asyncio.Event()

    async def sleep(seconds: float) -> None:
        if seconds == WRITE_PAUSE_SECONDS:
            waits.append(seconds)
            await goes_on.wait()
        else:
            await real_times().sleep(seconds)

    times: Times = replace(real_times(), sleep=sleep)
    async with running(catalogue.followed(times, snapshot_file=str(file))) as followed:
        await until(lambda: bool(waits), followed)
        assert saved_rows(catalogue, file) == 2
        await catalogue.insert(0, 10, 20)
        await until(lambda: where(followed, 15) == "one", followed)
        assert saved_rows(catalogue, file) == 2
        goes_on.set()
        await until(lambda: len(waits) == 2, followed)
        goes_on.clear()
        assert saved_rows(catalogue, file) == 3
        await catalogue.insert(0, 30, 40)
        await until(lambda: where(followed, 35) == "one", followed)
    assert saved_rows(catalogue, file) == 4


def _of_another_catalogue(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"port": ', b'"port": 1', 1))


def _damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [_of_another_catalogue, _damaged, _unreadable])
async def test_a_file_that_cannot_be_used_is_a_warning(
    catalogue: FollowedCatalogue,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
) -> None:
    file = tmp_path / "map.snapshot"
    async with running(catalogue.followed(snapshot_file=str(file))) as followed:
        await until(file.exists, followed)
    spoil(file)
    async with running(catalogue.followed(snapshot_file=str(file))) as followed:
        assert where(followed, 5) == "one"
        assert "the snapshot of the shard map is not used" in capsys.readouterr().out
        await until(lambda: followed.status().feed is FeedState.LISTENING, followed)


@pytest.mark.parametrize("seed", range(20))
async def test_rows_of_garbage_are_a_warning_or_an_empty_part_of_the_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """The file's sums are right: it was not damaged, but made."""
    random = Random(seed)
    rows = [mapping(key(at), key(at + 1), at + 1) for at in range(0, 40, 2)]
    chunk = chunk_of(rows)
    column = random.choice([field.name for field in fields(RowChunk)])
    content = bytes(random.randrange(256) for _ in getattr(chunk, column))
    place = CataloguePlace("map.example.com", 5432, "shardmap")
    found = CatalogueMap(MAP_ID, "tenants", MapSpec(Kind.RANGE, KeyType.INT4), 7)
    saved = SavedMap(place, found, tuple(SHARDS.values()))
    file = tmp_path / "map.snapshot"
    write(file, saved, [replace(chunk, **{column: content})])
    state = MapState("tenants", real_times())
    is_restored = await SnapshotKeeper(str(file), place, state, lambda _map: None).restore()
    for at in range(-1, 41):
        located = state.find(key(at))
        if located is not None:
            state.refusal(located.shard)
    warnings = capsys.readouterr().out.count("the snapshot of the shard map is not used")
    assert warnings == (0 if is_restored else 1)


async def test_a_saved_map_of_another_kind_than_is_configured_is_not_used(
    catalogue: FollowedCatalogue, tmp_path: Path
) -> None:
    file = tmp_path / "map.snapshot"
    async with running(catalogue.followed(snapshot_file=str(file))) as followed:
        await until(file.exists, followed)
    catalogue.is_down = True
    settings = catalogue.stores.settings(
        catalogue.stores.roles.session,
        **{"catalogue": {"snapshot_file": str(file)}, "shard_maps.tenants": {"kind": "hash"}},
    )
    one = FollowedMap(settings, catalogue.open, short_times(), lambda _result: None)
    async with running(one, loaded=False) as followed:
        await until(lambda: followed.failure is not None, followed)
        assert not followed.is_loaded


async def test_s49_a_remapped_shard_is_known_with_its_new_workspace_and_host_together(
    catalogue: FollowedCatalogue,
) -> None:
    async with running(catalogue.followed()) as followed:
        old = await followed.source.find(key(5))
        await catalogue.execute(
            "update shardmap.shard set host = 'new.example.com', workspace = 'b'"
            " where shard_id = $1",
            catalogue.shards[0],
        )
        await until(lambda: _host(followed) == "new.example.com", followed)
        new = await followed.source.find(key(5))
        assert (new.shard.host, new.shard.workspace) == ("new.example.com", "b")
        # What a session under way holds does not change.
        assert (old.shard.host, old.shard.workspace) == ("one.example.com", "")


def _host(followed: FollowedMap) -> str:
    located = followed.source.peek(key(5))
    return "" if located is None else located.shard.host


async def test_without_the_catalogue_and_without_a_file_nothing_is_served(
    catalogue: FollowedCatalogue, tmp_path: Path
) -> None:
    catalogue.is_down = True
    followed = catalogue.followed(short_times(), snapshot_file=str(tmp_path / "none"))
    async with running(followed, loaded=False):
        failure = await followed.first_try()
        assert failure is not None
        with pytest.raises(ProxyError) as caught:
            await followed.source.find(key(5), deadline=followed.state.times.clock() + 0.1)
        assert caught.value.kind is ErrorKind.CATALOGUE_UNREACHABLE
