"""The two schemas: installed once, by an owner who is no superuser, on each PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.schema import (
    CURRENT,
    StoreVersion,
    catalogue_version,
    check_readable,
    check_writable,
    migrate_catalogue,
    migrate_shard,
    shard_version,
)
from proxy.catalogue.transactions import transaction
from proxy.emulator.cluster import Cluster
from tests.support.catalogue import installations

OWNER = "store_owner"


@pytest.fixture(scope="module", params=installations(), ids=lambda one: f"postgres{one[0]}")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    version, installation = request.param
    with Cluster(version=version, installation=installation) as started:
        started.execute(f"CREATE ROLE {OWNER} LOGIN", database="postgres")
        yield started


@pytest.fixture
def database(cluster: Cluster) -> Iterator[str]:
    cluster.execute(f"CREATE DATABASE store OWNER {OWNER}", database="postgres")
    yield "store"
    cluster.execute("DROP DATABASE store WITH (FORCE)", database="postgres")


async def connect(cluster: Cluster, database: str) -> Any:
    return await asyncpg.connect(host=str(cluster.directory), user=OWNER, database=database)


@pytest_asyncio.fixture
async def connection(cluster: Cluster, database: str) -> AsyncIterator[Any]:
    connected = await connect(cluster, database)
    yield connected
    await connected.close()


async def test_the_catalogue_is_installed_once_by_an_ordinary_owner(connection: Any) -> None:
    assert await catalogue_version(connection) is None
    assert await migrate_catalogue(connection) is None
    assert await catalogue_version(connection) == CURRENT
    assert await migrate_catalogue(connection) == CURRENT
    assert not await connection.fetchval("select rolsuper from pg_roles where rolname = user")


async def test_a_shards_schema_may_be_installed_again_and_keeps_its_rows(connection: Any) -> None:
    assert await migrate_shard(connection, "shard eu") is None
    assert await shard_version(connection) is None, "it has no map yet"
    await connection.execute(
        "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
        " hash_version, shard_id, location, version) values (gen_random_uuid(), 'tenants', 'list',"
        " 'text', 'none', 1, gen_random_uuid(), 'host:5432/app', 1)"
    )
    assert await migrate_shard(connection, "shard eu") == CURRENT
    assert await connection.fetchval("select count(*) from shardmap_local.identity") == 1
    assert await shard_version(connection) == CURRENT


async def test_two_who_install_at_the_same_moment_install_once(
    cluster: Cluster, database: str
) -> None:
    connections = [await connect(cluster, database) for _ in range(4)]
    before = await asyncio.gather(*(migrate_catalogue(one) for one in connections))
    assert sorted(before, key=str) == [CURRENT] * 3 + [None]
    await asyncio.gather(*(migrate_shard(one, "shard eu") for one in connections))
    for one in connections:
        await one.close()


async def test_the_owners_own_settings_do_not_disturb(connection: Any) -> None:
    for setting in (
        "default_transaction_read_only = on",
        "default_transaction_isolation = 'serializable'",
        "standard_conforming_strings = off",
        "search_path = 'elsewhere'",
        "statement_timeout = 2000",  # for the first statement; then there is none
    ):
        await connection.execute(f"set {setting}", timeout=30)
    await migrate_catalogue(connection)
    await migrate_shard(connection, "shard eu")
    await connection.execute("set statement_timeout = 0; reset all")
    async with transaction(connection):
        assert await connection.fetchval("show statement_timeout") == "0"
    assert await catalogue_version(connection) == CURRENT


async def test_a_schema_of_that_name_that_is_not_ours_is_left_alone(connection: Any) -> None:
    await connection.execute("create schema shardmap; create schema shardmap_local")
    with pytest.raises(CatalogueError, match="did not install") as refused:
        await migrate_catalogue(connection)
    assert (refused.value.reason, refused.value.sqlstate) == ("store_missing", "55000")
    with pytest.raises(CatalogueError, match="did not install"):
        await migrate_shard(connection, "shard eu")


async def test_s38_a_store_of_a_later_major_version_is_not_touched(connection: Any) -> None:
    await migrate_catalogue(connection)
    await connection.execute("update shardmap.store_version set major = 2")
    with pytest.raises(CatalogueError, match=r"version 2\.0") as refused:
        await migrate_catalogue(connection)
    assert refused.value.hint == "Upgrade lakebase-auth-proxy."
    assert await catalogue_version(connection) == StoreVersion(2, 0)


@pytest.mark.parametrize(
    ("version", "readable", "writable", "side"),
    [
        (StoreVersion(1, 0), True, True, ""),
        (StoreVersion(1, 7), True, True, ""),
        (StoreVersion(2, 0), False, False, "Upgrade lakebase-auth-proxy."),
        (StoreVersion(0, 9), False, False, "Upgrade the schema"),
    ],
)
def test_s38_the_same_major_version_can_be_read_and_another_names_the_side_to_upgrade(
    version: StoreVersion, readable: bool, writable: bool, side: str
) -> None:
    for check, allowed in ((check_readable, readable), (check_writable, writable)):
        if allowed:
            check(version)
            continue
        with pytest.raises(CatalogueError) as refused:
            check(version)
        assert refused.value.reason == "store_version"
        assert refused.value.hint.startswith(side)


def test_a_database_without_the_schema_is_named() -> None:
    with pytest.raises(CatalogueError, match="the catalogue has no") as refused:
        check_readable(None)
    assert refused.value.reason == "store_missing"
    assert "shards init" in refused.value.hint
