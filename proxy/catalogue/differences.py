"""Where the catalogue and a shard's own map differ, by keys.

For: comparing two ordered streams of mappings in constant memory, and the digest of what differs.
Not for: reading them (`verify`), or changing anything (`repair_plan`).

The catalogue's mappings do not overlap each other. A shard's own rows may have anything in them:
one that begins below the end of the row before it, or whose bounds are no keys, is surplus.
"""

import hashlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum, unique
from typing import Final, NamedTuple
from uuid import UUID

from proxy.catalogue.bounds import show_bounds
from proxy.catalogue.table_builder import fault_of_bounds
from proxy.routing.shard_map import HIGHEST_BOUND, LOWEST_BOUND, Kind, MapSpec

# Above every bound of a key: +inf, so that bounds can be compared.
TOP: Final = b"\xff" * 256
# How many rows of other shards are read at once: few at first, as often there are none.
_OTHERS_ROWS: Final = (16, 10_000)
_DIGEST_DIGITS: Final = 32


class Row(NamedTuple):
    """A mapping, of the catalogue or of a shard. The first five say whether two are the same."""

    lo: bytes
    hi: bytes
    """TOP where the catalogue has null."""
    mapping_id: UUID
    status: str
    epoch: int
    shard_id: UUID
    extra: str | None = None
    """Of the catalogue, as JSON: sessions, drain and lock, if any. Of a shard: `op_id`, if any."""


SAME: Final = slice(0, 5)


@unique
class Where(StrEnum):
    """Which side has the keys."""

    CATALOGUE = "catalogue"
    SHARD = "shard"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class KeysDiffer:
    """Keys from `lo` to below `hi`, and the mapping that each side has for them.

    `surplus` is of a row of the shard that another one covers there, or whose bounds are no keys.
    """

    lo: bytes
    hi: bytes
    catalogue: Row | None
    local: Row | None
    surplus: bool = False

    @property
    def where(self) -> Where:
        """The side, or both."""
        if self.catalogue is None:
            return Where.SHARD
        return Where.CATALOGUE if self.local is None else Where.BOTH

    @property
    def differs(self) -> list[str]:
        """The words for what differs, where both sides have the keys."""
        catalogue, local = self.catalogue, self.local
        if catalogue is None or local is None:
            return ["identity"] if self.surplus else []
        identity = (catalogue.mapping_id, catalogue.shard_id) != (local.mapping_id, local.shard_id)
        found = {
            "epoch": catalogue.epoch != local.epoch,
            "status": catalogue.status != local.status,
            "identity": identity,
        }
        return [word for word, is_so in found.items() if is_so]

    def facts(self) -> tuple[object, ...]:
        """Return what the digest is of."""
        rows = [row and (row[SAME], row.shard_id) for row in (self.catalogue, self.local)]
        return (self.lo, self.hi, self.surplus, *rows)


@dataclass(frozen=True, slots=True)
class ShardDiffers:
    """The shard's own status is not that of the catalogue; None: it does not know the map."""

    catalogue: str
    local: str | None

    def facts(self) -> tuple[object, ...]:
        """Return what the digest is of."""
        return ("shard", self.catalogue, self.local)


@dataclass(frozen=True, slots=True)
class ForeignRows:
    """Rows of a map that the catalogue does not have. The shard may say where it serves that map.

    `location` is not the one of the catalogue's shard; empty if the shard does not know the map.
    """

    map_id: UUID
    rows: int
    location: str = ""

    def facts(self) -> tuple[object, ...]:
        """Return what the digest is of."""
        return ("foreign", str(self.map_id), self.rows, self.location)


Difference = KeysDiffer | ShardDiffers | ForeignRows


def of_keys(found: Sequence[Difference]) -> list[KeysDiffer]:
    """Return the differences that are of keys."""
    return [one for one in found if isinstance(one, KeysDiffer)]


def of_same_rows(found: Sequence[Difference], chosen: Sequence[Difference]) -> list[Difference]:
    """Return what is chosen, and what else differs in a row of the shard that is repaired so."""
    rows = {one.local.mapping_id for one in of_keys(chosen) if one.local is not None}
    same = [one for one in of_keys(found) if one.local is not None and one.local.mapping_id in rows]
    return [*chosen, *same]


ReadChunk = Callable[[], Awaitable[Sequence[Row]]]
"""Returns the next rows of a stream, none at its end."""

ReadOthers = Callable[[bytes, int], Awaitable[Sequence[Row]]]
"""Returns the first mappings of the catalogue that end above these bytes, so many at most."""


class Stream:
    """Rows one by one, of chunks."""

    def __init__(self, read: ReadChunk) -> None:
        self._read = read
        self._rows: Sequence[Row] = ()
        self._at = 0

    async def next(self) -> Row | None:
        """Return the next row, None at the end."""
        if self._at >= len(self._rows):
            self._rows, self._at = await self._read(), 0
            if not self._rows:
                return None
        self._at += 1
        return self._rows[self._at - 1]


