"""Fixtures for differential tests: one PostgreSQL, reached without and with the proxy in between.

The proxies and the emulator in front of the cluster live as long as a file's tests, because there
are hundreds of those and each needs nothing but a connection of its own. There are two proxies: one
opens an upstream session for each client, the other keeps them in a pool.
"""

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio

from proxy.emulator.cluster import Cluster
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.server.serving import serving
from tests.differential.comparison import difference
from tests.differential.exchange_client import ReadingClient, Transcript, run
from tests.differential.frontend import Exchange
from tests.support.cuts import Cut, whole
from tests.support.pooling import SESSION_MODE
from tests.support.running import captured_log, proxy_settings, without_own_account
from tests.support.secret_canaries import watching


@dataclass(frozen=True, slots=True)
class DirectAndProxied:
    """A database, reached without and with a proxy in between."""

    cluster: Cluster
    proxy: App
    pool: App  # the proxy that keeps upstream sessions for the next clients

    async def direct(self, exchange: Exchange, cut: Cut = whole) -> list[Transcript]:
        """Return what PostgreSQL answers."""
        clients = await run(ReadingClient, exchange, self.cluster.socket_path, cut)
        return [client.transcript for client in clients]

    async def proxied(self, exchange: Exchange, cut: Cut = whole) -> list[Transcript]:
        """Return what the proxy answers."""
        return await _answers(self.proxy, exchange, cut)

    async def compare(self, exchange: Exchange, cut: Cut = whole) -> None:
        """Fail unless all answer the same. `cut` is for what is sent to a proxy.

        The pool gets the exchange twice, so that the second time its session is a reused one: the
        first time's, unless that was left busy.
        """
        direct = await self.direct(exchange)
        found = difference(direct, await self.proxied(exchange, cut))
        assert not found, found
        expected = list(map(_without_login_notices, direct))
        for number in ("first", "second"):
            reused = map(_without_login_notices, await _answers(self.pool, exchange, cut))
            found = difference(expected, list(reused))
            assert not found, f"in a pool, the {number} time: {found}"


def _without_login_notices(transcript: Transcript) -> Transcript:
    """Return what was answered but for notices before the login was over (P29)."""
    ready = [number for number, frame in enumerate(transcript.frames) if frame.type == b"Z"]
    before, after = (
        transcript.frames[: min(ready, default=0)],
        transcript.frames[min(ready, default=0) :],
    )
    return replace(transcript, frames=[one for one in before if one.type != b"N"] + after)


async def _answers(proxy: App, exchange: Exchange, cut: Cut) -> list[Transcript]:
    address = (proxy.listen_host, proxy.listen_port)
    clients = await run(ReadingClient, exchange, address, cut)
    return [client.transcript for client in clients]


@pytest.fixture(scope="module", autouse=True)
def no_own_account() -> Iterator[None]:
    """Keep the SDK and libpq from finding anything of the person's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(kept := without_own_account(os.environ)):
            patch.delenv(name)
        for name, value in kept.items():
            patch.setenv(name, value)
        yield


@asynccontextmanager
async def in_front_of(clusters: Mapping[str, Cluster]) -> AsyncIterator[DirectAndProxied]:
    """Keep an emulator and a proxy in front of the clusters; the first one is compared."""
    async with Lakebase(tuple(clusters), clusters=clusters) as lakebase:
        shard = lakebase.shards[0]
        # The endpoint kind that changes neither errors nor settings, and here no keys: the proxy
        # alone is compared.
        shard.instance.passes_real_key = True
        host = {"host": shard.instance.host}
        settings = proxy_settings(lakebase, upstream=host)
        pooling = proxy_settings(lakebase, upstream={**host, **SESSION_MODE})
        with captured_log() as log:
            async with serving(settings) as proxy, serving(pooling) as pool, watching(proxy):
                yield DirectAndProxied(shard.cluster, proxy, pool)
                takes = pool.metrics.pools.rows()[0].takes if pool.metrics.pools.rows() else {}
        # Drivers log, too: psycopg warns of a pipeline that a test aborts.
        assert [line for line in log.above_info() if line["logger"].startswith("proxy")] == []
        assert not takes or takes["reused"] >= takes["dialled"] / 2, takes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    clusters: Mapping[str, Cluster], no_own_account: None
) -> AsyncIterator[DirectAndProxied]:
    """Return a PostgreSQL of the version that Lakebase runs, without and with a proxy."""
    async with in_front_of(clusters) as both:
        yield both
