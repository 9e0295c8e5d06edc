"""What makes the catalogue as all shards of a map are together. Pure.

For: a catalogue that was lost, or restored to the past, also in the middle of a move. Not for: one
shard (`repair_plan`), or reading them (`repair`).

Of two shards that have the same keys the one with the higher epoch is right, if the other one is
offline: a move leaves its source so. Of two equal epochs the one that is online is right: a branch
that became a shard is offline. Nothing is done for keys of which neither is known to be right.

A mapping that the catalogue does not have is taken as it is, with its epoch: sessions that know it
go on. An epoch is raised where another row with the same keys has one that is not lower.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final
from uuid import UUID

from proxy.catalogue.differences import SAME, Row, fault
from proxy.catalogue.model import Status
from proxy.catalogue.repair_plan import (
    Extents,
    Replacement,
    RowChanges,
    cut_out,
    derived,
    remainders,
    with_epoch,
)
from proxy.routing.shard_map import MapSpec

_ONLINE: Final = str(Status.ONLINE)

_Key = tuple[UUID, UUID]
"""Shard and mapping: in the middle of a move two shards have the same mapping."""


def from_all_shards(
    spec: MapSpec, catalogue: Sequence[Row], shards: Mapping[UUID, Sequence[Row]]
) -> RowChanges:
    """Return the plan. All rows are in the order of their bounds."""
    sound = sorted(row for rows in shards.values() for row in without_surplus(spec, rows))
    settled = _settle(sound)
    alone = settled.left_alone()
    targets = _targets([row for row in sound if _key(row) not in alone], settled)
    targets = _above(targets, catalogue, settled)
    plan = RowChanges(conflicts=settled.conflicts)
    kept = Extents((row.lo, row.hi) for row in sound if _key(row) in alone)
    # What is left alone loses what another row of its shard covers, as that one may be cut there.
    _plan_shards(plan, shards, [*targets, *(row for row in sound if _key(row) in alone)])
    _plan_catalogue(plan, catalogue, targets, kept.outside())
    return plan


def without_surplus(spec: MapSpec, rows: Iterable[Row]) -> list[Row]:
    """Return a shard's rows without those whose bounds are no keys, and without overlaps."""
    found: list[Row] = []
    reach = b""
    for row in rows:
        if not fault(spec, row) and (row.hi > reach or not found):
            found.append(row if row.lo >= reach else row._replace(lo=reach))
            reach = row.hi
    return found


def _key(row: Row) -> _Key:
    return row.shard_id, row.mapping_id


@dataclass(slots=True)
class _Settled:
    """Which rows lose keys to which others."""

    beaten: dict[_Key, list[Row]] = field(default_factory=lambda: defaultdict(list))
    """By the row that loses: those that it loses to."""
    losers: dict[_Key, Row] = field(default_factory=dict)
    conflicts: list[tuple[Row, Row]] = field(default_factory=list)

    def add(self, winner: Row, loser: Row) -> None:
        """Add that a row loses keys to another."""
        self.beaten[_key(loser)].append(winner)
        self.losers[_key(loser)] = loser

    def left_alone(self) -> set[_Key]:
        """Return the rows that nothing is done with: a conflict, and what has keys of one."""
        alone = {_key(row) for pair in self.conflicts for row in pair}
        if alone:
            linked: dict[_Key, list[_Key]] = defaultdict(list)
            for loser, winners in self.beaten.items():
                for winner in map(_key, winners):
                    linked[loser].append(winner)
                    linked[winner].append(loser)
            reached = list(alone)
            while reached:
                more = set(linked[reached.pop()]) - alone
                alone |= more
                reached += more
        return alone


def _settle(rows: Sequence[Row]) -> _Settled:
    """Compare all rows of different shards that have the same keys. They are in order."""
    settled = _Settled()
    reaching: list[Row] = []
    for row in rows:
        reaching = [one for one in reaching if one.hi > row.lo]
        for other in reaching:
            if _beats(row, other):
                settled.add(row, other)
            elif _beats(other, row):
                settled.add(other, row)
            else:
                settled.conflicts.append((other, row))
        reaching.append(row)
    return settled


def _beats(row: Row, other: Row) -> bool:
    if other.status == _ONLINE:
        return False
    return row.epoch > other.epoch or (row.epoch == other.epoch and row.status == _ONLINE)


def _targets(rows: Sequence[Row], settled: _Settled) -> list[Row]:
    """Return the mappings that the catalogue gets, in order; each id once."""
    found: list[Row] = []
    seen: set[UUID] = set()
    whole = [row for row in rows if _key(row) not in settled.beaten]
    cut = [row for row in rows if _key(row) in settled.beaten]
    for row in (*whole, *cut):
        extents = [(one.lo, one.hi) for one in settled.beaten.get(_key(row), ())]
        for part in remainders(row, extents, frozenset()):
            is_new = part.mapping_id not in seen
            target = part if is_new else part._replace(mapping_id=derived(part, part.lo.hex()))
            seen.add(target.mapping_id)
            found.append(target)
    return sorted(found)


def _above(targets: Sequence[Row], catalogue: Iterable[Row], settled: _Settled) -> list[Row]:
    """Return the targets with epochs above those of other rows with their keys, or their ids."""
    epochs = [0] * len(targets)
    extents = Extents((row.lo, row.hi) for row in targets)
    at_id = {row.mapping_id: at for at, row in enumerate(targets)}
    for row in chain(catalogue, settled.losers.values()):
        places = {*extents.positions(row)}
        if row.mapping_id in at_id:
            places.add(at_id[row.mapping_id])
        for at in places:
            if not _are_same(targets[at], row):
                epochs[at] = max(epochs[at], row.epoch)
    return [
        with_epoch(row, row.epoch if row.epoch > epoch else epoch + 1)
        for row, epoch in zip(targets, epochs, strict=True)
    ]


def _are_same(one: Row, other: Row) -> bool:
    return one[SAME] == other[SAME] and one.shard_id == other.shard_id


def _plan_shards(
    plan: RowChanges, shards: Mapping[UUID, Sequence[Row]], wanted: Iterable[Row]
) -> None:
    """Plan what each shard replaces: what is not wanted as it is."""
    after: dict[UUID, set[Row]] = defaultdict(set)
    for row in wanted:
        after[row.shard_id].add(row)
    for shard_id, rows in shards.items():
        before = set(rows)
        if before != after[shard_id]:
            gone, new = before - after[shard_id], after[shard_id] - before
            plan.local[shard_id] = Replacement(sorted(gone), sorted(new))


def _plan_catalogue(
    plan: RowChanges, catalogue: Iterable[Row], targets: Sequence[Row], extents: Extents
) -> None:
    """Plan what the catalogue replaces: all keys that are not left alone."""
    by_lo = {row.lo: row for row in targets}
    ids = frozenset(row.mapping_id for row in targets)
    extras: dict[UUID, str] = {}
    unchanged: set[bytes] = set()
    for row in catalogue:
        if row.lo in by_lo and _are_same(by_lo[row.lo], row):
            unchanged.add(row.lo)
            continue
        cut_out(plan.catalogue, [row], extents, ids)
        if row.extra is not None:
            extras[row.mapping_id] = row.extra
    plan.catalogue.after += (
        row._replace(extra=extras.get(row.mapping_id)) for row in targets if row.lo not in unchanged
    )
    plan.repaired = len({row.mapping_id for row in plan.catalogue.before + plan.catalogue.after})
