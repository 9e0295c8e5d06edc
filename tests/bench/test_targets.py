"""The bounds, and when they are kept."""

import pytest

from bench.record import Record
from bench.targets import TARGETS, Standing, standings
from tests.bench.records import record


def named(standing: Standing) -> tuple[str, str]:
    return standing.target.measure, standing.label


def test_nothing_is_met_or_missed_that_was_not_measured() -> None:
    assert {one.met for one in standings(Record(1))} == {None}


def test_a_record_that_keeps_every_bound_meets_every_target() -> None:
    assert [named(one) for one in standings(record()) if one.met is not True] == []


def test_a_record_that_keeps_none_misses_every_target() -> None:
    poor = record(speed=0.5, cost=2.0, latency=150.0, own=99.0)
    assert [named(one) for one in standings(poor) if one.met is not False] == []


def test_a_value_that_equals_its_bound_meets_it() -> None:
    for target in TARGETS:
        assert target.met(target.bound)
        assert not target.met(target.bound * (1.01 if target.at_most else 0.99))


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("CPU a transaction", 0.5),  # ratio to PgBouncer
        ("COPY beside direct", 2.0),  # ratio to direct
        ("Added latency", 0.5),  # 110 - 100 of 120 - 100
        ("Idle session", 1.0),  # a value of its own
    ],
)
def test_a_standing_has_the_value_of_its_measure(measure: str, value: float) -> None:
    seen = {one.value for one in standings(record()) if one.target.measure == measure}
    assert seen == {value}


def test_a_bound_is_said_in_words() -> None:
    words = {target.measure: target.words for target in TARGETS}
    assert words["Throughput"] == "at least 1 x PgBouncer"
    assert words["Idle session"] == "at most 30 kB"
