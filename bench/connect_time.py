"""New sessions, one at a time: from connect to the first answer, with a warm token.

The client is libpq itself, without a driver. A direct session's time includes libpq's own TLS with
verification of the certificate; a session through the proxy includes the proxy's. The systems take
turns session by session, with a pause after each one, because closing a session is work for the
other processes, too, which must not be measured with the next session's start.

Everything shares this machine and the network takes no time, so what the proxy adds is seen beside
the least that a session can cost. Lakebase is never that near, so the same is measured with
`delayed_upstream.py` between every system and PostgreSQL. PgBouncer keeps its server connections
for the next client, so it logs in upstream once; the proxy logs in for each session.
"""

import time
from collections.abc import Sequence
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn

from bench.errors import BenchError
from bench.measurements import Measurements, Quantity, percentile
from bench.systems import System

_WARM_UP_SESSIONS: Final = 3  # the first mints a token
PAUSE_SECONDS: Final = 0.003  # PostgreSQL and the proxy take about one to end a session


def open_session(system: System) -> PGconn:
    """Open a session and return it after its first answer. Raises BenchError."""
    session = open_unused_session(system)
    if session.exec_(b"SELECT 1").status == pq.ExecStatus.TUPLES_OK:
        return session
    raise _no_session(session, system)


def open_unused_session(system: System) -> PGconn:
    """Open a session and return it before its first query. Raises BenchError."""
    session = pq.PGconn.connect(system.conninfo)
    if session.status == pq.ConnStatus.OK:
        return session
    raise _no_session(session, system)


def _no_session(session: PGconn, system: System) -> BenchError:
    message = session.error_message.decode(errors="replace")
    session.finish()
    return BenchError(f"no session through {system.name}: {message}")


def measure(
    case: str,
    count: int,
    systems: Sequence[System],
    measurements: Measurements,
    *,
    in_a_row: int = 1,
) -> None:
    """Open and close at least `count` sessions of each system; record the times.

    A system's turn is `in_a_row` sessions, one right after the other; a pause follows the turn.
    Raises BenchError.
    """
    turns = -(-count // in_a_row)
    for system in systems:
        for _ in range(_WARM_UP_SESSIONS):
            open_session(system).finish()
    before = [one.cpu_time() for one in systems]
    seconds: list[list[float]] = [[] for _ in systems]
    for number in range(turns):
        for turn in range(len(systems)):  # another system is first each time
            index = (number * (len(systems) - 1) + turn) % len(systems)
            for _ in range(in_a_row):
                seconds[index].append(_timed(systems[index]))
            time.sleep(PAUSE_SECONDS)
    for system, took, then in zip(systems, seconds, before, strict=True):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            measurements.add(system.name, Quantity(case, name, "ms"), percentile(took, share) * 1e3)
        now = system.cpu_time()
        if now is not None and then is not None:
            used = (now - then).total / (turns * in_a_row)
            measurements.add(system.name, Quantity(case, "CPU", "ms/session"), used * 1e3)


def _timed(system: System) -> float:
    started_at = time.perf_counter()
    session = open_session(system)
    took = time.perf_counter() - started_at
    session.finish()
    return took
