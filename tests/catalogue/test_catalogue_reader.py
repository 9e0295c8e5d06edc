"""What is read of the catalogue: columns that are the rows, and errors that clients get."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from proxy.catalogue import store
from proxy.catalogue.cache import Build
from proxy.catalogue.catalogue_reader import StoreReader
from proxy.catalogue.model import Mapping
from proxy.catalogue.packed_rows import CHUNK_ROWS_MAX, READ_NEXT_CHUNK, RowChunk, moment
from proxy.catalogue.store import Span
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.followed import FollowedCatalogue, key

INSERT = (
    "insert into shardmap.mapping (map_id, shard_id, lo, hi, status, sessions, drain_until, epoch,"
    " op_id) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
)
SPEC = MapSpec(Kind.RANGE, KeyType.TEXT)


async def rows_of(chunks: AsyncIterator[RowChunk], map_id: UUID) -> list[Mapping]:
    build = Build(map_id, SPEC)
    async for chunk in chunks:
        build.append(chunk)
    for _ in build.steps():
        pass
    assert build.builder.bad == []
    table = build.builder.table()
    return [table.mapping(at) for at in range(len(table))]


async def read_all(catalogue: FollowedCatalogue) -> list[Mapping]:
    async with catalogue.open() as reader, reader.snapshot():
        return await rows_of(reader.chunks(catalogue.map_id), catalogue.map_id)


async def stored(catalogue: FollowedCatalogue) -> list[Mapping]:
    found = store.stream_mappings(catalogue.admin, catalogue.map_id, Span())
    return [row async for chunk in found for row in chunk]


async def test_the_columns_are_the_rows_whatever_these_have(catalogue: FollowedCatalogue) -> None:
    await catalogue.execute("delete from shardmap.mapping")
    moment = datetime(2026, 11, 29, 1, 2, 3, 456789, UTC)
    one, two = catalogue.shards
    for lo, hi, status, sessions, drain, epoch, op_id, shard in (
        (b"", b"a", "online", "kill", None, 1, None, one),
        (b"a", b"a\0", "offline", "drain", moment, 2**63 - 1, None, two),
        (b"b", b"c" * 129, "online", "keep", None, 7, uuid4(), one),
        (b"d" * 128, b"d" * 128 + b"\0", "offline", "kill", moment, 3, uuid4(), one),
        (b"e", b"f", "online", "kill", datetime(1969, 1, 1, tzinfo=UTC), 1, None, two),
        (b"f", None, "offline", "keep", None, 1, uuid4(), two),
    ):
        columns = (catalogue.map_id, shard, lo, hi, status, sessions, drain, epoch, op_id)
        await catalogue.execute(INSERT, *columns)
    found = await read_all(catalogue)
    assert found == await stored(catalogue)
    assert len(found) == 6


async def test_a_map_of_many_chunks_is_read_in_order_without_a_row_twice(
    catalogue: FollowedCatalogue,
) -> None:
    count = CHUNK_ROWS_MAX + 17
    await catalogue.execute("delete from shardmap.mapping")
    await catalogue.execute(
        "insert into shardmap.mapping (map_id, shard_id, lo, hi) select $1, $2,"
        " int4send(n), int4send(n + 1) from generate_series(1, $3::int4) n",
        catalogue.map_id,
        catalogue.shards[0],
        count,
    )
    async with catalogue.open() as reader, reader.snapshot():
        sizes = [len(chunk) async for chunk in reader.chunks(catalogue.map_id)]
        assert sizes == [CHUNK_ROWS_MAX, 17]
        # Nothing has analyzed the table: a chunk is an index scan all the same.
        assert isinstance(reader, StoreReader)
        arguments = catalogue.map_id, b"", CHUNK_ROWS_MAX
        plan = await reader._connection.fetch(f"explain {READ_NEXT_CHUNK}", *arguments)
        assert "Index Scan" in str(plan)
        assert "Sort" not in str(plan)
        rows = await rows_of(reader.chunks(catalogue.map_id), catalogue.map_id)
    assert [int.from_bytes(row.lo) for row in rows] == list(range(1, count + 1))


async def test_an_empty_map_and_one_of_exactly_one_chunk(catalogue: FollowedCatalogue) -> None:
    await catalogue.execute("delete from shardmap.mapping")
    assert await read_all(catalogue) == []
    await catalogue.execute(
        "insert into shardmap.mapping (map_id, shard_id, lo, hi) select $1, $2,"
        " int4send(n), int4send(n + 1) from generate_series(1, $3::int4) n",
        catalogue.map_id,
        catalogue.shards[0],
        CHUNK_ROWS_MAX,
    )
    assert len(await read_all(catalogue)) == CHUNK_ROWS_MAX


async def test_all_that_is_read_in_a_snapshot_is_of_one_moment(
    catalogue: FollowedCatalogue,
) -> None:
    async with catalogue.open() as reader, reader.snapshot():
        before = await reader.read_map("tenants")
        await catalogue.insert(0, 10, 20)
        assert await reader.read_map("tenants") == before
        assert before is not None
        assert await reader.version(before.map_id) == before.version
        assert len(await rows_of(reader.chunks(catalogue.map_id), catalogue.map_id)) == 2


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("revoke select on shardmap.shard_map from READER", ErrorKind.CATALOGUE_REFUSED),
        ("drop schema shardmap cascade", ErrorKind.CATALOGUE_REFUSED),
    ],
)
async def test_an_error_of_the_server_is_what_a_client_gets(
    catalogue: FollowedCatalogue, sql: str, kind: ErrorKind
) -> None:
    await catalogue.execute(sql.replace("READER", f'"{catalogue.stores.roles.reader}"'))
    async with catalogue.open() as reader:
        with pytest.raises(ProxyError) as caught:
            await reader.version(catalogue.map_id)
    assert caught.value.kind is kind
    assert "the catalogue" in caught.value.detail
    assert key(5).hex() not in caught.value.detail


def test_a_time_that_python_does_not_have_becomes_its_nearest() -> None:
    assert moment(2**63 - 1).year == 9999
    assert moment(-(2**63)).year == 1
    assert moment(-(2**63)).tzinfo is UTC


async def test_columns_that_do_not_fit_together_are_refused() -> None:
    names = ("ids", "shards", "los", "lo_sizes", "his", "hi_sizes", "epochs", "ops", "drains")
    whole = {
        **dict.fromkeys(names, b""),
        "ids": bytes(16),
        "shards": bytes(16),
        "lo_sizes": b"\0\1",
        "los": b"a",
        "hi_sizes": b"\0\0",
        "epochs": bytes(8),
        "flags": b"\1",
    }
    assert len(RowChunk.of(whole)) == 1
    for name, column in whole.items():
        with pytest.raises(ValueError, match="do not fit"):
            RowChunk.of({**whole, name: column + b"\1"})
    for flags in (b"\x80", b"\x03", b"\x21", b"\x41"):
        with pytest.raises(ValueError, match="do not fit"):
            RowChunk.of({**whole, "flags": flags})
