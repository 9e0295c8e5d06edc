"""The performance goals, and whether a record meets them.

A goal is one bound on one or more values. A value that was not measured is neither met nor missed.
"""

# ruff: noqa: E501 - a goal of the pool is a row of a table, and a row is a line

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench import pool
from bench.record import Record
from bench.systems import DIRECT, PGBOUNCER, POOLED, PROXY

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


def _ratio(case: str, name: str, reference: str, system: str = PROXY) -> _ReadValue:
    def read(record: Record) -> float | None:
        return record.measurements.ratio(record.measurements.find(case, name), system, reference)

    return read


def _added_ratio(case: str, name: str) -> _ReadValue:
    def read(record: Record) -> float | None:
        quantity = record.measurements.find(case, name)
        return record.measurements.added_ratio(quantity, PROXY, PGBOUNCER, DIRECT)

    return read


def _value(case: str, name: str, system: str = PROXY) -> _ReadValue:
    def read(record: Record) -> float | None:
        return record.measurements.median(record.measurements.find(case, name), system)

    return read


def _quotient(case: str, name: str, reference: str) -> _ReadValue:
    def read(record: Record) -> float | None:
        value, of = (_value(case, one)(record) for one in (name, reference))
        return None if value is None or not of else value / of

    return read


_PROTOCOLS: Final = ("simple", "prepared")
_TIMES_PGBOUNCER: Final = "x PgBouncer"
_TIMES_DIRECT: Final = "x direct"

# Measure, bound, whether it is the highest, unit, values. All of the proxy with a pool.
_POOL: Final = (
    ("connect beside direct", 0.15, True, _TIMES_DIRECT, (("p50, all on this machine", _ratio(pool.CONNECT_LOCAL, "p50", DIRECT, POOLED)),)),
    ("connect beside PgBouncer", 1.75, True, _TIMES_PGBOUNCER, (("p50, all on this machine", _ratio(pool.CONNECT_LOCAL, "p50", PGBOUNCER, POOLED)),)),
    ("connect away", 1.15, True, _TIMES_PGBOUNCER, (("p50, PostgreSQL 1 ms away", _ratio(pool.CONNECT_DELAYED, "p50", PGBOUNCER, POOLED)),)),
    ("CPU a session", 0.3, True, "x without a pool", (("connect, all on this machine", _ratio(pool.CONNECT_LOCAL, "CPU", PROXY, POOLED)),)),
    ("pgbench -C beside direct", 12, False, _TIMES_DIRECT, (("8 clients", _ratio(pool.RECONNECTS, "throughput", DIRECT, POOLED)),)),
    ("pgbench -C beside PgBouncer", 0.6, False, _TIMES_PGBOUNCER, (("8 clients", _ratio(pool.RECONNECTS, "throughput", PGBOUNCER, POOLED)),)),
    ("first catalogue query", 0.25, True, _TIMES_DIRECT, tuple((what, _ratio(pool.CATALOGUE_QUERY, f"{what}, p50", DIRECT, POOLED)) for what in pool.DRIVER_QUERIES)),
    ("relay CPU", 1.02, True, "x without a pool", tuple((f"{one}, 8 clients", _ratio(f"{pool.RELAY}, {one}", "CPU", PROXY, POOLED)) for one in _PROTOCOLS)),
    ("relay throughput", 0.98, False, "x without a pool", tuple((f"{one}, 8 clients", _ratio(f"{pool.RELAY}, {one}", "throughput", PROXY, POOLED)) for one in _PROTOCOLS)),
    ("logins", 3, True, "for 10,000 sessions", (("one after the other", _value(pool.LOGINS, "backends for 10,000 sessions", POOLED)),)),
    ("idle session", 20, True, "kB", (("of 500", _value(pool.MEMORY, "per idle session of 500", POOLED)),)),
)  # fmt: skip

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
            (one, _quotient(f"workers, {one}", "CPU, 2 workers", "CPU, 1 worker"))
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
    *(
        Goal("Pool, " + measure, bound, at_most, unit, values)
        for measure, bound, at_most, unit, values in _POOL
    ),
)
