"""Soak: the proxy under mixed load for some time; its memory and open files are recorded ten times.

The load is queries over long sessions, a new session for each of many queries, writes, results of a
megabyte, and COPY in both directions. What grows from the first tenth to the last, or is still
allocated after all clients have disconnected, is a leak. A failed session fails the run.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from bench.bulk_copy import BulkCopy
from bench.child_processes import ChildProcess, child
from bench.connect_time import open_session
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity
from bench.postgres import Postgres
from bench.process_usage import open_files, resident_bytes
from bench.systems import StartSystem, System

_PARTS: Final = 10
_COPY_MEGABYTES: Final = 64
_SETTLE_SECONDS: Final = 1.0
_COPY_PAUSE_SECONDS: Final = 3.0
_SLACK_SECONDS: Final = 30.0  # for connecting, and for the last statements
_BEFORE_END_SECONDS: Final = 1.0  # the last sample is taken under load, too
_MEGABYTE: Final = "SELECT repeat('x', 1000000);\n"

# Clients, transactions a second, and pgbench's options. The rates do not saturate the machine: this
# looks for growth, not for speed.
_LOADS: Final[tuple[tuple[int, int, tuple[str, ...]], ...]] = (
    (4, 2000, ("-S", "-M", "prepared")),
    (4, 40, ("-S", "-C")),
    (4, 200, ("-N", "-M", "extended")),
)
_MEGABYTE_LOAD: Final = (2, 10)


def measure(
    start: StartSystem, minutes: float, upstream: Postgres, measurements: Measurements
) -> None:
    """Run the load for so long; record memory and open files. Raises BenchError."""
    case = f"soak, {minutes:g} min of mixed load"
    bulk = BulkCopy(_COPY_MEGABYTES, upstream)
    with start() as system:
        open_session(system).finish()
        time.sleep(_SETTLE_SECONDS)
        samples = [("before", *_memory_and_files(system))]
        bulk.prepare(system)
        started_at = time.monotonic()
        with _load(system, minutes, upstream) as clients:
            for part in range(1, _PARTS + 1):
                until = started_at + part * (minutes * 60 - _BEFORE_END_SECONDS) / _PARTS
                _copy_until(until, bulk, system)
                samples.append((f"after {part * 100 // _PARTS} %", *_memory_and_files(system)))
            transactions = sum(_wait_for_end(one) for one in clients)
        time.sleep(_SETTLE_SECONDS)
        samples.append(("all gone", *_memory_and_files(system)))
    for when, megabytes, files in samples:
        measurements.add(system.name, Quantity(case, f"memory, {when}", "MB"), megabytes)
        measurements.add(system.name, Quantity(case, f"open files, {when}", ""), files)
    first, last = samples[1][1], samples[_PARTS][1]
    for name, unit, value in (
        ("transactions", "", transactions),
        ("memory growth, first to last tenth", "%", (last / first - 1) * 100),
        ("open files left over", "", samples[-1][2] - samples[0][2]),
    ):
        measurements.add(system.name, Quantity(case, name, unit), value)


@contextmanager
def _load(system: System, minutes: float, upstream: Postgres) -> Iterator[list[ChildProcess]]:
    script = upstream.scratch / "megabyte.sql"
    script.write_text(_MEGABYTE)
    loads = [*_LOADS, (*_MEGABYTE_LOAD, ("-f", str(script)))]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                child(
                    [
                        *(str(upstream.binaries / "pgbench"), "-n", *what),
                        *("-c", str(clients), "-R", str(rate), "-T", f"{minutes * 60:.0f}"),
                    ],
                    upstream.scratch / f"soak-{number}.log",
                    environment=system.environment,
                )
            )
            for number, (clients, rate, what) in enumerate(loads)
        ]


def _copy_until(moment: float, bulk: BulkCopy, system: System) -> None:
    while (left := moment - time.monotonic()) > 0:
        if left > _COPY_PAUSE_SECONDS:
            bulk.copy_out(system)
            bulk.copy_in(system)
        time.sleep(max(0.0, min(_COPY_PAUSE_SECONDS, moment - time.monotonic())))


def _wait_for_end(client: ChildProcess) -> int:
    """Wait until a client exits; return its transactions. Raises BenchError if it failed."""
    status = client.process.wait(_SLACK_SECONDS)
    output = client.log.read_text()
    done = [line for line in output.splitlines() if "actually processed" in line]
    if status or not done or "aborted" in output:
        raise BenchError(f"a client of the soak failed:\n{client.tail()}")
    return int(done[0].rpartition(":")[2].partition("/")[0])


def _memory_and_files(system: System) -> tuple[float, int]:
    """Return the resident megabytes and the open files of the system's processes."""
    megabytes = sum(resident_bytes(pid) for pid in system.pids) / 1e6
    return megabytes, sum(open_files(pid) for pid in system.pids)
