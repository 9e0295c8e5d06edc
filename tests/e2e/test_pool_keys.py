"""Which clients share a pool's sessions, and what they get if none is idle or they ask for less."""

import time
from collections.abc import AsyncIterator, Mapping
from functools import partial

import psycopg
import pytest
import pytest_asyncio

from proxy.emulator.cluster import Cluster
from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import V3_0
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, startup
from tests.support.pooling import Pooled, pooled, pooling, settled, value, visit, visitor
from tests.support.running import eventually, libpq
from tests.support.sharding import sharded


@pytest_asyncio.fixture
async def served(lakebase: Lakebase) -> AsyncIterator[Pooled]:
    async with pooled(lakebase, pool_idle_max=3) as served:
        yield served


async def test_p2_a_client_may_ask_for_less(start_proxy: StartProxy, lakebase: Lakebase) -> None:
    proxy = await start_proxy(**pooling())
    pid = await visit(proxy)
    await settled(proxy, idle=1)
    for wish in ({"lakebase.pool": "off"}, {"options": "-c LAKEBASE.POOL=off"}):
        assert await visit(proxy, **wish) != pid
    await settled(proxy, idle=1)
    for wish in ({"lakebase.pool": "session"}, {"options": "-c lakebase.pool=session"}):
        assert await visit(proxy, **wish) == pid
        await settled(proxy, idle=1)
    async with visitor(proxy) as client:
        await client.send(startup(V3_0, **{"lakebase.pool": "transaction"}))
        error = await client.error()
    assert error.sqlstate == "22023"
    assert "reason=pool_mode_invalid" in error.text(b"D")


async def test_p1_without_a_pool_it_is_a_custom_setting(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()
    wish = {"lakebase.pool": "anything"}
    assert await visit(proxy, "SHOW lakebase.pool", **wish) == "anything"
    assert await visit(proxy) != await visit(proxy)
    assert "pool_sessions{" not in proxy.exposition().decode()


@pytest.mark.parametrize("forwards", [False, True], ids=["stripped", "forwarded"])
async def test_p8_shard_keys_of_a_target_share_its_sessions_unless_they_are_forwarded(
    start_proxy: StartProxy, lakebase: Lakebase, *, forwards: bool
) -> None:
    proxy = await start_proxy(**sharded(lakebase, forward_key=forwards), **pooling())
    pids = set()
    for number, key in enumerate(("1", "2", "3"), 1):
        pids.add(await visit(proxy, options=f"-c lakebase.shard_key={key}"))
        await settled(proxy, idle=number if forwards else 1)
    assert len(pids) == (3 if forwards else 1)


async def test_p9_settings_that_vary_are_bounded_by_the_whole_target(served: Pooled) -> None:
    for number in range(8):
        async with served.client(application_name=f"worker {number}"):
            pass
        await served.at_rest()
        assert served.row().present.idle == min(number + 1, 3)
    assert served.retired() == {"surplus": 5}
    assert served.logins == 8


async def test_p35_without_an_idle_session_a_refusal_is_that_of_a_login(
    start_proxy: StartProxy, served: Pooled, lakebase: Lakebase
) -> None:
    plain = await start_proxy()
    seen = []
    for proxy in (plain, served.app):
        lakebase["one"].endpoint.refuse(ErrorResponse.fatal("28000", "not you"), times=None)
        with pytest.raises(psycopg.OperationalError) as raised:
            await psycopg.AsyncConnection.connect(**libpq(proxy))
        seen.append(str(raised.value).partition("FATAL")[2])
        lakebase["one"].endpoint.refusals.clear()
    assert seen[0] == seen[1]
    assert "not you" in seen[0]
    async with served.client() as client:  # the dial itself is as without a pool
        assert await value(client, "SELECT 1") == 1


async def test_p48_a_spare_logs_in_with_a_clients_token_and_expiry_ends_no_session(
    clusters: Mapping[str, Cluster],
) -> None:
    later_seconds = [0.0]
    clock = partial(_clock, later_seconds)
    async with (
        Lakebase(clusters=clusters, clock=clock) as lakebase,
        pooled(lakebase, pool_spare_min=1) as served,
    ):
        async with served.client() as client:
            await eventually(lambda: served.row().present.idle == 1, "a spare is there")
            tokens = {record.token for record in lakebase.gateway.sessions}
            assert tokens == {mint.fingerprint for mint in lakebase.workspace.mints}
            later_seconds[0] = 7200  # tokens live for an hour
            assert await value(client, "SELECT 1") == 1
        await served.at_rest()
        async with served.client() as client:
            assert await value(client, "SELECT 1") == 1
        assert served.row().takes["reused"] == 1


def _clock(later_seconds: list[float]) -> float:
    return time.time() + later_seconds[0]


@pytest.mark.parametrize("honest", [True, False])
async def test_p72_the_pid_of_the_key_is_what_the_front_end_said(
    served: Pooled, *, honest: bool
) -> None:
    served.endpoint.passes_real_key = honest
    for _ in range(2):
        async with plain_client(served.app) as client:
            key = await client.start_up()
            (record,) = served.lakebase.gateway.sessions
            assert key is not None
            assert record.issued_key is not None
            assert (key.pid == record.real_pid) == honest
            assert key.pid == record.issued_key.pid or record.issued_key.pid <= 0
        await served.at_rest()
