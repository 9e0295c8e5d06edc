"""Percentiles from counts between bounds: added over processes, subtracted over time."""

import pytest

from proxy.observe.connect_times import (
    BOUNDS,
    NO_CONNECTS,
    Counts,
    add_counts,
    index_of,
    percentile,
    since,
)


def counts(*seconds: float) -> Counts:
    found = list(NO_CONNECTS)
    for each in seconds:
        found[index_of(each)] += 1
    return tuple(found)


@pytest.mark.parametrize("seconds", [0.0005, 0.001, 0.004, 0.09, 1.7, 59.0])
def test_a_percentile_is_at_most_a_quarter_too_high(seconds: float) -> None:
    found = percentile(counts(seconds), 0.5)
    assert found is not None
    assert seconds <= found <= max(0.001, seconds * 1.25)


def test_one_slow_connect_of_a_hundred_is_beyond_the_99th_percentile_and_not_the_median() -> None:
    many = counts(*[0.1] * 98, 5.0, 5.0)
    assert percentile(many, 0.5) == BOUNDS[index_of(0.1)]
    assert percentile(many, 0.99) == BOUNDS[index_of(5.0)]


def test_longer_than_every_bound_is_the_last_bound() -> None:
    assert percentile(counts(1e6), 0.99) == BOUNDS[-1] > 60


def test_without_a_connect_there_is_no_percentile() -> None:
    assert percentile(NO_CONNECTS, 0.5) is None


def test_counts_of_two_processes_are_added_and_those_before_are_taken_off() -> None:
    before, later = counts(0.1, 2.0), counts(0.1, 0.1, 2.0)
    assert since(before, later) == counts(0.1)
    assert add_counts(before, counts(0.1)) == later
    assert since(later, before) == NO_CONNECTS, "a process that has ended takes nothing away"
