"""The numbers to reach, and where each stands in a record.

One line of `TARGETS` is one bound; what it bounds may be several values. A target whose value was
not measured is neither met nor missed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.record import Record
from bench.systems import DIRECT, PGBOUNCER, PROXY

_Value = Callable[[Record], float | None]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound, and how to read what it bounds out of a record."""

    measure: str
    bound: float
    at_most: bool
    unit: str  # what stands behind a number: "x PgBouncer", "kB"
    values: tuple[tuple[str, _Value], ...]

    @property
    def words(self) -> str:
        """The bound as people say it."""
        return f"at {'most' if self.at_most else 'least'} {self.bound:g} {self.unit}"

    def met(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one value stands; None where it was not measured."""

    target: Target
    label: str
    value: float | None

    @property
    def met(self) -> bool | None:
        """Whether it keeps the bound."""
        return None if self.value is None else self.target.met(self.value)


def standings(record: Record) -> list[Standing]:
    """Return every value of every target."""
    return [
        Standing(target, label, value(record))
        for target in TARGETS
        for label, value in target.values
    ]


def _ratio(case: str, name: str, reference: str) -> _Value:
    def read(record: Record) -> float | None:
        return record.readings.ratio(record.readings.find(case, name), PROXY, reference)

    return read


def _added(case: str, name: str) -> _Value:
    def read(record: Record) -> float | None:
        quantity = record.readings.find(case, name)
        return record.readings.added_ratio(quantity, PROXY, PGBOUNCER, DIRECT)

    return read


def _own(case: str, name: str) -> _Value:
    def read(record: Record) -> float | None:
        return record.readings.median(record.readings.find(case, name), PROXY)

    return read


_PROTOCOLS: Final = ("simple", "prepared")
_BY_PGBOUNCER: Final = "x PgBouncer"
_BY_DIRECT: Final = "x direct"

TARGETS: Final = (
    Target(
        "CPU a transaction",
        1.0,
        at_most=True,
        unit=_BY_PGBOUNCER,
        values=tuple(
            (f"{one}, 8 clients", _ratio(f"pgbench {one}, 8 clients", "CPU", PGBOUNCER))
            for one in _PROTOCOLS
        ),
    ),
    Target(
        "Throughput",
        1.0,
        at_most=False,
        unit=_BY_PGBOUNCER,
        values=tuple(
            (f"{one}, {count}", _ratio(f"pgbench {one}, {count}", "throughput", PGBOUNCER))
            for one in _PROTOCOLS
            for count in ("1 client", "8 clients")
        ),
    ),
    Target(
        "Added latency",
        1.0,
        at_most=True,
        unit="x what PgBouncer adds",
        values=tuple(
            (f"{one}, 1 client, p50 over direct", _added(f"pgbench {one}, 1 client", "latency p50"))
            for one in _PROTOCOLS
        ),
    ),
    Target(
        "COPY beside PgBouncer",
        1.5,
        at_most=False,
        unit=_BY_PGBOUNCER,
        values=tuple((one, _ratio(f"COPY {one}", "speed", PGBOUNCER)) for one in ("out", "in")),
    ),
    Target(
        "COPY beside direct",
        0.9,
        at_most=False,
        unit=_BY_DIRECT,
        values=tuple((one, _ratio(f"COPY {one}", "speed", DIRECT)) for one in ("out", "in")),
    ),
    Target(
        "CPU a GB",
        0.7,
        at_most=True,
        unit=_BY_PGBOUNCER,
        values=tuple(
            (f"COPY {one}", _ratio(f"COPY {one}", "CPU", PGBOUNCER)) for one in ("out", "in")
        ),
    ),
    Target(
        "Connect to first answer",
        1.15,
        at_most=True,
        unit=_BY_DIRECT,
        values=(
            ("p50, all on this machine", _ratio("connect, on this machine", "p50", DIRECT)),
            ("p50, PostgreSQL 1 ms away", _ratio("connect, PostgreSQL", "p50", DIRECT)),
        ),
    ),
    Target(
        "Idle session",
        30,
        at_most=True,
        unit="kB",
        values=tuple(
            (f"of {count}", _own("resident memory", f"per session of {count}"))
            for count in ("1,000", "5,000")
        ),
    ),
    Target(
        "Memory after bulk",
        10,
        at_most=True,
        unit="% more than before",
        values=(("COPY out", _own("resident memory", "growth by a bulk transfer")),),
    ),
    Target(
        "Two workers, CPU",
        1.1,
        at_most=True,
        unit="x one worker's a transaction",
        values=tuple(
            (one, _own(f"workers, {one}", "CPU, 2 workers / 1"))
            for one in ("simple, 8 clients", "prepared, 8 clients")
        ),
    ),
    Target(
        "Two workers, spread",
        20,
        at_most=True,
        unit="% from even",
        values=(("400 sessions", _own("workers", "sessions of the least even worker")),),
    ),
)
