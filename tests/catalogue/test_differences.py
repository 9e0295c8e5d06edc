"""Comparing two streams of mappings: exact sub-ranges, and any garbage is a difference."""

from collections.abc import Sequence
from uuid import UUID, uuid4

import pytest

from proxy.catalogue.differences import (
    TOP,
    Comparison,
    Digest,
    KeysDiffer,
    Others,
    Row,
    Stream,
    bounds_of,
    shown,
)
from proxy.routing.keys import KeyType, parse_key
from proxy.routing.shard_map import Kind, MapSpec

ONE, TWO = uuid4(), uuid4()
A, B, C, D = (uuid4() for _ in range(4))
RANGE = MapSpec(Kind.RANGE, KeyType.INT4)
LIST = MapSpec(Kind.LIST, KeyType.INT4)


def key(value: int) -> bytes:
    return parse_key(str(value), KeyType.INT4)


def row(
    low: int | None,
    high: int | None,
    mapping_id: UUID,
    *,
    status: str = "online",
    epoch: int = 1,
    shard: UUID = ONE,
) -> Row:
    lo = b"" if low is None else key(low)
    hi = TOP if high is None else key(high)
    return Row(lo, hi, mapping_id, status, epoch, shard)


def stream(rows: Sequence[Row], chunk: int = 2) -> Stream:
    left = sorted(rows)

    async def read() -> Sequence[Row]:
        found, left[:] = left[:chunk], left[chunk:]
        return found

    return Stream(read)


async def compared(
    catalogue: Sequence[Row], local: Sequence[Row], spec: MapSpec = RANGE
) -> list[KeysDiffer]:
    ours = [one for one in catalogue if one.shard_id == ONE]
    asked: list[bytes] = []

    async def others(lo: bytes, limit: int) -> Sequence[Row]:
        assert not asked or lo >= asked[-1]
        asked.append(lo)
        return [one for one in sorted(catalogue) if one.hi > lo][:limit]

    comparison = Comparison(spec, stream(ours), stream(local), Others(others))
    return [one async for one in comparison.differences()]


def told(found: Sequence[KeysDiffer], spec: MapSpec = RANGE) -> list[tuple[str, ...]]:
    return [(*bounds_of(spec, one), str(one.where), " ".join(one.differs)) for one in found]


async def test_s32_equal_sides_have_no_difference() -> None:
    rows = [row(None, 0, A), row(0, 10, B), row(20, None, C)]
    assert await compared(rows, rows) == []
    assert await compared([], []) == []


@pytest.mark.parametrize(
    ("local", "differs"),
    [
        (row(10, 20, B, epoch=2), "epoch"),
        (row(10, 20, B, status="offline"), "status"),
        (row(10, 20, D), "identity"),
        (row(10, 20, D, epoch=2, status="offline"), "epoch status identity"),
    ],
)
async def test_s33_what_differs_is_named(local: Row, differs: str) -> None:
    rows = [row(0, 10, A), row(10, 20, B), row(20, 30, C)]
    found = await compared(rows, [rows[0], local, rows[2]])
    assert told(found) == [("10", "20", "both", differs)]


async def test_s34_keys_that_another_shard_has_in_the_catalogue() -> None:
    catalogue = [row(1, 6, A), row(6, 10, B, shard=TWO)]
    found = await compared(catalogue, [row(1, 11, A)])
    assert told(found) == [("6", "10", "both", "identity"), ("10", "11", "shard", "")]
    assert found[0].catalogue == catalogue[1]


async def test_s34_a_difference_ends_with_the_row_of_the_shard() -> None:
    found = await compared([row(6, 20, B, shard=TWO)], [row(1, 11, A)])
    assert told(found) == [("1", "6", "shard", ""), ("6", "11", "both", "identity")]


async def test_s34_wider_extra_and_disjoint() -> None:
    wider = await compared([row(5, 10, A)], [row(0, 15, A)])
    assert told(wider) == [("0", "5", "shard", ""), ("10", "15", "shard", "")]
    narrower = await compared([row(0, 15, A)], [row(5, 10, A)])
    assert told(narrower) == [("0", "5", "catalogue", ""), ("10", "15", "catalogue", "")]
    disjoint = await compared([row(0, 5, A)], [row(10, 15, B)])
    assert told(disjoint) == [("0", "5", "catalogue", ""), ("10", "15", "shard", "")]
    across = await compared([row(0, 10, A), row(10, 20, B)], [row(5, 15, C)])
    assert told(across) == [
        ("0", "5", "catalogue", ""),
        ("5", "10", "both", "identity"),
        ("10", "15", "both", "identity"),
        ("15", "20", "catalogue", ""),
    ]


async def test_a_million_others_are_read_in_pages() -> None:
    catalogue = [row(at, at + 1, uuid4(), shard=TWO) for at in range(100)]
    found = await compared(catalogue, [row(-5, 200, A)])
    assert len(found) == 102
    assert told(found)[0] == ("-5", "0", "shard", "")
    assert told(found)[-1] == ("100", "200", "shard", "")


async def test_rows_that_overlap_are_surplus_where_another_covers_them() -> None:
    catalogue = [row(0, 10, A), row(10, 20, B)]
    local = [row(0, 10, A), row(5, 20, C), row(12, 14, D)]
    found = await compared(catalogue, local)
    assert told(found) == [
        ("5", "10", "shard", "identity"),
        ("10", "20", "both", "identity"),
        ("12", "14", "shard", "identity"),
    ]
    assert [one.surplus for one in found] == [True, False, True]


@pytest.mark.parametrize("spec", [RANGE, LIST, MapSpec(Kind.HASH, KeyType.TEXT)])
async def test_bounds_that_are_no_keys_are_differences(spec: MapSpec) -> None:
    garbage = [
        Row(b"\x01", b"\x02\x03", A, "online", 1, ONE),
        Row(b"\xff" * 200, TOP, B, "offline", 1 << 41, ONE),
    ]
    found = await compared([], garbage, spec)
    assert [one.surplus for one in found] == [True, True]
    assert bounds_of(spec, found[0]) == ("\\x01", "\\x0203") or spec.kind is Kind.HASH
    assert all(shown(spec, one.lo, one.hi) for one in found)


async def test_a_range_in_a_list_is_a_difference() -> None:
    point = Row(key(5), key(5) + b"\0", A, "online", 1, ONE)
    wide = Row(key(1), key(9), B, "online", 1, ONE)
    found = await compared([point], [wide], LIST)
    assert told(found, LIST) == [
        ("1", "9", "shard", "identity"),
        ("5", "5", "catalogue", ""),
    ]


def test_the_digest_is_of_map_shard_and_everything_that_differs() -> None:
    def digest(*found: KeysDiffer, map_id: UUID = A, shard: UUID = ONE) -> str:
        made = Digest(map_id, shard)
        for one in found:
            made.add(one)
        return made.text()

    differs = KeysDiffer(key(0), key(5), row(0, 5, A), row(0, 5, A, epoch=2))
    other = KeysDiffer(key(0), key(5), row(0, 5, A), row(0, 5, A, epoch=3))
    texts = {
        digest(),
        digest(differs),
        digest(other),
        digest(differs, map_id=B),
        digest(differs, shard=TWO),
        digest(differs, other),
    }
    assert len(texts) == 6
    assert digest(differs) == digest(differs)
