"""Fixtures for differential tests: two roads to one PostgreSQL, straight and through the proxy.

The proxy and the stand-in in front of the cluster live as long as a file's tests, because there
are hundreds of those and each needs nothing but a connection of its own.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import pytest_asyncio

from proxy.emulator.cluster import Cluster
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App, serving
from tests.differential.comparison import difference
from tests.differential.frontend import OPENING, Exchange
from tests.support.running import captured_log, proxy_settings, without_own_account
from tests.support.scripted_client import Cut, Transcript, run_script, whole
from tests.support.secret_canaries import watching


@dataclass(frozen=True, slots=True)
class DirectAndProxied:
    """Two ways to the same database."""

    cluster: Cluster
    proxy: App

    async def connect_direct(self, client: Callable[[], asyncio.Protocol]) -> None:
        """Connect to PostgreSQL itself."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(client, self.cluster.socket_path)

    async def connect_proxied(self, client: Callable[[], asyncio.Protocol]) -> None:
        """Connect to the proxy."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(client, self.proxy.listen_host, self.proxy.listen_port)

    async def direct(self, exchange: Exchange, cut: Cut = whole) -> tuple[Transcript, ...]:
        """Return what PostgreSQL answers."""
        return await run_script(self.connect_direct, exchange.steps, OPENING, cut)

    async def proxied(self, exchange: Exchange, cut: Cut = whole) -> tuple[Transcript, ...]:
        """Return what the proxy answers."""
        return await run_script(self.connect_proxied, exchange.steps, OPENING, cut)

    async def compare(self, exchange: Exchange, cut: Cut = whole) -> None:
        """Fail unless both answer the same. `cut` is for the proxy's road alone."""
        direct = await self.direct(exchange)
        found = difference(direct, await self.proxied(exchange, cut))
        assert not found, found


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
async def roads_to(clusters: Mapping[str, Cluster]) -> AsyncIterator[DirectAndProxied]:
    """Keep a stand-in and a proxy in front of the clusters; the roads lead to the first."""
    async with Lakebase(tuple(clusters), clusters=clusters) as lakebase:
        shard = lakebase.shards[0]
        # The face that changes neither errors nor settings, nor keys when told so: the proxy alone
        # is compared.
        shard.instance.passes_real_key = True
        settings = proxy_settings(lakebase, upstream={"host": shard.instance.host})
        with captured_log() as log:
            async with serving(settings) as proxy, watching(proxy):
                yield DirectAndProxied(shard.cluster, proxy)
        # Drivers log, too: psycopg warns of a pipeline that a test aborts.
        assert [line for line in log.above_info() if line["logger"].startswith("proxy")] == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    clusters: Mapping[str, Cluster], no_own_account: None
) -> AsyncIterator[DirectAndProxied]:
    """Return two roads to a PostgreSQL as Lakebase runs it."""
    async with roads_to(clusters) as both:
        yield both
