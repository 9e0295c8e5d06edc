"""A pool over a real dialer toward the emulator, without clients or relay: sessions are asked here.

For: tests of the pool's bounds, waiting clients and spares. Not for: whole sessions (`running`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from proxy.config import UpstreamSettings
from proxy.emulator.lakebase import Lakebase
from proxy.observe.pool_stats import PoolRow, PoolStats
from proxy.pool.pool import Pool
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstream_session import UpstreamSession
from proxy.wire.startup import V3_0, StartupMessage
from tests.support.dialing import Dialing, asked, lakebase_dialing, toward
from tests.support.running import eventually

TARGET = "one"


class Held:
    """A session that a test has as its client would."""

    def __init__(self, opened: UpstreamSession, pid: bytes) -> None:
        assert opened.lease is not None
        self.opened = opened
        self.lease = opened.lease
        self.reused = opened.lease.reused
        self.has_left = False
        self.pid = pid
        """Of its backend."""

    def leave(self, retired_for: str = "") -> None:
        """End its client. The pool keeps it, unless `retired_for` says why not."""
        self.has_left = True
        self.lease.release(retired_for)


def client_of(key: str) -> StartupMessage:
    """Return the StartupMessage of a client of this kind."""
    pairs = ((b"user", b"app"), (b"database", b"databricks_postgres"))
    return StartupMessage(V3_0, (*pairs, (b"application_name", key.encode())))


class PoolOf:
    """Made by `pool_of`. A key is an application_name, since sessions of one name are equal."""

    def __init__(self, pool: Pool, lakebase: Lakebase, dialing: Dialing, stats: PoolStats) -> None:
        self.pool = pool
        self.lakebase = lakebase
        self.dialing = dialing
        self._stats = stats
        self._held: list[Held] = []

    @property
    def row(self) -> PoolRow:
        """The numbers that operators see."""
        (row,) = self._stats.rows()
        return row

    @property
    def logins(self) -> int:
        """The number of logins so far."""
        return self.lakebase.gateway.logins.total()

    async def open(self, key: str = "a") -> Held:
        """Open a session for a client of this kind, and ask it for its backend."""
        opened = await self.pool.open(client_of(key), DialPhases())
        try:
            held = Held(opened, await asked(opened, "SELECT pg_backend_pid()"))
            assert await asked(opened, "SHOW application_name") == key.encode()
        except BaseException:
            opened.close()  # an answer may be owed
            raise
        self._held.append(held)
        return held

    def leave_all(self) -> None:
        """End the clients that are still there."""
        for held in self._held:
            if not held.has_left:
                held.leave("busy")

    async def until_idle(self, count: int) -> None:
        """Wait until so many sessions are idle, and none is on its way."""

        def is_idle() -> bool:
            now = self.row.present
            return (now.idle, now.resetting, now.dialling) == (count, 0, 0)

        await eventually(is_idle, f"{count} sessions are idle")


@asynccontextmanager
async def pool_of(
    lakebase: Lakebase,
    *,
    connects_max: int = 50,
    clock: Callable[[], float] = time.monotonic,
    **upstream: Any,
) -> AsyncIterator[PoolOf]:
    """Make a pool for the first shard's endpoint; at the end all of its sessions have gone."""
    endpoint, stats = lakebase["one"].endpoint, PoolStats()
    settings = UpstreamSettings(**{**toward(lakebase, endpoint), "pool": "session", **upstream})
    async with lakebase_dialing(lakebase, endpoint, connects_max=connects_max) as dialing:
        pool = Pool(TARGET, settings, dialing.dialer, stats.register, clock=clock)
        made = PoolOf(pool, lakebase, dialing, stats)
        try:
            yield made
        finally:
            pool.drain()
            made.leave_all()
            async with asyncio.timeout(10):
                await pool.wait_closed()
    await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)
