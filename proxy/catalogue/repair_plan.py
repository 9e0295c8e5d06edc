"""What a repair replaces: rows of the catalogue and of shards, before and after.

For: from what differs to the rows that make both sides the same. Pure. Not for: reading what
differs (`verify`), or doing it (`repair`).

One side is right, by the caller's choice: its mappings that have a chosen difference are the
targets. The other side loses the keys of the targets, and gets them. What a mapping has beside
those keys stays: its first part keeps the id, and each further part has an id that both sides
derive from it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, NamedTuple
from uuid import UUID, uuid5

from proxy.catalogue.differences import TOP, KeysDiffer, Row
from proxy.catalogue.model import Status

# No mapping is changed so often. From here on a mapping gets a new id, and its epochs begin anew.
EPOCH_MAX: Final = 1 << 62
_ONLINE: Final = str(Status.ONLINE)

Extent = tuple[bytes, bytes]
"""Keys from the first bytes to below the second."""


@dataclass(slots=True)
class Replacement:
    """Rows of one database: those that go, and those that come. An id may be in both."""

    before: list[Row] = field(default_factory=list)
    after: list[Row] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Return whether there is anything to replace."""
        return bool(self.before or self.after)

    def ids(self) -> list[UUID]:
        """Return the ids of all rows."""
        return list({row.mapping_id for row in (*self.before, *self.after)})

    def losing(self) -> list[UUID]:
        """Return the mappings that lose keys or go offline: their sessions must end first."""
        after = {row.mapping_id: row for row in self.after}
        return [row.mapping_id for row in self.before if _loses(row, after.get(row.mapping_id))]


def _loses(before: Row, after: Row | None) -> bool:
    if after is None or after.lo > before.lo or after.hi < before.hi:
        return True
    return before.status == _ONLINE and after.status != _ONLINE


class OwnStatus(NamedTuple):
    """A shard's own status, before and after; before is None where it did not know the map."""

    before: str | None
    version: int
    after: str
    new_version: int


@dataclass(slots=True)
class RowChanges:
    """All that a repair changes. `local` and `statuses` are by shard."""

    repaired: int = 0
    catalogue: Replacement = field(default_factory=Replacement)
    local: dict[UUID, Replacement] = field(default_factory=dict)
    statuses: dict[UUID, OwnStatus] = field(default_factory=dict)
    """Shards whose own status is set, on both sides."""
    foreign: list[UUID] = field(default_factory=list)
    """Maps whose rows go from the shard."""
    conflicts: list[tuple[Row, Row]] = field(default_factory=list)
    """Pairs of rows of which neither is right; they are left as they are."""

    def of(self, shard_id: UUID) -> Replacement:
        """Return what is replaced in a shard."""
        return self.local.setdefault(shard_id, Replacement())


# -- keys ----------------------------------------------------------------------------------------


