"""A proxy that keeps upstream sessions for the next clients, and how tests observe its pool.

For: tests of whole sessions through a pool. Not for: the pool's own rules (`tests/pool`).
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg
import pytest

from proxy.emulator.cluster import Cluster
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.lakebase import Lakebase
from proxy.observe.pool_stats import PoolRow
from proxy.server.app import App
from proxy.server.serving import serving
from tests.support.running import (
    WAIT_SECONDS_MAX,
    LogLines,
    captured_log,
    eventually,
    libpq,
    proxy_settings,
    without_own_account,
)
from tests.support.secret_canaries import watching

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

# Without spares, so that a test knows which session is next.
SESSION_MODE: Final[Mapping[str, object]] = {"pool": "session", "pool_spare_min": 0}


@dataclass(frozen=True, slots=True)
class Pooled:
    """A proxy with a pool, and the emulator in front of it."""

    lakebase: Lakebase
    app: App
    log: LogLines

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that the proxy dials."""
        return self.lakebase.shards[0].endpoint

    @property
    def cluster(self) -> Cluster:
        """The database."""
        return self.lakebase.shards[0].cluster

    @property
    def logins(self) -> int:
        """The number of upstream sessions so far."""
        return self.lakebase.gateway.logins.total()

    def row(self) -> PoolRow:
        """Return the pool's numbers."""
        rows = self.app.metrics.pools.rows()
        assert len(rows) == 1
        return rows[0]

    def retired(self) -> dict[str, int]:
        """Return how many sessions were retired, by the reasons that occurred."""
        return {reason: count for reason, count in self.row().retired.items() if count}

    async def at_rest(self, seconds_max: float = WAIT_SECONDS_MAX) -> None:
        """Wait until no client has a session, and none is dialled or reset."""

        def resting() -> bool:
            rows = self.app.metrics.pools.rows()
            pools = [row.present for row in rows]
            moving = sum(pool.in_use + pool.resetting + pool.dialling for pool in pools)
            return not moving and self.app.metrics.value("connections") == 0

        await eventually(resting, "the pool is at rest", seconds_max)

    async def fill(self, count: int) -> None:
        """Open so many sessions and make them idle; the youngest is the first to be taken."""
        clients = [await Connection.connect(**libpq(self.app)) for _ in range(count)]
        for kept, client in enumerate(clients, 1):
            await client.close()
            idle = partial(self._has_idle, kept)
            await eventually(idle, f"{kept} are idle")

    def _has_idle(self, count: int) -> bool:
        return self.row().present.idle == count

    @asynccontextmanager
    async def client(self, **parameters: Any) -> AsyncIterator[Connection]:
        """Connect a client for the block; it leaves with a Terminate."""
        where = libpq(self.app, autocommit=True, **parameters)
        async with await Connection.connect(**where) as connection:
            yield connection


async def value(connection: Connection, sql: str) -> object:
    """Return the first column of the first row, or the SQLSTATE of the error."""
    try:
        cursor = await connection.execute(sql.encode())
    except psycopg.Error as error:
        return error.sqlstate
    row = await cursor.fetchone() if cursor.description else None
    return row[0] if row else None


async def backend_pid(connection: Connection) -> int:
    """Return the number of the session's backend, as PostgreSQL says it."""
    pid = await value(connection, "SELECT pg_catalog.pg_backend_pid()")
    assert isinstance(pid, int)
    return pid


@asynccontextmanager
async def pooled(lakebase: Lakebase, **upstream: object) -> AsyncIterator[Pooled]:
    """Run a proxy with a pool in front of the emulator's first shard."""
    settings = proxy_settings(lakebase, upstream={**SESSION_MODE, **upstream})
    with captured_log() as log:
        async with serving(settings) as app, watching(app):
            yield Pooled(lakebase, app, log)


@asynccontextmanager
async def pooled_for_module(
    clusters: Mapping[str, Cluster], **upstream: object
) -> AsyncIterator[Pooled]:
    """Run an emulator and a proxy with a pool for the tests of one file."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(kept := without_own_account(os.environ)):
            patch.delenv(name)
        for name, content in kept.items():
            patch.setenv(name, content)
        lakebase = Lakebase(tuple(clusters), clusters=clusters)
        async with lakebase, pooled(lakebase, **upstream) as served:
            yield served
