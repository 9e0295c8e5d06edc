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
from dataclasses import fields
from itertools import accumulate
from operator import eq, le, lt, ne
from typing import Final, NamedTuple
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
    RowChunk,
    column_of,
    fixed_pieces,
    flags_of,
    microseconds,
    moment,
    numbers,
    own_hi,
    sessions_of,
    sizes_between,
    status_of,
    uuid_of,
)
from proxy.routing.keys import HASH_BYTES, KEY_BYTES, KEY_BYTES_MAX
from proxy.routing.shard_map import Kind, MapSpec

_WORD_BYTES: Final = 8  # an array's longest integer
_STEP_ROWS: Final = 5_000
# A bound may be the key after the longest one.
_BOUND_BYTES_MAX: Final = KEY_BYTES_MAX + 1
# Rows that are reported one by one; of more, only their shards.
BAD_ROWS_MAX: Final = 10_000
_KIND: Final = bytes(flags & HI_KIND for flags in range(256))
_IS_NEXT: Final = bytes(1 if flags & HI_KIND == HI_NEXT else 0 for flags in range(256))
_OWN: Final = bytes(
    flags & ~HI_KIND if flags & HI_KIND == HI_NEXT else flags for flags in range(256)
)
_IS_DEAD: Final = bytes(1 if flags & DEAD else 0 for flags in range(256))
_TO_DEAD: Final = bytes(flags | DEAD for flags in range(256))


class BadRow(NamedTuple):
    """A row that cannot be right: it is left out, and sessions of its shard are refused."""

    mapping_id: UUID
    shard_ids: tuple[UUID, ...]
    """Its shard; of one that overlaps another, that one's too: either may be wrong."""
    reason: str


def key_size(spec: MapSpec) -> int | None:
    """Return the bytes of every key that is looked up, None if they differ."""
    return HASH_BYTES if spec.kind is Kind.HASH else KEY_BYTES[spec.key_type]


def fault_of_bounds(spec: MapSpec, lo: bytes, hi: bytes | None) -> str:
    """Return what is wrong with a row's bounds, empty if they can be right."""
    size = key_size(spec)
    if spec.kind is Kind.LIST:
        if not lo or hi != lo + b"\0":
            return "a list's mapping is for a single key"
        hi = None
    elif hi is not None and hi <= lo:
        return "its upper bound is not above the lower one"
    for bound in (lo, hi or b""):
        if len(bound) > _BOUND_BYTES_MAX or (size is not None and len(bound) not in (0, size)):
            return "a bound has another size than the map's keys"
    return ""


class MappingTable:
    """The rows of a map. `TableBuilder` makes one."""

    __slots__ = (
        *("map_id", "flags", "_common", "_epochs", "_exact_size", "_hi_ends", "_his", "_ids"),
        *("_known_shards", "_lo_ends", "_los", "_marks", "_shard_ids", "_shards", "_skip"),
        *("_slots", "_word_bytes", "_words"),
    )

    def __init__(self, built: "TableBuilder") -> None:
        self.map_id = built.map_id
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
        self._words, self._slots = built.words, built.slots

    def __len__(self) -> int:
        """Return the number of rows, dead ones included."""
        return len(self.flags)

    # -- looking up ------------------------------------------------------------------------------

    def find(self, key: bytes) -> int:
        """Return the position of the row that covers a routing key; -1 if none or it is dead."""
        if len(key) != self._exact_size or not key.startswith(self._common):
            at = self.find_le(key)
            return at if at >= 0 and self._covers(at, key) else -1
        # The same in the short way that the keys of most maps allow.
        word = int.from_bytes(key[self._skip :])
        at = bisect_right(self._words, word) - 1
        if at < 0:
            return -1
        flags = self.flags[at]
        if flags == HI_NEXT:
            return at
        if flags == HI_POINT:
            return at if self._words[at] == word else -1
        return at if self._covers(at, key) else -1

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
        word = _word(key, self._skip, self._word_bytes)
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

    def shard(self, at: int) -> Shard | None:
        """Return the shard of a row, if it is known."""
        return self._known_shards[self._shards[at]]

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
        writer = _ChunkWriter()
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
        self, writer: "_ChunkWriter", flags: bytes, first: int, end: int
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

    # The setter of a frozen class is slow.
    __setattr__ = object.__setattr__

    def __init__(self, table: MappingTable, at: int, shard: Shard) -> None:
        self._table = table
        self._at = at
        self.shard = shard  # type: ignore[misc]  # frozen for all others

    @property
    def mapping(self) -> Mapping:
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


