"""The goals, and when they are met."""

import pytest

from bench.goals import GOALS, GoalResult, check_goals
from bench.record import Record
from tests.bench.records import record


def named(result: GoalResult) -> tuple[str, str]:
    return result.goal.measure, result.label


def test_nothing_is_met_or_missed_that_was_not_measured() -> None:
    assert {one.met for one in check_goals(Record(1))} == {None}


def test_a_record_within_every_bound_meets_every_goal() -> None:
    assert [named(one) for one in check_goals(record()) if one.met is not True] == []


def test_a_record_within_no_bound_misses_every_goal() -> None:
    poor = record(speed=0.5, cost=2.0, latency=150.0, own=99.0)
    assert [named(one) for one in check_goals(poor) if one.met is not False] == []


def test_a_value_that_equals_its_bound_meets_it() -> None:
    for goal in GOALS:
        assert goal.met(goal.bound)
        assert not goal.met(goal.bound * (1.01 if goal.at_most else 0.99))


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("CPU a transaction", 0.5),  # ratio to PgBouncer
        ("COPY beside direct", 2.0),  # ratio to direct
        ("Added latency", 0.5),  # 110 - 100 of 120 - 100
        ("Idle session", 1.0),  # a value of its own
    ],
)
def test_a_result_has_the_value_of_its_measure(measure: str, value: float) -> None:
    values = {one.value for one in check_goals(record()) if one.goal.measure == measure}
    assert values == {value}


def test_a_bound_is_described() -> None:
    descriptions = {goal.measure: goal.description for goal in GOALS}
    assert descriptions["Throughput"] == "at least 1 x PgBouncer"
    assert descriptions["Idle session"] == "at most 30 kB"
