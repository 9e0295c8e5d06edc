"""Resident memory: at rest, with many idle sessions, fresh and used, after they closed,
after a bulk transfer.

Each program is started anew for this, since what it did before shows in its memory. It is
measured once, not in rounds: it hardly varies.
"""

import time
from contextlib import ExitStack
from typing import Final

from bench.accounting import resident_bytes
from bench.bulk import Bulk
from bench.contenders import Contender, Start
from bench.readings import Quantity, Readings
from bench.sessions import open_session

_SETTLE_SECONDS: Final = 1.0  # sessions end on both sides, allocators return what they will
# A megabyte for each session: do its buffers stay as large as they once were?
_LARGE_QUERY: Final = b"SELECT repeat('x', 1000000)"


def measure(start: Start, sessions_count: int, bulk: Bulk, readings: Readings) -> None:
    """Start a contender, fill it, empty it, and keep its memory. Raises BenchError."""
    with start() as contender:
        open_session(contender).finish()  # what the first session loads belongs to the rest
        rest = _settled(contender)
        with ExitStack() as stack:
            sessions = []
            for _ in range(sessions_count):
                sessions.append(open_session(contender))
                stack.callback(sessions[-1].finish)
            full = _settled(contender)
            for session in sessions:
                session.exec_(_LARGE_QUERY)
            used = _settled(contender)
        closed = _settled(contender)
    with start() as contender:
        open_session(contender).finish()
        before = _settled(contender)
        bulk.copy_out(contender)
        after = _settled(contender)
    many = f"{sessions_count} idle sessions"
    for name, unit, value in (
        ("at rest", "MB", rest / 1e6),
        (many, "MB", full / 1e6),
        ("per idle session", "kB", (full - rest) / sessions_count / 1e3),
        ("per idle session, used", "kB", (used - rest) / sessions_count / 1e3),
        (f"after {many}", "MB", closed / 1e6),
        ("growth by a bulk transfer", "%", (after / before - 1) * 100),
    ):
        readings.add(contender.name, Quantity("resident memory", name, unit), value)


def _settled(contender: Contender) -> int:
    assert contender.pid is not None
    time.sleep(_SETTLE_SECONDS)
    return resident_bytes(contender.pid)
