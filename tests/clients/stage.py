"""Where clients are tried: one PostgreSQL that they reach directly, and through the proxy.

The proxy is a process of its own, before the emulator's workspace and gateway, which let tokens
expire, put the compute to sleep and restart the server at a test's wish.
"""

import asyncio
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from proxy.emulator.cluster import CLIENT_ID, DATABASE, Cluster, running
from proxy.emulator.lakebase import SHARDS, Lakebase
from tests.support.admin_address import Answer, ask
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import proxy_values, toml
from tests.support.sharding import sharded, target

LIFETIME_SECONDS: Final = 5.0  # of a token; in Lakebase an hour
# What is left of it for a login: twenty at once on a busy machine.
MARGIN_SECONDS: Final = 4.0
LIFETIMES: Final = 3
WAKE_SECONDS: Final = 1.0
SETTLED_SECONDS_MAX: Final = 30.0
_SETTLED_SECONDS: Final = 0.2
CONNECTIONS_MAX: Final = 1000  # twenty a program, directly and through the proxy

KEY, OTHER_KEY = 42, 1042  # on shards one and two
UNCOVERED_KEY: Final = 999_999
ROLELESS_KEY: Final = 5000  # its target logs in as a role that does not exist

Ends = Counter[tuple[str, str]]
"""How many sessions ended, by outcome and reason."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs; made by `stage`."""

    lakebase: Lakebase
    proxy: ProxyProcess
    server: Cluster
    server_port: int

    @property
    def direct(self) -> dict[str, str]:
        """The environment of a program that connects to PostgreSQL, as the role itself."""
        return _environment(self.server_port, CLIENT_ID)

    @property
    def proxied(self) -> dict[str, str]:
        """The environment of a program that connects to the proxy."""
        return _environment(self.proxy.listen_port, "application")

    async def outlive_tokens(self) -> None:
        """Wait until tokens of now have expired, and those of then, and those of then."""
        await asyncio.sleep(LIFETIME_SECONDS * LIFETIMES)

    async def sleep(self) -> None:
        """Put the compute to sleep: it ends all sessions, and the next login wakes it."""
        self.lakebase[SHARDS[0]].endpoint.suspend()

    async def restart(self) -> None:
        """Restart the server of both ways."""
        await asyncio.to_thread(self.server.restart)

    async def ends(self) -> Ends:
        """Return the ends of sessions that the proxy has counted, as soon as it counts no more.

        A session is counted when its upstream has closed too, and that may be after its client.
        """
        port = int(self.proxy.events("serving")[0]["admin_port"])
        before: Answer | None = None
        now = await ask(port, "/metrics")
        async with asyncio.timeout(SETTLED_SECONDS_MAX):
            while before is None or _ends(before) != _ends(now):
                await asyncio.sleep(_SETTLED_SECONDS)
                before, now = now, await ask(port, "/metrics")
        return _ends(now)


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Start everything for the block."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    many = {"max_connections": str(CONNECTIONS_MAX)}
    tcp = {"listen_addresses": "127.0.0.1", "port": str(port)}
    clusters = [Cluster(SHARDS[0], settings={**many, **tcp}), Cluster(SHARDS[1], settings=many)]
    by_name = {cluster.shard: cluster for cluster in clusters}
    with tempfile.TemporaryDirectory() as directory:
        async with running(clusters), Lakebase(clusters=by_name) as lakebase:
            lakebase.workspace.api.credential_seconds = LIFETIME_SECONDS
            lakebase[SHARDS[0]].endpoint.wake_seconds = WAKE_SECONDS
            file = Path(directory) / "proxy.toml"
            file.write_text(toml(proxy_values(lakebase, _sections(lakebase))))
            async with started_process("run", "--config", str(file)) as proxy:
                await proxy.serving()
                yield Stage(lakebase, proxy, clusters[0], port)


def _sections(lakebase: Lakebase) -> Mapping[str, Mapping[str, object]]:
    sections = sharded(lakebase, require_key=False)
    roleless = target(lakebase, lakebase[SHARDS[0]].endpoint, user="absent")
    sections["targets"]["roleless"] = roleless
    mappings = sections["shard_maps"]["tenants"]["mappings"]  # type: ignore[index]
    mappings.append({"low": ROLELESS_KEY, "high": ROLELESS_KEY + 1, "target": "roleless"})
    return {
        **sections,
        "listen": {"port": 0, "max_connections": CONNECTIONS_MAX},
        "admin": {"enabled": True, "port": 0},
        "credentials": {"expiry_margin_seconds": MARGIN_SECONDS},
    }


def _environment(port: int, user: str) -> dict[str, str]:
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGSSLMODE": "disable"}
    return {**where, "PGUSER": user, "PGDATABASE": DATABASE}


def _ends(metrics: Answer) -> Ends:
    return Ends(
        {
            (sample.labels["outcome"], sample.labels["reason"]): int(sample.value)
            for family in text_string_to_metric_families(metrics.body.decode())
            for sample in family.samples
            if sample.name == "lakebase_proxy_sessions_ended_total"
        }
    )
