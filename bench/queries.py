"""Small queries: pgbench select-only, by query protocol and number of clients.

The time counted is a window inside the run, when all clients are connected and none has finished:
pgbench's log gives each transaction's end, and the CPU clock of the process in between is read
several times a second.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from bench.accounting import CPU
from bench.children import child
from bench.errors import BenchError
from bench.postgres import Postgres
from bench.readings import Quantity, Readings, percentile
from bench.systems import Contender

_WARM_UP_SECONDS: Final = 0.2  # caches fill and prepared statements are prepared
_SAMPLE_SECONDS: Final = 0.05
_MANY_CLIENTS: Final = 16
_MANY_CONNECT_SECONDS: Final = 1.0
_SECOND_CHANCE_SECONDS: Final = 5.0
_SLACK_SECONDS: Final = 30.0  # for connecting, on top of the run itself


class _TooShort(BenchError):
    """pgbench ran, but nothing of it can be counted."""


@dataclass(frozen=True, slots=True)
class Load:
    """One pgbench run."""

    protocol: str  # simple, extended, prepared
    clients: int
    seconds: float

    @property
    def case(self) -> str:
        """Its name in the table."""
        return f"{self.protocol}, {self.clients} client{'s' * (self.clients > 1)}"


@dataclass(frozen=True, slots=True)
class Transaction:
    """One line of pgbench's log: when it ended, on the wall clock, and how long it took."""

    ended_at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A reading of the CPU clock at a moment of the wall clock; no CPU without a process."""

    at: float
    cpu: CPU | None


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two samples."""

    seconds: float
    latencies: list[float]
    cpu: CPU | None

    @property
    def throughput(self) -> float:
        """Transactions a second."""
        return len(self.latencies) / self.seconds


def measure(load: Load, contender: Contender, upstream: Postgres, readings: Readings) -> None:
    """Run pgbench once and keep what it showed. Raises BenchError."""
    _keep(f"pgbench {load.case}", contender.name, observe(load, contender, upstream), readings)


def observe(load: Load, contender: Contender, upstream: Postgres) -> Window:
    """Run pgbench once and return what happened in its middle. Raises BenchError.

    pgbench counts its time from before its clients connect: on a machine that is busy with others
    nothing may be left of it, so it has a second chance.
    """
    seconds = load.seconds + (_MANY_CONNECT_SECONDS if load.clients >= _MANY_CLIENTS else 0)
    try:
        return _observe(load, seconds, contender, upstream)
    except _TooShort:
        return _observe(load, seconds + _SECOND_CHANCE_SECONDS, contender, upstream)


def _observe(load: Load, run_seconds: float, contender: Contender, upstream: Postgres) -> Window:
    prefix = upstream.scratch / "transactions"
    command: list[str | Path] = [
        *(upstream.binaries / "pgbench", "-n", "-S", "-M", load.protocol),
        *("-c", str(load.clients), "-j", str(min(load.clients, 2)), "-T", f"{run_seconds:.0f}"),
        *("-l", f"--log-prefix={prefix}"),
    ]
    samples: list[Sample] = []
    log = upstream.scratch / "pgbench.log"
    deadline = time.monotonic() + run_seconds + _SLACK_SECONDS
    with child(command, log, environment=contender.environment) as started:
        while (status := started.process.poll()) is None:
            samples.append(Sample(time.time(), contender.cpu()))
            if time.monotonic() > deadline:
                raise BenchError(f"{load.case} through {contender.name} hangs:\n{started.tail()}")
            time.sleep(_SAMPLE_SECONDS)
        if status:
            raise BenchError(f"{load.case} through {contender.name}:\n{started.tail()}")
    return window(samples, _transactions(prefix))


def window(samples: list[Sample], transactions: list[Transaction]) -> Window:
    """Return what happened from the first sample after the warm-up to the last in the run.

    Raises BenchError when that is nothing.
    """
    if not transactions:
        raise _TooShort("the run was too short for a transaction")
    begun = min(one.ended_at for one in transactions) + _WARM_UP_SECONDS
    ended = max(one.ended_at for one in transactions)
    inside = [sample for sample in samples if begun <= sample.at <= ended]
    if len(inside) < 2:
        raise _TooShort("the run was too short to measure")
    first, last = inside[0], inside[-1]
    latencies = [one.seconds for one in transactions if first.at < one.ended_at <= last.at]
    if not latencies:
        raise _TooShort("the run was too short for a transaction after the warm-up")
    spent = None if first.cpu is None or last.cpu is None else last.cpu - first.cpu
    return Window(last.at - first.at, latencies, spent)


def _keep(case: str, contender: str, seen: Window, readings: Readings) -> None:
    def keep(name: str, unit: str, value: float) -> None:
        readings.add(contender, Quantity(case, name, unit), value)

    keep("throughput", "TPS", seen.throughput)
    keep("latency mean", "us", fmean(seen.latencies) * 1e6)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        keep(f"latency {name}", "us", percentile(seen.latencies, share) * 1e6)
    readings.add_cpu(contender, case, "us/transaction", seen.cpu, 1e6 / len(seen.latencies))


def _transactions(prefix: Path) -> list[Transaction]:
    """Read and remove pgbench's logs, one a thread: client, number, us, script, s, us."""
    found = []
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        for line in path.read_text().splitlines():
            _, _, took, _, seconds, microseconds = line.split()[:6]
            found.append(Transaction(int(seconds) + int(microseconds) / 1e6, int(took) / 1e6))
        path.unlink()
    return found
