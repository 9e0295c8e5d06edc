"""Large results other than COPY: a single value of 100 MB, and a million small rows.

The client is libpq, which keeps a whole result in memory as most drivers do. Its work is part of
the time and the same for every system, so the ratios are closer to 1 than those of COPY.
"""

import time
from collections.abc import Callable
from typing import Final

from psycopg import pq
from psycopg.pq.abc import PGconn, PGresult

from bench.bulk_copy import record_transfer
from bench.connect_time import open_session
from bench.errors import BenchError
from bench.measurements import Measurements
from bench.systems import System

_VALUE_BYTES: Final = 100_000_000
_VALUE: Final = f"SELECT repeat('x', {_VALUE_BYTES})".encode()
_LENGTH: Final = b"SELECT length($1::text)"

_ROWS: Final = 1_000_000
# Ten digits each: a DataRow of 21 bytes (type, length, number of columns, length, value).
_ROW_BYTES: Final = 21
_SMALL_ROWS: Final = f"SELECT 1000000000 + i FROM generate_series(1, {_ROWS}) AS i".encode()  # noqa: S608


def measure(system: System, measurements: Measurements) -> None:
    """Fetch and send the value once, fetch the rows; record each. Raises BenchError."""
    session = open_session(system)
    value = b"x" * _VALUE_BYTES
    transfers: tuple[tuple[str, int, Callable[[PGconn], PGresult]], ...] = (
        ("one value out, 100 MB", _VALUE_BYTES, lambda one: one.exec_(_VALUE)),
        ("one value in, 100 MB", _VALUE_BYTES, lambda one: one.exec_params(_LENGTH, [value])),
        ("1,000,000 small rows", _ROWS * _ROW_BYTES, lambda one: one.exec_(_SMALL_ROWS)),
    )
    try:
        for case, size_bytes, transfer in transfers:
            before, started_at = system.cpu_time(), time.perf_counter()
            result = transfer(session)
            seconds = time.perf_counter() - started_at
            if result.status != pq.ExecStatus.TUPLES_OK:
                message = result.error_message.decode(errors="replace")
                raise BenchError(f"{case} through {system.name}: {message}")
            result.clear()
            record_transfer(
                case, system, before, seconds, size_bytes=size_bytes, measurements=measurements
            )
    finally:
        session.finish()
