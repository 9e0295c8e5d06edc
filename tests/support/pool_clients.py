"""Clients of a proxy that pools, and what its pool says of itself.

For: tests of sessions that serve several clients. Not for: the pool's parts (`tests/pool`).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.server.app import App
from proxy.wire.messages import BackendKeyData, ErrorResponse, Frame, ReadyForQuery, Terminate
from proxy.wire.startup import V3_0, ProtocolVersion
from tests.support.client import Client, connected, startup
from tests.support.pooling import SESSION_MODE
from tests.support.running import Listening, eventually

PID = "SELECT pg_backend_pid()"

both_relays = pytest.mark.parametrize("accelerated", [True, False], ids=["compiled", "python"])


def pooling(*, accelerated: bool = True, **upstream: object) -> dict[str, dict[str, object]]:
    """Return the sections of a proxy whose target pools, without spares."""
    return {"upstream": {**SESSION_MODE, "accelerated": accelerated, **upstream}}


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
