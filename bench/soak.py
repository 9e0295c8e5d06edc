"""Soak: the proxy under mixed load for a time, with its memory and open files ten times on the way.

Queries over sessions that stay, a new session for each of many queries, writes, results of a
megabyte, and COPY in both directions. What grows from the first tenth to the last, or is still
there when all clients have gone, is a leak. A session that fails fails the run.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from bench.accounting import open_files, resident_bytes
from bench.bulk import Bulk
from bench.children import Child, child
from bench.errors import BenchError
from bench.postgres import Postgres
from bench.readings import Quantity, Readings
from bench.sessions import open_session
from bench.systems import Contender, Start

_PARTS: Final = 10
_COPY_MEGABYTES: Final = 64
_SETTLE_SECONDS: Final = 1.0
_COPY_PAUSE_SECONDS: Final = 3.0
_SLACK_SECONDS: Final = 30.0  # for connecting, and for the last statements
_BEFORE_END_SECONDS: Final = 1.0  # the last reading is of a loaded proxy, too
_MEGABYTE: Final = "SELECT repeat('x', 1000000);\n"

# Clients, transactions a second (0: as many as go), and what they do. The rates leave the machine
# room: this looks for growth, not for speed.
_LOADS: Final[tuple[tuple[int, int, tuple[str, ...]], ...]] = (
    (4, 2000, ("-S", "-M", "prepared")),
    (4, 40, ("-S", "-C")),
    (4, 200, ("-N", "-M", "extended")),
)
_MEGABYTE_LOAD: Final = (2, 10)


def measure(start: Start, minutes: float, upstream: Postgres, readings: Readings) -> None:
    """Run the load for so long and keep what the proxy held meanwhile. Raises BenchError."""
    case = f"soak, {minutes:g} min of mixed load"
    bulk = Bulk(_COPY_MEGABYTES, upstream)
    with start() as contender:
        open_session(contender).finish()
        time.sleep(_SETTLE_SECONDS)
        seen = [("before", *_held(contender))]
        bulk.prepare(contender)
        begun = time.monotonic()
        with _load(contender, minutes, upstream) as clients:
            for part in range(1, _PARTS + 1):
                until = begun + part * (minutes * 60 - _BEFORE_END_SECONDS) / _PARTS
                _copy_until(until, bulk, contender)
                seen.append((f"after {part * 100 // _PARTS} %", *_held(contender)))
            transactions = sum(_end(one) for one in clients)
        time.sleep(_SETTLE_SECONDS)
        seen.append(("all gone", *_held(contender)))
    for when, megabytes, files in seen:
        readings.add(contender.name, Quantity(case, f"memory, {when}", "MB"), megabytes)
        readings.add(contender.name, Quantity(case, f"open files, {when}", ""), files)
    first, last = seen[1][1], seen[_PARTS][1]
    for name, unit, value in (
        ("transactions", "", transactions),
        ("memory growth, first to last tenth", "%", (last / first - 1) * 100),
        ("open files left over", "", seen[-1][2] - seen[0][2]),
    ):
        readings.add(contender.name, Quantity(case, name, unit), value)


@contextmanager
def _load(contender: Contender, minutes: float, upstream: Postgres) -> Iterator[list[Child]]:
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
                    environment=contender.environment,
                )
            )
            for number, (clients, rate, what) in enumerate(loads)
        ]


def _copy_until(moment: float, bulk: Bulk, contender: Contender) -> None:
    while (left := moment - time.monotonic()) > 0:
        if left > _COPY_PAUSE_SECONDS:
            bulk.copy_out(contender)
            bulk.copy_in(contender)
        time.sleep(max(0.0, min(_COPY_PAUSE_SECONDS, moment - time.monotonic())))


def _end(client: Child) -> int:
    """Wait for a client's end and return its transactions. Raises BenchError for a failed one."""
    status = client.process.wait(_SLACK_SECONDS)
    words = client.log.read_text()
    done = [line for line in words.splitlines() if "actually processed" in line]
    if status or not done or "aborted" in words:
        raise BenchError(f"a client of the soak failed:\n{client.tail()}")
    return int(done[0].rpartition(":")[2].partition("/")[0])


def _held(contender: Contender) -> tuple[float, int]:
    """Return the megabytes and the open files of the processes in between."""
    megabytes = sum(resident_bytes(pid) for pid in contender.pids) / 1e6
    return megabytes, sum(open_files(pid) for pid in contender.pids)
