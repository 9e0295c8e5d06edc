"""The fixture `stores`: three servers, and three roles that may do what each is for."""

import pytest

from tests.support.catalogue import MAP, SHARD_NAMES, Stores


@pytest.mark.parametrize("name", [MAP, *SHARD_NAMES])
async def test_each_role_logs_in_and_none_is_a_superuser(stores: Stores, name: str) -> None:
    for role in (stores.roles.admin, stores.roles.reader, stores.roles.session):
        async with stores.connect(name, role) as connection:
            row = await connection.fetchrow(
                "select user::text, current_database()::text, rolsuper, rolcreaterole"
                " from pg_roles where rolname = user"
            )
            assert tuple(row) == (role, stores.database, False, False)


async def test_the_administrator_owns_the_database_and_sees_sessions_of_shards(
    stores: Stores,
) -> None:
    async with stores.connect("one") as connection:
        await connection.execute("create schema own")
        async with stores.connect("one", stores.roles.session) as other:
            pid = await other.fetchval("select pg_backend_pid()")
            sql = "select backend_start is not null from pg_stat_activity where pid = $1"
            assert await connection.fetchval(sql, pid)
            assert await connection.fetchval("select pg_terminate_backend($1)", pid)
