"""Results that are large in another way than COPY: a single value of 100 MB, a million small rows.

By libpq itself, which keeps a whole result in memory as most drivers do: its work is the same for
every contender and part of the time, so the ratios are nearer to 1 than those of COPY.
"""

import time
from collections.abc import Callable
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn, PGresult

from bench import bulk
from bench.errors import BenchError
from bench.readings import Readings
from bench.sessions import open_session
from bench.systems import Contender

_VALUE_BYTES: Final = 100_000_000
_VALUE: Final = f"SELECT repeat('x', {_VALUE_BYTES})".encode()
_LENGTH: Final = b"SELECT length($1::text)"

_ROWS: Final = 1_000_000
# Ten digits each: a DataRow of 21 bytes (type, length, number of columns, length, value).
_ROW_BYTES: Final = 21
_SMALL_ROWS: Final = f"SELECT 1000000000 + i FROM generate_series(1, {_ROWS}) AS i".encode()  # noqa: S608


def measure(contender: Contender, readings: Readings) -> None:
    """Fetch and send the value once, and fetch the rows. Raises BenchError."""
    session = open_session(contender)
    value = b"x" * _VALUE_BYTES
    ways: tuple[tuple[str, int, Callable[[PGconn], PGresult]], ...] = (
        ("one value out, 100 MB", _VALUE_BYTES, lambda one: one.exec_(_VALUE)),
        ("one value in, 100 MB", _VALUE_BYTES, lambda one: one.exec_params(_LENGTH, [value])),
        ("1,000,000 small rows", _ROWS * _ROW_BYTES, lambda one: one.exec_(_SMALL_ROWS)),
    )
    try:
        for case, size_bytes, transfer in ways:
            before, begun = contender.cpu(), time.perf_counter()
            result = transfer(session)
            seconds = time.perf_counter() - begun
            if result.status != pq.ExecStatus.TUPLES_OK:
                message = result.error_message.decode(errors="replace")
                raise BenchError(f"{case} through {contender.name}: {message}")
            result.clear()
            bulk.keep(case, contender, before, seconds, size_bytes=size_bytes, readings=readings)
    finally:
        session.finish()
