"""What the soak proves, it can also refute: each fault is found where it is put."""

import pytest

from tests.soak.map_changes import canonical
from tests.soak.served import Served
from tests.soak.stamped_rows import LIVES_SECONDS_MAX, History, Kept, Known, Stamp, lost_rows
from tests.support.catalogue import MAP


def history(known: Known | None = None, *kept: Kept) -> History:
    """Return that of the keys 0 to 9: on shard one, offline from 10 on, on shard two from 20 on."""
    made = History(known or Known())
    moved = (
        Kept(0, 1, "one", served=True),
        Kept(10, 2, "one", served=False),
        Kept(20, 4, "two", served=True),
    )
    for row in (*moved, *kept):
        made.add(canonical(0), canonical(10), row)
    return made


@pytest.mark.parametrize(
    ("stamp", "wrong"),
    [
        (Stamp(5, 1, "one", 5.0), ""),
        (Stamp(5, 1, "one", 11.0), ""),  # it ends a moment later
        (Stamp(5, 4, "two", 21.0), ""),
        (Stamp(5, 1, "one", 21.0), "two has served it, under 4, since then"),
        (Stamp(5, 4, "two", 19.0), "one has served it, under 1"),
        (Stamp(5, 1, "two", 21.0), "one has served it, under 1"),
        (Stamp(5, 2, "one", 15.0), "had not served it under that epoch"),
        (Stamp(5, None, "one", 5.0), "had not served it under that epoch"),
        (Stamp(15, 1, "one", 5.0), "had not served it under that epoch"),
    ],
)
def test_a_stamp_is_right_only_where_and_while_its_shard_has_the_key(
    stamp: Stamp, wrong: str
) -> None:
    found = history().wrong(stamp)
    assert wrong in found
    assert bool(wrong) == bool(found)


def test_a_mapping_that_is_deleted_and_added_where_it_was_has_its_first_epoch_again() -> None:
    back = Kept(30, 6, "one", served=True)
    deleted, added = Kept(40, 7, "one", served=False), Kept(40, 1, "one", served=True)
    found = history(None, back, deleted, added)
    assert found.wrong(Stamp(5, 1, "one", 41.0)) == ""
    assert found.wrong(Stamp(5, 6, "one", 39.0)) == ""
    assert "one has served it, under 6, since then" in found.wrong(Stamp(5, 4, "two", 35.0))


def test_a_session_that_lives_where_its_key_is_offline_is_timed_unless_it_may() -> None:
    assert history().lives_seconds(Stamp(5, 1, "one", 5.0)) == 0
    assert history().lives_seconds(Stamp(5, 1, "one", 13.0)) == 3
    assert history().lives_seconds(Stamp(5, 1, "one", 11.0 + LIVES_SECONDS_MAX)) == 21
    long_after = Stamp(5, 1, "one", 13.0)
    kept = Known(changes=[(range(10), 3.0, False), (range(10), 9.0, True)])
    assert history(kept).lives_seconds(long_after) == 0
    # Neither what was kept before another change of the key, nor what is kept later.
    kept = Known(changes=[(range(10), 3.0, True), (range(10), 9.0, False), (range(10), 12.0, True)])
    assert history(kept).lives_seconds(long_after) == 3
    assert history(Known(changes=[(range(6, 10), 9.0, True)])).lives_seconds(long_after) == 3


def test_an_epoch_that_two_shards_use_is_found() -> None:
    assert history().order([5]) == []
    assert history(None, Kept(30, 4, "one", served=True)).order([5]) != []
    assert history(None, Kept(30, 3, "one", served=True)).order([5]) != []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1, 1), (1, 2)], ""),
        ([(1, 1), (1, 2), (1, 3)], ""),  # the answer was lost, the row was not
        ([(1, 1)], "1 committed rows are lost"),
        ([(1, 1), (1, 2), (1, 2)], "1 rows are there twice"),
        ([(1, 1), (1, 2), (7, 7)], "1 rows that were never written"),
    ],
)
def test_rows_are_there_once_if_they_were_committed(rows: list[tuple[int, int]], said: str) -> None:
    known = Known()
    known.acknowledged[5] = {(1, 1), (1, 2)}
    known.attempted[5] = {(1, 1), (1, 2), (1, 3)}
    found = "; ".join(lost_rows(5, rows, known))
    assert said in found
    assert bool(said) == bool(found)


def test_a_sidecar_is_excused_as_long_as_it_may_not_have_heard_of_another_host() -> None:
    """A feed that was lost with the catalogue comes back after a pause, which was not counted."""
    served = Served(owners={5: "two"})
    assert served.seconds(5, has_feed=False) is not None
    served.rises("two", elsewhere=True)
    assert served.seconds(5) is not None
    assert served.seconds(5, has_feed=False) is None
    served.rises(MAP)
    served.rises("two", elsewhere=True)
    assert served.seconds(5) is None