class Others:
    """What the catalogue has for keys that the shard should not have. Asked in ascending order."""

    def __init__(self, read: ReadOthers) -> None:
        self._read = read
        self._rows: deque[Row] = deque()
        self._known_to = b""
        self._limit, self._limit_max = _OTHERS_ROWS

    async def over(self, lo: bytes, hi: bytes) -> AsyncIterator[tuple[bytes, bytes, Row | None]]:
        """Yield parts of these keys, each with the mapping that has it, None if none has."""
        while lo < hi:
            row = await self._first(lo)
            if row is None or row.lo >= hi:
                yield lo, hi, None
                return
            if row.lo > lo:
                yield lo, row.lo, None
                lo = row.lo
            end = min(row.hi, hi)
            yield lo, end, row
            lo = end

    async def _first(self, lo: bytes) -> Row | None:
        """Return the first mapping that ends above these bytes."""
        while True:  # each page begins above the one before it
            while self._rows and self._rows[0].hi <= lo:
                self._rows.popleft()
            if self._rows:
                return self._rows[0]
            if lo < self._known_to or self._known_to == TOP:
                return None
            rows = await self._read(lo, self._limit)
            self._known_to = TOP if len(rows) < self._limit else rows[-1].hi
            self._limit = min(4 * self._limit, self._limit_max)
            self._rows.extend(rows)


class _Side:
    """The mapping that one side is at, and where its keys begin that were not compared yet."""

    def __init__(self, row: Row, at: bytes) -> None:
        self.row = row
        self.at = at

    def ends_at(self, at: bytes) -> bytes:
        """Return where this side changes next, seen from these bytes."""
        return self.row.hi if self.at == at else self.at


class Comparison:
    """Compares the catalogue's mappings of a shard with the shard's own."""

    def __init__(self, spec: MapSpec, catalogue: Stream, local: Stream, others: Others) -> None:
        self._spec = spec
        self._catalogue = catalogue
        self._local = local
        self._others = others

    async def differences(self) -> AsyncIterator[KeysDiffer]:
        """Yield what differs, by keys; a surplus row comes after the one that covers it."""
        pieces = self._pieces()
        ours = _side(await self._catalogue.next())
        local = await anext(pieces, None)
        while ours is not None or local is not None:
            if isinstance(local, KeysDiffer):
                yield local
                local = await anext(pieces, None)
                continue
            if ours is not None and local is not None and _are_same(ours, local):
                ours = _side(await self._catalogue.next())
                local = await anext(pieces, None)
                continue
            sides = [side for side in (ours, local) if side is not None]
            lo = min(side.at for side in sides)
            hi = min(side.ends_at(lo) for side in sides)
            async for one in self._compared(lo, hi, _row_at(ours, lo), _row_at(local, lo)):
                yield one
            for side in sides:
                side.at = max(side.at, hi)
            if ours is not None and ours.at >= ours.row.hi:
                ours = _side(await self._catalogue.next())
            if local is not None and local.at >= local.row.hi:
                local = await anext(pieces, None)

    async def _pieces(self) -> AsyncIterator[_Side | KeysDiffer]:
        """Yield the shard's rows, each from the end of those before it on, and what is surplus."""
        reach = b""
        while (row := await self._local.next()) is not None:
            if row.lo >= reach and not fault(self._spec, row):
                reach = row.hi
                yield _Side(row, row.lo)
            elif fault(self._spec, row):
                yield KeysDiffer(row.lo, row.hi, None, row, surplus=True)
            else:
                yield KeysDiffer(row.lo, min(row.hi, reach), None, row, surplus=True)
                if row.hi > reach:
                    at, reach = reach, row.hi
                    yield _Side(row, at)

    async def _compared(
        self, lo: bytes, hi: bytes, ours: Row | None, local: Row | None
    ) -> AsyncIterator[KeysDiffer]:
        """Yield what differs in keys for which each side has one row, or none."""
        if local is None:
            if ours is not None:
                yield KeysDiffer(lo, hi, ours, None)
        elif ours is None:
            async for start, end, other in self._others.over(lo, hi):
                yield KeysDiffer(start, end, other, local)
        elif (differs := KeysDiffer(lo, hi, ours, local)).differs:
            yield differs


def _side(row: Row | None) -> _Side | None:
    return None if row is None else _Side(row, row.lo)


def _are_same(ours: _Side, local: _Side) -> bool:
    return ours.row[SAME] == local.row[SAME] and ours.at == local.at == ours.row.lo


def _row_at(side: _Side | None, at: bytes) -> Row | None:
    return side.row if side is not None and side.at == at else None


def fault(spec: MapSpec, row: Row) -> str:
    """Return what is wrong with a row's bounds, empty if they can be right."""
    return fault_of_bounds(spec, row.lo, None if row.hi == TOP else row.hi)


# -- for people, and for a digest ----------------------------------------------------------------


def shown(spec: MapSpec, lo: bytes, hi: bytes) -> tuple[str, str]:
    """Return bounds as `show` has them; what are no keys is shown as hex. Never raises."""
    if spec.kind is Kind.LIST and hi == lo + b"\0":
        return show_bounds(spec, lo, hi)
    as_range = replace(spec, kind=Kind.RANGE) if spec.kind is Kind.LIST else spec
    return show_bounds(as_range, lo, None if hi == TOP else hi)


WHOLE: Final = (LOWEST_BOUND, HIGHEST_BOUND)


def bounds_of(spec: MapSpec, found: Difference) -> tuple[str, str]:
    """Return the bounds of a difference as `verify` shows them."""
    return shown(spec, found.lo, found.hi) if isinstance(found, KeysDiffer) else WHOLE


class Digest:
    """The digest of what differs in one shard: with it, a repair knows that it is still so."""

    def __init__(self, map_id: UUID, shard_id: UUID) -> None:
        self._hash = hashlib.sha256(f"{map_id} {shard_id}".encode())

    def add(self, found: Difference) -> None:
        """Add a difference."""
        self._hash.update(repr(found.facts()).encode())

    def text(self) -> str:
        """Return the digest."""
        return self._hash.hexdigest()[:_DIGEST_DIGITS]
