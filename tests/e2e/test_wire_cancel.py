"""Forwarding a cancel: what goes upstream, when the client is closed, and what bounds it (W27, W39
to W43).

The forms of the request are in `test_cancel_requests`, inside TLS in `test_wire_listener_tls`.
"""

import asyncio
import time
from contextlib import AsyncExitStack

import psycopg
import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.session.cancel import FORWARDS_MAX
from proxy.upstream.connector import CANCEL_SECONDS_MAX
from proxy.wire.messages import BackendKeyData, Terminate
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_2, CancelRequest
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client
from tests.support.manual_upstream import KEY, manual_upstream
from tests.support.proxy_process import ProxyProcess, descendants
from tests.support.running import LogLines, eventually, libpq

SLEEP = "SELECT pg_sleep(60)"


def request(key: BackendKeyData) -> bytes:
    return CancelRequest(key.pid, key.key).encode()


async def started(client: Client) -> BackendKeyData:
    key = await client.start_up()
    assert key is not None
    return key


async def test_w27_w40_two_sessions_with_one_key_are_told_apart_and_both_are_cancelled(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # As two shards could give it out. The second gets a key of the proxy's own; upstream each
    # cancel carries the 16 bytes that the upstream gave.
    async with manual_upstream(lakebase) as upstream:
        proxy = await start_proxy(upstream={"port": upstream.port})
        async with (
            plain_client(proxy) as one,
            plain_client(proxy) as two,
            plain_client(proxy) as new,
        ):
            first, second = await started(one), await started(two)
            third = await new.start_up(V3_2)
            assert third is not None
            assert first == KEY
            assert len({first.pid, second.pid, third.pid}) == 3
            assert (len(second.key), len(third.key)) == (4, 32)
            assert min(second.pid, third.pid) > 0
            for number, key in enumerate((first, second, third)):
                async with plain_client(proxy) as canceller:
                    await canceller.send(request(key))
                    assert await canceller.receive_rest() == b""
                assert upstream.cancels[number:] == [request(KEY)]
                assert len(request(KEY)) == 16
        # A key is free again with its session.
        await eventually(lambda: len(proxy.cancel_keys) == 0, "all keys are forgotten")
        async with plain_client(proxy) as again:
            assert await started(again) == KEY


@pytest.mark.parametrize("pid", [0, -1, -(2**31)])
async def test_w27_a_pid_that_is_not_positive_is_never_shown(
    start_proxy: StartProxy, lakebase: Lakebase, pid: int
) -> None:
    key = BackendKeyData(pid, Secret(b"\xff\0\xff\0"))
    welcome = bytes.fromhex("52 00000008 00000000") + key.encode() + b"Z\0\0\0\5I"
    async with manual_upstream(lakebase, welcome=welcome) as upstream:
        proxy = await start_proxy(upstream={"port": upstream.port})
        async with plain_client(proxy) as client, plain_client(proxy) as canceller:
            own = await started(client)
            assert own.pid > 0
            await canceller.send(request(own))
            assert await canceller.receive_rest() == b""
        assert upstream.cancels == [request(key)]


async def test_w39_the_socket_closes_only_when_the_upstream_has_closed_its_own(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # libpq takes the end for "delivered" and sends its next query: too early an end hits that.
    proxy = await start_proxy()
    async with plain_client(proxy) as client, plain_client(proxy) as canceller:
        key = await started(client)
        lakebase.gateway.inject(Stage.CANCEL, Injection.HANG, times=1)
        await canceller.send(request(key))
        await lakebase.gateway.until(lambda: bool(lakebase.gateway.cancels))
        with pytest.raises(TimeoutError):
            await canceller.receive(0.1)
        lakebase.gateway.clear_faults()
        assert await canceller.receive_rest() == b""


@pytest.mark.parametrize("key", [KEY, BackendKeyData(0, Secret(bytes(4)))])
async def test_w39_an_unknown_key_gets_no_byte_and_no_dial(
    proxy: App, lakebase: Lakebase, key: BackendKeyData
) -> None:
    async with plain_client(proxy) as canceller:
        await canceller.send(request(key))
        assert await canceller.receive_rest() == b""
    assert lakebase.gateway.accepted == 0


async def test_w39_libpqs_own_cancel_never_hits_the_next_query(proxy: App) -> None:
    connect = psycopg.AsyncConnection.connect
    async with await connect(**libpq(proxy), autocommit=True) as connection:
        for _ in range(15):
            running = asyncio.create_task(connection.execute(SLEEP))
            while not running.done():  # a cancel before the query began is lost, rightly
                await connection.cancel_safe(timeout=5)
                await asyncio.wait((running,), timeout=0.05)
            with pytest.raises(psycopg.errors.QueryCanceled):
                await running
            row = await (await connection.execute("SELECT 'next'")).fetchone()
            assert row == ("next",)


async def test_w40_a_session_that_ends_meanwhile_drops_its_cancel(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with plain_client(proxy) as canceller:
        async with plain_client(proxy) as client:
            key = await started(client)
            issued = proxy.cancel_keys.find(CancelRequest(key.pid, key.key))
            accepted = lakebase.gateway.accepted
            lakebase.gateway.inject(Stage.SSL_REPLY, Injection.HANG, times=1)
            await canceller.send(request(key))
            await lakebase.gateway.until(lambda: lakebase.gateway.accepted > accepted)
            await client.send(Terminate().encode())
        await eventually(lambda: len(proxy.cancel_keys) == 0, "the session is over")
        lakebase.gateway.clear_faults()
        assert await canceller.receive_rest() == b""
    assert lakebase.gateway.cancels == []
    assert issued is not None
    assert not issued.forwarded
    # It once was counted as forwarded.
    assert proxy.metrics.value("cancel_requests_total", result="forwarded") == 0
    assert proxy.metrics.value("cancel_requests_total", result="session_ended") == 1
    assert log.above_info() == []


@pytest.mark.slow
async def test_w40_an_upstream_that_does_not_answer_is_given_up_after_10_seconds(
    proxy: App, lakebase: Lakebase
) -> None:
    assert CANCEL_SECONDS_MAX == 10
    async with plain_client(proxy) as client, plain_client(proxy) as canceller:
        key = await started(client)
        lakebase.gateway.inject(Stage.CANCEL, Injection.HANG)
        began = time.monotonic()
        await canceller.send(request(key))
        assert await canceller.receive(15) == b""
        assert 9.5 < time.monotonic() - began < 13
    assert proxy.metrics.value("cancel_requests_total", result="failed") == 1


async def test_w42_cancels_have_a_bound_of_their_own_and_over_it_they_wait(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    # One more than the bound was dropped at once, and the query that it was for ran on.
    proxy = await start_proxy(listen={"max_connections": 1})
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(plain_client(proxy))
        key = await started(client)
        lakebase.gateway.inject(Stage.CANCEL, Injection.HANG)
        waiting = []
        for _ in range(FORWARDS_MAX + 1):
            canceller = await stack.enter_async_context(plain_client(proxy))
            await canceller.send(request(key))
            waiting.append(canceller)
        await lakebase.gateway.until(lambda: len(lakebase.gateway.cancels) == FORWARDS_MAX)
        with pytest.raises(TimeoutError):
            await waiting[-1].receive(0.1)
        lakebase.gateway.clear_faults()
        for canceller in waiting:
            assert await canceller.receive_rest() == b""
    assert len(lakebase.gateway.cancels) == FORWARDS_MAX + 1
    assert proxy.metrics.value("cancel_requests_total", result="forwarded") == FORWARDS_MAX + 1
    assert log.above_info() == []


async def test_w42_a_cancel_that_waits_too_long_is_given_up_logged_and_counted(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(plain_client(proxy))
        key = await started(client)
        lakebase.gateway.inject(Stage.CANCEL, Injection.HANG)
        for _ in range(FORWARDS_MAX):
            canceller = await stack.enter_async_context(plain_client(proxy))
            await canceller.send(request(key))
        await lakebase.gateway.until(lambda: len(lakebase.gateway.cancels) == FORWARDS_MAX)
        issued = proxy.cancel_keys.find(CancelRequest(key.pid, key.key))
        assert issued is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await proxy.cancels.cancel_disconnected(issued)
        lakebase.gateway.clear_faults()
    assert proxy.metrics.value("cancel_requests_total", result="too_many") == 1
    (line,) = log.events("cancel request not delivered")
    assert line["error"] == "all slots for cancel requests were in use"


@pytest.mark.slow
async def test_w43_one_process_serves_so_every_cancel_finds_its_session(
    proxy_process: ProxyProcess, lakebase: Lakebase
) -> None:
    # There is no other process in which a cancel could land; with several: `test_workers.py`.
    assert descendants(proxy_process.pid) == set()
    async with AsyncExitStack() as stack:
        keys = [
            await started(await stack.enter_async_context(plain_client(proxy_process)))
            for _ in range(10)
        ]
        for key in keys * 3:  # each over a connection of its own, which any worker might accept
            async with plain_client(proxy_process) as canceller:
                await canceller.send(request(key))
                assert await canceller.receive_rest() == b""
    assert [record.cancel_known for record in lakebase.gateway.cancels] == [True] * 30


@pytest.mark.parametrize("stage", [Stage.SSL_REPLY, Stage.TLS, Stage.CANCEL])
@pytest.mark.parametrize("inject", [Injection.CLOSE, Injection.RESET])
async def test_w39_a_cancel_connection_that_breaks_closes_the_client_without_a_byte(
    proxy: App, lakebase: Lakebase, stage: Stage, inject: Injection
) -> None:
    async with plain_client(proxy) as client, plain_client(proxy) as canceller:
        key = await started(client)
        lakebase.gateway.inject(stage, inject, times=1)
        await canceller.send(request(key))
        assert await canceller.receive_rest() == b""
        await client.query("SELECT 'unharmed'")
        assert b"unharmed" in await client.receive()
