"""How sessions end, byte for byte (W34, W35, W55): nothing is invented, and nothing runs on.

The upstream is written by the test where the bytes count, and a real one where its work counts.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.server.app import App
from proxy.session.direction import CLIENT_POLL_SECONDS
from proxy.wire.messages import ErrorResponse, Frame, ReadyForQuery, Terminate
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.manual_upstream import (
    WELCOME,
    ManualSession,
    ManualUpstream,
    manual_upstream,
)
from tests.support.running import LogLines, all_over, eventually, query_runs

TERMINATE = bytes.fromhex("58 00000004")
SLEEP = "SELECT pg_sleep(60)"
LAST_WORDS = ErrorResponse.fatal(
    "57P01", "terminating connection due to administrator command"
).encode()


@pytest_asyncio.fixture
async def upstream(lakebase: Lakebase) -> AsyncIterator[ManualUpstream]:
    async with manual_upstream(lakebase) as written:
        yield written


async def session_of(client: Client, upstream: ManualUpstream) -> ManualSession:
    await client.send(startup())
    assert await client.receive() == WELCOME
    return await upstream.session()


@pytest_asyncio.fixture
async def short(start_proxy: StartProxy, upstream: ManualUpstream) -> App:
    """A proxy in front of the manual upstream, which cancels nothing."""
    more = {"port": upstream.port, "cancel_on_disconnect": False}
    return await start_proxy(upstream=more)


# -- W34 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", range(1, 7))
@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w34_a_query_cut_short_goes_no_further_than_it_came(
    short: App, upstream: ManualUpstream, missing: int, way: str
) -> None:
    # A Terminate put after it would make two bytes short a whole, other statement, ending in X.
    cut = query("DELETE FROM t WHERE a = 1")[:-missing]
    async with plain_client(short) as client:
        session = await session_of(client, upstream)
        await client.send(cut)
        await upstream.until(lambda: session.received == cut)
        getattr(client, way)()
        await upstream.until(lambda: session.ended)
    assert session.received == cut
    assert session.ended_by is EndedBy.CLOSE_NOTIFY


@pytest.mark.parametrize("said", [b"", query("SELECT 1"), query("SELECT 1") + TERMINATE])
async def test_w34_at_a_message_boundary_no_terminate_is_invented_either(
    short: App, upstream: ManualUpstream, said: bytes
) -> None:
    async with plain_client(short) as client:
        session = await session_of(client, upstream)
        await client.send(said)
        client.close()
        await upstream.until(lambda: session.received == said)
        if said.endswith(TERMINATE):
            session.peer.end_orderly()  # as PostgreSQL does when it has run the statement
        await upstream.until(lambda: session.ended)
    assert session.received == said
    assert session.ended_by is EndedBy.CLOSE_NOTIFY


async def test_w34_all_that_a_client_sent_before_its_end_arrives(
    short: App, upstream: ManualUpstream
) -> None:
    sent = query("x" * 3_000_000) + TERMINATE
    async with plain_client(short) as client:
        session = await session_of(client, upstream)
        await client.send(sent)
        client.close()
        await upstream.until(lambda: session.received == sent)
        session.peer.end_orderly()
        await upstream.until(lambda: session.ended)


@pytest.mark.parametrize("way", ["close_notify", "fin"])
async def test_w34_all_that_the_upstream_said_before_its_end_reaches_a_slow_client(
    short: App, upstream: ManualUpstream, way: str
) -> None:
    said = Frame(b"D", b"\0\1" + b"x" * 2_000_000).encode() + LAST_WORDS
    async with plain_client(short, receive_buffer_bytes=4096) as client:
        session = await session_of(client, upstream)
        ending = asyncio.create_task(last_words(session, said, way))
        received = bytearray()
        while portion := await client.receive():
            received += portion
            if len(received) < 20_000:
                await asyncio.sleep(0.001)
        await ending
    assert received == said


async def last_words(session: ManualSession, said: bytes, way: str) -> None:
    await session.peer.send(said)
    if way == "close_notify":
        session.peer.send_close_notify()
    session.peer.end()


# -- W35 -------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def proxy(start_proxy: StartProxy) -> App:
    """A proxy that sends a CancelRequest; `test_vanished_clients` has the default."""
    return await start_proxy(upstream={"cancel_method": "cancel_request"})


EXTENDED = (
    Frame(b"P", b"\0" + SLEEP.encode() + b"\0\0\0").encode()
    + Frame(b"B", bytes(8)).encode()
    + Frame(b"E", bytes(5)).encode()
)
SYNC = Frame(b"S", b"").encode()
# What is sent, and where its backend is then.
BUSY = {
    "a query": (query(SLEEP), "PgSleep"),
    "a query in a transaction": (query("BEGIN") + query(SLEEP), "PgSleep"),
    "the second of a pipeline": (query("SELECT 1") + query(SLEEP), "PgSleep"),
    "an extended query": (EXTENDED + SYNC, "PgSleep"),
    "one that no Sync has followed": (EXTENDED + Frame(b"H", b"").encode(), "PgSleep"),
    "a result that is not read": (
        query("SELECT repeat('x', 1000), generate_series(1, 100000000)"),
        "ClientWrite",
    ),
    "COPY in": (query("CREATE TEMP TABLE t (s text); COPY t FROM STDIN"), "ClientRead"),
}


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY.keys())
async def test_w35_the_query_of_a_client_that_vanishes_is_cancelled_and_gone(
    proxy: App, lakebase: Lakebase, log: LogLines, way: str, busy: tuple[bytes, str]
) -> None:
    sent, event = busy
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(sent)
        found = await query_runs(lakebase, event)
        getattr(client, way)()
        gateway, cluster = lakebase.gateway, lakebase["one"].cluster
        await gateway.until(lambda: any(r.cancel_known for r in gateway.cancels))
        await eventually(lambda: not cluster.execute(found), "the query is gone", 3)
        await all_over(proxy, lakebase)
    # A cancel that was answered is followed by another, which finds nothing to do.
    cancels = len(gateway.cancels)
    assert 1 <= cancels <= 4
    assert gateway.sessions[-1].ended_by is EndedBy.CLOSE_NOTIFY
    assert proxy.metrics.value("cancel_requests_total", result="forwarded") == cancels
    assert log.above_info() == []


async def test_w35_the_cancel_comes_before_the_close(proxy: App, lakebase: Lakebase) -> None:
    gateway = lakebase.gateway
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query(SLEEP)
        found = await query_runs(lakebase)
        gateway.inject(Stage.CANCEL, Injection.HANG, times=1)
        client.close()
        await gateway.until(lambda: bool(gateway.cancels))
        session = gateway.sessions[-1]
        assert session.ended_by is None  # it is still there, because its cancel is on the way
        assert not session.closed
        assert lakebase["one"].cluster.execute(found)
        gateway.clear_faults()
        await gateway.until(lambda: session.closed)
    await all_over(proxy, lakebase)
    assert gateway.sessions[-1].ended_by is EndedBy.CLOSE_NOTIFY
    assert gateway.cancels[0].cancel_known


IDLE = {
    "idle": b"",
    "idle after a query": query("SELECT 1"),
    "idle in a transaction": query("BEGIN"),
    "in a failed transaction": query("BEGIN") + query("nonsense"),
}


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("sent", IDLE.values(), ids=IDLE.keys())
async def test_w35_where_nothing_runs_one_cancel_does_no_harm(
    proxy: App, lakebase: Lakebase, log: LogLines, way: str, sent: bytes
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(sent)
        for _ in range(sent.count(b"Q\0\0\0")):
            while not isinstance(await client.message(), ReadyForQuery):
                pass
        getattr(client, way)()
        await all_over(proxy, lakebase)
    assert len(lakebase.gateway.cancels) == 1
    assert log.above_info() == []


async def test_w35_after_terminate_nothing_is_cancelled(proxy: App, lakebase: Lakebase) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(TERMINATE)
        client.close()
        await all_over(proxy, lakebase)
    assert lakebase.gateway.cancels == []


async def test_w35_every_statement_of_a_pipeline_is_cancelled(
    proxy: App, lakebase: Lakebase
) -> None:
    # One cancel ends one statement; the next one had come with it and began.
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(query(SLEEP) * 3)
        pid = lakebase.gateway.sessions[-1].real_pid
        await query_runs(lakebase)
        client.close()
        alive = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}"
        cluster = lakebase["one"].cluster
        await eventually(lambda: not cluster.execute(alive), "the backend has ended")
        await all_over(proxy, lakebase)


async def test_w47_a_session_at_work_is_cut_without_a_message_when_a_drain_ends(
    proxy: App, lakebase: Lakebase
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query(SLEEP)
        await query_runs(lakebase)
        assert await proxy.drain(0) == 1
        assert await client.receive() == b""


async def test_w35_who_says_terminate_wants_its_query_to_be_done(
    proxy: App, lakebase: Lakebase, scratch_database: str
) -> None:
    cluster = lakebase["one"].cluster
    cluster.execute("CREATE TABLE t (n int); GRANT ALL ON t TO PUBLIC", database=scratch_database)
    async with plain_client(proxy) as client:
        await client.send(startup(database=scratch_database))
        while not (await client.receive()).endswith(b"Z\0\0\0\x05I"):
            pass
        sql = "INSERT INTO t SELECT 1 FROM pg_sleep(2)"
        await client.send(query(sql) + Terminate().encode())
        await query_runs(lakebase)
        client.close()
    await eventually(
        lambda: cluster.execute("SELECT count(*) FROM t", database=scratch_database) == "1",
        "the row is there",
    )
    await all_over(proxy, lakebase)
    assert lakebase.gateway.cancels == []


async def test_w35_with_the_setting_off_the_query_runs_on(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(upstream={"cancel_on_disconnect": False})
    cluster = lakebase["one"].cluster
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query(SLEEP)
        found = await query_runs(lakebase)
        client.close()
        await all_over(proxy, lakebase)
    assert lakebase.gateway.cancels == []
    assert cluster.execute(found)  # as PostgreSQL does it: it notices when it writes
    pid = lakebase.gateway.sessions[-1].real_pid
    cluster.execute(f"SELECT pg_terminate_backend({pid})")


async def test_w35_a_cancel_that_cannot_be_delivered_does_not_keep_the_session(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query(SLEEP)
        await query_runs(lakebase)
        await lakebase.gateway.refuse_connections()
        client.close()
        await all_over(proxy, lakebase)
    pid = lakebase.gateway.sessions[-1].real_pid
    lakebase["one"].cluster.execute(f"SELECT pg_terminate_backend({pid})")
    assert len(log.events("cancel request not delivered")) == 1
    assert proxy.metrics.value("sessions_ended_total", reason="client_closed") == 1


async def test_w35_an_upstream_that_ends_first_is_not_cancelled(
    proxy: App, lakebase: Lakebase
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query(SLEEP)
        await query_runs(lakebase)
        lakebase["one"].endpoint.end_sessions()
        assert (await client.error()).sqlstate == "57P01"
        assert await client.receive_rest() == b""
    await all_over(proxy, lakebase)
    assert lakebase.gateway.cancels == []


# -- W55 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fin", "close_notify", "reset"])
@pytest.mark.parametrize("said", [b"", Frame(b"D", b"\0\1" + bytes(50)).encode()[:-30]])
async def test_w55_an_upstream_lost_in_mid_stream_closes_the_client_and_nothing_is_invented(
    short: App, upstream: ManualUpstream, log: LogLines, way: str, said: bytes
) -> None:
    async with plain_client(short) as client:
        session = await session_of(client, upstream)
        await client.send(query("SELECT 1"))
        await upstream.until(lambda: session.received == query("SELECT 1"))
        received = b""
        await session.peer.send(said)
        while len(received) < len(said):
            received += await client.receive()
        if way == "reset":
            session.peer.reset()
        else:
            await last_words(session, b"", way)
        assert received + await client.receive_rest() == said
    await eventually(lambda: log.events("session ended"), "its closing line")
    expected = "upstream_lost" if way == "reset" else "upstream_closed"
    assert [line["reason"] for line in log.events("session ended")] == [expected]
    assert len(upstream.sessions) == 1  # nor is the statement sent to another session


@pytest.mark.slow
async def test_w35_a_client_that_leaves_while_its_upload_is_stuck_is_noticed(
    proxy: App, lakebase: Lakebase
) -> None:
    # The upstream waits for a lock and reads nothing, so the client is not read, and its end does
    # not arrive as one. Once such a session went on until the lock was given.
    lock = query("SELECT pg_advisory_lock(4711)")
    async with plain_client(proxy) as owner, plain_client(proxy) as client:
        for each in (owner, client):
            await each.start_up()
        await owner.send(lock)
        while not isinstance(await owner.message(), ReadyForQuery):
            pass
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await client.send(lock + query("SELECT '" + "x" * 1_000_000 + "'") * 40)
        client.reset()
        await eventually(
            lambda: proxy.metrics.value("connections") == 1,
            "the client is gone",
            4 * CLIENT_POLL_SECONDS,
        )
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        await eventually(lambda: not lakebase["one"].cluster.execute(waits), "nothing waits")