class Extents:
    """Keys that do not overlap each other, in order."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents: list[Extent] = []
        for lo, hi in sorted(extents):
            if self._extents and lo < self._extents[-1][1]:
                self._extents[-1] = self._extents[-1][0], max(hi, self._extents[-1][1])
            else:
                self._extents.append((lo, hi))
        self._los = [lo for lo, _ in self._extents]
        self._his = [hi for _, hi in self._extents]

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._extents)

    def positions(self, row: Row) -> range:
        """Return which of them have keys of a row."""
        return range(bisect_right(self._his, row.lo), bisect_left(self._los, row.hi))

    def between(self, lo: bytes, hi: bytes) -> list[Extent]:
        """Return those that have keys from `lo` to below `hi`."""
        return self._extents[bisect_right(self._his, lo) : bisect_left(self._los, hi)]

    def within(self, row: Row) -> list[Extent]:
        """Return those that have keys of a row."""
        return self.between(row.lo, row.hi)

    def outside(self) -> "Extents":
        """Return all other keys."""
        gaps = zip([b"", *self._his], [*self._los, TOP], strict=True)
        return Extents((lo, hi) for lo, hi in gaps if lo < hi)


def remainders(row: Row, extents: Iterable[Extent], taken: frozenset[UUID]) -> list[Row]:
    """Return what is left of a row without these keys. Ids in `taken` are those of other rows."""
    parts: list[Extent] = []
    lo = row.lo
    for start, end in sorted(extents):
        parts.append((lo, min(start, row.hi)))
        lo = max(lo, end)
    parts.append((lo, row.hi))
    found: list[Row] = []
    for lo, hi in parts:
        if lo < hi:
            keeps_id = not found and row.mapping_id not in taken
            new_id = row.mapping_id if keeps_id else derived(row, lo.hex())
            found.append(row._replace(lo=lo, hi=hi, mapping_id=new_id))
    return found


def raised(targets: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """Return the targets with epochs above those of all rows with their keys, or their ids.

    The targets are in order and do not overlap.
    """
    epochs = [row.epoch for row in targets]
    extents = Extents(_extent(row) for row in targets)
    by_id = {row.mapping_id: at for at, row in enumerate(targets)}
    for row in others:
        places = {*extents.positions(row)}
        if row.mapping_id in by_id:
            places.add(by_id[row.mapping_id])
        for at in places:
            epochs[at] = max(epochs[at], row.epoch)
    return [with_epoch(row, epoch + 1) for row, epoch in zip(targets, epochs, strict=True)]


def with_epoch(row: Row, epoch: int) -> Row:
    """Return a row with this epoch; from EPOCH_MAX on, with a new id and the first epoch."""
    if epoch < EPOCH_MAX:
        return row._replace(epoch=epoch)
    return row._replace(mapping_id=derived(row, "epoch"), epoch=1)


def derived(row: Row, of: str) -> UUID:
    """Return an id that both sides derive from a row, and that no later one of it has again."""
    return uuid5(row.mapping_id, f"{row.epoch} {of}")


def _ids(rows: Iterable[Row]) -> frozenset[UUID]:
    return frozenset(row.mapping_id for row in rows)


def _extent(row: Row) -> Extent:
    return row.lo, row.hi


# -- one shard -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Choice:
    """The differences of a shard, and those of them that are repaired."""

    shard_id: UUID
    all: list[KeysDiffer]
    chosen: list[KeysDiffer]

    def catalogue_targets(self) -> list[Row]:
        """Return the catalogue's mappings of the shard that have a chosen difference."""
        rows = (one.catalogue for one in self.chosen if self._is_own(one))
        return sorted({row.mapping_id: row for row in rows if row is not None}.values())

    def local_targets(self) -> list[Row]:
        """Return the shard's mappings that have a chosen difference, without surplus keys."""
        surplus = self.surplus()
        rows = (one.local for one in self.chosen if not one.surplus)
        distinct = {row.mapping_id: row for row in rows if row is not None}
        return sorted(
            row._replace(lo=surplus[row.mapping_id][1]) if row.mapping_id in surplus else row
            for row in distinct.values()
        )

    def extents(self, targets: Sequence[Row]) -> "Extents":
        """Return the keys of these mappings, and what is chosen beside them."""
        covered = Extents(map(_extent, targets))
        gaps = [
            (one.lo, one.hi)
            for one in self.chosen
            if not one.surplus and not covered.between(one.lo, one.hi)
        ]
        return Extents([*map(_extent, targets), *gaps])

    def rows(self, of: Literal["catalogue", "local"]) -> dict[UUID, Row]:
        """Return the rows of one side that anything differs in, by their ids."""
        rows: Iterable[Row | None] = (getattr(one, of) for one in self.all)
        return {row.mapping_id: row for row in rows if row is not None}

    def surplus(self) -> dict[UUID, Extent]:
        """Return the keys for which a row of the shard is surplus, by its id."""
        return {
            one.local.mapping_id: (one.lo, one.hi)
            for one in self.all
            if one.surplus and one.local is not None
        }

    def dropped(self, extents: "Extents") -> dict[UUID, Extent]:
        """Return the surplus that is chosen, and rows that are all surplus if they are cut."""
        chosen = {one.local.mapping_id for one in self.chosen if one.surplus and one.local}
        rows = self.rows("local")
        return {
            row_id: extent
            for row_id, extent in self.surplus().items()
            if row_id in chosen or (extent == _extent(rows[row_id]) and extents.between(*extent))
        }

    def _is_own(self, one: KeysDiffer) -> bool:
        return one.catalogue is not None and one.catalogue.shard_id == self.shard_id


