"""How sessions end: each side's last words arrive, nothing runs on, nothing is left (W34, W54)."""

import asyncio
import contextlib
import socket
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.server.app import App
from proxy.wire.messages import ReadyForQuery, Terminate
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, query, startup
from tests.support.running import (
    LogLines,
    all_over,
    asyncpg_arguments,
    eventually,
    libpq,
    nothing_left,
    query_runs,
)

ROWS = 20_000
ROW_TEXT_BYTES = 1000
POLITE_CLOSES = 20


async def test_fatal_57p01_of_a_terminated_backend_reaches_a_driver(
    proxy: App, lakebase: Lakebase
) -> None:
    connection = await psycopg.AsyncConnection.connect(**libpq(proxy), autocommit=True)
    sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
    await query_runs(lakebase)
    pid = lakebase.gateway.sessions[0].real_pid
    lakebase["one"].cluster.execute(f"SELECT pg_terminate_backend({pid})")
    with pytest.raises(psycopg.errors.AdminShutdown) as raised:
        await sleeping
    assert raised.value.diag.sqlstate == "57P01"
    assert raised.value.diag.severity == "FATAL"
    await connection.close()


async def test_w34_last_words_to_an_idle_client_come_before_the_close(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        lakebase["one"].endpoint.end_sessions()
        assert (await client.error()).sqlstate == "57P01"
        assert await client.receive_rest() == b""
    await eventually(lambda: log.events("session ended"), "its closing line")
    (line,) = log.events("session ended")
    assert line["reason"] == "upstream_closed"
    assert proxy.metrics.value("sessions_ended_total", reason="upstream_closed") == 1


@pytest.mark.parametrize("ending", [SessionEnd.END_OF_FILE, SessionEnd.RESET], ids=lambda e: e.name)
async def test_w55_an_upstream_lost_without_a_word_closes_the_client_without_one(
    proxy: App, lakebase: Lakebase, ending: SessionEnd, log: LogLines
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        lakebase["one"].endpoint.end_sessions(ending)
        assert await client.receive_rest() == b""
    await eventually(lambda: log.events("session ended"), "its closing line")
    assert log.events("session ended")[0]["reason"] in ("upstream_closed", "upstream_lost")


async def test_w34_a_slow_reader_gets_every_byte_though_the_upstream_has_ended(
    proxy: App, lakebase: Lakebase
) -> None:
    sql = f"SELECT repeat('x', {ROW_TEXT_BYTES}) FROM generate_series(1, {ROWS})"
    async with plain_client(proxy, receive_buffer_bytes=4096) as client:
        await client.start_up()
        # Terminate after the query: Postgres ends as soon as it has written the result.
        await client.send(query(sql) + Terminate().encode())
        received = bytearray()
        while portion := await client.receive():
            received += portion
            if len(received) < 50_000:
                await asyncio.sleep(0.001)
    assert received.count(b"x") >= ROWS * ROW_TEXT_BYTES
    assert received.endswith(b"C\0\0\0\x11SELECT 20000\0Z\0\0\0\x05I")


async def test_w34_a_result_that_waits_in_the_proxy_survives_the_upstreams_end(
    proxy: App, lakebase: Lakebase
) -> None:
    # Small enough for buffers to hold it: the upstream's session is over before the first read.
    sql = "SELECT repeat('x', 1000) FROM generate_series(1, 100)"
    async with plain_client(proxy, receive_buffer_bytes=4096) as client:
        await client.start_up()
        await client.send(query(sql) + Terminate().encode())
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "the upstream has ended")
        rest = await client.receive_rest()
    assert rest.endswith(b"C\0\0\0\x0fSELECT 100\0Z\0\0\0\x05I")


@pytest.mark.parametrize("missing", range(1, 7))
async def test_w34_a_query_cut_short_never_runs(
    proxy: App, lakebase: Lakebase, scratch_database: str, missing: int
) -> None:
    cluster = lakebase["one"].cluster
    cluster.execute("CREATE TABLE t (n int); GRANT ALL ON t TO PUBLIC", database=scratch_database)
    async with plain_client(proxy) as client:
        await client.send(startup(database=scratch_database))
        while not (await client.receive()).endswith(b"Z\0\0\0\x05I"):
            pass
        await client.send(query("INSERT INTO t VALUES (1)     ")[:-missing])
        client.close()
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "the session has ended")
    assert cluster.execute("SELECT count(*) FROM t", database=scratch_database) == "0"


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_client_that_leaves_ends_its_upstream_session_orderly(
    proxy: App, lakebase: Lakebase, way: str
) -> None:
    async with plain_client(proxy) as warm:
        await warm.start_up()
    await all_over(proxy, lakebase)
    async with nothing_left(), plain_client(proxy) as client:
        await client.start_up()
        getattr(client, way)()
        await all_over(proxy, lakebase)
    # OpenSSL calls an end without close_notify an error.
    assert lakebase.gateway.records[-1].ended_by is EndedBy.CLOSE_NOTIFY
    reason = {"reason": {"close": "client_closed", "reset": "client_lost"}[way]}
    assert proxy.metrics.value("sessions_ended_total", **reason) >= 1


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w54_a_client_that_vanishes_while_the_database_wakes_ends_the_dial(
    proxy: App, lakebase: Lakebase, way: str, log: LogLines
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds = 60
    async with plain_client(proxy) as client:
        await client.send(startup())
        await eventually(lambda: endpoint.state == "INIT", "the database wakes")
        (record,) = lakebase.gateway.records
        getattr(client, way)()
        await lakebase.gateway.until(lambda: record.closed)
    assert record.ended_by is EndedBy.CLOSE_NOTIFY
    assert not record.ready
    await eventually(lambda: proxy.metrics.value("connections") == 0, "its connection is gone")
    assert proxy.metrics.value("startup_failures_total", reason="client_gone_login") == 1
    assert log.above_info() == []


@pytest.mark.parametrize(
    "stage", [s for s in Stage if s not in (Stage.CANCEL, Stage.AUTHENTICATED)]
)
async def test_w41_a_client_that_vanishes_at_any_stage_of_the_dial_leaves_nothing(
    proxy: App, lakebase: Lakebase, stage: Stage
) -> None:
    async with plain_client(proxy) as warm:
        await warm.start_up()
    await all_over(proxy, lakebase)
    lakebase.gateway.inject(stage, Injection.HANG)
    before = lakebase.gateway.accepted
    async with nothing_left():
        async with plain_client(proxy) as client:
            await client.send(startup())
            await lakebase.gateway.until(lambda: lakebase.gateway.accepted > before)
            await asyncio.sleep(0)
            client.close()
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone", 2)
        lakebase.gateway.clear_faults()
        await eventually(lambda: lakebase.gateway.records[-1].closed, "closed upstream")
    assert lakebase.gateway.open_sessions == 0


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w41_a_client_that_sent_much_and_vanishes_leaves_nothing(
    proxy: App, lakebase: Lakebase, way: str
) -> None:
    # More than 64 KB are not read before the session is ready, so its end did not arrive: slot and
    # dial were kept until connect_timeout_seconds.
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with plain_client(proxy) as client:
        await client.send(startup() + query("SELECT '" + "x" * 200_000 + "'"))
        await lakebase.gateway.until(lambda: lakebase.gateway.accepted > 0)
        getattr(client, way)()
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone", 1)
    await eventually(lambda: lakebase.gateway.records[-1].closed, "closed upstream")


async def test_w54_a_client_that_vanishes_while_a_token_is_minted_leaves_the_mint_to_the_next(
    proxy: App, lakebase: Lakebase
) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, faults.HANG, times=1)
    async with plain_client(proxy) as client:
        await client.send(startup())
        async with asyncio.timeout(10):
            await lakebase.workspace.called(Call.CREDENTIAL)
        client.close()
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone", 1)
    assert proxy.metrics.value("startup_failures_total", reason="client_gone_mint") == 1
    lakebase.workspace.clear_faults()
    async with plain_client(proxy) as client:
        await client.start_up()
    assert len(lakebase.workspace.mints) == 1


