"""Hypothesis: maps with mappings that do not overlap, and chunks of them."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from hypothesis import strategies as st

from proxy.catalogue.model import Mapping, SessionsMode, Shard, Status
from proxy.catalogue.packed_rows import RowChunk, column_of, flags_of, microseconds, own_hi
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec

MAP_ID: Final = UUID(int=7)
FIRST_SHARD: Final = UUID(int=1)
SHARDS: Final = {
    UUID(int=number): Shard(UUID(int=number), MAP_ID, f"s{number}", "db.example.com", 5432, "app")
    for number in range(1, 4)
}

SPECS: Final = st.sampled_from(
    [
        MapSpec(Kind.RANGE, KeyType.INT4),
        MapSpec(Kind.RANGE, KeyType.INT8),
        MapSpec(Kind.RANGE, KeyType.TEXT),
        MapSpec(Kind.RANGE, KeyType.UUID),
        MapSpec(Kind.HASH, KeyType.TEXT),
        MapSpec(Kind.LIST, KeyType.TEXT),
        MapSpec(Kind.LIST, KeyType.INT4),
    ]
)
_PREFIXES: Final = (b"", b"\x80\x00\x00", b"tenant-of-a-long-name-")


def routing_keys(spec: MapSpec) -> st.SearchStrategy[bytes]:
    """Draw keys that are often near each other, as the map compares them."""
    size = {KeyType.INT4: 4, KeyType.INT8: 8, KeyType.UUID: 16}.get(spec.key_type)
    size = 4 if spec.kind is Kind.HASH else size
    letters = st.sampled_from([b"\0", b"\1", b"\x7f", b"\x80", b"\xff"])
    if size is None:
        short = st.lists(letters, min_size=1, max_size=5).map(b"".join)
        return st.builds(bytes.__add__, st.sampled_from(_PREFIXES), short)
    near = st.lists(letters, min_size=2, max_size=2).map(b"".join)
    prefix = st.sampled_from(
        [b"\x80" * (size - 2), b"\0" * (size - 2), b"\x80" + b"\1" * (size - 3)]
    )
    return st.builds(bytes.__add__, prefix, near) | st.binary(min_size=size, max_size=size)


@st.composite
def mappings(draw: st.DrawFn, spec: MapSpec) -> Mapping:
    """Draw one mapping of such a map."""
    one, other = draw(routing_keys(spec)), draw(routing_keys(spec))
    lo, hi = sorted((one, other))
    high: bytes | None = hi
    if spec.kind is Kind.LIST:
        high = lo + b"\0"
    else:
        lo = draw(st.sampled_from([lo, lo, lo, b""]))
        high = draw(st.sampled_from([hi, hi, hi, None])) if hi > lo else None
    return mapping(
        lo,
        high,
        draw(st.integers(1, 40)),
        shard=draw(st.sampled_from(list(SHARDS))),
        status=draw(st.sampled_from(Status)),
        sessions=draw(st.sampled_from(SessionsMode)),
        epoch=draw(st.sampled_from([1, 2, 2**63 - 1])),
        drain_until=draw(st.sampled_from([None, datetime(1999, 1, 1, 7, 7, 7, 7, UTC)])),
        op_id=draw(st.sampled_from([None, UUID(int=2**127)])),
    )


def mapping(
    lo: bytes,
    hi: bytes | None,
    number: int = 1,
    *,
    shard: UUID = FIRST_SHARD,
    status: Status = Status.ONLINE,
    sessions: SessionsMode = SessionsMode.KILL,
    epoch: int = 1,
    drain_until: datetime | None = None,
    op_id: UUID | None = None,
) -> Mapping:
    """Return a mapping whose id has this number."""
    return Mapping(
        mapping_id=UUID(int=number << 64),
        map_id=MAP_ID,
        shard_id=shard,
        lo=lo,
        hi=hi,
        status=status,
        sessions=sessions,
        epoch=epoch,
        drain_until=drain_until,
        op_id=op_id,
    )


def sorted_apart(found: Iterable[Mapping]) -> list[Mapping]:
    """Return those of the mappings that can be in a map together, by their lower bounds."""
    kept: list[Mapping] = []
    for one in sorted(found, key=lambda row: row.lo):
        same = any(other.mapping_id == one.mapping_id for other in kept)
        if not same and (not kept or overlaps_not(kept[-1], one)):
            kept.append(one)
    return kept


def overlaps_not(one: Mapping, other: Mapping) -> bool:
    """Return whether no key is in both."""
    first, second = sorted((one, other), key=lambda row: row.lo)
    return first.hi is not None and first.hi <= second.lo


def chunk_of(rows: Sequence[Mapping]) -> RowChunk:
    """Return rows as the catalogue sends them."""
    flags = [flags_of(row) for row in rows]
    his = [own_hi(row, flag) for row, flag in zip(rows, flags, strict=True)]
    return RowChunk.of(
        {
            "ids": b"".join(row.mapping_id.bytes for row in rows),
            "shards": b"".join(row.shard_id.bytes for row in rows),
            "los": b"".join(row.lo for row in rows),
            "lo_sizes": column_of("H", [len(row.lo) for row in rows]),
            "his": b"".join(his),
            "hi_sizes": column_of("H", [len(hi) for hi in his]),
            "epochs": column_of("q", [row.epoch for row in rows]),
            "flags": bytes(flags),
            "ops": b"".join(row.op_id.bytes for row in rows if row.op_id is not None),
            "drains": column_of(
                "q", [microseconds(row.drain_until) for row in rows if row.drain_until is not None]
            ),
        }
    )
