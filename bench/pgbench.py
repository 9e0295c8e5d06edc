"""Small queries: pgbench select-only, by query protocol and number of clients.

Only a window inside the run counts, in which all clients are connected and none has finished.
pgbench's log has the end of each transaction; the system's CPU time is sampled several times a
second.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from bench.child_processes import child
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity, percentile
from bench.postgres import Postgres
from bench.process_usage import CPUTime
from bench.systems import System

_WARM_UP_SECONDS: Final = 0.2  # caches fill and statements are prepared
_SAMPLE_SECONDS: Final = 0.05
_MANY_CLIENTS: Final = 16
_MANY_CONNECT_SECONDS: Final = 1.0
_RETRY_EXTRA_SECONDS: Final = 5.0
_SLACK_SECONDS: Final = 30.0  # for connecting, on top of the run itself


class _TooShort(BenchError):
    """The run has no window that counts."""


@dataclass(frozen=True, slots=True)
class Load:
    """One pgbench run."""

    protocol: str  # simple, extended, prepared
    clients: int
    seconds: float
    reconnects: bool = False  # a connection for each transaction

    @property
    def case(self) -> str:
        """The name in the table."""
        case = f"{self.protocol}, {self.clients} client{'s' * (self.clients > 1)}"
        return case + ", new connections" * self.reconnects


@dataclass(frozen=True, slots=True)
class Transaction:
    """One line of pgbench's log: the end, on the wall clock, and the duration."""

    ended_at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The system's CPU time at a moment of the wall clock; None if it has no process."""

    at: float
    cpu: CPUTime | None


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between two samples."""

    seconds: float
    latencies: list[float]
    cpu: CPUTime | None

    @property
    def throughput(self) -> float:
        """The transactions a second."""
        return len(self.latencies) / self.seconds


def measure(load: Load, system: System, upstream: Postgres, measurements: Measurements) -> None:
    """Run pgbench once and record the results. Raises BenchError."""
    record(f"pgbench {load.case}", system.name, run(load, system, upstream), measurements)


def run(load: Load, system: System, upstream: Postgres) -> Window:
    """Run pgbench once and return the window that counts. Raises BenchError.

    pgbench's time includes connecting: on a busy machine no window may be left, so a run that was
    too short is repeated once, for longer.
    """
    seconds = load.seconds + (_MANY_CONNECT_SECONDS if load.clients >= _MANY_CLIENTS else 0)
    try:
        return _run(load, seconds, system, upstream)
    except _TooShort:
        return _run(load, seconds + _RETRY_EXTRA_SECONDS, system, upstream)


def _run(load: Load, run_seconds: float, system: System, upstream: Postgres) -> Window:
    prefix = upstream.scratch / "transactions"
    command: list[str | Path] = [
        *(upstream.binaries / "pgbench", "-n", "-S", "-M", load.protocol),
        *("-c", str(load.clients), "-j", str(min(load.clients, 2)), "-T", f"{run_seconds:.0f}"),
        *("-l", f"--log-prefix={prefix}"),
        *(["-C"] if load.reconnects else []),
    ]
    samples: list[Sample] = []
    log = upstream.scratch / "pgbench.log"
    deadline = time.monotonic() + run_seconds + _SLACK_SECONDS
    with child(command, log, environment=system.environment) as started:
        while (status := started.process.poll()) is None:
            samples.append(Sample(time.time(), system.cpu_time()))
            if time.monotonic() > deadline:
                raise BenchError(f"{load.case} through {system.name} hangs:\n{started.tail()}")
            time.sleep(_SAMPLE_SECONDS)
        if status:
            raise BenchError(f"{load.case} through {system.name}:\n{started.tail()}")
    return window(samples, _transactions(prefix))


def window(samples: list[Sample], transactions: list[Transaction]) -> Window:
    """Return the window from the first sample after the warm-up to the last one of the run.

    Raises BenchError if there is none.
    """
    if not transactions:
        raise _TooShort("the run was too short for a transaction")
    started_at = min(one.ended_at for one in transactions) + _WARM_UP_SECONDS
    ended_at = max(one.ended_at for one in transactions)
    inside = [sample for sample in samples if started_at <= sample.at <= ended_at]
    if len(inside) < 2:
        raise _TooShort("the run was too short to measure")
    first, last = inside[0], inside[-1]
    latencies = [one.seconds for one in transactions if first.at < one.ended_at <= last.at]
    if not latencies:
        raise _TooShort("the run was too short for a transaction after the warm-up")
    used = None if first.cpu is None or last.cpu is None else last.cpu - first.cpu
    return Window(last.at - first.at, latencies, used)


def record(case: str, system: str, window: Window, measurements: Measurements) -> None:
    """Record a run's results."""

    def add(name: str, unit: str, value: float) -> None:
        measurements.add(system, Quantity(case, name, unit), value)

    add("throughput", "TPS", window.throughput)
    add("latency mean", "us", fmean(window.latencies) * 1e6)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        add(f"latency {name}", "us", percentile(window.latencies, share) * 1e6)
    measurements.add_cpu(system, case, "us/transaction", window.cpu, 1e6 / len(window.latencies))


def _transactions(prefix: Path) -> list[Transaction]:
    """Read and remove pgbench's logs, one per thread: client, number, us, script, s, us."""
    found = []
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        for line in path.read_text().splitlines():
            _, _, took, _, seconds, microseconds = line.split()[:6]
            found.append(Transaction(int(seconds) + int(microseconds) / 1e6, int(took) / 1e6))
        path.unlink()
    return found
