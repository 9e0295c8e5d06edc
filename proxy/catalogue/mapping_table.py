"""A map's mappings in memory: sorted columns, some 70 bytes a row, one bisection a look-up.

For: the rows as one read of the catalogue found them. Not for: single changes, which `cache` keeps
beside the table until it builds the next one.

Invariant: rows are sorted and do not overlap; a row never changes, except that it may be marked
dead. Rows that cannot be right are left out and reported.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from proxy.catalogue.model import Located, Mapping, Shard
from proxy.catalogue.packed_rows import (
    CHUNK_ROWS_MAX,
    DEAD,
    HAS_DRAIN,
    HAS_OP,
    HI_KIND,
    HI_NEXT,
    HI_OPEN,
    HI_POINT,
    UUID_BYTES,
    ChunkWriter,
    RowChunk,
    column_of,
    moment,
    sessions_of,
    sizes_between,
    status_of,
    uuid_of,
)

WORD_BYTES: Final = 8  # an array's longest integer
Marks = tuple[bytes | None, int | None]
_KIND: Final = bytes(flags & HI_KIND for flags in range(256))
_IS_NEXT: Final = bytes(1 if flags & HI_KIND == HI_NEXT else 0 for flags in range(256))
_OWN: Final = bytes(
    flags & ~HI_KIND if flags & HI_KIND == HI_NEXT else flags for flags in range(256)
)
_IS_DEAD: Final = bytes(1 if flags & DEAD else 0 for flags in range(256))
_TO_DEAD: Final = bytes(flags | DEAD for flags in range(256))


def word_of(bound: bytes, skip: int, size: int) -> int:
    """Return some bytes of a bound as an integer; the order of words is that of the bounds."""
    return int.from_bytes(bound[skip : skip + size].ljust(size, b"\0"))


@dataclass(slots=True)
class TableColumns:
    """The columns of a table, as `TableBuilder` builds them."""

    ids: bytearray = field(default_factory=bytearray)
    packed_ids: bytes = b""
    los: bytearray = field(default_factory=bytearray)
    lo_ends: "array[int]" = field(default_factory=lambda: array("I", [0]))
    his: bytearray = field(default_factory=bytearray)
    hi_ends: "array[int]" = field(default_factory=lambda: array("I", [0]))
    epochs: "array[int]" = field(default_factory=lambda: array("q"))
    shards: "array[int]" = field(default_factory=lambda: array("I"))
    """Positions in `shard_ids`."""
    shard_ids: list[UUID] = field(default_factory=list)
    flags: bytearray = field(default_factory=bytearray)
    marks: dict[int, Marks] = field(default_factory=dict)
    """The operation and the end of a drain, of the few rows that have one."""
    common: bytes = b""
    """What all lower bounds begin with."""
    exact_size: int = -1
    """The size of every key whose bytes after `common` fit a word; -1: sizes differ."""
    word_bytes: int = WORD_BYTES
    words: "array[int]" = field(default_factory=lambda: array("Q"))
    """The bytes after `common` of each lower bound."""
    part_shift: int = 0
    part_starts: "array[int]" = field(default_factory=lambda: array("I", [0]))
    """Where each part of the words begins, and the end; a part's words are equal but for their
    last `part_shift` bits."""
    slots: "array[int]" = field(default_factory=lambda: array("I", [0]))
    """A hash table of the ids: positions plus one, 0 where it is empty."""


class MappingTable:
    """The rows of a map. `TableBuilder` makes one."""

    __slots__ = (
        *("map_id", "flags", "_base", "_common", "_epochs", "_exact_size", "_hi_ends", "_his"),
        *("_ids", "_known_shards", "_lo_ends", "_los", "_marks", "_part_shift", "_part_starts"),
        *("_parts_end", "_shard_ids", "_shards", "_skip", "_slots", "_word_bytes", "_words"),
    )

    def __init__(self, map_id: UUID, built: TableColumns) -> None:
        self.map_id = map_id
        self.flags = built.flags
        self._ids = built.packed_ids
        self._los, self._his = bytes(built.los), bytes(built.his)
        self._lo_ends, self._hi_ends = built.lo_ends, built.hi_ends
        self._epochs, self._shards = built.epochs, built.shards
        self._shard_ids = tuple(built.shard_ids)
        self._known_shards: list[Shard | None] = [None] * len(self._shard_ids)
        self._marks = built.marks
        self._common, self._skip = built.common, len(built.common)
        self._exact_size, self._word_bytes = built.exact_size, built.word_bytes
        # What a key of the exact size is above its word.
        self._base = int.from_bytes(built.common) << 8 * built.word_bytes
        self._words, self._slots = built.words, built.slots
        self._part_starts, self._part_shift = built.part_starts, built.part_shift
        self._parts_end = (len(built.part_starts) - 1) << built.part_shift

    def __len__(self) -> int:
        """Return the number of rows, dead ones included."""
        return len(self.flags)

    # -- looking up ------------------------------------------------------------------------------

    def find(self, key: bytes) -> "CachedLocation | None":
        """Return where a routing key is; None if no live row of a known shard covers it."""
        word = at = -1
        if len(key) == self._exact_size:
            word = int.from_bytes(key) - self._base
            # The short way, which the keys of most maps allow. Others are outside of all parts,
            # those that do not begin as all bounds do among them.
            if 0 <= word < self._parts_end:
                starts, part = self._part_starts, word >> self._part_shift
                at = bisect_right(self._words, word, starts[part], starts[part + 1]) - 1
        if at < 0 and (at := self.find_le(key)) < 0:
            return None
        kind = self.flags[at]
        if (
            kind == HI_NEXT
            or (kind == HI_POINT and self._words[at] == word)
            or self._covers(at, key)
        ):
            shard = self._known_shards[self._shards[at]]
            return None if shard is None else CachedLocation(self, at, shard)
        return None

    def _covers(self, at: int, key: bytes) -> bool:
        """Return whether a row is alive and its upper bound is above the key."""
        if self.flags[at] & DEAD:
            return False
        hi = self.hi(at)
        return hi is None or key < hi

    def find_le(self, key: bytes) -> int:
        """Return the position of the last lower bound that is not above these bytes, or -1."""
        common = self._common
        if not key.startswith(common):
            # All bounds but -inf, which is the first, begin so.
            if key > common:
                return len(self.flags) - 1
            return 0 if self.flags and self._lo_ends[1] == 0 else -1
        word = word_of(key, self._skip, self._word_bytes)
        words = self._words
        at = bisect_right(words, word) - 1
        if at < 0 or words[at] != word or self.lo(at) <= key:
            return at
        equal = range(bisect_left(words, word, 0, at), at)
        return equal.start + bisect_right(equal, key, key=self.lo) - 1

    def position(self, mapping_id: bytes) -> int:
        """Return the position of a mapping by the 16 bytes of its id; -1 if none or it is dead."""
        slots, ids = self._slots, self._ids
        mask = len(slots) - 1
        slot = hash(mapping_id) & mask
        while at := slots[slot]:
            if ids[(at - 1) * UUID_BYTES : at * UUID_BYTES] == mapping_id:
                return -1 if self.flags[at - 1] & DEAD else at - 1
            slot = (slot + 1) & mask
        return -1

    def operations(self) -> set[UUID]:
        """Return the ids of the operations that hold rows."""
        live = (op for at, (op, _) in self._marks.items() if not self.flags[at] & DEAD)
        return {UUID(bytes=op) for op in live if op is not None}

    # -- a row's values --------------------------------------------------------------------------

    def lo(self, at: int) -> bytes:
        """Return the lower bound of a row."""
        ends = self._lo_ends
        return self._los[ends[at] : ends[at + 1]]

    def hi(self, at: int) -> bytes | None:
        """Return the upper bound of a row."""
        kind = self.flags[at] & HI_KIND
        if kind == HI_OPEN:
            return None
        if kind == HI_NEXT:
            return self.lo(at + 1)
        if kind == HI_POINT:
            return self.lo(at) + b"\0"
        return self._his[self._hi_ends[at] : self._hi_ends[at + 1]]

    def set_shards(self, shards: MappingOf[UUID, Shard]) -> None:
        """Take the shards that are known now."""
        self._known_shards = [shards.get(shard_id) for shard_id in self._shard_ids]

    def mapping_id(self, at: int) -> UUID:
        """Return the id of a row."""
        return uuid_of(self._ids[at * UUID_BYTES : (at + 1) * UUID_BYTES])

    def mapping(self, at: int) -> Mapping:
        """Return a row as a value."""
        flags = self.flags[at]
        op, drain = self._marks.get(at, _NO_MARKS) if flags & (HAS_OP | HAS_DRAIN) else _NO_MARKS
        return Mapping(
            mapping_id=self.mapping_id(at),
            map_id=self.map_id,
            shard_id=self._shard_ids[self._shards[at]],
            lo=self.lo(at),
            hi=self.hi(at),
            status=status_of(flags),
            sessions=sessions_of(flags),
            drain_until=None if drain is None else moment(drain),
            epoch=self._epochs[at],
            op_id=None if op is None else uuid_of(op),
        )

    # -- the rows, to be written or built anew ---------------------------------------------------

    def live(self, first: int, end: int) -> Iterator[int]:
        """Yield the positions of these rows that are not dead."""
        return (at for at in range(first, end) if not self.flags[at] & DEAD)

    def mark_dead(self, first: int, end: int) -> int:
        """Mark rows as dead, and return how many were not."""
        part = self.flags[first:end]
        self.flags[first:end] = part.translate(_TO_DEAD)
        return len(part) - part.translate(_IS_DEAD).count(1)

    def chunks(self, flags: bytes, rows: Sequence[Mapping]) -> Iterator[RowChunk]:
        """Yield the rows that are not dead by these flags, and others, sorted as well, in order.

        `flags` is a copy of an earlier moment: what has died since is still in the chunks.
        """
        writer = ChunkWriter()
        dead = flags.translate(_IS_DEAD)
        at = 0
        for row in rows:
            end = self.find_le(row.lo) + 1
            for first, last in _live_parts(dead, at, end):
                yield from self._write(writer, flags, first, last)
            at = max(at, end)
            writer.add_row(row)
            if writer.count >= CHUNK_ROWS_MAX:
                yield writer.take()
        for first, last in _live_parts(dead, at, len(flags)):
            yield from self._write(writer, flags, first, last)
        if writer.count:
            yield writer.take()

    def _write(
        self, writer: "ChunkWriter", flags: bytes, first: int, end: int
    ) -> Iterator[RowChunk]:
        while first < end:
            last = min(end, first + CHUNK_ROWS_MAX - writer.count)
            los, marks = self._lo_ends, self._marks
            his, hi_sizes, written = self._written_his(flags, first, last)
            marked = flags[first:last].translate(_HAS_MARKS).count(1) and [
                marks[at] for at in range(first, last) if at in marks
            ]
            writer.add(
                last - first,
                self._ids[first * UUID_BYTES : last * UUID_BYTES],
                b"".join([self._shard_ids[at].bytes for at in self._shards[first:last]]),
                self._los[los[first] : los[last]],
                sizes_between(los, first, last),
                his,
                hi_sizes,
                column_of("q", self._epochs[first:last]),
                written,
                b"".join(op for op, _ in marked or () if op is not None),
                column_of("q", [drain for _, drain in marked or () if drain is not None]),
            )
            first = last
            if writer.count >= CHUNK_ROWS_MAX:
                yield writer.take()

    def _written_his(self, flags: bytes, first: int, end: int) -> tuple[bytes, bytes, bytes]:
        """Return the upper bounds, their sizes and the flags of rows, each by itself."""
        part, ends = flags[first:end], self._hi_ends
        if not part.translate(_IS_NEXT).count(1):
            his = self._his[ends[first] : ends[end]]
            return his, sizes_between(ends, first, end), part
        bounds = [
            b"" if kind in (HI_OPEN, HI_POINT) else self.hi(at) or b""
            for at, kind in enumerate(part.translate(_KIND), first)
        ]
        return b"".join(bounds), column_of("H", [len(hi) for hi in bounds]), part.translate(_OWN)


class CachedLocation(Located):
    """Where a key is, as the table has it: the mapping is read from there when it is asked for.

    It is made at every look-up, and only some look-ups need the mapping's values.
    """

    __slots__ = ("_at", "_table")
    _at: int
    _table: MappingTable

    def __init__(self, table: MappingTable, at: int, shard: Shard) -> None:
        self._table = table
        self._at = at
        self.shard = shard

    @property
    def mapping(self) -> Mapping:  # type: ignore[override]  # no attribute of a Located is written
        """The mapping."""
        return self._table.mapping(self._at)

    def __eq__(self, other: object) -> bool:
        """Return whether it is the same mapping in the same shard, however it is kept."""
        if not isinstance(other, Located):
            return NotImplemented
        return (self.mapping, self.shard) == (other.mapping, other.shard)

    def __hash__(self) -> int:
        """Return what Located does."""
        return hash((self.mapping, self.shard))


_NO_MARKS: Final[Marks] = (None, None)
_HAS_MARKS: Final = bytes(1 if flags & (HAS_OP | HAS_DRAIN) else 0 for flags in range(256))


def _live_parts(dead: bytes, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of these positions without a dead row."""
    while first < end:
        stop = dead.find(1, first, end)
        if stop < 0:
            yield first, end
            return
        if stop > first:
            yield first, stop
        first = stop + 1
