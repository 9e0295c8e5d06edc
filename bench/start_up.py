"""How long the proxy takes from its start until it takes clients, and how large it is then.

Compared with nothing but itself: PgBouncer, in C, is there within milliseconds. Ready is the moment
at which its TCP port accepts, which is when readiness says so. What is done behind that moment (the
SDK's import) shows in the memory at rest.
"""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final

from bench.accounting import cpu, resident_bytes
from bench.children import LOOPBACK, START_SECONDS_MAX, Child, free_port
from bench.errors import BenchError
from bench.readings import Quantity, Readings
from bench.systems import PROXY

CASE: Final = "start"
STARTS_MIN: Final = 5
_POLL_SECONDS: Final = 0.002
_REST_SECONDS: Final = 2.0  # the SDK's import takes some tenths

Run = Callable[[Mapping[str, str]], AbstractContextManager[Child]]
"""Runs the proxy with these settings beside its own, and does not wait for it."""


def measure(run: Run, starts: int, readings: Readings) -> None:
    """Start it so many times, `STARTS_MIN` at least, and keep each. Raises BenchError."""
    for _ in range(max(starts, STARTS_MIN)):
        port = free_port()
        begun = time.perf_counter()
        with run({"LISTEN__PORT": str(port)}) as started:
            _wait_for(port, started)
            took, spent = time.perf_counter() - begun, cpu(started.pid).total
            ready = resident_bytes(started.pid)
            time.sleep(_REST_SECONDS)
            rest = resident_bytes(started.pid)
        for name, unit, value in (
            ("time to ready", "s", took),
            ("CPU to ready", "s", spent),
            ("memory when ready", "MB", ready / 1e6),
            ("memory at rest, no session yet", "MB", rest / 1e6),
        ):
            readings.add(PROXY, Quantity(CASE, name, unit), value)


def _wait_for(port: int, started: Child) -> None:
    """Return once something accepts. Raises BenchError with the program's last words."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while started.process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(_POLL_SECONDS)
    raise BenchError(f"the proxy did not start:\n{started.tail()}")
