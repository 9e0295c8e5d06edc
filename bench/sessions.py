"""New sessions, one at a time: from connect to the first answer, with a warm token.

The client is libpq itself, without a driver around it, and verifies the certificate where it
speaks TLS itself; so a direct session's time holds libpq's own TLS, and one through the proxy the
proxy's. The contenders take turns session by session, and after each one there is a pause: its end
is work for others, too, and is not to be measured with the next one's start.

All of it shares this machine, and the network takes no time: what the proxy adds is seen next to
the least that a session can cost. Lakebase is never that near, so the same is measured with
`delay.py` between every contender and PostgreSQL. PgBouncer keeps its server connections and gives
them to the next client, so that it logs in upstream once; the proxy does so for each.
"""

import time
from collections.abc import Sequence
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn

from bench.errors import BenchError
from bench.readings import Quantity, Readings, percentile
from bench.systems import Contender

_WARM_UP_SESSIONS: Final = 3  # the first mints a token
_PAUSE_SECONDS: Final = 0.003  # PostgreSQL and the proxy take about one to end a session


def open_session(contender: Contender) -> PGconn:
    """Return a session that has answered its first query. Raises BenchError."""
    session = pq.PGconn.connect(contender.conninfo)
    if session.status == pq.ConnStatus.OK and _answers(session):
        return session
    message = session.error_message.decode(errors="replace")
    session.finish()
    raise BenchError(f"no session through {contender.name}: {message}")


def measure(case: str, count: int, contenders: Sequence[Contender], readings: Readings) -> None:
    """Open and close so many sessions of each and keep how long they took. Raises BenchError."""
    for contender in contenders:
        for _ in range(_WARM_UP_SESSIONS):
            open_session(contender).finish()
    before = [one.cpu() for one in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    for number in range(count):
        for turn in range(len(contenders)):  # each round of turns begins with another one
            index = (number * (len(contenders) - 1) + turn) % len(contenders)
            seconds[index].append(_timed(contenders[index]))
            time.sleep(_PAUSE_SECONDS)
    for contender, took, then in zip(contenders, seconds, before, strict=True):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            readings.add(contender.name, Quantity(case, name, "ms"), percentile(took, share) * 1e3)
        now = contender.cpu()
        if now is not None and then is not None:
            spent = (now - then).total / count
            readings.add(contender.name, Quantity(case, "CPU", "ms/session"), spent * 1e3)


def _timed(contender: Contender) -> float:
    begun = time.perf_counter()
    session = open_session(contender)
    took = time.perf_counter() - begun
    session.finish()
    return took


def _answers(session: PGconn) -> bool:
    return session.exec_(b"SELECT 1").status == pq.ExecStatus.TUPLES_OK
