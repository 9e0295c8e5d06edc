"""Clients that leave, or half leave, with bytes of theirs on the way (W34, W41).

Not for: clients that leave at each stage of the dial without having sent more (`test_ends`).
"""

import asyncio
import socket
from collections.abc import Callable

import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.manual_upstream import WELCOME, manual_upstream
from tests.support.running import LogLines, eventually, nothing_left, query_runs


def half_close(client: Client) -> None:
    """End what the client sends, and leave it reading."""
    client.sock.shutdown(socket.SHUT_WR)


Leave = Callable[[Client], None]
WAYS: list[Leave] = [Client.close, Client.reset, half_close]


@pytest.mark.parametrize("leave", WAYS, ids=lambda way: way.__name__)
async def test_w41_a_client_that_pipelined_and_leaves_while_its_token_is_minted_is_not_dialled_for(
    proxy: App, lakebase: Lakebase, log: LogLines, leave: Leave
) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, faults.HANG, times=1)
    async with plain_client(proxy) as client:
        await client.send(startup() + query("SELECT 'pipelined'"))
        async with asyncio.timeout(10):
            await lakebase.workspace.called(Call.CREDENTIAL)
        leave(client)
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone", 1)
        if leave is half_close:
            assert await client.receive_rest() == b""
    lakebase.workspace.clear_faults()
    assert lakebase.gateway.accepted == 0
    async with plain_client(proxy) as client:
        await client.start_up()
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "the second is gone")
    assert len(lakebase.gateway.sessions) == 1  # the dial was not taken up again with the token
    assert proxy.metrics.value("startup_failures_total", reason="client_gone_mint") == 1
    assert log.above_info() == []


async def test_w34_half_close_after_a_query_is_the_end_of_the_session(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # PostgreSQL would answer; here the end of one direction is the end of both.
    async with manual_upstream(lakebase) as upstream:
        proxy = await start_proxy(upstream={"port": upstream.port, "cancel_on_disconnect": False})
        async with plain_client(proxy) as warm:
            await warm.send(startup())
            assert await warm.receive() == WELCOME
            first = await upstream.session()
        await upstream.until(lambda: first.ended)
        async with nothing_left(), plain_client(proxy) as client:
            await client.send(startup())
            assert await client.receive() == WELCOME
            session = await upstream.session(1)
            await client.send(query("SELECT 1"))
            half_close(client)
            assert await client.receive_rest() == b""
            await upstream.until(lambda: session.ended)
        assert session.received == query("SELECT 1")
        assert session.ended_by is EndedBy.CLOSE_NOTIFY
        assert upstream.cancels == []


async def test_w34_half_close_while_a_query_runs_cancels_it(proxy: App, lakebase: Lakebase) -> None:
    gateway, cluster = lakebase.gateway, lakebase["one"].cluster
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("SELECT pg_sleep(60)")
        runs = await query_runs(lakebase)
        half_close(client)
        await client.receive_rest()  # the end comes, whatever was said before it
        await eventually(lambda: not cluster.execute(runs), "the query is gone")
        await eventually(lambda: all(record.closed for record in gateway.records), "all closed")
    await eventually(lambda: proxy.metrics.value("connections") == 0, "the connection is over")
