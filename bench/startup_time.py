"""How long the proxy takes from its start until it accepts clients, and its memory then.

Not compared with other systems: PgBouncer, in C, starts within milliseconds. Ready is the moment at
which its TCP port accepts, which is when the readiness check succeeds. The SDK is imported after
that, which shows in the memory at rest.
"""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final

from bench.child_processes import LOOPBACK, START_SECONDS_MAX, ChildProcess, free_port
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity
from bench.process_usage import cpu_time, resident_bytes
from bench.systems import PROXY

CASE: Final = "start"
STARTS_MIN: Final = 5
_POLL_SECONDS: Final = 0.002
_REST_SECONDS: Final = 2.0  # importing the SDK takes some tenths

StartProxy = Callable[[Mapping[str, str]], AbstractContextManager[ChildProcess]]
"""Starts the proxy with these additional settings, without waiting until it serves."""


def measure(start: StartProxy, starts: int, measurements: Measurements) -> None:
    """Start it so many times, at least `STARTS_MIN`; record each. Raises BenchError."""
    for _ in range(max(starts, STARTS_MIN)):
        port = free_port()
        started_at = time.perf_counter()
        with start({"LISTEN__PORT": str(port)}) as started:
            _wait_until_accepting(port, started)
            took, used = time.perf_counter() - started_at, cpu_time(started.pid).total
            ready = resident_bytes(started.pid)
            time.sleep(_REST_SECONDS)
            rest = resident_bytes(started.pid)
        for name, unit, value in (
            ("time to ready", "s", took),
            ("CPU to ready", "s", used),
            ("memory when ready", "MB", ready / 1e6),
            ("memory at rest, no session yet", "MB", rest / 1e6),
        ):
            measurements.add(PROXY, Quantity(CASE, name, unit), value)


def _wait_until_accepting(port: int, started: ChildProcess) -> None:
    """Wait until the port accepts. Raises BenchError with the end of the program's output."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while started.process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(_POLL_SECONDS)
    raise BenchError(f"the proxy did not start:\n{started.tail()}")
