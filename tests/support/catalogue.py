"""A catalogue and two shards: three real PostgreSQL servers behind the emulator's TLS and tokens.

For: fixtures, three roles of which none is a superuser, settings that lead there, connections as
each role. Not for: what is in the catalogue.

`stores` is new for each test: a database of its own on each server, and roles of its own.
"""

import os
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio

from proxy.config import Settings
from proxy.emulator.cluster import Cluster, quoted
from proxy.emulator.lakebase import CLIENT_SECRET, Lakebase
from tests.support.running import toml

MAP: Final = "map"
"""The name of the catalogue's server; those of the shards' are "one" and "two"."""
SHARD_NAMES: Final = ("one", "two")
# The newest that the wheel has, unless the environment says another one. The shards' are the
# session's own (`tests/conftest.py`).
MAP_VERSION: Final = int(os.environ.get("TEST_CATALOGUE_VERSION", "18"))
SYSTEM_15: Final = Path("/usr/lib/postgresql/15")

Values = dict[str, dict[str, object]]


@dataclass(frozen=True, slots=True)
class Roles:
    """The three logins of section "roles"; each is the identity of a service principal too."""

    admin: str
    reader: str
    session: str


class Stores:
    """The servers, the database's name, the roles, and what leads there."""

    def __init__(
        self, lakebase: Lakebase, clusters: Mapping[str, Cluster], database: str, roles: Roles
    ) -> None:
        self.lakebase = lakebase
        self.clusters = clusters
        self.database = database
        self.roles = roles

    def host(self, name: str) -> str:
        """Return the host of the catalogue ("map") or of a shard ("one", "two")."""
        return self.lakebase[name].endpoint.host

    def endpoint(self, name: str) -> str:
        """Return the resource name of its endpoint."""
        return self.lakebase[name].endpoint.name

    @asynccontextmanager
    async def connect(self, name: str, role: str | None = None) -> AsyncIterator[Any]:
        """Yield a direct asyncpg connection to a server's database; by default as administrator."""
        connection = await asyncpg.connect(
            host=str(self.clusters[name].directory),
            user=role or self.roles.admin,
            database=self.database,
            password="",
            ssl=False,
            statement_cache_size=0,
        )
        try:
            yield connection
        finally:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close()  # a test may have ended it

    def execute(self, name: str, sql: str, role: str = "postgres") -> str:
        """Run a script on a server with psql, as superuser unless a role is given; blocks."""
        return self.clusters[name].execute(sql, database=self.database, user=role)

    def values(self, identity: str | None = None, **sections: Mapping[str, object]) -> Values:
        """Return settings by section and key: a file that the CLI, or a sidecar, takes.

        `identity` is the service principal: by default the administrator. That of `roles.session`
        makes a sidecar's settings, which reads the catalogue with the reader's role.
        """
        identity = identity or self.roles.admin
        lakebase = self.lakebase
        user = {"user": self.roles.reader} if identity == self.roles.session else {}
        values: Values = {
            "listen": {"port": 0},
            "admin": {"enabled": False, "port": 0},
            "workspace": {
                "host": lakebase.workspace_url,
                "client_id": identity,
                "client_secret": CLIENT_SECRET,
                "auth_type": "oauth-m2m",
            },
            "upstream": {
                "port": lakebase.port,
                "database": self.database,
                "ssl_root_cert": str(lakebase.ca_file),
                "connect_retry_seconds": 0.5,
            },
            "targets.main": {
                "endpoint": self.endpoint(MAP),
                "hostaddr": lakebase.host_address,
                **user,
            },
            "catalogue": {"target": "main", "shard_hostaddr": lakebase.host_address},
            "routing": {"shard_map": "tenants"},
            "shard_maps.tenants": {"catalogue": True},
        }
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
        return values

    def settings(self, identity: str | None = None, **sections: Mapping[str, object]) -> Settings:
        """Return `values` as settings."""
        nested: dict[str, Any] = {}
        for section, keys in self.values(identity, **sections).items():
            table = nested
            for part in section.split("."):
                table = table.setdefault(part, {})
            table.update(keys)
        return Settings.model_validate(nested)

    def file(
        self, folder: Path, identity: str | None = None, **sections: Mapping[str, object]
    ) -> Path:
        """Write `values` to a file and return its path."""
        path = folder / f"{identity or 'admin'}.toml"
        values = self.values(identity, **sections)
        path.write_text(toml(values))
        return path


