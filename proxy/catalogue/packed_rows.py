"""Mappings in columns of bytes, as they come from the catalogue and lie in a snapshot file.

For: a million rows without a million objects. Not for: looking a key up (`mapping_table`). A chunk
is checked for its form only; whether its rows can be right is for `mapping_table`.

Integers are big-endian, as PostgreSQL's send functions write them.
"""

from array import array
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from itertools import accumulate, pairwise
from operator import sub
from sys import byteorder
from typing import Final, Self
from uuid import UUID

from proxy.catalogue.model import Mapping, SessionsMode, Status

# Rows of a chunk. All that is done with one takes some milliseconds, and then others may run.
CHUNK_ROWS_MAX: Final = 10_000

UUID_BYTES: Final = 16
_SIZE_BYTES: Final = 2
_LONG_BYTES: Final = 8

# A row's flags. The SQL of `READ_CHUNK` sets them; HI_NEXT and DEAD are only ever set in memory.
# Two bits say what hi is, unless it is in its column.
HI_KIND: Final = 3
HI_OPEN: Final = 1
HI_POINT: Final = 2  # lo and one zero byte: the mapping is a single key
HI_NEXT: Final = 3  # lo of the next row
OFFLINE: Final = 4
DRAIN: Final = 8
KEEP: Final = 16
HAS_OP: Final = 32
HAS_DRAIN: Final = 64
DEAD: Final = 128

# PostgreSQL counts microseconds from here.
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)

# One row with a column of each kind for the rows $4 at most that follow the bound $2. Aggregates
# take the rows of a sorted subquery in its order. An index scan of (map_id, lo): a chunk costs the
# same wherever it begins.
READ_CHUNK: Final = """
select coalesce(string_agg(pg_catalog.uuid_send(mapping_id), ''), '') as ids,
  coalesce(string_agg(pg_catalog.uuid_send(shard_id), ''), '') as shards,
  coalesce(string_agg(lo, ''), '') as los,
  coalesce(string_agg(pg_catalog.int2send(octet_length(lo)::int2), ''), '') as lo_sizes,
  coalesce(string_agg(own_hi, ''), '') as his,
  coalesce(string_agg(pg_catalog.int2send(octet_length(own_hi)::int2), ''), '') as hi_sizes,
  coalesce(string_agg(pg_catalog.int8send(epoch), ''), '') as epochs,
  coalesce(string_agg(pg_catalog.set_byte('\\x00', 0,
    case when hi is null then 1 when own_hi = '' then 2 else 0 end
    + case status when 'online' then 0 else 4 end
    + case sessions when 'drain' then 8 when 'keep' then 16 else 0 end
    + case when op_id is null then 0 else 32 end
    + case when drain_until is null then 0 else 64 end), ''), '') as flags,
  coalesce(string_agg(pg_catalog.uuid_send(op_id), ''), '') as ops,
  coalesce(string_agg(pg_catalog.timestamptz_send(drain_until), ''), '') as drains
from (select *, case when hi is null or hi = lo || '\\x00'::bytea then '' else hi end as own_hi
  from shardmap.mapping where map_id = $1 and lo {after} $2 order by lo limit $3) m
"""
READ_FIRST_CHUNK: Final = READ_CHUNK.format(after=">=")
READ_NEXT_CHUNK: Final = READ_CHUNK.format(after=">")


