"""The map in memory: as a naive model, whatever changes and whenever a table is built."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.catalogue.cache import LOGGED_MAX, RECENT_MAX, Build, MappingCache
from proxy.catalogue.model import Located, Mapping, Status
from proxy.catalogue.packed_rows import CHUNK_ROWS_MAX
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.mappings import (
    FIRST_SHARD,
    MAP_ID,
    SHARDS,
    SPECS,
    chunk_of,
    mapping,
    mappings,
    overlaps_not,
    routing_keys,
    sorted_apart,
)

INT4 = MapSpec(Kind.RANGE, KeyType.INT4)


class NaiveMap:
    """A list that every question walks through."""

    def __init__(self, rows: Sequence[Mapping]) -> None:
        self.rows = list(rows)

    def find(self, key: bytes) -> Mapping | None:
        return next((row for row in self.rows if row.covers(key)), None)

    def insert(self, new: Mapping) -> None:
        self.rows = [
            row for row in self.rows if row.mapping_id != new.mapping_id and overlaps_not(row, new)
        ]
        self.rows.append(new)

    def remove(self, mapping_id: UUID) -> None:
        self.rows = [row for row in self.rows if row.mapping_id != mapping_id]

    def remove_at(self, key: bytes) -> None:
        self.rows = [row for row in self.rows if not row.covers(key)]


def built(cache: MappingCache, rows: Sequence[Mapping], size: int = 3) -> Build:
    build = cache.start_build()
    for at in range(0, len(rows), size):
        build.append(chunk_of(rows[at : at + size]))
    for _ in build.steps():
        pass
    return build


def loaded(spec: MapSpec, rows: Sequence[Mapping]) -> MappingCache:
    cache = MappingCache(MAP_ID, spec)
    cache.set_shards(SHARDS)
    assert cache.exchange(built(cache, rows))
    return cache


def rebuilt(cache: MappingCache) -> Build:
    build = cache.start_build()
    for chunk in cache.chunks():
        build.append(chunk)
    return build


def check(cache: MappingCache, naive: NaiveMap, keys: Sequence[bytes]) -> None:
    assert len(cache) == len(naive.rows)
    for row in naive.rows:
        assert cache.by_id(row.mapping_id) == row
    bounds = [bound for row in naive.rows for bound in (row.lo, row.hi) if bound]
    for key in (*keys, *bounds):
        found, expected = cache.find(key), naive.find(key)
        assert (found and found.mapping) == expected
        if found is not None and expected is not None:
            assert found.shard == SHARDS[expected.shard_id]
    copy = rebuilt(cache)
    for _ in copy.steps():
        pass
    assert copy.builder.bad == []
    table = copy.builder.table()
    rows = [table.mapping(at) for at in range(len(table))]
    assert rows == sorted(naive.rows, key=lambda row: row.lo)


def rows_of(cache: MappingCache) -> list[Mapping]:
    table = cache._rows.table
    return [table.mapping(at) for at in range(len(table))]


@given(st.data())
def test_it_is_the_naive_map_after_any_changes(data: st.DataObject) -> None:
    spec = data.draw(SPECS)
    rows = st.lists(mappings(spec), max_size=8).map(sorted_apart)
    first = data.draw(rows)
    cache, naive = loaded(spec, first), NaiveMap(first)
    keys = data.draw(st.lists(routing_keys(spec), max_size=20))
    build: Build | None = None
    steps: Iterator[None] = iter([])
    for _ in range(data.draw(st.integers(0, 15))):
        match data.draw(st.sampled_from(["insert", "insert", "remove", "at", "build", "step"])):
            case "insert":
                new = data.draw(mappings(spec))
                before = {row.mapping_id for row in naive.rows}
                naive.insert(new)
                after = {row.mapping_id for row in naive.rows} - {new.mapping_id}
                assert set(cache.insert(new)) == before - after
            case "remove":
                number = data.draw(st.integers(1, 40))
                was = cache.by_id(UUID(int=number << 64)) is not None
                assert cache.remove(UUID(int=number << 64)) == was
                naive.remove(UUID(int=number << 64))
            case "at":
                key = data.draw(routing_keys(spec))
                found = naive.find(key)
                assert cache.remove_at(key) == ([found.mapping_id] if found else [])
                naive.remove_at(key)
            case "build":
                build = rebuilt(cache)
                steps = build.steps()
            case "step":
                if build is not None and next(steps, "done") == "done":
                    assert cache.exchange(build)
                    build = None
    if build is not None:
        for _ in steps:
            pass
        assert cache.exchange(build)
    check(cache, naive, keys)


@given(st.data())
def test_an_exchange_replaces_what_was_known(data: st.DataObject) -> None:
    spec = data.draw(SPECS)
    rows = st.lists(mappings(spec), max_size=8).map(sorted_apart)
    cache = loaded(spec, data.draw(rows))
    second = data.draw(rows)
    build = built(cache, second)
    change = data.draw(mappings(spec))
    cache.insert(change)
    assert cache.exchange(build)
    naive = NaiveMap(second)
    naive.insert(change)
    check(cache, naive, data.draw(st.lists(routing_keys(spec), max_size=20)))


def key(value: int) -> bytes:
    return (value + 2**31).to_bytes(4)


def test_s22_a_look_up_changes_nothing() -> None:
    cache = loaded(INT4, [mapping(key(0), key(10))])
    before = list(cache.chunks())
    assert cache.find(key(5)) is not None
    assert cache.find(key(10)) is None
    assert list(cache.chunks()) == before


def test_s19_what_is_removed_is_not_found() -> None:
    rows = [mapping(key(n), key(n + 1), n) for n in range(1, 5)]
    cache = loaded(INT4, rows)
    cache.remove(rows[1].mapping_id)
    assert cache.find(key(2)) is None
    assert cache.find(key(1)) is not None
    assert cache.find(key(3)) is not None


def test_s67_a_shards_change_touches_no_mapping() -> None:
    cache = loaded(INT4, [mapping(key(0), key(10)), mapping(key(10), None, 2)])
    cache.insert(mapping(key(20), key(30), 3))
    table = cache._rows.table
    moved = replace(SHARDS[FIRST_SHARD], host="other.example.com")
    cache.set_shards({**SHARDS, FIRST_SHARD: moved})
    found = [cache.find(key(value)) for value in (5, 25)]
    assert [one and one.shard for one in found] == [moved, moved]
    assert found[0] == Located(mapping(key(0), key(10)), moved)
    assert len({found[0], Located(mapping(key(0), key(10)), moved)}) == 1
    assert cache._rows.table is table
    cache.set_shards({})
    assert cache.find(key(5)) is None
    assert len(cache) == 2


def test_a_mapping_whose_shard_is_not_known_is_not_found() -> None:
    cache = MappingCache(MAP_ID, INT4)
    cache.insert(mapping(key(0), None))
    assert cache.find(key(1)) is None
    cache.set_shards(SHARDS)
    assert cache.find(key(1)) is not None


def test_an_empty_cache_finds_nothing_and_can_be_cleared() -> None:
    cache = MappingCache(MAP_ID, INT4)
    assert (len(cache), cache.find(key(0)), list(cache.chunks())) == (0, None, [])
    cache = loaded(INT4, [mapping(b"", None)])
    build = built(cache, [])
    cache.clear()
    assert not cache.exchange(build)
    assert list(cache.chunks()) == []


def test_a_second_build_voids_the_first() -> None:
    cache = loaded(INT4, [])
    first = built(cache, [mapping(b"", None)])
    second = built(cache, [])
    assert not cache.exchange(first)
    assert cache.exchange(second)
    assert len(cache) == 0


def test_many_changes_ask_for_a_build_and_void_one_that_is_under_way() -> None:
    rows = [mapping(key(n), key(n + 1), n + 1) for n in range(2 * RECENT_MAX)]
    cache = loaded(INT4, [])
    for row in rows[:RECENT_MAX]:
        cache.insert(row)
    assert not cache.wants_build()
    cache.insert(rows[RECENT_MAX])
    assert cache.wants_build()
    build = rebuilt(cache)
    for row in rows[: LOGGED_MAX + 1]:
        cache.remove(row.mapping_id)
    for _ in build.steps():
        pass
    assert not cache.exchange(build)
    assert len(cache) == RECENT_MAX - LOGGED_MAX
    build = rebuilt(cache)
    for _ in build.steps():
        pass
    assert cache.exchange(build)
    assert not cache.wants_build()
    assert len(cache) == RECENT_MAX - LOGGED_MAX
    for row in rows[LOGGED_MAX + 1 : RECENT_MAX]:
        cache.remove(row.mapping_id)
    assert len(cache) == 1


def test_a_large_map_is_written_in_chunks_and_built_in_steps() -> None:
    count = CHUNK_ROWS_MAX + 500
    rows = [mapping(key(n), key(n + 1), n + 1) for n in range(0, count * 2, 2)]
    cache = loaded(INT4, rows)
    assert len(cache) == count
    cache.remove(rows[17].mapping_id)
    cache.insert(mapping(key(-10), key(-5), 10**9, status=Status.OFFLINE))
    chunks = list(cache.chunks())
    assert [len(chunk) for chunk in chunks] == [CHUNK_ROWS_MAX, 500]
    order = random.Random(3).sample(range(count), 2000)
    for at in order:
        found = cache.find(rows[at].lo)
        assert (found and found.mapping) == (None if at == 17 else rows[at])


@pytest.mark.parametrize(
    ("spec", "rows", "kept", "said"),
    [
        (
            INT4,
            [mapping(key(0), key(9), 1), mapping(key(5), key(20), 2), mapping(key(20), None, 3)],
            [1, 3],
            "overlaps",
        ),
        (INT4, [mapping(key(0), None, 1), mapping(key(5), key(20), 2)], [1], "overlaps"),
        (INT4, [mapping(key(0), key(1), 1), mapping(key(3), key(2), 2)], [1], "not above"),
        (INT4, [mapping(b"abc", key(1), 1), mapping(key(3), key(4), 2)], [2], "another size"),
        (
            INT4,
            [mapping(key(0), key(1) + b"\0", 1), mapping(key(3), key(4), 2)],
            [2],
            "another size",
        ),
        (
            MapSpec(Kind.LIST, KeyType.INT4),
            [mapping(key(0), key(0) + b"\0", 1), mapping(key(1), key(3), 2)],
            [1],
            "single key",
        ),
        (
            MapSpec(Kind.RANGE, KeyType.TEXT),
            [mapping(b"", b"a" * 129, 1), mapping(b"b", b"b" * 130, 2)],
            [1],
            "another size",
        ),
    ],
)
def test_s63_a_row_that_cannot_be_right_is_left_out_and_its_shard_reported(
    spec: MapSpec, rows: list[Mapping], kept: list[int], said: str
) -> None:
    for size in (1, 3):
        cache = MappingCache(MAP_ID, spec)
        cache.set_shards(SHARDS)
        build = built(cache, rows, size)
        assert cache.exchange(build)
        assert [row.mapping_id.int >> 64 for row in rows_of(cache)] == kept
        bad = {row.mapping_id.int >> 64 for row in build.builder.bad}
        assert bad == {row.mapping_id.int >> 64 for row in rows} - set(kept)
        assert all(said in fault for fault in build.builder.refused.values())
        assert said in build.builder.bad[0].reason
