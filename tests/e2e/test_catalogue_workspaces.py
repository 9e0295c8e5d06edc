"""Shards of a map in two workspaces: a token goes to hosts of its own workspace alone.

As `test_workspaces`: two emulators whose endpoints and hosts have the same names, so that nothing
but the workspace tells their tokens apart. Each gateway keeps which tokens it saw.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio

from proxy.emulator.lakebase import CLIENT_SECRET, Lakebase
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.server.serving import serving
from tests.e2e.test_catalogue_sessions import connect
from tests.e2e.test_workspaces import assert_own_tokens_only
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.operator import Operator
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import eventually
from tests.support.secret_canaries import watching

WORKERS: Final = 2
LANES: Final = 6
SESSIONS: Final = 60


@pytest_asyncio.fixture
async def other(stores: Stores) -> AsyncIterator[Lakebase]:
    """Return the second workspace, in front of the same servers."""
    async with Lakebase((MAP, *SHARD_NAMES), clusters=stores.clusters) as started:
        started.workspace.api.clients[stores.roles.session] = CLIENT_SECRET
        yield started


@pytest_asyncio.fixture
async def operator(stores: Stores) -> Operator:
    made = Operator(stores, MapSpec(Kind.RANGE, KeyType.INT4))
    await made.install()
    await made.add("0", "10", "one")
    await made.add("1000", None, "two")
    return made


def sections(stores: Stores, other: Lakebase, folder: Path, **more: Any) -> dict[str, Any]:
    """Return the settings of a sidecar with both workspaces, which has no target in the second."""
    authorities = folder / "authorities.pem"
    authorities.write_bytes(stores.lakebase.ca_file.read_bytes() + other.ca_file.read_bytes())
    return {
        "upstream": {"ssl_root_cert": str(authorities)},
        "workspaces.b": {
            "host": other.workspace_url,
            "client_id": stores.roles.session,
            "client_secret": CLIENT_SECRET,
            "auth_type": "oauth-m2m",
        },
        **more,
    }


async def remap(operator: Operator, name: str, where: Lakebase) -> None:
    """Move a shard to this workspace's gateway, as a restore to another workspace does."""
    here = where is operator.stores.lakebase
    location = f"{operator.stores.host(name)}:{where.port}/{operator.stores.database}"
    async with operator.stores.connect(name) as local:
        await local.execute("update shardmap_local.identity set location = $1", location)
    await operator.catalogue(
        "update shardmap.shard set port = $2, workspace = $3, version = version + 1"
        " where shard_id = $1",
        *(operator.shard_ids[name], where.port, "" if here else "b"),
    )


async def heard_of(proxy: ProxyProcess, key: str) -> None:
    """Return when the proxy has heard where the shard of a key is: else the shard refuses it."""
    async with asyncio.timeout(20):
        while True:
            with suppress(asyncpg.ObjectNotInPrerequisiteStateError):
                (await connect(proxy, key)).terminate()
                return
            await asyncio.sleep(0.02)


def sessions(stand: Lakebase, host: str) -> int:
    """Return how many sessions of a host a gateway has let in."""
    return sum(record.sni == host for record in stand.gateway.sessions)


async def test_s49_a_shard_that_moves_to_another_workspace_is_sent_no_old_token(
    stores: Stores, operator: Operator, other: Lakebase, tmp_path: Path
) -> None:
    settings = stores.settings(stores.roles.session, **sections(stores, other, tmp_path))
    host = stores.host("one")
    async with serving(settings) as app, watching(app):

        def changes() -> float:
            return app.metrics.value("cache_changes_total", map="tenants", change="shard")

        moves = ((stores.lakebase, 1), (other, 1), (stores.lakebase, 2), (other, 2))
        for number, (where, count) in enumerate(moves):
            if number:
                await remap(operator, "one", where)
            await eventually(lambda number=number: changes() >= number, "the feed")  # type: ignore[misc]
            connection = await connect(app)
            assert await connection.fetchval("select 1") == 1
            connection.terminate()
            assert sessions(where, host) == count
        assert {token.workspace for token in app.snapshot.tokens()} == {"workspace", "b"}
    assert_own_tokens_only(stores.lakebase, other)


async def test_s49_no_token_goes_astray_while_a_shard_moves_to_and_fro(
    stores: Stores, operator: Operator, other: Lakebase, tmp_path: Path
) -> None:
    more = {
        # A token for each session, and no refusal of a shard: as many as can be are on their way.
        "credentials": {"token_max_age_seconds": 0},
        "catalogue": {"validate": False, "allow_unvalidated": True},
    }
    settings = stores.settings(stores.roles.session, **sections(stores, other, tmp_path, **more))
    host = stores.host("one")
    async with serving(settings) as app:

        async def lane() -> None:
            for _ in range(SESSIONS // LANES):
                (await connect(app)).terminate()

        async with asyncio.TaskGroup() as tasks:
            lanes = [tasks.create_task(lane()) for _ in range(LANES)]
            moves = 0
            for where in itertools.cycle((other, stores.lakebase)):
                await remap(operator, "one", where)
                moves += 1
                before = sessions(where, host)
                await eventually(
                    lambda where=where, before=before: (  # type: ignore[misc]
                        sessions(where, host) > before or all(one.done() for one in lanes)
                    ),
                    "a session comes there",
                )
                if all(one.done() for one in lanes):
                    break
    assert moves >= 3
    assert sessions(stores.lakebase, host) + sessions(other, host) == SESSIONS
    assert_own_tokens_only(stores.lakebase, other)


@pytest.mark.slow
async def test_s61_workers_reach_shards_in_a_workspace_that_no_target_is_in(
    stores: Stores, operator: Operator, other: Lakebase, tmp_path: Path
) -> None:
    given = sections(stores, other, tmp_path, listen={"workers": WORKERS}, log={"format": "json"})
    file = stores.file(tmp_path, stores.roles.session, **given)
    async with started_process("run", "--config", str(file)) as proxy:
        await proxy.serving()
        await remap(operator, "two", other)
        await heard_of(proxy, "1000")
        live = [await connect(proxy, key) for key in (*["1000"] * 2 * WORKERS, "5")]
        assert len({row["proxy"] for row in await operator.registered("two")}) == WORKERS
        for one in live:
            assert await one.fetchval("select 1") == 1
            one.terminate()
        # A worker that comes later asks for what it has never had a setting of.
        await remap(operator, "one", other)
        await heard_of(proxy, "5")
        for _ in range(WORKERS):
            (await connect(proxy)).terminate()
    assert len(other.workspace.mints) == 1
    assert_own_tokens_only(stores.lakebase, other)