@dataclass(frozen=True, slots=True, repr=False)
class RowChunk:
    """Rows in the order of their lower bounds; `ops` and `drains` have those of flagged rows."""

    ids: bytes
    shards: bytes
    los: bytes
    lo_sizes: bytes
    his: bytes
    hi_sizes: bytes
    epochs: bytes
    flags: bytes
    ops: bytes
    drains: bytes

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.flags)

    @classmethod
    def of(cls, columns: MappingOf[str, bytes]) -> Self:
        """Return the chunk with these columns. Raises ValueError if they do not fit together."""
        chunk = cls(*(columns[field.name] for field in fields(cls)))
        count = len(chunk)
        kinds = set(chunk.flags)
        op_count = sum(chunk.flags.count(flag) for flag in kinds if flag & HAS_OP)
        drain_count = sum(chunk.flags.count(flag) for flag in kinds if flag & HAS_DRAIN)
        fits = (
            len(chunk.ids) == len(chunk.shards) == UUID_BYTES * count
            and len(chunk.lo_sizes) == len(chunk.hi_sizes) == _SIZE_BYTES * count
            and len(chunk.epochs) == _LONG_BYTES * count
            and sum(numbers("H", chunk.lo_sizes)) == len(chunk.los)
            and sum(numbers("H", chunk.hi_sizes)) == len(chunk.his)
            and len(chunk.ops) == UUID_BYTES * op_count
            and len(chunk.drains) == _LONG_BYTES * drain_count
            and not any(flag & DEAD or flag & HI_KIND == HI_NEXT for flag in kinds)
        )
        if not fits:
            raise ValueError("the columns do not fit together")
        return chunk

    def split_ids(self) -> Iterator[bytes]:
        """Yield the ids of the rows."""
        return fixed_pieces(self.ids, UUID_BYTES)

    def bounds(self) -> tuple[list[bytes], list[bytes | None]]:
        """Return the bounds of each row."""
        los = pieces(self.los, self.lo_sizes)
        his: list[bytes | None] = list(pieces(self.his, self.hi_sizes))
        for at, flag in enumerate(self.flags):
            if flag & HI_KIND:
                his[at] = None if flag & HI_KIND == HI_OPEN else los[at] + b"\0"
        return los, his

    def last_lo(self) -> bytes:
        """Return the lower bound of the last row."""
        return self.los[len(self.los) - numbers("H", self.lo_sizes)[-1] :]

    def select(self, kept: Sequence[int]) -> "RowChunk":
        """Return the rows at these positions, in ascending order."""
        wanted = set(kept)
        los, his = pieces(self.los, self.lo_sizes), pieces(self.his, self.hi_sizes)
        ops, drains = self.marks()
        return RowChunk(
            ids=cut(self.ids, UUID_BYTES, kept),
            shards=cut(self.shards, UUID_BYTES, kept),
            los=b"".join(los[at] for at in kept),
            lo_sizes=cut(self.lo_sizes, _SIZE_BYTES, kept),
            his=b"".join(his[at] for at in kept),
            hi_sizes=cut(self.hi_sizes, _SIZE_BYTES, kept),
            epochs=cut(self.epochs, _LONG_BYTES, kept),
            flags=cut(self.flags, 1, kept),
            ops=b"".join(op for at, op in ops.items() if at in wanted),
            drains=b"".join(drain for at, drain in drains.items() if at in wanted),
        )

    def marks(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Return the operations and the ends of drains, by the positions of their rows."""
        if not self.ops and not self.drains:
            return {}, {}
        with_op = [at for at, flag in enumerate(self.flags) if flag & HAS_OP]
        with_drain = [at for at, flag in enumerate(self.flags) if flag & HAS_DRAIN]
        ops = fixed_pieces(self.ops, UUID_BYTES)
        drains = fixed_pieces(self.drains, _LONG_BYTES)
        return dict(zip(with_op, ops, strict=True)), dict(zip(with_drain, drains, strict=True))


def flags_of(mapping: Mapping) -> int:
    """Return the flags of a row."""
    flags = 0 if mapping.status is Status.ONLINE else OFFLINE
    if mapping.hi is None:
        flags |= HI_OPEN
    elif mapping.hi == mapping.lo + b"\0":
        flags |= HI_POINT
    flags |= _SESSIONS_FLAGS[mapping.sessions]
    flags |= HAS_OP if mapping.op_id is not None else 0
    flags |= HAS_DRAIN if mapping.drain_until is not None else 0
    return flags


def own_hi(mapping: Mapping, flags: int) -> bytes:
    """Return the upper bound as a row keeps it: empty where the flags say what it is."""
    return b"" if mapping.hi is None or flags & HI_KIND else mapping.hi


def status_of(flags: int) -> Status:
    """Return the status that flags say."""
    return Status.OFFLINE if flags & OFFLINE else Status.ONLINE


def sessions_of(flags: int) -> SessionsMode:
    """Return the mode that flags say."""
    if flags & DRAIN:
        return SessionsMode.DRAIN
    return SessionsMode.KEEP if flags & KEEP else SessionsMode.KILL


def moment(microseconds: int) -> datetime:
    """Return a PostgreSQL timestamp; one that Python does not have becomes its nearest."""
    try:
        return _EPOCH + microseconds * _MICROSECOND
    except OverflowError:
        return _LAST if microseconds > 0 else _FIRST


def microseconds(when: datetime) -> int:
    """Return a time as PostgreSQL's timestamptz_send writes it."""
    return (when - _EPOCH) // _MICROSECOND


_SESSIONS_FLAGS: Final = {SessionsMode.KILL: 0, SessionsMode.DRAIN: DRAIN, SessionsMode.KEEP: KEEP}


class ChunkWriter:
    """Collects rows for a chunk."""

    def __init__(self) -> None:
        self._columns = _empty_columns()
        self.count = 0

    def add(self, count: int, *columns: bytes) -> None:
        """Add rows, as the columns of a RowChunk in their order."""
        self.count += count
        for pieces, column in zip(self._columns, columns, strict=True):
            pieces.append(column)

    def add_row(self, row: Mapping) -> None:
        """Add one row."""
        flags = flags_of(row)
        hi = own_hi(row, flags)
        drain = [] if row.drain_until is None else [microseconds(row.drain_until)]
        self.add(
            1,
            row.mapping_id.bytes,
            row.shard_id.bytes,
            row.lo,
            column_of("H", [len(row.lo)]),
            hi,
            column_of("H", [len(hi)]),
            column_of("q", [row.epoch]),
            bytes([flags]),
            b"" if row.op_id is None else row.op_id.bytes,
            column_of("q", drain),
        )

    def take(self) -> RowChunk:
        """Return what was added since the last call."""
        columns, self._columns, self.count = self._columns, _empty_columns(), 0
        return RowChunk(*map(b"".join, columns))


def _empty_columns() -> list[list[bytes]]:
    return [[] for _ in fields(RowChunk)]


# -- columns -------------------------------------------------------------------------------------


def numbers(typecode: str, column: bytes) -> "array[int]":
    """Return a column of big-endian integers."""
    found = array(typecode)
    found.frombytes(column)
    if byteorder == "little":
        found.byteswap()
    return found


def column_of(typecode: str, values: "array[int] | Sequence[int]") -> bytes:
    """Return integers as a column."""
    written = array(typecode, values)
    if byteorder == "little":
        written.byteswap()
    return written.tobytes()


def sizes_between(ends: "array[int]", first: int, end: int) -> bytes:
    """Return the sizes of the pieces from `first` to before `end`, of which these are the ends."""
    return column_of("H", array("H", map(sub, ends[first + 1 : end + 1], ends[first:end])))


def pieces(column: bytes, sizes: bytes) -> list[bytes]:
    """Return the pieces of a column, which have these sizes."""
    ends = list(accumulate(numbers("H", sizes), initial=0))
    return [column[first:end] for first, end in pairwise(ends)]


def fixed_pieces(column: bytes, size: int) -> Iterator[bytes]:
    """Yield the pieces of a column, which have one size."""
    return (column[at : at + size] for at in range(0, len(column), size))


def cut(column: bytes, size: int, kept: Sequence[int]) -> bytes:
    """Return the pieces of one size at these positions."""
    return b"".join(column[at * size : (at + 1) * size] for at in kept)


def uuid_of(packed: bytes) -> UUID:
    """Return a UUID of its 16 bytes."""
    return UUID(bytes=packed)