_Marks = tuple[bytes | None, int | None]
_NO_MARKS: Final[_Marks] = (None, None)
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


class _ChunkWriter:
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


class TableBuilder:
    """Builds a table in steps of some milliseconds: `append` chunks, run `finish`, take `table`."""

    def __init__(self, map_id: UUID, spec: MapSpec) -> None:
        self.map_id = map_id
        self._spec = spec
        self._size = key_size(spec)
        self._end: bytes | None = b""  # of the last row
        self._last_shard: UUID | None = None
        self._number_of: dict[bytes, int] = {}
        self.ids, self.los, self.his = bytearray(), bytearray(), bytearray()
        self.packed_ids = b""
        self.lo_ends, self.hi_ends = array("I", [0]), array("I", [0])
        self.epochs, self.shards, self.flags = array("q"), array("I"), bytearray()
        self.shard_ids: list[UUID] = []
        self.marks: dict[int, _Marks] = {}
        self.common, self.exact_size = b"", -1
        self.word_bytes = _WORD_BYTES
        self.words, self.slots = array("Q"), array("I", [0])
        self.bad: list[BadRow] = []
        self.refused: dict[UUID, str] = {}
        """Shards that have rows which cannot be right, and what is wrong with the first."""

    def append(self, chunk: RowChunk) -> None:
        """Add the next rows, in order. What cannot be right is left out and reported."""
        los, his = chunk.bounds()
        if not self._is_sound(los, his):
            chunk = chunk.select(self._sound_rows(chunk, los, his))
            los, his = chunk.bounds()
        if not los:
            return
        self._end = his[-1]
        first = len(self.flags)
        flags, his_column, hi_sizes = _joined(chunk, los, his)
        self._last_shard = uuid_of(chunk.shards[-UUID_BYTES:])
        self.ids += chunk.ids
        self.los += chunk.los
        self.his += his_column
        _extend_ends(self.lo_ends, chunk.lo_sizes)
        _extend_ends(self.hi_ends, hi_sizes)
        self.epochs += numbers("q", chunk.epochs)
        self.shards.extend(map(self._shard_number, fixed_pieces(chunk.shards, UUID_BYTES)))
        self.flags += flags
        ops, drains = chunk.marks()
        for at in ops.keys() | drains.keys():
            drain = numbers("q", drains[at])[0] if at in drains else None
            self.marks[first + at] = (ops.get(at), drain)

    def finish(self) -> Iterator[None]:
        """Build the indexes; others may run after each step."""
        count = len(self.flags)
        los, ends = bytes(self.los), self.lo_ends
        lowest = 1 if count and ends[1] == 0 else 0  # after -inf
        if lowest < count:
            self.common = _common_prefix(
                los[ends[lowest] : ends[lowest + 1]], los[ends[count - 1] :]
            )
        if self._size is not None and self._size <= len(self.common) + _WORD_BYTES:
            self.exact_size = self._size
            self.word_bytes = self._size - len(self.common)
        self.packed_ids = bytes(self.ids)
        slots = 1
        while slots < 1.5 * count:
            slots *= 2
        self.slots = array("I", bytes(4 * slots))
        yield
        for first in range(0, count, _STEP_ROWS):
            self._add_words(los, first, min(first + _STEP_ROWS, count))
            yield
            self._add_ids(first, min(first + _STEP_ROWS, count))
            yield

    def table(self) -> MappingTable:
        """Return the table, once it is finished."""
        return MappingTable(self)

    def _shard_number(self, packed: bytes) -> int:
        number = self._number_of.get(packed)
        if number is None:
            number = self._number_of[packed] = len(self.shard_ids)
            self.shard_ids.append(uuid_of(packed))
        return number

    def _add_words(self, los: bytes, first: int, end: int) -> None:
        skip, size, ends = len(self.common), self.word_bytes, self.lo_ends
        parts = zip(ends[first:end], ends[first + 1 : end + 1], strict=True)
        self.words.extend([_word(los[begin:stop], skip, size) for begin, stop in parts])

    def _add_ids(self, first: int, end: int) -> None:
        ids, slots, mask = self.packed_ids, self.slots, len(self.slots) - 1
        for at in range(first, end):
            slot = hash(ids[at * UUID_BYTES : (at + 1) * UUID_BYTES]) & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = at + 1

    # -- rows that cannot be right ---------------------------------------------------------------

    def _is_sound(self, los: list[bytes], his: list[bytes | None]) -> bool:
        """Return whether nothing is wrong with any of these rows: seldom anything is."""
        if not los or self._end is None or los[0] < self._end or None in his[:-1]:
            return not los
        bounded: list[bytes] = [hi for hi in his if hi is not None]
        sizes = {*map(len, los), *map(len, bounded)}
        if self._spec.kind is Kind.LIST:
            if not los[0] or his[-1] is None or any(map(ne, bounded, [lo + b"\0" for lo in los])):
                return False
            sizes = set(map(len, los))
        return (
            all(map(lt, los, bounded))
            and all(map(le, bounded, los[1:]))
            and sizes <= ({0, self._size} if self._size is not None else _SIZES)
        )

    def _sound_rows(self, chunk: RowChunk, los: list[bytes], his: list[bytes | None]) -> list[int]:
        """Return the positions of the rows that can be right, and report the others."""
        kept = []
        end, neighbour = self._end, self._last_shard
        ids = list(fixed_pieces(chunk.ids, UUID_BYTES))
        shards = [uuid_of(packed) for packed in fixed_pieces(chunk.shards, UUID_BYTES)]
        for at, (lo, hi) in enumerate(zip(los, his, strict=True)):
            fault, wrong = fault_of_bounds(self._spec, lo, hi), {shards[at]}
            if not fault and (end is None or lo < end):
                fault = "it overlaps another mapping"
                wrong |= {neighbour} if neighbour is not None else set()
            if fault:
                self._report(BadRow(uuid_of(ids[at]), tuple(wrong), fault))
                continue
            kept.append(at)
            end, neighbour = hi, shards[at]
        return kept

    def _report(self, row: BadRow) -> None:
        for shard_id in row.shard_ids:
            self.refused.setdefault(shard_id, row.reason)
        if len(self.bad) < BAD_ROWS_MAX:
            self.bad.append(row)