def from_catalogue(choice: Choice, same_ids: Sequence[Row]) -> RowChanges:
    """Return what makes the shard as the catalogue is.

    `same_ids` are the rows of the shard that have the ids of `choice.catalogue_targets`.
    """
    targets = choice.catalogue_targets()
    extents = choice.extents(targets)
    held = choice.rows("local") | {row.mapping_id: row for row in same_ids}
    after = raised(targets, held.values())
    plan = RowChanges(len(choice.chosen), Replacement(targets, after))
    local = plan.of(choice.shard_id)
    cut_out(local, held.values(), extents, _ids(after), choice.dropped(extents))
    local.after += after
    return plan


def from_shard(
    choice: Choice, same_ids: Sequence[Row], others: Iterable[tuple[UUID, Sequence[Row]]]
) -> RowChanges:
    """Return what makes the catalogue as the shard is, and takes its keys from other shards.

    `same_ids` are the rows of the catalogue that have the ids of `choice.local_targets`. `others`
    are the rows that other shards have for the keys.
    """
    targets = choice.local_targets()
    extents = choice.extents(targets)
    held = choice.rows("catalogue") | {row.mapping_id: row for row in same_ids}
    others = list(others)
    foreign = [row for _, rows in others for row in rows]
    after = [
        row._replace(extra=held[row.mapping_id].extra if row.mapping_id in held else None)
        for row in raised(targets, [*held.values(), *foreign])
    ]
    plan = RowChanges(len(choice.chosen))
    cut_out(plan.catalogue, held.values(), extents, _ids(after))
    plan.catalogue.after += after
    _keep_own(plan.of(choice.shard_id), choice, _ids(targets), after)
    for shard_id, taken in others:
        cut_out(plan.of(shard_id), taken, extents, frozenset())
    return plan


def _keep_own(
    local: Replacement, choice: Choice, ids: frozenset[UUID], targets: Sequence[Row]
) -> None:
    """Replace a shard's own rows that are right, and take what is surplus from the others."""
    by_lo = {row.lo: row for row in targets}
    cuts = {row_id: [extent] for row_id, extent in choice.dropped(Extents(())).items()}
    kept = list(targets)
    parts: list[Row] = []
    for row in choice.rows("local").values():
        cut = cuts.get(row.mapping_id, [])
        if row.lo in by_lo:  # without its own surplus keys a target may begin there
            cut = [*cut, _extent(by_lo[row.lo])]
        if row.mapping_id in ids or cut:
            local.before.append(row)
        else:
            kept.append(row)
        if row.mapping_id not in ids and cut:
            parts += remainders(row, cut, ids)
    local.after += [*targets, *apart(parts, kept)]


def cut_out(
    side: Replacement,
    rows: Iterable[Row],
    extents: Extents,
    ids: frozenset[UUID],
    dropped: Mapping[UUID, Extent] = MappingProxyType({}),
) -> None:
    """Take keys from the rows of a side; those with ids of the targets are replaced."""
    kept: list[Row] = []
    parts: list[Row] = []
    for row in rows:
        cut = extents.within(row)
        if row.mapping_id in dropped:
            cut.append(dropped[row.mapping_id])
        if cut or row.mapping_id in ids:
            side.before.append(row)
            parts += remainders(row, cut, ids)
        else:
            kept.append(row)
    side.after += apart(parts, kept)


def apart(parts: Iterable[Row], others: Iterable[Row]) -> list[Row]:
    """Return parts of rows, no two of which begin at one bound, nor where one of the others does.

    Rows of a shard that overlap may be cut at the same key. The later part begins where the row
    that it overlaps ends; if there is nothing left, it goes.
    """
    by_lo = {row.lo: row for row in others}
    found: list[Row] = []
    for part in sorted(parts):
        lo = part.lo
        while lo in by_lo:
            lo = by_lo[lo].hi
        if lo < part.hi:
            by_lo[lo] = part._replace(lo=lo)
            found.append(by_lo[lo])
    return found
