"""How many are served at a time, and what the next one hears."""

import asyncio
import socket
from contextlib import AsyncExitStack, ExitStack, closing

import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import Terminate
from proxy.wire.startup import SSLRequest
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import eventually


async def test_w44_one_too_many_is_told_so_after_its_startup_message(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen={"max_connections": 2})
    async with plain_client(proxy) as one, plain_client(proxy) as two:
        await one.start_up()
        await two.start_up()
        async with plain_client(proxy) as three:
            await three.send(SSLRequest().encode())
            assert await three.receive() == b"N"
            await three.send(startup())
            error = await three.error()
            assert (error.sqlstate, error.message) == ("53300", "too many clients already")
            assert error.text(b"D") == "reason=too_many_connections"
            assert "max_connections" in error.text(b"H")
            assert await three.receive_rest() == b""
        assert len(lakebase.gateway.records) == 2


async def test_a_place_is_free_as_soon_as_its_client_has_closed(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(listen={"max_connections": 1})
    for _ in range(5):
        async with plain_client(proxy) as client:
            await client.start_up()
            await client.send(Terminate().encode())
            client.close()
            await eventually(lambda: proxy.metrics.value("connections") == 0, "it is free", 1)


async def test_a_place_is_free_as_soon_as_the_upstream_and_the_client_have_closed(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen={"max_connections": 1})
    for _ in range(3):
        async with plain_client(proxy) as client:
            await client.start_up()
            lakebase["one"].endpoint.end_sessions()
            assert (await client.error()).sqlstate == "57P01"
            assert await client.receive_rest() == b""
            client.close()
            await eventually(lambda: proxy.metrics.value("connections") == 0, "it is free", 1)


async def test_clients_that_have_not_started_take_no_place(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(listen={"max_connections": 1})
    async with AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(plain_client(proxy))
        await eventually(lambda: proxy.metrics.value("connections") == 20, "all are connected")
        client = await stack.enter_async_context(plain_client(proxy))
        await client.start_up()


async def test_a_burst_of_connections_shares_one_token(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()

    async def session() -> None:
        async with plain_client(proxy) as client:
            await client.start_up()

    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(session())
    assert len(lakebase.workspace.mints) == 1


SILENT = 1200
LOCKED_OUT_SECONDS = 10.0  # a second is usual; it was 17


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
async def test_silent_connections_make_room_for_clients(
    start_process: StartProcess, workers: int
) -> None:
    # 1,200 of them locked everybody out by RST until their startup had timed out.
    proxy = await start_process(listen={"port": 0, "workers": workers})
    address = (proxy.listen_host, proxy.listen_port)
    with ExitStack() as stack:
        for _ in range(SILENT * workers):  # each worker has its own bound
            stack.enter_context(closing(socket.create_connection(address)))
        async with asyncio.timeout(LOCKED_OUT_SECONDS):
            for _ in range(10):
                async with plain_client(proxy) as client:
                    await client.start_up()