_SIZES: Final = frozenset(range(_BOUND_BYTES_MAX + 1))


def _word(bound: bytes, skip: int, size: int) -> int:
    """Return some bytes of a bound as an integer; the order of words is that of the bounds."""
    return int.from_bytes(bound[skip : skip + size].ljust(size, b"\0"))


def _joined(
    chunk: RowChunk, los: list[bytes], his: list[bytes | None]
) -> tuple[bytes, bytes, bytes]:
    """Return flags and upper bounds, without the bounds that are the next row's lower ones."""
    nexts = [*map(eq, his, los[1:]), False]
    if not any(nexts):
        return chunk.flags, chunk.his, chunk.hi_sizes
    flags = bytes(
        flag | HI_NEXT if is_next and not flag & HI_KIND else flag
        for flag, is_next in zip(chunk.flags, nexts, strict=True)
    )
    bounds = [
        b"" if hi is None or flag & HI_KIND else hi for hi, flag in zip(his, flags, strict=True)
    ]
    return flags, b"".join(bounds), column_of("H", [len(hi) for hi in bounds])


def _extend_ends(ends: "array[int]", sizes: bytes) -> None:
    last = ends.pop()
    ends.extend(accumulate(numbers("H", sizes), initial=last))


def _common_prefix(one: bytes, other: bytes) -> bytes:
    length = 0
    while one[length : length + 1] == other[length : length + 1] != b"":
        length += 1
    return one[:length]
