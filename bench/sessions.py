"""New sessions, one after the other: from connect to the first answer, with a warm token.

The client is libpq itself, without a driver around it. PgBouncer keeps its server connections
and gives them to the next client, so that it logs in upstream once; the proxy does so for each.
"""

import time
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn

from bench.accounting import cpu
from bench.contenders import Contender
from bench.errors import BenchError
from bench.readings import Quantity, Readings, percentile

_WARM_UP_SESSIONS: Final = 3  # the first mints a token


def open_session(contender: Contender) -> PGconn:
    """Return a session that has answered its first query. Raises BenchError."""
    session = pq.PGconn.connect(contender.conninfo)
    if session.status == pq.ConnStatus.OK and _answers(session):
        return session
    message = session.error_message.decode(errors="replace")
    session.finish()
    raise BenchError(f"no session through {contender.name}: {message}")


def measure(count: int, contender: Contender, readings: Readings) -> None:
    """Open and close so many sessions and keep how long they took. Raises BenchError."""
    for _ in range(_WARM_UP_SESSIONS):
        open_session(contender).finish()
    before = None if contender.pid is None else cpu(contender.pid)
    seconds = [_timed(contender) for _ in range(count)]
    case = "connect and SELECT 1"
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        milliseconds = percentile(seconds, share) * 1e3
        readings.add(contender.name, Quantity(case, name, "ms"), milliseconds)
    if contender.pid is not None and before is not None:
        spent = (cpu(contender.pid) - before).total
        readings.add(contender.name, Quantity(case, "CPU", "ms/session"), spent / count * 1e3)


def _timed(contender: Contender) -> float:
    begun = time.perf_counter()
    session = open_session(contender)
    took = time.perf_counter() - begun
    session.finish()
    return took


def _answers(session: PGconn) -> bool:
    return session.exec_(b"SELECT 1").status == pq.ExecStatus.TUPLES_OK
