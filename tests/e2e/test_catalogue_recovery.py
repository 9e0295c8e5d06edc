"""A sidecar that runs through disasters of its map, and the verbs as processes that end them.

It is never restarted: what it knows is served while the catalogue is lost, and what the verbs have
repaired is followed.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from proxy.exit_codes import EXIT_DIFFERENCES, EXIT_OK
from proxy.server.app import App
from proxy.server.serving import serving
from tests.e2e.test_catalogue_sessions import ended, session
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.operating import until
from tests.support.operator import Operator, Placed
from tests.support.running import captured_log, eventually
from tests.support.secret_canaries import watching
from tests.support.shards_cli import Shards

pytestmark = [pytest.mark.slow]

# The feed connects anew within half a minute.
FOLLOWED_SECONDS_MAX = 60.0


@pytest_asyncio.fixture
async def app(stores: Stores, placed: Placed) -> AsyncIterator[App]:
    with captured_log():
        async with AsyncExitStack() as stack:
            settings = stores.settings(stores.roles.session)
            started = await stack.enter_async_context(serving(settings))
            yield await stack.enter_async_context(watching(started))


@pytest.fixture
def shards(stores: Stores, tmp_path: Path) -> Shards:
    return Shards(stores, tmp_path)


async def done(shards: Shards, *words: str) -> dict[str, Any]:
    """Run a verb as a process that succeeds; return its facts."""
    answered = await shards.process(*words, "--json")
    assert answered.code == EXIT_OK, (words, answered)
    return answered.facts


async def repaired(shards: Shards, name: str, source: str) -> None:
    """Verify and repair a shard."""
    answered = await shards.process("verify", "--shard", name, "--json")
    assert answered.code == EXIT_DIFFERENCES, answered
    words = ("repair", "--shard", name, "--from", source, "--report", answered.facts["report"])
    await done(shards, *words)


async def admitted(app: App, key: str = "5") -> None:
    """Return when a session of a key starts; the sidecar may not have heard of a change yet."""

    async def starts() -> bool:
        with suppress(asyncpg.PostgresError):
            async with session(app, key) as opened:
                return bool(await opened.fetchval("select true"))
        return False

    await until(starts, "a session starts")


async def refused_with(app: App, reason: str) -> None:
    """Return when a session is refused for this reason."""

    async def is_refused() -> bool:
        try:
            async with session(app):
                return False
        except asyncpg.PostgresError as error:
            return f"reason={reason}" in str(error.detail)

    await until(is_refused, f"a session is refused: {reason}")


async def test_a_lost_catalogue_is_rebuilt_while_the_sidecar_serves(
    app: App, shards: Shards, placed: Placed
) -> None:
    stores = shards.stores
    async with session(app) as one, session(app, "1000") as two:
        stores.execute(MAP, "drop schema shardmap cascade")
        async with session(app) as during:
            assert await during.fetchval("select 1") == 1
        await done(shards, "init")
        await done(shards, "grant", "reader", stores.roles.reader)
        for name in SHARD_NAMES:
            found = await done(shards, "attach", name, *shards.where(name))
            assert found["found"] == 1
            async with session(app) as during:  # of what the sidecar knows
                assert await during.fetchval("select 1") == 1
        await done(shards, "repair", "--all", "--from", "shard")
        assert (await done(shards, "verify"))["differences"] == []
        assert await one.fetchval("select 1") == 1
        assert await two.fetchval("select 1") == 1

        def is_followed() -> bool:
            status = app.status().shard_map
            return status is not None and status.feed == "listening"

        await eventually(is_followed, "the new catalogue is followed", FOLLOWED_SECONDS_MAX)
        await done(shards, "offline", "0", "10")
        await ended(one)
        assert await two.fetchval("select 1") == 1
    await done(shards, "online", "0", "10")
    await admitted(app)


async def test_s41_r5_a_shard_restored_to_yesterday_is_repaired(
    app: App, shards: Shards, operator: Operator, placed: Placed
) -> None:
    await operator.offline(placed)
    await operator.online(placed)
    await admitted(app)
    async with shards.stores.connect("one") as connection:
        await connection.execute("update shardmap_local.mapping set epoch = 1")
    await refused_with(app, "shard_behind")
    await repaired(shards, "one", "shard")
    await admitted(app)


async def test_the_catalogue_restored_to_yesterday_is_repaired(
    app: App, shards: Shards, operator: Operator, placed: Placed
) -> None:
    await operator.offline(placed)
    await operator.online(placed)
    await operator.catalogue(
        "update shardmap.mapping set epoch = 1 where mapping_id = $1", placed.mapping_id
    )

    await refused_with(app, "mapping_stale")
    await repaired(shards, "one", "shard")
    await admitted(app)


async def test_s31_a_shard_is_detached_and_attached(
    app: App, shards: Shards, placed: Placed
) -> None:
    async with session(app) as opened, session(app, "1000") as other:
        await done(shards, "detach", "one", "--force")
        await ended(opened)
        assert await other.fetchval("select 1") == 1
    await refused_with(app, "mapping_not_found")
    await done(shards, "attach", "one", *shards.where("one"))
    await repaired(shards, "one", "shard")
    await admitted(app)


async def test_s37_a_renamed_shard_is_relocated(app: App, shards: Shards, placed: Placed) -> None:
    stores = shards.stores
    renamed = f"{stores.database}_new"
    cluster = stores.clusters["one"]
    end = "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{0}'"
    rename = 'alter database "{0}" rename to "{1}"'
    await admitted(app)
    try:
        cluster.execute(end.format(stores.database), database="postgres")
        cluster.execute(rename.format(stores.database, renamed), database="postgres")
        await refused_with(app, "")
        found = await done(shards, "relocate", "one", *shards.where("one"), "--database", renamed)
        assert found["differences"] == []
        assert found["shard"]["database"] == renamed
        await admitted(app)
        async with session(app) as opened:
            assert await opened.fetchval("select current_database()") == renamed
    finally:
        cluster.execute(end.format(renamed), database="postgres")
        cluster.execute(rename.format(renamed, stores.database), database="postgres")
