"""Sessions that are dialled ahead, after a client has come (P36 and P37)."""

import asyncio
from contextlib import AsyncExitStack

from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import ErrorResponse
from tests.e2e.conftest import StartProxy
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
from tests.support.running import LogLines, eventually


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
