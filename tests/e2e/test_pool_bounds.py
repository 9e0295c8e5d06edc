"""The bounds of a pool, and clients that wait for room (P38 to P42)."""

import asyncio
from contextlib import AsyncExitStack

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.client import startup
from tests.support.pooling import (
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
from tests.support.running import eventually


async def waits(proxy: App, clients: int) -> None:
    """Wait until so many clients wait for room."""
    await eventually(lambda: count(proxy, "waiting") == clients, f"{clients} wait")


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
