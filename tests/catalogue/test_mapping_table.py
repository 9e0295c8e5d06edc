"""Look-ups in tables of many rows, whose bounds are near each other in some parts and far apart."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from proxy.catalogue.mapping_table import MappingTable
from proxy.catalogue.model import Mapping
from proxy.catalogue.table_builder import TableBuilder
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.mappings import MAP_ID, SHARDS, chunk_of, mapping

ROWS = 12_000


def table_of(spec: MapSpec, rows: Sequence[Mapping]) -> MappingTable:
    builder = TableBuilder(MAP_ID, spec)
    builder.append(chunk_of(rows))
    for _ in builder.finish():
        pass
    assert builder.bad == []
    table = builder.table()
    table.set_shards(SHARDS)
    return table


def bounds(generator: random.Random, size: int, prefix: bytes) -> list[bytes]:
    """Return bounds of which half are within a thousandth of all keys."""
    bits = 8 * (size - len(prefix))
    near = (generator.randrange(1 << bits - 10) for _ in range(ROWS // 2))
    far = (generator.randrange(1 << bits) for _ in range(ROWS // 2))
    return sorted({prefix + number.to_bytes(size - len(prefix)) for number in (*near, *far)})


def ranges(los: Sequence[bytes], *, is_open: bool) -> Iterator[Mapping]:
    """Yield mappings between neighbours, with a gap after each tenth."""
    if is_open:
        yield mapping(b"", los[0], ROWS)
    for at in range(len(los) - 1):
        if at % 10:
            yield mapping(los[at], los[at + 1], at + 1)
    if is_open:
        yield mapping(los[-1], None, ROWS + 1)


def points(los: Sequence[bytes]) -> Iterator[Mapping]:
    for at, lo in enumerate(los, 1):
        yield mapping(lo, lo + b"\0", at)


def check(table: MappingTable, rows: Sequence[Mapping], keys: Sequence[bytes]) -> None:
    los = [row.lo for row in rows]
    for key in keys:
        at = bisect_right(los, key) - 1
        expected = rows[at] if at >= 0 and rows[at].covers(key) else None
        found = table.find(key)
        assert (found and found.mapping) == expected, key.hex()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize(
    ("key_type", "size", "prefix"),
    [
        (KeyType.INT4, 4, b""),
        (KeyType.INT8, 8, b"\x80\x00"),
        (KeyType.INT8, 8, b""),
        (KeyType.UUID, 16, b"\x01\x8f\x00\x00\x00\x00\x70\x00"),
        (KeyType.UUID, 16, b""),
    ],
)
def test_a_key_is_found_wherever_it_is(
    key_type: KeyType, size: int, prefix: bytes, *, is_open: bool
) -> None:
    generator = random.Random(size)
    los = bounds(generator, size, prefix)
    edges = [bytes(size), b"\xff" * size, prefix.ljust(size, b"\0"), prefix.ljust(size, b"\xff")]
    near = [
        (int.from_bytes(lo) + step).to_bytes(size + 1)[-size:] for lo in los for step in (-1, 0, 1)
    ]
    keys = [*edges, *near, *(generator.randbytes(size) for _ in range(ROWS))]
    for rows in (list(ranges(los, is_open=is_open)), list(points(los))):
        kind = Kind.LIST if rows[0].hi == rows[0].lo + b"\0" else Kind.RANGE
        check(table_of(MapSpec(kind, key_type), rows), rows, keys)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_a_table_of_few_rows_is_one_part(count: int) -> None:
    los = [number.to_bytes(4) for number in range(100, 100 + 3 * count, 3)]
    rows = [mapping(lo, (int.from_bytes(lo) + 2).to_bytes(4), at) for at, lo in enumerate(los)]
    table = table_of(MapSpec(Kind.RANGE, KeyType.INT4), rows)
    check(table, rows, [number.to_bytes(4) for number in range(90, 140)])


@pytest.mark.parametrize("kind", [Kind.LIST, Kind.RANGE])
def test_a_dead_row_is_not_found(kind: Kind) -> None:
    los = [bytes([0, 0, 0, number]) for number in range(200)]
    pairs = pairwise(los)  # of a range, each ends where the next one begins
    neighbours = [mapping(lo, hi, at) for at, (lo, hi) in enumerate(pairs, 1)]
    rows = list(points(los)) if kind is Kind.LIST else neighbours
    table = table_of(MapSpec(kind, KeyType.INT4), rows)
    assert table.mark_dead(7, 9) == 2
    assert [table.find(row.lo) is None for row in rows[6:10]] == [False, True, True, False]
