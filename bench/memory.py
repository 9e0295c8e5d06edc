"""Resident memory: at rest, with many idle sessions, fresh and used, after they closed,
after a bulk transfer.

Each program is started anew for this, since what it did before shows in its memory. It is
measured once, not in rounds: it hardly varies.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from psycopg.pq.abc import PGconn

from bench.accounting import resident_bytes
from bench.bulk import Bulk
from bench.readings import Quantity, Readings
from bench.sessions import open_session
from bench.systems import Contender, Start

CASE: Final = "resident memory"
_SETTLE_SECONDS: Final = 1.0  # sessions end on both sides, allocators return what they will
# PostgreSQL takes about two to end 1,000, and the last is what memory is given back after.
_CLOSED_SECONDS: Final = 5.0
# A megabyte for each session: do its buffers stay as large as they once were?
_LARGE_QUERY: Final = b"SELECT repeat('x', 1000000)"


def measure(start: Start, sessions_count: int, bulk: Bulk, readings: Readings) -> None:
    """Start a contender, fill it, empty it, and keep its memory. Raises BenchError."""
    with start() as contender:
        open_session(contender).finish()  # what the first session loads belongs to the rest
        rest = _settled(contender)
        with _idle_sessions(contender, sessions_count) as sessions:
            full = _settled(contender)
            for session in sessions:
                session.exec_(_LARGE_QUERY)
            used = _settled(contender)
        closed = _settled(contender, _CLOSED_SECONDS)
    with start() as contender:
        open_session(contender).finish()
        before = _settled(contender)
        bulk.copy_out(contender)
        after = _settled(contender)
    for name, unit, value in (
        ("at rest", "MB", rest / 1e6),
        ("per session on PostgreSQL", "kB", (full - rest) / sessions_count / 1e3),
        ("per session, each used for 1 MB", "kB", (used - rest) / sessions_count / 1e3),
        (f"after {sessions_count:,} of these sessions", "MB", closed / 1e6),
        ("growth by a bulk transfer", "%", (after / before - 1) * 100),
    ):
        readings.add(contender.name, Quantity(CASE, name, unit), value)


def measure_idle(start: Start, sessions_count: int, readings: Readings) -> None:
    """Start a contender with a scripted upstream, which any number of sessions costs little.

    Raises BenchError.
    """
    with start() as contender:
        open_session(contender).finish()
        rest = _settled(contender)
        with _idle_sessions(contender, sessions_count):
            full = _settled(contender)
    for name, unit, value in (
        (f"{sessions_count:,} idle sessions", "MB", full / 1e6),
        (f"per session of {sessions_count:,}", "kB", (full - rest) / sessions_count / 1e3),
    ):
        readings.add(contender.name, Quantity(CASE, name, unit), value)


@contextmanager
def _idle_sessions(contender: Contender, count: int) -> Iterator[list[PGconn]]:
    with ExitStack() as stack:
        sessions = []
        for _ in range(count):
            sessions.append(open_session(contender))
            stack.callback(sessions[-1].finish)
        yield sessions


def _settled(contender: Contender, seconds: float = _SETTLE_SECONDS) -> int:
    time.sleep(seconds)
    return sum(resident_bytes(pid) for pid in contender.pids)
