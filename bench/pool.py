"""A pool of upstream sessions (`upstream.pool = "session"`) beside one session for each client.

A client that connects for each request is what a pool is for: what it waits for, what that costs,
and how warm the session is that it gets. The relay of a pooled session is compared with an unpooled
one's, because keeping an end from the upstream must not cost a transaction anything.
"""

import time
from contextlib import ExitStack
from typing import Final

from psycopg import pq

from bench import connect_time, pgbench
from bench.connect_time import open_session, open_unused_session
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity, percentile
from bench.pgbench import Load
from bench.postgres import Postgres
from bench.process_usage import resident_bytes
from bench.systems import POOLED, PROXY, StartSystem, System

SETTINGS: Final = {"UPSTREAM__POOL": "session"}
CASE: Final = "pool"
CONNECT_LOCAL: Final = f"{CASE}, connect, on this machine"
CONNECT_RARE: Final = f"{CASE}, connect, between sessions of others"
CONNECT_DELAYED: Final = f"{CASE}, connect, PostgreSQL"
RECONNECTS: Final = f"{CASE}, pgbench -C"
RELAY: Final = f"{CASE}, relay"
CATALOGUE_QUERY: Final = f"{CASE}, first catalogue query"
CATALOGUE_RARE: Final = f"{CATALOGUE_QUERY}, between sessions of others"
MEMORY: Final = f"{CASE}, memory"
LOGINS: Final = f"{CASE}, logins"
# What is pooled for connects again and again. For some 30 ms the kernel runs client and proxy on
# one core, so a turn is much longer. CONNECT_RARE shows a client that comes after others have used
# the machine: everything is colder, the direct connection's libpq least of all.
_SESSIONS_IN_A_ROW: Final = 200
_CLIENTS: Final = 8
_LOAD_FACTOR: Final = 3  # loads run so many times as long as others: the relay's goal is 2 %
_SETTLE_SECONDS: Final = 6.0  # resets, closes, and what returns memory after the last session
# What drivers ask about a type that they do not know: cold caches make it slow.
DRIVER_QUERIES: Final = {
    "a type by name": (
        b"SELECT oid, typarray, typdelim, typtype, oid::pg_catalog.regtype::pg_catalog.text"
        b" FROM pg_catalog.pg_type WHERE oid = pg_catalog.to_regtype('uuid')"
    ),
    "a type by oid": (
        b"SELECT n.nspname, t.typname, t.typelem, t.typtype FROM pg_catalog.pg_type t"
        b" JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = 2950"
    ),
}
# An ORM's. PostgreSQL itself takes over a quarter of its cold time with warm caches: no goal.
_ORM_QUERY: Final = {
    "a table's columns": (
        b"SELECT c.relname, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), d.adbin"
        b" FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        b" JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid"
        b" JOIN pg_catalog.pg_type t ON t.oid = a.atttypid"
        b" LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum"
        b" WHERE c.relname = 'pgbench_accounts' AND a.attnum > 0 ORDER BY a.attnum"
    ),
}


def measure_connects(
    local: list[System],
    delayed: list[System],
    counts: tuple[int, int],
    away: str,
    measurements: Measurements,
) -> None:
    """Record the time from connect to the first answer, near and away. Raises BenchError."""
    turn = _SESSIONS_IN_A_ROW
    connect_time.measure(CONNECT_LOCAL, counts[0], local, measurements, in_a_row=turn)
    case = f"{CONNECT_DELAYED} {away}"
    connect_time.measure(case, counts[1], delayed, measurements, in_a_row=turn)
    connect_time.measure(CONNECT_RARE, counts[0], local, measurements)
    _measure_catalogue_query(CATALOGUE_QUERY, local, 1, turn, measurements)
    _measure_catalogue_query(CATALOGUE_RARE, local, counts[1], 1, measurements)


def measure_queries(
    systems: list[System], seconds: float, upstream: Postgres, measurements: Measurements
) -> None:
    """Record the relay of the proxy with and without a pool, and `pgbench -C`."""
    for protocol in ("simple", "prepared"):
        load = Load(protocol, _CLIENTS, _LOAD_FACTOR * seconds)
        compared = [system for system in systems if system.name in (PROXY, POOLED)]
        for system in compared + compared[::-1]:  # a machine that becomes slower is so for both
            window = pgbench.run(load, system, upstream)
            pgbench.record(f"{RELAY}, {load.case}", system.name, window, measurements)
    load = Load("simple", _CLIENTS, _LOAD_FACTOR * seconds, reconnects=True)
    for system in systems:
        window = pgbench.run(load, system, upstream)
        pgbench.record(f"{RECONNECTS}, {_CLIENTS} clients", system.name, window, measurements)
        upstream.wait_until_sessions_end()  # each is work for a proxy, and for the next system


def measure_logins(system: System, sessions: int, measurements: Measurements) -> None:
    """Record how many backends serve so many sessions one after the other. Raises BenchError."""
    backends = set()
    for _ in range(sessions):
        session = open_session(system)
        backends.add(session.exec_(b"SELECT pg_backend_pid()").get_value(0, 0))
        session.finish()
    quantity = Quantity(LOGINS, f"backends for {sessions:,} sessions", "")
    measurements.add(system.name, quantity, len(backends))


def measure_memory(
    unpooled: StartSystem, pooled: StartSystem, sessions: int, measurements: Measurements
) -> None:
    """Record what an idle session of the pool costs. Raises BenchError.

    Both proxies serve as many clients, which have left: so the difference is the kept sessions.
    """
    grown = [_grown_bytes(start, sessions) for start in (unpooled, pooled)]
    kilobytes = (grown[1] - grown[0]) / sessions / 1e3
    measurements.add(POOLED, Quantity(MEMORY, f"per idle session of {sessions:,}", "kB"), kilobytes)


def _grown_bytes(start: StartSystem, sessions: int) -> int:
    with start() as system:
        open_session(system).finish()
        rest = _settled_bytes(system)
        with ExitStack() as stack:
            for _ in range(sessions):
                stack.callback(open_session(system).finish)
        return _settled_bytes(system) - rest


def _settled_bytes(system: System) -> int:
    time.sleep(_SETTLE_SECONDS)
    return sum(resident_bytes(pid) for pid in system.pids)


def _catalogue_query(system: System, query: bytes) -> tuple[float, float]:
    """Return the seconds of a new client's first query, and of the same query again."""
    session = open_unused_session(system)
    times = [time.perf_counter()]
    for _ in range(2):
        status = session.exec_(query).status
        times.append(time.perf_counter())
        if status != pq.ExecStatus.TUPLES_OK:
            raise BenchError(f"no answer about the catalogue through {system.name}")
    session.finish()
    return times[1] - times[0], times[2] - times[1]


def _measure_catalogue_query(
    case: str, systems: list[System], turns: int, in_a_row: int, measurements: Measurements
) -> None:
    for what, query in (DRIVER_QUERIES | _ORM_QUERY).items():
        took: list[list[tuple[float, float]]] = [[] for _ in systems]
        for _ in range(turns):
            for system, seconds in zip(systems, took, strict=True):
                seconds += [_catalogue_query(system, query) for _ in range(in_a_row)]
                time.sleep(connect_time.PAUSE_SECONDS)
        for system, seconds in zip(systems, took, strict=True):
            for name, values in zip(
                (what, f"{what}, again"), zip(*seconds, strict=True), strict=True
            ):
                quantity = Quantity(case, f"{name}, p50", "us")
                measurements.add(system.name, quantity, percentile([*values], 0.5) * 1e6)
