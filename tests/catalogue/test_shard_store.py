"""What a shard knows of itself, and the rights over its sessions."""

from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from proxy.catalogue import shard_store
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.model import Status
from proxy.catalogue.schema import migrate_shard
from tests.support.catalogue import Stores

MAP_ID, SHARD_ID, MAPPING_ID = uuid4(), uuid4(), uuid4()
LOCATION = "one.example.com:5432/app"


@pytest_asyncio.fixture
async def shard(stores: Stores) -> AsyncIterator[Any]:
    """Return a connection of the administrator to a shard with one mapping, [a, c)."""
    async with stores.connect("one") as connection:
        await migrate_shard(connection, "shard one")
        await connection.execute(
            "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
            " hash_version, shard_id, location, version)"
            " values ($1, 'tenants', 'range', 'text', 'none', 1, $2, $3, 1)",
            MAP_ID,
            SHARD_ID,
            LOCATION,
        )
        await connection.execute(
            "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch)"
            " values ($1, $2, 'a', 'c', 'online', 7)",
            MAPPING_ID,
            MAP_ID,
        )
        for statement in shard_store.session_statements(stores.roles.session):
            await connection.execute(statement)
        yield connection


async def admit(connection: Any, mapping_id: UUID = MAPPING_ID) -> str:
    """Call the shard's function as a proxy does. Return the verdict."""
    verdict: str = await connection.fetchval(
        "select verdict from shardmap_local.admit(1, $1, $2, $3, $4, 7, 'b', 'proxy', '', $5)",
        MAP_ID,
        SHARD_ID,
        LOCATION,
        mapping_id,
        sha256(b"secret").digest(),
    )
    return verdict


async def test_identity_and_the_local_mapping_of_a_key(shard: Any) -> None:
    (identity,) = await shard_store.read_identities(shard)
    assert identity == shard_store.Identity(MAP_ID, "tenants", SHARD_ID, LOCATION, Status.ONLINE)
    expected = shard_store.LocalMapping(MAPPING_ID, b"a", b"c", Status.ONLINE, 7)
    for key, found in ((b"a", expected), (b"bzz", expected), (b"c", None), (b"", None)):
        assert await shard_store.find_local_mapping(shard, MAP_ID, key) == found


async def test_sessions_are_those_that_are_registered_and_alive(shard: Any, stores: Stores) -> None:
    assert await shard_store.read_sessions(shard, MAP_ID) == []
    async with stores.connect("one", stores.roles.session) as session:
        assert await admit(session) == "ok"
        (live,) = await shard_store.read_sessions(shard, MAP_ID)
        assert live.pid == await session.fetchval("select pg_backend_pid()")
        assert (live.mapping_id, live.lo, live.hi, live.epoch) == (MAPPING_ID, b"a", b"c", 7)
        assert live.proxy == "proxy"
        assert await shard_store.read_sessions(shard, uuid4()) == []
        await shard.fetchval("select pg_terminate_backend($1, 10000)", live.pid)
    assert await shard_store.read_sessions(shard, MAP_ID) == []


async def test_s66_each_right_over_sessions_is_checked_and_the_sql_that_grants_it_is_said(
    shard: Any, stores: Stores
) -> None:
    admin, session = stores.roles.admin, stores.roles.session
    await shard_store.check_rights(shard, [session], "shard one")
    stores.execute("one", f'revoke pg_read_all_stats, pg_signal_backend from "{admin}"')
    missing = await shard_store.missing_rights(shard, session)
    assert [right.what for right in missing] == [
        "see the start of its sessions",
        "end its sessions",
    ]
    with pytest.raises(CatalogueError, match="may not see the start") as refused:
        await shard_store.check_rights(shard, [session], "shard one")
    assert (refused.value.reason, refused.value.sqlstate) == ("rights_missing", "42501")
    assert f'grant pg_read_all_stats to "{admin}"' in refused.value.hint
    stores.execute("one", missing[0].statements[0])
    with pytest.raises(CatalogueError, match="may not end") as refused:
        await shard_store.check_rights(shard, [session], "shard one")
    stores.execute("one", missing[1].statements[0])
    await shard_store.check_rights(shard, [session], "shard one")


async def test_s66_membership_in_the_login_is_enough_if_it_is_inherited(
    shard: Any, stores: Stores
) -> None:
    admin, session = stores.roles.admin, stores.roles.session
    stores.execute("one", f'revoke pg_read_all_stats, pg_signal_backend from "{admin}"')
    stores.execute("one", f'grant "{session}" to "{admin}" with inherit false')
    assert len(await shard_store.missing_rights(shard, session)) == 2
    stores.execute("one", f'grant "{session}" to "{admin}" with inherit true')
    assert await shard_store.missing_rights(shard, session) == []
    async with stores.connect("one", session) as other:
        assert await admit(other) == "ok"
        (live,) = await shard_store.read_sessions(shard, MAP_ID)
        assert await shard.fetchval("select pg_terminate_backend($1, 10000)", live.pid)


async def test_s66_the_logins_own_function_ends_its_sessions(shard: Any, stores: Stores) -> None:
    admin, session = stores.roles.admin, stores.roles.session
    stores.execute("one", f'revoke pg_signal_backend from "{admin}"')
    (right,) = await shard_store.missing_rights(shard, session)
    *_, grant, _, create, revoke, give, _, take = right.statements
    roles = (admin, session, session, session, admin)
    for role, statement in zip(roles, (grant, create, revoke, give, take), strict=True):
        stores.execute("one", statement, role)
    assert await shard_store.missing_rights(shard, session) == []
    async with stores.connect("one", session) as other:
        assert await admit(other) == "ok"
        (live,) = await shard_store.read_sessions(shard, MAP_ID)
        oid = await shard.fetchval("select oid from pg_roles where rolname = $1", session)
        assert await shard.fetchval(f"select shardmap_local.end_session_{oid}($1)", live.pid)
    # No other role may call it.
    async with stores.connect("one", stores.roles.reader) as reader:
        sql = "select has_function_privilege('shardmap_local.end_session_%s(int)', 'execute')"
        with pytest.raises(Exception, match="permission denied"):
            await reader.fetchval(sql % oid)


async def test_a_login_that_is_not_there_is_named(shard: Any) -> None:
    with pytest.raises(CatalogueError, match="shard one has no role app") as refused:
        await shard_store.check_rights(shard, ["app"], "shard one")
    assert refused.value.reason == "rights_missing"
    assert await shard_store.missing_rights(shard, "app") == []
