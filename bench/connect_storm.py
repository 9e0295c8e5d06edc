"""A connect storm: several hundred sessions opened at once, from connect to the first answer.

For: what a deploy or a failover does to a sidecar. The client is libpq, driven without blocking by
one thread. PgBouncer's pool is emptied before, so that its server connections are opened in the
storm, as the proxy's are. The proxy opens at most `upstream.connects_max` at a time.
"""

import selectors
import time
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn

from bench.connect_time import open_session
from bench.errors import BenchError
from bench.launch import empty_pool
from bench.measurements import Measurements, Quantity, percentile
from bench.postgres import Postgres
from bench.systems import System

_SECONDS_MAX: Final = 60.0


def measure(count: int, system: System, upstream: Postgres, measurements: Measurements) -> None:
    """Open `count` sessions at once and record how long each took. Raises BenchError."""
    open_session(system).finish()  # so that the proxy has a token
    empty_pool(system)
    upstream.wait_until_sessions_end()
    before = system.cpu_time()
    took = _ConnectStorm(system, count).run()
    now = system.cpu_time()
    case = f"storm, {count} sessions at once"
    for name, seconds in (
        ("p50", percentile(took, 0.5)),
        ("p99", percentile(took, 0.99)),
        ("until all answered", max(took)),
    ):
        measurements.add(system.name, Quantity(case, name, "ms"), seconds * 1e3)
    if now is not None and before is not None:
        used = (now - before).total / count
        measurements.add(system.name, Quantity(case, "CPU", "ms/session"), used * 1e3)
    empty_pool(system)
    upstream.wait_until_sessions_end()


class _ConnectStorm:
    """The sessions of one storm, each of them connecting or waiting for its answer."""

    def __init__(self, system: System, count: int) -> None:
        self._system = system
        self._count = count
        self._sessions: list[PGconn] = []
        self._took: list[float] = []
        self._started_at = 0.0

    def run(self) -> list[float]:
        """Return the seconds from the start of the storm to each answer. Raises BenchError."""
        conninfo = self._system.conninfo
        try:
            with selectors.DefaultSelector() as selector:
                self._started_at = time.perf_counter()
                for _ in range(self._count):
                    session = pq.PGconn.connect_start(conninfo)
                    self._sessions.append(session)
                    # libpq's documentation: begin as if PQconnectPoll had returned WRITING
                    selector.register(session.socket, selectors.EVENT_WRITE, session)
                while len(self._took) < self._count:
                    self._advance_ready(selector)
            return self._took
        finally:
            for session in self._sessions:
                session.finish()

    def _advance_ready(self, selector: selectors.BaseSelector) -> None:
        left = self._started_at + _SECONDS_MAX - time.perf_counter()
        ready = selector.select(left) if left > 0 else []
        if not ready:
            missing = self._count - len(self._took)
            raise BenchError(f"{missing} of {self._count} got no answer from {self._system.name}")
        for key, _ in ready:
            session: PGconn = key.data
            selector.unregister(key.fd)  # libpq may change the socket
            wanted = self._advance(session)
            if wanted:
                selector.register(session.socket, wanted, session)

    def _advance(self, session: PGconn) -> int:
        """Do what can be done now; return what to wait for, 0 once the answer has arrived."""
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
                self._took.append(time.perf_counter() - self._started_at)
                return 0
        message = session.error_message.decode(errors="replace")
        raise BenchError(f"no session through {self._system.name} in a connect storm: {message}")