async def insert_map(
    connection: Any, name: str = "tenants", kind: str = "range", key_type: str = "int4"
) -> uuid.UUID:
    """Insert a map as it is, without the verb; return its id."""
    sql = (
        "insert into shardmap.shard_map (name, kind, key_type) values ($1, $2, $3) returning map_id"
    )
    map_id: uuid.UUID = await connection.fetchval(sql, name, kind, key_type)
    return map_id


async def insert_shard(
    connection: Any, map_id: uuid.UUID, name: str, host: str, database: str
) -> uuid.UUID:
    """Insert a shard's row, without the verb; return its id."""
    sql = (
        "insert into shardmap.shard (map_id, name, host, dbname) values ($1, $2, $3, $4)"
        " returning shard_id"
    )
    shard_id: uuid.UUID = await connection.fetchval(sql, map_id, name, host, database)
    return shard_id


async def insert_mapping(
    connection: Any, map_id: uuid.UUID, shard_id: uuid.UUID, lo: bytes, hi: bytes | None
) -> uuid.UUID:
    """Insert a mapping's row, without the operation; return its id."""
    sql = (
        "insert into shardmap.mapping (map_id, shard_id, lo, hi) values ($1, $2, $3, $4)"
        " returning mapping_id"
    )
    mapping_id: uuid.UUID = await connection.fetchval(sql, map_id, shard_id, lo, hi)
    return mapping_id


def installations() -> list[tuple[int, Path | None]]:
    """Return the server versions that this machine has: the wheel's 16 and 18, the system's 15."""
    found: list[tuple[int, Path | None]] = [(16, None), (18, None)]
    if (SYSTEM_15 / "bin" / "initdb").exists():
        found.insert(0, (15, SYSTEM_15))
    return found


@pytest.fixture(scope="session")
def store_clusters(clusters: Mapping[str, Cluster]) -> Iterator[Mapping[str, Cluster]]:
    """Return the three servers, shared by all tests."""
    with Cluster(MAP, version=MAP_VERSION) as map_cluster:
        yield {MAP: map_cluster, **clusters}


@pytest_asyncio.fixture
async def stores(store_clusters: Mapping[str, Cluster]) -> AsyncIterator[Stores]:
    """Return a new database on each of the three servers, with new roles and nothing in it."""
    async with new_stores(store_clusters) as made:
        yield made


@asynccontextmanager
async def new_stores(clusters: Mapping[str, Cluster]) -> AsyncIterator[Stores]:
    """Yield a new database on each of these servers, with new roles and nothing in it."""
    letters = uuid.uuid4().hex[:12]
    database = f"stores_{letters}"
    roles = Roles(*(f"{name}-{letters}" for name in ("admin", "reader", "session")))
    with ThreadPoolExecutor(len(clusters)) as threads:
        list(threads.map(lambda one: _create(one, database, roles), clusters.items()))
    async with AsyncExitStack() as stack:
        names = (MAP, *SHARD_NAMES)
        lakebase = await stack.enter_async_context(Lakebase(names, clusters=clusters))
        for role in (roles.admin, roles.reader, roles.session):
            lakebase.workspace.api.clients[role] = CLIENT_SECRET
        # A sidecar has one identity, and reads the catalogue with a role that it is a member of.
        lakebase[MAP].endpoint.members[roles.reader] = {roles.session}
        yield Stores(lakebase, clusters, database, roles)
    with ThreadPoolExecutor(len(clusters)) as threads:
        list(threads.map(lambda one: _drop(one[1], database, roles), clusters.items()))


def _create(named: tuple[str, Cluster], database: str, roles: Roles) -> None:
    name, cluster = named
    statements = [f"CREATE ROLE {quoted(role)} LOGIN;" for role in _all(roles)]
    statements.append(f"CREATE DATABASE {quoted(database)} OWNER {quoted(roles.admin)};")
    if name != MAP:
        admin = quoted(roles.admin)
        statements.append(f"GRANT pg_read_all_stats, pg_signal_backend TO {admin};")
    cluster.execute("\n".join(statements), database="postgres")


def _drop(cluster: Cluster, database: str, roles: Roles) -> None:
    statements = [f"DROP DATABASE IF EXISTS {quoted(database)} WITH (FORCE);"]
    statements += [f"DROP ROLE IF EXISTS {quoted(role)};" for role in _all(roles)]
    cluster.execute("\n".join(statements), database="postgres")


def _all(roles: Roles) -> tuple[str, str, str]:
    return roles.admin, roles.reader, roles.session


def bare_environment() -> dict[str, str]:
    """Return an environment without anything that settings are read from."""
    foreign = ("LAKEBASE_", "DATABRICKS_", "PG", "ENDPOINT_NAME")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
