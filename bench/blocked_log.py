"""A log that nothing reads beside one that is read: what sessions pay for it.

Standard error is a named pipe. One proxy's is read all the time; the other's is full, and so is the
queue in front of it, before anything is measured. Transactions log nothing; with a connection for
each transaction every one logs a line or two, which is the most that a log can cost.
"""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from psycopg import pq
from psycopg.conninfo import make_conninfo

from bench import pgbench
from bench.child_processes import LOOPBACK, START_SECONDS_MAX, ChildProcess
from bench.errors import BenchError
from bench.launch import local_parameters
from bench.measurements import Measurements, Quantity
from bench.pgbench import Load
from bench.postgres import Postgres
from bench.systems import PROXY, System

CASE: Final = "blocked log"
_CLIENTS: Final = 8
_TO_PIPE: Final = ("sh", "-c", 'exec "$@" 2>"$0"')
_LONG: Final = "x" * 5000  # in a name that the log repeats
_LINES_MAX: Final = 5000  # some 300 fill pipe and queue
_DROPPED: Final = "lakebase_proxy_log_lines_dropped_total"

StartProcess = Callable[[Sequence[str | Path]], AbstractContextManager[ChildProcess]]
"""Starts a proxy by a command that the proxy's own is appended to."""


def measure(
    start: StartProcess,
    rounds: int,
    seconds: float,
    upstream: Postgres,
    measurements: Measurements,
) -> None:
    """Compare both, round by round, each first in turn. Raises BenchError."""
    loads = [Load("simple", _CLIENTS, seconds), Load("simple", _CLIENTS, seconds, reconnects=True)]
    with ExitStack() as stack:
        read = stack.enter_context(_proxy(start, upstream.scratch / "read.pipe", blocked=False))
        blocked = stack.enter_context(
            _proxy(start, upstream.scratch / "blocked.pipe", blocked=True)
        )
        for number in range(rounds):
            for load in loads:
                systems = {"read": read, "blocked": blocked}
                _compare(load, systems, upstream, measurements, reverse=number % 2 == 1)


def _compare(
    load: Load,
    systems: dict[str, System],
    upstream: Postgres,
    measurements: Measurements,
    *,
    reverse: bool,
) -> None:
    order = sorted(systems, reverse=reverse)
    windows = {name: pgbench.run(load, systems[name], upstream) for name in order}
    case = f"{CASE}, {load.case}"
    costs: dict[str, float] = {}
    for name, window in windows.items():
        assert window.cpu is not None
        costs[name] = window.cpu.total / len(window.latencies) * 1e6
        measurements.add(PROXY, Quantity(case, f"throughput, {name}", "TPS"), window.throughput)
        measurements.add(PROXY, Quantity(case, f"CPU, {name}", "us/transaction"), costs[name])
    ratio = windows["blocked"].throughput / windows["read"].throughput
    measurements.add(PROXY, Quantity(case, "throughput, blocked / read", ""), ratio)
    ratio = costs["blocked"] / costs["read"]
    measurements.add(PROXY, Quantity(case, "CPU, blocked / read", ""), ratio)


@contextmanager
def _proxy(start: StartProcess, pipe: Path, *, blocked: bool) -> Iterator[System]:
    """Run a proxy whose log goes to a named pipe."""
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    thread = threading.Thread(target=_read_all, args=(reader,), daemon=True)
    try:
        with start((*_TO_PIPE, pipe)) as started:
            serving = _serving(reader, started)
            os.set_blocking(reader, True)
            system = System(PROXY, local_parameters(serving["port"]), (started.pid,))
            if blocked:
                _fill(system, serving["admin_port"])
            else:
                thread.start()
            yield system
    finally:
        if thread.is_alive():
            thread.join(START_SECONDS_MAX)  # it has ended with the last writer
        os.close(reader)


def _serving(reader: int, started: ChildProcess) -> dict[str, Any]:
    """Return the line with the ports."""
    received = bytearray()

    def found() -> dict[str, Any] | None:
        try:
            received.extend(os.read(reader, 65536))
        except BlockingIOError:
            return None
        lines = [line for line in received.split(b"\n")[:-1] if b'"serving"' in line]
        line: dict[str, Any] | None = json.loads(lines[0]) if lines else None
        return line

    deadline = time.monotonic() + START_SECONDS_MAX
    while (line := found()) is None:
        if started.process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"the proxy did not start:\n{received.decode()}")
        time.sleep(0.02)
    return line


def _read_all(reader: int) -> None:
    while os.read(reader, 65536):
        pass


def _fill(system: System, admin_port: int) -> None:
    """Send connections that are refused with long lines until the log drops some."""
    conninfo = make_conninfo(**(system.parameters | {"options": f"-c {_LONG}"})).encode()
    for _ in range(_LINES_MAX):
        pq.PGconn.connect(conninfo).finish()
        if _dropped(admin_port):
            return
    raise BenchError("the log drops no line")


def _dropped(admin_port: int) -> float:
    url = f"http://{LOOPBACK}:{admin_port}/metrics"
    with urllib.request.urlopen(url, timeout=START_SECONDS_MAX) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(_DROPPED))