@pytest.mark.parametrize(
    ("stage", "reason"),
    [(Stage.TLS, "client_gone_tls"), (Stage.PASSWORD, "client_gone_login")],
)
async def test_w54_a_client_that_leaves_is_counted_with_the_step_of_the_dial_it_waited_for(
    proxy: App, lakebase: Lakebase, stage: Stage, reason: str, log: LogLines
) -> None:
    # It was a bare client_gone: whether the workspace, the network or the database was slow could
    # not be seen.
    measured = partial(proxy.metrics.value, "upstream_connect_seconds_count")
    phase_before = {"client_gone_tls": "tcp", "client_gone_login": "tls"}[reason]
    lakebase.gateway.inject(stage, Injection.HANG)
    async with plain_client(proxy) as client:
        await client.send(startup())
        await eventually(lambda: measured(phase=phase_before) == 1, "the step has begun")
        client.close()
        await all_over(proxy, lakebase)
    assert_gone(proxy, log, reason)


async def test_w54_a_client_that_leaves_while_the_host_does_not_answer_waited_for_tcp(
    start_proxy: StartProxy, log: LogLines
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        host, port = full.getsockname()
        for _ in range(2):  # its queue is full, and it drops what else arrives
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        before = connecting_to(port)
        proxy = await start_proxy(upstream={"host": "localhost", "hostaddr": host, "port": port})
        async with plain_client(proxy) as client:
            await client.send(startup())
            await eventually(lambda: connecting_to(port) > before, "it connects")
            client.close()
            await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone")
    assert_gone(proxy, log, "client_gone_tcp")


def connecting_to(port: int) -> int:
    """Return how many connections to this port wait for an answer (SYN_SENT)."""
    return Path("/proc/net/tcp").read_text().count(f":{port:04X} 02 ")


async def test_w54_a_client_that_leaves_while_others_connect_waited_for_a_slot(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    proxy = await start_proxy(upstream={"connects_max": 1})
    failed = partial(proxy.metrics.value, "startup_failures_total")
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with plain_client(proxy) as first, plain_client(proxy) as second:
        await first.send(startup())
        await lakebase.gateway.until(lambda: lakebase.gateway.accepted > 0)
        await second.send(startup())
        await eventually(lambda: proxy.session_slots_used == 2, "both wait")
        second.close()
        await eventually(lambda: failed() == 1, "it is counted")
        assert_gone(proxy, log, "client_gone_slot")


def assert_gone(proxy: App, log: LogLines, reason: str) -> None:
    """Check that one client has left, for this reason, and that it has its line."""
    assert proxy.metrics.value("startup_failures_total", reason=reason) == 1
    assert proxy.metrics.value("startup_failures_total") == 1
    (line,) = log.events("client left before its session was ready")
    assert (line["level"], line["reason"]) == ("info", reason)


async def test_a_terminate_completes_the_session_whichever_side_closes_first(
    proxy: App, lakebase: Lakebase
) -> None:
    # A driver that waits for the server to close after its Terminate, as asyncpg does, was counted
    # as lost: the alert for lost sessions fired on healthy applications.
    for _ in range(POLITE_CLOSES):
        await (await asyncpg.connect(**asyncpg_arguments(proxy))).close()
        connection = await psycopg.AsyncConnection.connect(**libpq(proxy))
        await connection.close()
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(Terminate().encode())
        client.reset()
    await all_over(proxy, lakebase)
    ended = partial(proxy.metrics.value, "sessions_ended_total")
    assert ended(outcome="lost") == 0
    assert ended(reason="client_closed") == 2 * POLITE_CLOSES + 1


async def test_sessions_are_apart_a_lost_one_does_not_touch_the_others(
    proxy: App, lakebase: Lakebase
) -> None:
    connections: list[Any] = [await asyncpg.connect(**asyncpg_arguments(proxy)) for _ in range(5)]
    connections[2].terminate()
    answers = [await c.fetchval("SELECT 1") for n, c in enumerate(connections) if n != 2]
    assert answers == [1] * 4
    for connection in connections:
        await connection.close()


async def test_draining_to_zero_seconds_cuts_sessions_and_counts_them(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    proxy = await start_proxy()
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("BEGIN")
        assert b"BEGIN" in await client.receive()
        assert await proxy.drain(0) == 1
        with contextlib.suppress(ConnectionResetError):  # cut is cut
            assert await client.receive_rest() == b""
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")
    assert proxy.metrics.value("sessions_ended_total", reason="shutdown") == 1
    assert [line["reason"] for line in log.events("session ended")] == ["shutdown"]


async def test_a_client_cut_by_a_drain_before_it_was_ready_is_told_so(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with plain_client(proxy) as client:
        await client.send(startup())
        await lakebase.gateway.until(lambda: any(r.endpoint for r in lakebase.gateway.records))
        assert await proxy.drain(0) == 0  # who is told is not cut
        error = await client.error()
        assert (error.sqlstate, error.text(b"D")) == ("57P01", "reason=shutting_down")


async def test_readiness_fails_while_draining_and_new_clients_are_refused(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(admin={"enabled": True, "port": 0})
    assert proxy.admin is not None
    admin = proxy.admin

    async def status(path: str) -> str:
        reader, writer = await asyncio.open_connection(admin.host, admin.port)
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        line = await reader.readline()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        return line.split()[1].decode()

    assert await status("/readiness") == "200"
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("BEGIN")
        await client.messages_until(ReadyForQuery)
        draining = asyncio.create_task(proxy.drain(10))
        await asyncio.sleep(0)
        assert await status("/readiness") == "503"
        assert await status("/liveness") == "200"
        with pytest.raises(ConnectionRefusedError):
            async with plain_client(proxy):
                pass
        await client.query("SELECT 1")
        assert b"SELECT 1" in await client.receive()
        client.close()
        assert await draining == 0
