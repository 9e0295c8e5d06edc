"""The bounds of a pool, waiting for room, spares, and what a reload does (P36 to P48)."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import ErrorResponse, ReadyForQuery, Terminate
from proxy.wire.startup import V3_0, CancelRequest
from tests.e2e.conftest import StartProxy
from tests.support.client import startup
from tests.support.pool_clients import (
    PID,
    Visitor,
    both_relays,
    count,
    pooling,
    retired,
    settled,
    states,
    taken,
    visit,
    visitor,
)
from tests.support.running import LogLines, eventually, proxy_settings


async def waits(proxy: App, clients: int) -> None:
    """Wait until so many clients wait for room."""
    await eventually(lambda: count(proxy, "waiting") == clients, f"{clients} wait")


# -- spares --------------------------------------------------------------------------------------


async def test_p36_a_spare_is_dialled_behind_a_client_and_never_by_itself(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_spare_min=2, pool_idle_seconds=1))
    assert lakebase.gateway.logins.total() == 0
    async with visitor(proxy) as client:
        await client.enter()
        await settled(proxy, idle=2, in_use=1)
        assert lakebase.gateway.logins.total() == 3
        await eventually(lambda: count(proxy, "retired_total") == 2, "the spares have expired")
        await settled(proxy, idle=0, in_use=1)
        assert lakebase.gateway.logins.total() == 3  # nothing replaces them
        assert retired(proxy) == {"unused_spare": 2}
        await client.leave()


@both_relays
async def test_p36_the_next_client_gets_a_spare_and_its_welcome_is_that_of_a_login(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated, pool_spare_min=1))
    async with visitor(proxy) as one, visitor(proxy) as two:
        first = await one.enter()
        await settled(proxy, idle=1, in_use=1)
        assert await two.enter() != first
        assert taken(proxy) == {"dialled": 1, "reused": 1}
        await settled(proxy, idle=1, in_use=2)
        await one.leave()
        await two.leave()
    await settled(proxy, idle=3)


async def test_p36_a_lost_spare_is_not_replaced(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_spare_min=1))
    await visit(proxy)
    await settled(proxy, idle=2)
    logins = lakebase.gateway.logins.total()
    lakebase["one"].endpoint.end_sessions()
    await settled(proxy, idle=0)
    assert lakebase.gateway.logins.total() == logins


async def test_p37_a_failed_spare_is_no_clients_error_and_is_not_tried_at_once(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    proxy = await start_proxy(**pooling(pool_spare_min=1))
    await visit(proxy)
    await settled(proxy, idle=2)
    full = ErrorResponse.fatal("53300", "too many")
    lakebase["one"].endpoint.refuse(full, times=None)
    async with visitor(proxy) as one, visitor(proxy) as two:
        await one.enter()
        await two.enter()  # the second one of two
        await eventually(lambda: count(proxy, "spares_total", result="failed") == 1, "it failed")
        for _ in range(3):
            await one.leave() if one.open else None
            await settled(proxy, idle=1, in_use=1)
            await visit(proxy)
        assert count(proxy, "spares_total", result="failed") == 1
        await two.leave()
    assert log.above_info() == []


async def test_p37_a_spare_takes_no_slot_that_clients_wait_for(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_spare_min=1, connects_max=1))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(visitor(proxy)) for _ in range(5)]
        pids = await asyncio.gather(*(client.enter() for client in clients))
        assert len(set(pids)) == 5
        for client in clients:
            await client.leave()
    await eventually(lambda: states(proxy).keys() <= {"idle"}, "all are idle")


# -- room ----------------------------------------------------------------------------------------


@both_relays
async def test_p38_p39_a_client_over_the_bound_gets_the_next_session_after_its_reset(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated, pool_size_max=1))
    async with visitor(proxy) as one, visitor(proxy) as two:
        pid = await one.enter()
        entering = asyncio.create_task(two.enter())
        await waits(proxy, 1)
        await one.leave()
        assert await entering == pid
        await two.leave()
    assert lakebase.gateway.logins.total() == 1
    assert taken(proxy) == {"dialled": 1, "waited": 1}
    assert retired(proxy) == {}


async def test_p38_an_idle_session_of_another_key_makes_room(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=2))
    await visit(proxy, application_name="a")
    await visit(proxy, application_name="b")
    await settled(proxy, idle=2)
    most = 0

    def open_sessions() -> int:
        nonlocal most
        most = max(most, lakebase["one"].endpoint.slots)
        return most

    async with visitor(proxy) as client:
        entering = asyncio.create_task(client.enter(application_name="c"))
        await eventually(lambda: open_sessions() and entering.done(), "it is served")
        await entering
        await client.leave()
    assert most <= 2
    assert retired(proxy) == {"surplus": 1}
    await settled(proxy, idle=2)
    await visit(proxy, application_name="b")  # the other one is there still
    assert taken(proxy)["reused"] == 1


@both_relays
async def test_p39_a_returned_session_of_another_key_makes_room_for_the_first_waiter(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated, pool_size_max=1))
    async with visitor(proxy) as one, visitor(proxy) as two, visitor(proxy) as three:
        first = await one.enter()
        second = asyncio.create_task(two.enter(application_name="other"))
        await waits(proxy, 1)
        third = asyncio.create_task(three.enter())  # of the first one's key, but it came later
        await waits(proxy, 2)
        await one.leave()
        assert await second != first
        assert not third.done()
        await two.leave()
        assert await third != first
        await three.leave()
    assert lakebase.gateway.logins.total() == 3


async def test_p40_the_wait_for_room_ends_with_53300(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=1, pool_wait_seconds=0.2))
    async with visitor(proxy) as one, visitor(proxy) as two:
        await one.enter()
        await two.send(startup())
        error = await two.error()
        assert error.sqlstate == "53300"
        assert "reason=pool_full" in error.text(b"D")
        assert "pool_size_max" in error.text(b"H")
        assert count(proxy, "waiting") == 0
        await one.leave()
    await visit(proxy)


async def test_p40_without_a_wait_a_client_is_refused_at_once(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=1, pool_wait_seconds=0))
    async with visitor(proxy) as one, visitor(proxy) as two:
        await one.enter()
        await two.send(startup())
        assert (await two.error()).sqlstate == "53300"
        await one.leave()


async def test_p40_a_client_that_leaves_while_it_waits_leaves_the_queue(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=1))
    async with visitor(proxy) as one, visitor(proxy) as gone, visitor(proxy) as two:
        pid = await one.enter()
        await gone.send(startup())
        await waits(proxy, 1)
        entering = asyncio.create_task(two.enter())
        await waits(proxy, 2)
        gone.close()
        await waits(proxy, 1)
        await one.leave()
        assert await entering == pid
        await two.leave()


async def test_p40_a_drain_answers_clients_that_wait(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=1))
    async with visitor(proxy) as one, visitor(proxy) as two:
        await one.enter()
        await two.send(startup())
        await waits(proxy, 1)
        draining = asyncio.create_task(proxy.drain(5))
        assert (await two.error()).sqlstate == "57P01"
        assert (await one.error()).sqlstate == "57P01"
        await draining


async def test_p40_a_dial_that_fails_makes_room_for_the_next_client(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=1))
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG, times=1)
    async with visitor(proxy) as one, visitor(proxy) as two:
        await one.send(startup(database="missing"))
        await eventually(lambda: states(proxy) == {"dialling": 1}, "it is dialled")
        entering = asyncio.create_task(two.enter())
        await waits(proxy, 1)
        lakebase.gateway.clear_faults()
        assert (await one.error()).sqlstate == "3D000"
        await entering
        await two.leave()


async def test_p41_without_a_bound_no_client_waits(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling(pool_idle_max=1))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(visitor(proxy)) for _ in range(12)]
        await asyncio.gather(*(client.enter() for client in clients))
        await asyncio.gather(*(client.leave() for client in clients))
    await settled(proxy, idle=1)
    assert retired(proxy) == {"surplus": 11}
    assert taken(proxy) == {"dialled": 12}


@both_relays
async def test_p42_a_returned_session_serves_a_client_that_waits_for_a_slot(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated, connects_max=1))
    async with visitor(proxy) as one, visitor(proxy) as slow, visitor(proxy) as two:
        pid = await one.enter()
        lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
        dialling = asyncio.create_task(slow.enter(application_name="other"))
        await eventually(lambda: states(proxy).get("dialling") == 1, "the slot is taken")
        entering = asyncio.create_task(two.enter())
        await eventually(lambda: states(proxy).get("dialling") == 2, "the other one waits")
        await one.leave()
        assert await entering == pid
        lakebase.gateway.clear_faults()
        await dialling
        await two.leave()
        await slow.leave()
    await settled(proxy, idle=2)
    assert lakebase.gateway.logins.total() == 2


async def test_the_bound_holds_while_clients_come_and_go_as_they_like(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_size_max=3, pool_idle_max=2, pool_spare_min=1))
    most = 0

    async def client(number: int) -> None:
        nonlocal most
        for turn in range(4):
            name = f"key {(number + turn) % 3}"
            async with visitor(proxy) as one:
                await one.enter(application_name=name)
                assert await one.value("SHOW application_name") == name
                most = max(most, lakebase["one"].endpoint.slots)
                if turn % 2:
                    await one.leave()

    await asyncio.gather(*map(client, range(10)))
    assert most <= 3
    assert count(proxy, "waiting") == 0
    await eventually(lambda: states(proxy).keys() <= {"idle"}, "all are idle")
    assert states(proxy).get("idle", 0) <= 2


# -- its life ------------------------------------------------------------------------------------


async def test_p44_an_upstream_that_is_configured_as_before_keeps_its_pool(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    pid = await visit(proxy)
    await settled(proxy, idle=1)
    proxy.reload(proxy_settings(lakebase, log={"level": "debug"}, **pooling()))
    assert await visit(proxy) == pid


async def test_p44_one_that_changes_in_any_key_closes_its_sessions(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as busy:
        first = await busy.enter()
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        proxy.reload(proxy_settings(lakebase, **pooling(pool_idle_max=5)))
        await eventually(lambda: states(proxy) == {"in_use": 1}, "the idle one is closed")
        assert await visit(proxy) != first
        assert await busy.value(PID) == first
        await busy.leave()
        await settled(proxy, idle=1)
    assert retired(proxy) == {"reconfigured": 2}
    proxy.reload(proxy_settings(lakebase))
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "nothing is kept")
    assert await visit(proxy) != await visit(proxy)


async def test_p45_sessions_of_another_host_are_retired(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as busy:
        await busy.enter()
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        upstream = proxy.snapshot.upstreams["upstream"]
        before = upstream.address_lookup.known_target
        lakebase["one"].endpoint.hosts = lakebase["two"].endpoint.hosts
        upstream.address_lookup.invalidate_host()
        await upstream.address_lookup.target()
        assert upstream.address_lookup.known_target != before
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        assert retired(proxy) == {"reconfigured": 1}
        await busy.leave()
    await eventually(lambda: retired(proxy) == {"reconfigured": 2}, "both are")


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


@pytest.mark.parametrize("leaves", [True, False], ids=["Terminate", "end of stream"])
@both_relays
async def test_p17_a_session_whose_query_was_cancelled_is_retired(
    start_proxy: StartProxy, lakebase: Lakebase, *, leaves: bool, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    async with visitor(proxy) as client, visitor(proxy) as canceller:
        pid = await client.enter()
        await client.query("SELECT pg_sleep(60)")
        sql = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
        await eventually(lambda: lakebase["one"].cluster.execute(sql), "the query runs")
        await cancel(canceller, client)
        await client.error()
        await client.messages_until(ReadyForQuery)
        if leaves:
            await client.send(Terminate().encode())
        client.close()
    await eventually(lambda: retired(proxy) == {"cancelled": 1}, "it is retired")


async def cancel(canceller: Visitor, client: Visitor) -> None:
    """Send the CancelRequest of a client; return when it was delivered."""
    assert client.key is not None
    await canceller.send(CancelRequest(client.key.pid, client.key.key).encode())
    assert await canceller.receive_rest() == b""
