"""What the catalogue becomes from all shards: whichever row is right, and what is left alone."""

from uuid import UUID

import pytest

from proxy.catalogue.differences import Row
from proxy.catalogue.rebuild_plan import from_all_shards
from proxy.catalogue.repair_plan import RowChanges
from tests.catalogue.test_differences import ONE, RANGE, TWO, A, B, C, key, row


def rebuilt(one: list[Row], two: list[Row], catalogue: list[Row] | None = None) -> RowChanges:
    return from_all_shards(RANGE, sorted(catalogue or []), {ONE: sorted(one), TWO: sorted(two)})


def on_two(low: int, high: int, mapping_id: UUID, status: str = "online", epoch: int = 1) -> Row:
    return row(low, high, mapping_id, status=status, epoch=epoch, shard=TWO)


def test_a_lost_catalogue_gets_what_the_shards_have_as_it_is() -> None:
    one, two = [row(0, 10, A, epoch=4)], [on_two(10, 20, B, "offline", 7)]
    plan = rebuilt(one, two)
    assert plan.catalogue.after == [*one, *two]
    assert plan.local == {}
    assert plan.repaired == 2


def test_what_the_catalogue_has_already_is_not_touched() -> None:
    one, two = [row(0, 10, A, epoch=4)], [on_two(10, 20, B)]
    plan = rebuilt(one, two, [*one, *two])
    assert (plan.repaired, plan.local, bool(plan.catalogue)) == (0, {}, False)


@pytest.mark.parametrize("status", ["online", "offline"])
def test_the_higher_epoch_is_right_if_the_lower_one_is_offline(status: str) -> None:
    source, target = row(0, 10, A, status="offline", epoch=5), on_two(0, 10, A, status, 6)
    plan = rebuilt([source], [target])
    assert plan.catalogue.after == [target]
    assert plan.local[ONE].before == [source]
    assert plan.local[ONE].after == []
    assert TWO not in plan.local


def test_of_equal_epochs_the_one_that_is_online_is_right() -> None:
    branch = on_two(0, 10, A, "offline", 5)
    plan = rebuilt([row(0, 10, A, epoch=5)], [branch])
    assert plan.catalogue.after == [row(0, 10, A, epoch=6)]  # above both
    assert plan.local[TWO].before == [branch]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (row(0, 10, A, epoch=5), on_two(5, 15, B, "online", 9)),
        (row(0, 10, A, epoch=5), on_two(5, 15, B, "offline", 9)),
        (row(0, 10, A, status="offline", epoch=5), on_two(5, 15, B, "offline", 5)),
    ],
)
def test_nothing_is_done_with_keys_of_which_neither_is_known_to_be_right(
    one: Row, two: Row
) -> None:
    catalogue = [row(0, 10, A, epoch=3)]
    plan = rebuilt([one, row(20, 30, C)], [two], catalogue)
    assert plan.conflicts == [(one, two)]
    assert plan.catalogue.after == [row(20, 30, C)]
    assert plan.catalogue.before == []
    assert plan.local == {}


def test_a_row_whose_epoch_cannot_be_raised_gets_a_new_id() -> None:
    garbage = row(0, 10, A, epoch=(1 << 63) - 1)
    (target,) = rebuilt([garbage], []).catalogue.after
    assert target.mapping_id != A
    assert target[:2] == garbage[:2]
    assert target.epoch < 1 << 40


def test_what_loses_to_a_conflict_is_left_alone_too() -> None:
    loser = on_two(8, 12, C, "offline", 1)
    plan = rebuilt([row(0, 10, A, epoch=5)], [on_two(0, 8, B, epoch=6), loser])
    assert len(plan.conflicts) == 1
    assert plan.local == {}


def test_what_wins_against_a_conflict_is_left_alone_too() -> None:
    # The catalogue keeps its mapping of the conflict, which would overlap that of the winner.
    one = [row(0, 10, A, status="offline", epoch=1)]
    two = [on_two(0, 5, B, epoch=3), on_two(5, 15, C, "offline", 1)]
    plan = rebuilt(one, two, [row(0, 10, A, status="offline")])
    assert plan.conflicts == [(one[0], two[1])]
    assert not plan.catalogue
    assert plan.local == {}


def test_a_part_that_no_other_shard_has_stays() -> None:
    one, two = row(0, 10, A, status="offline", epoch=5), on_two(4, 6, B, epoch=8)
    plan = rebuilt([one], [two])
    after = plan.catalogue.after
    assert [(found.lo, found.hi, found.shard_id) for found in after] == [
        (key(0), key(4), ONE),
        (key(4), key(6), TWO),
        (key(6), key(10), ONE),
    ]
    assert after[0].mapping_id == A
    assert len({found.mapping_id for found in after}) == 3


def test_the_same_id_is_in_the_catalogue_once() -> None:
    plan = rebuilt([row(0, 10, A)], [on_two(20, 30, A)])
    assert len({found.mapping_id for found in plan.catalogue.after}) == 2


def test_an_older_catalogue_is_replaced_with_epochs_above_its_own() -> None:
    old = [row(0, 10, A, epoch=9), row(10, 20, B, epoch=2)]
    plan = rebuilt([row(0, 10, A, epoch=4)], [on_two(10, 20, B, epoch=5)], old)
    assert [(found.epoch, found.shard_id) for found in plan.catalogue.after] == [
        (10, ONE),
        (5, TWO),
    ]
    assert plan.local[ONE].after == [row(0, 10, A, epoch=10)]
    assert TWO not in plan.local


def test_garbage_of_a_shard_goes() -> None:
    bad = Row(b"\x01", b"\x02", C, "online", 1, ONE)
    plan = rebuilt([row(0, 10, A), row(5, 8, B), bad], [])
    assert plan.catalogue.after == [row(0, 10, A)]
    assert sorted(plan.local[ONE].before) == sorted([bad, row(5, 8, B)])
