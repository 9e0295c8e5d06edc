"""A storm: several hundred sessions at the same moment, from connect to the first answer.

What a deploy or a failover does to a sidecar. The client is libpq, driven without blocking by one
thread. PgBouncer's pool is emptied before: its server connections are made in the storm, as the
proxy's are; and the proxy opens no more than `upstream.connects_max` at a time.
"""

import selectors
import time
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn

from bench.errors import BenchError
from bench.postgres import Postgres
from bench.readings import Quantity, Readings, percentile
from bench.sessions import open_session
from bench.starting import empty_pool
from bench.systems import Contender

_SECONDS_MAX: Final = 60.0


def measure(count: int, contender: Contender, upstream: Postgres, readings: Readings) -> None:
    """Open so many sessions at once and keep how long they took. Raises BenchError."""
    open_session(contender).finish()  # a token is there
    empty_pool(contender)
    upstream.settle()
    before = contender.cpu()
    took = _Storm(contender, count).run()
    now = contender.cpu()
    case = f"storm, {count} sessions at once"
    for name, seconds in (
        ("p50", percentile(took, 0.5)),
        ("p99", percentile(took, 0.99)),
        ("until all answered", max(took)),
    ):
        readings.add(contender.name, Quantity(case, name, "ms"), seconds * 1e3)
    if now is not None and before is not None:
        spent = (now - before).total / count
        readings.add(contender.name, Quantity(case, "CPU", "ms/session"), spent * 1e3)
    empty_pool(contender)
    upstream.settle()


class _Storm:
    """The sessions of one storm, each in one of two states: connecting, or asking."""

    def __init__(self, contender: Contender, count: int) -> None:
        self._contender = contender
        self._count = count
        self._sessions: list[PGconn] = []
        self._took: list[float] = []
        self._begun = 0.0

    def run(self) -> list[float]:
        """Return the seconds from the storm's beginning to each answer. Raises BenchError."""
        conninfo = self._contender.conninfo
        try:
            with selectors.DefaultSelector() as selector:
                self._begun = time.perf_counter()
                for _ in range(self._count):
                    session = pq.PGconn.connect_start(conninfo)
                    self._sessions.append(session)
                    # libpq: behave as if polling had said so
                    selector.register(session.socket, selectors.EVENT_WRITE, session)
                while len(self._took) < self._count:
                    self._take_turn(selector)
            return self._took
        finally:
            for session in self._sessions:
                session.finish()

    def _take_turn(self, selector: selectors.BaseSelector) -> None:
        left = self._begun + _SECONDS_MAX - time.perf_counter()
        ready = selector.select(left) if left > 0 else []
        if not ready:
            missing = self._count - len(self._took)
            raise BenchError(f"{missing} of {self._count} got no answer of {self._contender.name}")
        for key, _ in ready:
            session: PGconn = key.data
            selector.unregister(key.fd)  # libpq may change the socket
            wanted = self._advance(session)
            if wanted:
                selector.register(session.socket, wanted, session)

    def _advance(self, session: PGconn) -> int:
        """Do what can be done; return what to wait for, 0 when the answer is there."""
        if session.status not in (pq.ConnStatus.OK, pq.ConnStatus.BAD):
            polled = session.connect_poll()
            if polled == pq.PollingStatus.READING:
                return selectors.EVENT_READ
            if polled == pq.PollingStatus.WRITING:
                return selectors.EVENT_WRITE
            if polled == pq.PollingStatus.OK:
                session.nonblocking = 1
                session.send_query(b"SELECT 1")
                session.flush()
                return selectors.EVENT_READ
        if session.status == pq.ConnStatus.OK:
            session.consume_input()
            if session.is_busy():
                return selectors.EVENT_READ
            result = session.get_result()
            if result is not None and result.status == pq.ExecStatus.TUPLES_OK:
                self._took.append(time.perf_counter() - self._begun)
                return 0
        message = session.error_message.decode(errors="replace")
        raise BenchError(f"no session through {self._contender.name} in a storm: {message}")
