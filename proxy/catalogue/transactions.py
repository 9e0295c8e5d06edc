"""Transactions in the catalogue and in shards that depend on no setting of the role or database.

For: everything that writes, or that reads several rows as they were at one moment. Not for: what is
written.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from proxy.catalogue.errors import driver_errors
from proxy.catalogue.model import Connection

# Another operation, or whatever else locks the rows, is waited for this long.
LOCK_SECONDS_MAX: Final = 10

_SETTINGS: Final = f"""
set local lock_timeout = '{LOCK_SECONDS_MAX}s';
set local statement_timeout = 0;
set local idle_in_transaction_session_timeout = '10min';
set local standard_conforming_strings = on;
set local check_function_bodies = on;
set local search_path = pg_catalog, pg_temp
"""
_WRITE: Final = "begin isolation level read committed read write;" + _SETTINGS
_READ: Final = "begin isolation level repeatable read read only;" + _SETTINGS


@asynccontextmanager
async def transaction(connection: Connection, *, read_only: bool = False) -> AsyncIterator[None]:
    """Run the block in a transaction; `read_only`: in one snapshot. Raises what asyncpg does."""
    await connection.execute(_READ if read_only else _WRITE)
    try:
        yield
    except BaseException:
        # The error of the block says more than that of a connection which it has broken.
        with suppress(*driver_errors()):
            if not connection.is_closed():
                await connection.execute("rollback")
        raise
    await connection.execute("commit")
