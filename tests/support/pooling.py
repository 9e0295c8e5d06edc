"""A proxy that keeps upstream sessions for the next clients, its clients, and what its pool counts.

For: tests of whole sessions through a pool. Not for: the pool's own rules (`tests/pool`).
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import pytest

from proxy import native
from proxy.emulator.cluster import Cluster
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.lakebase import Lakebase
from proxy.observe.pool_stats import PoolRow
from proxy.server.app import App
from proxy.server.serving import serving
from proxy.wire.messages import BackendKeyData, ErrorResponse, Frame, ReadyForQuery, Terminate
from proxy.wire.startup import V3_0, ProtocolVersion
from tests.support.client import Client, connected, startup
from tests.support.running import (
    WAIT_SECONDS_MAX,
    Listening,
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
PID: Final = "SELECT pg_backend_pid()"

both_modes = pytest.mark.parametrize(
    "upstream_keys", [{}, SESSION_MODE], ids=["off", "session"], indirect=True
)
_RELAYS: Final = {"compiled": True, "python": False} if native.AVAILABLE else {"python": False}
both_relays = pytest.mark.parametrize("accelerated", _RELAYS.values(), ids=_RELAYS)


def pooling(*, accelerated: bool = True, **upstream: object) -> dict[str, dict[str, object]]:
    """Return the sections of a proxy whose target pools, without spares."""
    return {"upstream": {**SESSION_MODE, "accelerated": accelerated, **upstream}}


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
        return retired(self.app)

    async def at_rest(self, seconds_max: float = WAIT_SECONDS_MAX) -> None:
        """Wait until no client has a session, and none is dialled or reset."""

        def resting() -> bool:
            return states(self.app).keys() <= {"idle"} and not self.app.metrics.value("connections")

        await eventually(resting, "the pool is at rest", seconds_max)

    async def fill(self, count: int) -> None:
        """Open so many sessions and make them idle; the youngest is the first to be taken."""
        clients = [await Connection.connect(**libpq(self.app)) for _ in range(count)]
        for kept, client in enumerate(clients, 1):
            await client.close()
            await settled(self.app, idle=kept, in_use=count - kept)

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


class Visitor(Client):
    """A client that asks for single values, and leaves."""

    key: BackendKeyData | None = None

    async def enter(self, version: ProtocolVersion = V3_0, **parameters: str) -> str:
        """Start up. Return the pid of the backend."""
        await self.send(startup(version, **parameters))
        while not isinstance(message := await self.message(), ReadyForQuery):
            assert not isinstance(message, ErrorResponse), message
            if isinstance(message, BackendKeyData):
                self.key = message
        return await self.value(PID)

    async def value(self, sql: str) -> str:
        """Return the last value that a simple Query returns; empty without one."""
        await self.query(sql)
        messages = await self.messages_until(ReadyForQuery)
        rows = [one for one in messages if isinstance(one, Frame) and one.type == b"D"]
        return rows[-1].payload[6:].decode() if rows else ""

    async def leave(self) -> None:
        """Send Terminate, and wait until the proxy has closed."""
        await self.send(Terminate().encode())
        assert await self.receive_rest() == b""
        self.close()


@asynccontextmanager
async def visitor(proxy: Listening) -> AsyncIterator[Visitor]:
    """Connect a client, without a StartupMessage."""
    address = (proxy.listen_host, proxy.listen_port)
    async with connected(Visitor, address) as client:
        yield client


async def visit(proxy: Listening, sql: str = PID, **parameters: str) -> str:
    """Return what a client of its own gets for a query. It leaves."""
    async with visitor(proxy) as client:
        pid = await client.enter(V3_0, **parameters)
        value = pid if sql == PID else await client.value(sql)
        await client.leave()
    return value


def count(proxy: App, name: str, **labels: str) -> int:
    """Return the sum of a pool's metric."""
    return int(proxy.metrics.value(f"pool_{name}", **labels))


def states(proxy: App) -> dict[str, int]:
    """Return how many sessions of pools are in each state that some are in."""
    words = ("in_use", "idle", "resetting", "dialling")
    found = {word: count(proxy, "sessions", state=word) for word in words}
    return {word: number for word, number in found.items() if number}


async def settled(proxy: App, idle: int, in_use: int = 0) -> None:
    """Wait until so many sessions are idle and in use, and none is in another state."""
    wanted = {word: n for word, n in (("in_use", in_use), ("idle", idle)) if n}
    await eventually(lambda: states(proxy) == wanted, f"{wanted}")


def retired(proxy: App) -> dict[str, int]:
    """Return how many sessions were retired, by reason."""
    rows = proxy.metrics.pools.rows()
    return {word: n for row in rows for word, n in row.retired.items() if n}


def taken(proxy: App) -> dict[str, int]:
    """Return how many clients were given a session, by source."""
    rows = proxy.metrics.pools.rows()
    return {word: n for row in rows for word, n in row.takes.items() if n}
