"""What a repair replaces, for any garbage: the rows of each side can be written, and are the same.

A shard's rows may overlap each other, so two of them may be cut at the same key. Two rows with one
lower bound cannot be written: the repair failed, and was undone.
"""

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from uuid import UUID

import pytest

from proxy.catalogue.differences import TOP, KeysDiffer, Row
from proxy.catalogue.rebuild_plan import from_all_shards
from proxy.catalogue.repair_plan import (
    EPOCH_MAX,
    Choice,
    Replacement,
    RowChanges,
    from_catalogue,
    from_shard,
)
from tests.catalogue.test_differences import ONE, RANGE, TWO, A, B, C, D, compared, key, row

CASES = 500
BOUNDS_MAX = 30


def written(rows: Sequence[Row], replacement: Replacement, *, overlap: bool) -> list[Row]:
    """Return a side's rows after the replacement; fail if a database would refuse them."""
    ids = set(replacement.ids())
    found = sorted([*(one for one in rows if one.mapping_id not in ids), *replacement.after])
    assert len({one.mapping_id for one in found}) == len(found)
    assert len({one.lo for one in found}) == len(found)
    for one in found:
        assert one.lo < one.hi
        assert 0 < one.epoch < 1 << 63
    for one, other in pairwise(found):
        assert overlap or one.hi <= other.lo
    return [one._replace(extra=None) for one in found]


class Garbage:
    """A catalogue of two shards, and anything in the shards' own maps."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.ids = [UUID(int=random.getrandbits(128)) for _ in range(8)]
        self.catalogue = self._catalogue()
        one = [row for row in self.catalogue if row.shard_id == ONE and random.random() < 0.5]
        two = [row for row in self.catalogue if row.shard_id == TWO]
        self.one = self._with_garbage(one, ONE, 6)
        self.two = self._with_garbage(two, TWO, random.choice([0, 3]))

    def _status(self) -> str:
        return self.random.choice(["online", "offline"])

    def _catalogue(self) -> list[Row]:
        random, rows = self.random, []
        low = random.randint(0, 4)
        for mapping_id in random.sample(self.ids, 5):
            high = low + random.randint(1, 8)
            shard = random.choice([ONE, ONE, TWO])
            epoch = random.randint(1, 4)
            made = row(low, high, mapping_id, status=self._status(), epoch=epoch, shard=shard)
            rows.append(made)
            low = high + random.choice([0, 0, 3])
        return rows

    def _with_garbage(self, rows: list[Row], shard: UUID, count_max: int) -> list[Row]:
        random, found = self.random, [*rows]
        for _ in range(random.randint(0, count_max)):
            made = self._garbage(shard)
            taken = {one.mapping_id for one in found}
            if made.mapping_id not in taken and made.lo not in {one.lo for one in found}:
                found.append(made)
        return sorted(found)

    def _garbage(self, shard: UUID) -> Row:
        random = self.random
        low, epoch = random.randint(0, BOUNDS_MAX), random.choice([1, 2, 5, EPOCH_MAX])
        high = random.choice([None, *range(low + 1, low + 15)])
        made = row(low, high, random.choice(self.ids), epoch=epoch, shard=shard)
        lo = made.lo if random.random() < 0.9 else made.lo[:2]  # no key
        return made._replace(lo=lo, status=self._status())

    def plan(self, source: str, found: list[KeysDiffer], chosen: list[KeysDiffer]) -> RowChanges:
        """Return what a repair of shard one replaces."""
        choice = Choice(ONE, found, chosen)
        if source == "catalogue":
            ids = {one.mapping_id for one in choice.catalogue_targets()}
            return from_catalogue(choice, [one for one in self.one if one.mapping_id in ids])
        targets = choice.local_targets()
        ids = {one.mapping_id for one in targets}
        same = [one for one in self.catalogue if one.mapping_id in ids]
        return from_shard(choice, same, [(TWO, self._near(choice, targets))])

    def _near(self, choice: Choice, targets: list[Row]) -> list[Row]:
        extents, near, reach = choice.extents(targets), [], b""
        for one in self.two:
            if one.lo < reach or extents.within(one):
                near.append(one)
                reach = max(reach, one.hi)
        return near

    def after(self, plan: RowChanges) -> tuple[list[Row], list[Row]]:
        """Return the rows of the catalogue and of shard one after a plan."""
        for shard_id, rows in ((ONE, self.one), (TWO, self.two)):
            written(rows, plan.local.get(shard_id, Replacement()), overlap=True)
        local = written(self.one, plan.local.get(ONE, Replacement()), overlap=True)
        return written(self.catalogue, plan.catalogue, overlap=False), local


async def test_s35_a_repair_of_any_garbage_can_be_written_and_leaves_no_difference() -> None:
    for seed in range(CASES):
        garbage = Garbage(seed)
        found = await compared(garbage.catalogue, garbage.one)
        some = [one for one in found if garbage.random.random() < 0.5]
        for source in ("catalogue", "shard"):
            try:
                garbage.after(garbage.plan(source, found, some))
                after = garbage.after(garbage.plan(source, found, found))
                assert await compared(*after) == []
            except AssertionError as error:
                error.add_note(f"from the {source}, garbage {seed}")
                raise


def test_s35_a_rebuild_from_any_garbage_can_be_written() -> None:
    for seed in range(CASES):
        garbage = Garbage(seed)
        shards = {ONE: garbage.one, TWO: garbage.two}
        try:
            garbage.after(from_all_shards(RANGE, garbage.catalogue, shards))
        except AssertionError as error:
            error.add_note(f"garbage {seed}")
            raise


@pytest.mark.parametrize("source", ["catalogue", "shard"])
async def test_s36_rows_that_overlap_are_cut_at_one_key(source: str) -> None:
    catalogue = [row(5, 10, A)]
    local = [row(0, 20, B), row(7, 15, C), row(10, 12, D)]
    found = await compared(catalogue, local)
    chosen = [one for one in found if (one.lo, one.hi) == (key(5), key(10)) and not one.surplus]
    choice = Choice(ONE, found, chosen)
    plan = from_catalogue(choice, []) if source == "catalogue" else from_shard(choice, [], [])
    rows = written(local, plan.local[ONE], overlap=True)
    assert {one.mapping_id for one in rows} >= {B if source == "shard" else A}
    assert all(one.hi <= TOP for one in rows)
