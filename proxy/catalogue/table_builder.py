"""Building a table of mappings, in steps that leave the event loop free.

For: sorted rows in chunks to a `MappingTable`, and which of them cannot be right. Not for: looking
up (`mapping_table`).

Invariant: a row that is not sorted, overlaps another or has impossible bounds is left out and
reported, so that all others can be served.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from operator import eq, le, lt, ne
from typing import Final, NamedTuple
from uuid import UUID

from proxy.catalogue.mapping_table import WORD_BYTES, MappingTable, TableColumns, word_of
from proxy.catalogue.packed_rows import (
    HI_KIND,
    HI_NEXT,
    UUID_BYTES,
    RowChunk,
    column_of,
    fixed_pieces,
    numbers,
    uuid_of,
)
from proxy.routing.keys import HASH_BYTES, KEY_BYTES, KEY_BYTES_MAX
from proxy.routing.shard_map import Kind, MapSpec

_STEP_ROWS: Final = 5_000
# The words are in parts by their first bits, so that a look-up bisects one part. So many fit a
# processor's second cache; with more it is no faster.
_PART_BITS_MAX: Final = 12
# A bound may be the key after the longest one.
_BOUND_BYTES_MAX: Final = KEY_BYTES_MAX + 1
_SIZES: Final = frozenset(range(_BOUND_BYTES_MAX + 1))
# Rows that are reported one by one; of more, only their shards.
BAD_ROWS_MAX: Final = 10_000


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


class TableBuilder:
    """Builds a table in steps of some milliseconds: `append` chunks, run `finish`, take `table`."""

    def __init__(self, map_id: UUID, spec: MapSpec) -> None:
        self.map_id = map_id
        self._spec = spec
        self._size = key_size(spec)
        self._end: bytes | None = b""  # of the last row
        self._last_shard: UUID | None = None
        self._number_of: dict[bytes, int] = {}
        self.columns = TableColumns()
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
        first = len(self.columns.flags)
        flags, his_column, hi_sizes = _joined(chunk, los, his)
        self._last_shard = uuid_of(chunk.shards[-UUID_BYTES:])
        self.columns.ids += chunk.ids
        self.columns.los += chunk.los
        self.columns.his += his_column
        _extend_ends(self.columns.lo_ends, chunk.lo_sizes)
        _extend_ends(self.columns.hi_ends, hi_sizes)
        self.columns.epochs += numbers("q", chunk.epochs)
        self.columns.shards.extend(map(self._shard_number, fixed_pieces(chunk.shards, UUID_BYTES)))
        self.columns.flags += flags
        ops, drains = chunk.marks()
        for at in ops.keys() | drains.keys():
            drain = numbers("q", drains[at])[0] if at in drains else None
            self.columns.marks[first + at] = (ops.get(at), drain)

    def finish(self) -> Iterator[None]:
        """Build the indexes; others may run after each step."""
        count = len(self.columns.flags)
        los, ends = bytes(self.columns.los), self.columns.lo_ends
        lowest = 1 if count and ends[1] == 0 else 0  # after -inf
        if lowest < count:
            self.columns.common = _common_prefix(
                los[ends[lowest] : ends[lowest + 1]], los[ends[count - 1] :]
            )
        if self._size is not None and self._size <= len(self.columns.common) + WORD_BYTES:
            self.columns.exact_size = self._size
            self.columns.word_bytes = self._size - len(self.columns.common)
        self._choose_parts(los[ends[count - 1] :] if count else b"")
        self.columns.packed_ids = bytes(self.columns.ids)
        slots = 1
        while slots < 1.5 * count:
            slots *= 2
        self.columns.slots = array("I", bytes(4 * slots))
        yield
        for first in range(0, count, _STEP_ROWS):
            self._add_words(los, first, min(first + _STEP_ROWS, count))
            yield
            self._add_ids(first, min(first + _STEP_ROWS, count))
            yield
        self.columns.part_starts.append(count)

    def table(self) -> MappingTable:
        """Return the table, once it is finished."""
        return MappingTable(self.map_id, self.columns)

    def _shard_number(self, packed: bytes) -> int:
        number = self._number_of.get(packed)
        if number is None:
            number = self._number_of[packed] = len(self.columns.shard_ids)
            self.columns.shard_ids.append(uuid_of(packed))
        return number

    def _choose_parts(self, last_lo: bytes) -> None:
        """Choose how many bits tell the parts of the words apart: eight words a part or more."""
        columns = self.columns
        last = word_of(last_lo, len(columns.common), columns.word_bytes)
        bits = min(_PART_BITS_MAX, max(len(columns.flags).bit_length() - 3, 0))
        columns.part_shift = max(last.bit_length() - bits, 0)

    def _add_words(self, los: bytes, first: int, end: int) -> None:
        skip, size, ends = len(self.columns.common), self.columns.word_bytes, self.columns.lo_ends
        parts = zip(ends[first:end], ends[first + 1 : end + 1], strict=True)
        words, starts = self.columns.words, self.columns.part_starts
        words.extend([word_of(los[begin:stop], skip, size) for begin, stop in parts])
        shift = self.columns.part_shift
        for part in range(len(starts), (words[-1] >> shift) + 1):
            starts.append(bisect_left(words, part << shift, first))

    def _add_ids(self, first: int, end: int) -> None:
        ids, slots, mask = self.columns.packed_ids, self.columns.slots, len(self.columns.slots) - 1
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
