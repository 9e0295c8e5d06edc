"""Reading the catalogue: each function against rows in a real PostgreSQL."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from proxy.catalogue import store
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.model import Mapping, Status
from proxy.catalogue.schema import migrate_catalogue
from proxy.catalogue.store import Location, Span
from proxy.catalogue.transactions import transaction
from proxy.routing.keys import KeyType, parse_key
from proxy.routing.shard_map import Kind
from tests.support.catalogue import MAP, Stores, insert_map, insert_mapping, insert_shard


def key(value: int) -> bytes:
    return parse_key(str(value), KeyType.INT4)


@dataclass(slots=True)
class Filled:
    """A catalogue with a range map over two shards: [0,10) one, [20,30) two, [30,+inf) one."""

    connection: Any
    map_id: UUID
    one: UUID
    two: UUID
    mappings: list[UUID] = field(default_factory=list)


@pytest_asyncio.fixture
async def filled(stores: Stores) -> AsyncIterator[Filled]:
    async with stores.connect(MAP) as connection:
        await migrate_catalogue(connection)
        map_id = await insert_map(connection)
        one = await insert_shard(connection, map_id, "one", "one.example.com", "app")
        two = await insert_shard(connection, map_id, "two", "two.example.com", "app")
        made = Filled(connection, map_id, one, two)
        for shard, lo, hi in ((one, 0, 10), (two, 20, 30), (one, 30, None)):
            bounds = key(lo), None if hi is None else key(hi)
            made.mappings.append(await insert_mapping(connection, map_id, shard, *bounds))
        yield made


def ids(mappings: list[Mapping]) -> list[UUID]:
    return [mapping.mapping_id for mapping in mappings]


async def test_s5_a_key_is_located_with_its_shard_and_an_uncovered_one_is_not(
    filled: Filled,
) -> None:
    for value, index, shard in (
        (0, 0, "one"),
        (9, 0, "one"),
        (20, 1, "two"),
        (2**31 - 1, 2, "one"),
    ):
        found = await store.locate(filled.connection, filled.map_id, key(value))
        assert found is not None
        assert found.mapping.mapping_id == filled.mappings[index]
        assert (found.shard.name, found.shard.host) == (shard, f"{shard}.example.com")
    for value in (-1, 10, 19):
        assert await store.locate(filled.connection, filled.map_id, key(value)) is None
    assert await store.locate(filled.connection, uuid4(), key(5)) is None


async def test_s9_mappings_are_listed_by_range_by_shard_and_all_in_order(filled: Filled) -> None:
    async def listed(span: Span, limit: int = 100) -> list[UUID]:
        return ids(await store.read_mappings(filled.connection, filled.map_id, span, limit))

    first, second, third = filled.mappings
    assert await listed(Span()) == [first, second, third]
    assert await listed(Span(shard_id=filled.one)) == [first, third]
    assert await listed(Span(), limit=2) == [first, second]
    # Those that overlap [low, high).
    assert await listed(Span(low=key(5))) == [first, second, third]
    assert await listed(Span(low=key(10))) == [second, third]
    assert await listed(Span(high=key(20))) == [first]
    assert await listed(Span(high=key(21))) == [first, second]
    assert await listed(Span(key(9), key(20))) == [first]
    assert await listed(Span(key(10), key(20))) == []
    assert await listed(Span(key(25), key(26), filled.two)) == [second]
    assert await listed(Span(key(25), key(26), filled.one)) == []


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 5])
async def test_a_stream_is_the_list_in_chunks(
    filled: Filled, chunk_rows: int, limit: int | None
) -> None:
    streamed: list[Mapping] = []
    async for chunk in store.stream_mappings(
        filled.connection, filled.map_id, Span(), limit, chunk_rows
    ):
        assert 0 < len(chunk) <= chunk_rows
        streamed += chunk
    assert ids(streamed) == filled.mappings[:limit]


async def test_a_stream_in_a_snapshot_does_not_see_what_changes_meanwhile(
    filled: Filled, stores: Stores
) -> None:
    seen: list[Mapping] = []
    async with transaction(filled.connection, read_only=True):
        async for chunk in store.stream_mappings(
            filled.connection, filled.map_id, Span(), chunk_rows=1
        ):
            seen += chunk
            async with stores.connect(MAP) as other:
                await other.execute("delete from shardmap.mapping")
    assert ids(seen) == filled.mappings


async def test_a_stream_reads_each_row_once_of_a_table_without_statistics(filled: Filled) -> None:
    # A million rows that were just added took minutes: each chunk sorted all rows that follow.
    rows = 20_000
    await filled.connection.execute(
        "insert into shardmap.mapping (map_id, shard_id, lo, hi)"
        " select $1, $2, int4send(n), int4send(n + 1) from generate_series(1, $3::int4) n",
        filled.map_id,
        filled.two,
        rows,
    )
    fetched = (
        "select sum(pg_catalog.pg_stat_get_xact_tuples_fetched(c.oid))::int8 from pg_class c"
        " left join pg_index i on i.indexrelid = c.oid"
        " where 'shardmap.mapping'::regclass in (c.oid, i.indrelid)"
    )
    found = 0
    async with transaction(filled.connection, read_only=True):
        before = await filled.connection.fetchval(fetched)
        async for chunk in store.stream_mappings(
            filled.connection, filled.map_id, Span(), chunk_rows=1000
        ):
            found += len(chunk)
        read = await filled.connection.fetchval(fetched) - before
    assert found == rows + len(filled.mappings)
    assert found <= read < 1.1 * found


async def test_s60_a_look_up_reads_one_row_however_many_mappings_there_are(filled: Filled) -> None:
    await filled.connection.execute(
        "insert into shardmap.mapping (map_id, shard_id, lo, hi)"
        " select $1, $2, int4send(n), int4send(n + 1) from generate_series(1, 20000, 2) n",
        filled.map_id,
        filled.two,
    )
    await filled.connection.execute("analyze shardmap.mapping")
    for value in (20_002, 18_001, 18_002):  # above all, covered, and in a gap
        sought = value.to_bytes(4)
        plan = "\n".join(
            row[0]
            for row in await filled.connection.fetch(
                f"explain (analyze, timing off, costs off) {store._LOCATE}", filled.map_id, sought
            )
        )
        assert re.search(r"Index Scan Backward .*rows=[01](\.00)? loops=1", plan), plan


async def test_maps_shards_counts_and_locations(filled: Filled) -> None:
    connection = filled.connection
    other = await insert_map(connection, "hashed", "hash", "text")
    await insert_shard(connection, other, "one", "one.example.com", "app")
    maps = await store.read_maps(connection)
    found = [(one.map.name, one.map.spec.kind, one.shards, one.mappings) for one in maps]
    assert found == [("hashed", Kind.HASH, 1, 0), ("tenants", Kind.RANGE, 2, 3)]
    assert await store.read_locations(connection) == [
        Location("one.example.com", 5432, "app", 2),
        Location("two.example.com", 5432, "app", 1),
    ]
    assert [shard.name for shard in await store.read_shards(connection, filled.map_id)] == [
        "one",
        "two",
    ]
    counts = await store.count_mappings(connection, filled.map_id)
    assert counts == {filled.one: 2, filled.two: 1}
    versions = await store.read_versions(connection)
    # One for each change of the map's shards and mappings.
    assert versions == {filled.map_id: 6, other: 2}
    by_id = await store.mappings_by_id(connection, [filled.mappings[1], uuid4()])
    assert ids(by_id) == [filled.mappings[1]]
    (shard,) = await store.shards_by_id(connection, [filled.two, uuid4()])
    assert (shard.name, shard.location, shard.status) == (
        "two",
        "two.example.com:5432/app",
        Status.ONLINE,
    )


async def test_a_name_that_is_not_there_is_refused_by_its_reason(filled: Filled) -> None:
    owner = await store.read_map(filled.connection, "tenants")
    assert (await store.read_shard(filled.connection, owner, "two")).shard_id == filled.two
    with pytest.raises(CatalogueError, match="no map Tenants") as refused:
        await store.read_map(filled.connection, "Tenants")
    assert (refused.value.reason, refused.value.sqlstate) == ("unknown_map", "42704")
    with pytest.raises(CatalogueError, match="no shard three") as refused:
        await store.read_shard(filled.connection, owner, "three")
    assert (refused.value.reason, refused.value.sqlstate) == ("unknown_shard", "42704")


async def test_a_lock_counts_until_its_time_is_over(filled: Filled) -> None:
    for interval, locked in (("1 hour", True), ("-1 hour", False)):
        await filled.connection.execute(
            "update shardmap.mapping set lock_owner = gen_random_uuid(),"
            f" locked_until = now() + interval '{interval}' where mapping_id = $1",
            filled.mappings[0],
        )
        (mapping,) = await store.mappings_by_id(filled.connection, filled.mappings[:1])
        assert mapping.locked is locked


async def test_the_store_is_checked_before_it_is_read(stores: Stores) -> None:
    async with stores.connect(MAP) as connection:
        with pytest.raises(CatalogueError) as refused:
            await store.check_store(connection)
        assert refused.value.reason == "store_missing"
        await migrate_catalogue(connection)
        await store.check_store(connection, writes=True)
        await connection.execute("update shardmap.store_version set minor = 3")
        await store.check_store(connection, writes=True)
    async with stores.connect(MAP, stores.roles.reader) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await store.check_store(connection)
