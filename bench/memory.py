"""Resident memory: at rest, with idle sessions, after they have closed, after a bulk transfer.

Each program is started anew for this, because earlier load would show in its memory. It is measured
once, not in rounds, because it hardly varies.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from psycopg.pq.abc import PGconn

from bench.bulk_copy import BulkCopy
from bench.connect_time import open_session
from bench.measurements import Measurements, Quantity
from bench.process_usage import resident_bytes
from bench.systems import StartSystem, System

CASE: Final = "resident memory"
_SETTLE_SECONDS: Final = 1.0  # both sides close their sessions, allocators return memory
# PostgreSQL takes about 2 s to end 1,000 sessions; the proxy returns memory after the last.
_CLOSED_SECONDS: Final = 5.0
# A megabyte for each session: shows whether its buffers shrink again.
_LARGE_QUERY: Final = b"SELECT repeat('x', 1000000)"


def measure(
    start: StartSystem, sessions_count: int, bulk: BulkCopy, measurements: Measurements
) -> None:
    """Start a system, open and close its sessions, record its memory. Raises BenchError."""
    with start() as system:
        open_session(system).finish()  # what the first session loads counts as memory at rest
        rest = _settled_bytes(system)
        with _idle_sessions(system, sessions_count) as sessions:
            full = _settled_bytes(system)
            for session in sessions:
                session.exec_(_LARGE_QUERY)
            used = _settled_bytes(system)
        closed = _settled_bytes(system, _CLOSED_SECONDS)
    with start() as system:
        open_session(system).finish()
        before = _settled_bytes(system)
        bulk.copy_out(system)
        after = _settled_bytes(system)
    for name, unit, value in (
        ("at rest", "MB", rest / 1e6),
        ("per session on PostgreSQL", "kB", (full - rest) / sessions_count / 1e3),
        ("per session, each used for 1 MB", "kB", (used - rest) / sessions_count / 1e3),
        (f"after {sessions_count:,} of these sessions", "MB", closed / 1e6),
        ("growth by a bulk transfer", "%", (after / before - 1) * 100),
    ):
        measurements.add(system.name, Quantity(CASE, name, unit), value)


def measure_idle(start: StartSystem, sessions_count: int, measurements: Measurements) -> None:
    """Record a system's memory with so many sessions to a scripted upstream. Raises BenchError."""
    with start() as system:
        open_session(system).finish()
        rest = _settled_bytes(system)
        with _idle_sessions(system, sessions_count):
            full = _settled_bytes(system)
    for name, unit, value in (
        (f"{sessions_count:,} idle sessions", "MB", full / 1e6),
        (f"per session of {sessions_count:,}", "kB", (full - rest) / sessions_count / 1e3),
    ):
        measurements.add(system.name, Quantity(CASE, name, unit), value)


@contextmanager
def _idle_sessions(system: System, count: int) -> Iterator[list[PGconn]]:
    with ExitStack() as stack:
        sessions = []
        for _ in range(count):
            sessions.append(open_session(system))
            stack.callback(sessions[-1].finish)
        yield sessions


def _settled_bytes(system: System, seconds: float = _SETTLE_SECONDS) -> int:
    time.sleep(seconds)
    return sum(resident_bytes(pid) for pid in system.pids)
