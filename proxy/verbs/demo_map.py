"""The demo's shard map: a catalogue beside the first shard, and both shards in it.

For: filling it over the servers' own sockets, in a tenth of a second, and the settings that lead to
it. Not for: the verbs of `shards`, which reach it with these settings as any other catalogue.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from proxy.catalogue import store
from proxy.catalogue.bounds import parse_bounds
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.model import Shard as ShardRow
from proxy.catalogue.operation import Tools
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operations import Operator
from proxy.catalogue.schema import migrate_catalogue
from proxy.catalogue.shard_operations import AddShard, new_shard
from proxy.catalogue.shard_store import quoted
from proxy.config.toml import toml_key, toml_path, toml_value

if TYPE_CHECKING:
    from proxy.emulator.cluster import Cluster
    from proxy.emulator.lakebase import Lakebase

MAP: Final = "tenants"
CATALOGUE_DATABASE: Final = "shardmap"
# Tenants 0 to 999 are on the first shard, 1000 to 1999 on the second, all others on none.
TENANTS_A_SHARD: Final = 1000
_FILE: Final = "demo.toml"

Values = dict[str, dict[str, Any]]
"""Settings by section and key."""


def bounds_of(number: int) -> tuple[str, str]:
    """Return the bounds of the tenants that the shard of this number has at first."""
    return str(number * TENANTS_A_SHARD), str((number + 1) * TENANTS_A_SHARD)


def settings_values(lakebase: "Lakebase") -> Values:
    """Return the settings that lead to the emulator, for the proxy and for `shards`."""
    endpoint, address = lakebase.shards[0].endpoint.name, lakebase.host_address
    return {
        "workspace": {
            "host": lakebase.workspace_url,
            "client_id": lakebase.client_id,
            "client_secret": lakebase.client_secret,
            "auth_type": "oauth-m2m",
        },
        "upstream": {
            "endpoint": endpoint,
            "hostaddr": address,
            "port": lakebase.port,
            "database": lakebase.database,
            "ssl_root_cert": str(lakebase.ca_file),
        },
        # With the address: a target that sets where to dial takes none of that from [upstream].
        "targets.main": {
            "endpoint": endpoint,
            "hostaddr": address,
            "database": CATALOGUE_DATABASE,
        },
        "catalogue": {
            "target": "main",
            "shard_hostaddr": address,
            "shard_hosts": ",".join(shard.endpoint.host for shard in lakebase.shards),
        },
        f"shard_maps.{MAP}": {"catalogue": True},
        # A client that names no tenant gets the first shard.
        "routing": {"shard_map": MAP, "require_key": False},
    }


def write_settings(lakebase: "Lakebase", own: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a file for other verbs, beside the first server; it is removed with that directory.

    `own` are the sections of the proxy's own addresses.
    """
    lines = ["# For `shards`, `resolve` and others while the demo runs. Its secrets are not real."]
    for section, values in {**settings_values(lakebase), **own}.items():
        lines += ["", f"[{toml_path(section.split('.'))}]"]
        lines += [f"{toml_key(name)} = {toml_value(value)}" for name, value in values.items()]
    path = lakebase.shards[0].cluster.directory / _FILE
    path.write_text("\n".join([*lines, ""]))
    return path


class _Databases:
    """Connections to the servers' own sockets, which trust every login."""

    def __init__(self, lakebase: "Lakebase") -> None:
        self._lakebase = lakebase

    def superuser(self) -> Any:
        """Connect to the first server as the one who may create a database."""
        return self._connect(self._lakebase.shards[0].cluster, "postgres", "postgres")

    def catalogue(self) -> Any:
        """Connect to the catalogue."""
        return self._connect(self._lakebase.shards[0].cluster, CATALOGUE_DATABASE)

    def shard(self, shard: ShardRow) -> Any:
        """Connect to a shard."""
        return self._connect(self._lakebase[shard.name].cluster, self._lakebase.database)

    @asynccontextmanager
    async def _connect(
        self, cluster: "Cluster", database: str, user: str = ""
    ) -> AsyncIterator[Any]:
        import asyncpg  # noqa: PLC0415 - not while the servers start

        connection = await asyncpg.connect(
            host=str(cluster.directory),
            user=user or self._lakebase.client_id,
            database=database,
            password="",
            ssl=False,
        )
        try:
            yield connection
        finally:
            await connection.close()


async def fill_catalogue(lakebase: "Lakebase") -> None:
    """Make the catalogue's database, the map, and its shards with their tenants."""
    databases = _Databases(lakebase)
    async with databases.superuser() as connection:
        owner = quoted(lakebase.client_id)
        await connection.execute(f"create database {CATALOGUE_DATABASE} owner {owner}")
    async with databases.catalogue() as connection:
        await migrate_catalogue(connection)
        insert = (
            "insert into shardmap.shard_map (name, kind, key_type) values ($1, 'range', 'int4')"
        )
        await connection.execute(insert, MAP)
        created = await store.read_map(connection, MAP)
    tools = Tools(
        databases, asyncio.sleep, lambda: datetime.now(UTC), time.monotonic, lambda _: None
    )
    async with Operator(tools, KINDS, store.map_by_id, owner="the demo") as operator:
        for number, shard in enumerate(lakebase.shards):
            endpoint = shard.endpoint
            where = (endpoint.host, lakebase.port, lakebase.database)
            row = new_shard(created, shard.name, *where, endpoint=endpoint.name)
            await operator.run(AddShard(created, row))
            bounds = parse_bounds(bounds_of(number), created.spec)
            await operator.run(AddMapping(created, *bounds, shard.name))
