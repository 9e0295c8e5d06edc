"""The performance goals, and whether a record meets them.

A goal is one bound on one or more values. A value that was not measured is neither met nor missed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.record import Record
from bench.systems import DIRECT, PGBOUNCER, PROXY

_ReadValue = Callable[[Record], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound, and how to read the values that it bounds from a record."""

    measure: str
    bound: float
    at_most: bool
    unit: str  # follows the number: "x PgBouncer", "kB"
    values: tuple[tuple[str, _ReadValue], ...]

    @property
    def description(self) -> str:
        """The bound as text."""
        return f"at {'most' if self.at_most else 'least'} {self.bound:g} {self.unit}"

    def met(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True, slots=True)
class GoalResult:
    """One value of a goal; None if it was not measured."""

    goal: Goal
    label: str
    value: float | None

    @property
    def met(self) -> bool | None:
        """Whether it meets the goal; None if it was not measured."""
        return None if self.value is None else self.goal.met(self.value)


def check_goals(record: Record) -> list[GoalResult]:
    """Return every value of every goal."""
    return [GoalResult(goal, label, read(record)) for goal in GOALS for label, read in goal.values]


def _ratio(case: str, name: str, reference: str) -> _ReadValue:
    def read(record: Record) -> float | None:
        return record.measurements.ratio(record.measurements.find(case, name), PROXY, reference)

    return read


def _added_ratio(case: str, name: str) -> _ReadValue:
    def read(record: Record) -> float | None:
        quantity = record.measurements.find(case, name)
        return record.measurements.added_ratio(quantity, PROXY, PGBOUNCER, DIRECT)

    return read


def _value(case: str, name: str) -> _ReadValue:
    def read(record: Record) -> float | None:
        return record.measurements.median(record.measurements.find(case, name), PROXY)

    return read


_PROTOCOLS: Final = ("simple", "prepared")
_TIMES_PGBOUNCER: Final = "x PgBouncer"
_TIMES_DIRECT: Final = "x direct"

GOALS: Final = (
    Goal(
        "CPU a transaction",
        1.0,
        at_most=True,
        unit=_TIMES_PGBOUNCER,
        values=tuple(
            (f"{one}, 8 clients", _ratio(f"pgbench {one}, 8 clients", "CPU", PGBOUNCER))
            for one in _PROTOCOLS
        ),
    ),
    Goal(
        "Throughput",
        1.0,
        at_most=False,
        unit=_TIMES_PGBOUNCER,
        values=tuple(
            (f"{one}, {count}", _ratio(f"pgbench {one}, {count}", "throughput", PGBOUNCER))
            for one in _PROTOCOLS
            for count in ("1 client", "8 clients")
        ),
    ),
    Goal(
        "Added latency",
        1.0,
        at_most=True,
        unit="x what PgBouncer adds",
        values=tuple(
            (
                f"{one}, 1 client, p50 over direct",
                _added_ratio(f"pgbench {one}, 1 client", "latency p50"),
            )
            for one in _PROTOCOLS
        ),
    ),
    Goal(
        "COPY beside PgBouncer",
        1.5,
        at_most=False,
        unit=_TIMES_PGBOUNCER,
        values=tuple((one, _ratio(f"COPY {one}", "speed", PGBOUNCER)) for one in ("out", "in")),
    ),
    Goal(
        "COPY beside direct",
        0.9,
        at_most=False,
        unit=_TIMES_DIRECT,
        values=tuple((one, _ratio(f"COPY {one}", "speed", DIRECT)) for one in ("out", "in")),
    ),
    Goal(
        "CPU a GB",
        0.7,
        at_most=True,
        unit=_TIMES_PGBOUNCER,
        values=tuple(
            (f"COPY {one}", _ratio(f"COPY {one}", "CPU", PGBOUNCER)) for one in ("out", "in")
        ),
    ),
    Goal(
        "Connect to first answer",
        1.15,
        at_most=True,
        unit=_TIMES_DIRECT,
        values=(
            ("p50, all on this machine", _ratio("connect, on this machine", "p50", DIRECT)),
            ("p50, PostgreSQL 1 ms away", _ratio("connect, PostgreSQL", "p50", DIRECT)),
        ),
    ),
    Goal(
        "Idle session",
        30,
        at_most=True,
        unit="kB",
        values=tuple(
            (f"of {count}", _value("resident memory", f"per session of {count}"))
            for count in ("1,000", "5,000")
        ),
    ),
    Goal(
        "Memory after bulk",
        10,
        at_most=True,
        unit="% more than before",
        values=(("COPY out", _value("resident memory", "growth by a bulk transfer")),),
    ),
    Goal(
        "Two workers, CPU",
        1.1,
        at_most=True,
        unit="x one worker's a transaction",
        values=tuple(
            (one, _value(f"workers, {one}", "CPU, 2 workers / 1"))
            for one in ("simple, 8 clients", "prepared, 8 clients")
        ),
    ),
    Goal(
        "Two workers, spread",
        20,
        at_most=True,
        unit="% from even",
        values=(("400 sessions", _value("workers", "sessions of the least even worker")),),
    ),
)
