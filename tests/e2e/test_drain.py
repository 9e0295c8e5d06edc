"""The end of a proxy with sessions: drain, with real processes, signals and drivers; idle timeout.

An idle session is told 57P01, a busy one when it becomes idle; what is busy at the deadline is cut.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import psycopg
import psycopg_pool
import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import ErrorResponse, Frame, ReadyForQuery, Terminate
from tests.differential.frontend import SYNC, copy_data, extended, message
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.client import Client, plain_client, startup
from tests.support.proxy_process import ProxyProcess, alive, descendants
from tests.support.running import (
    all_over,
    asyncpg_arguments,
    eventually,
    libpq,
    nothing_left,
)

pytestmark = pytest.mark.slow

SESSIONS = 200


async def answered(client: Client) -> bytes:
    """Read up to the next ReadyForQuery and return its status; an error fails the test."""
    while not isinstance(said := await client.message(), ReadyForQuery):
        assert not isinstance(said, ErrorResponse), said
    return said.status


async def told(client: Client, sqlstate: str, reason: str) -> None:
    """Expect the proxy's own last word, and the end of the stream after it."""
    error = await client.message()
    assert isinstance(error, ErrorResponse), error
    assert (error.severity, error.sqlstate) == ("FATAL", sqlstate)
    assert error.text(b"D") == f"reason={reason}"
    assert error.text(b"H")
    assert await client.receive_rest() == b""


def sockets(directory: Path) -> list[Path]:
    return list(directory.glob(".s.PGSQL.*"))


async def readiness(process: ProxyProcess) -> int:
    """Ask the admin address, whose port is in the log, for its verdict."""
    port = int(process.events("serving")[0]["admin_port"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /readiness HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    status = int((await reader.readline()).split()[1])
    writer.close()
    await writer.wait_closed()
    return status


async def test_200_sessions_lose_nothing_that_was_begun_and_leave_nothing(
    start_process: StartProcess, lakebase: Lakebase, scratch_database: str, tmp_path: Path
) -> None:
    proxy = await start_process(
        listen={"unix_socket_directory": str(tmp_path)},
        upstream={"database": scratch_database},
        shutdown={"drain_seconds": 30},
    )
    assert len(sockets(tmp_path)) == 1
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(plain_client(proxy)) for _ in range(SESSIONS)]
        for start in range(0, SESSIONS, 20):
            async with asyncio.TaskGroup() as group:
                for client in clients[start : start + 20]:
                    group.create_task(client.start_up())
        await clients[0].query("CREATE TABLE done (n int)")
        await answered(clients[0])
        busy, idle = clients[: SESSIONS // 2], clients[SESSIONS // 2 :]
        for number, client in enumerate(busy):
            await client.query(f"BEGIN; INSERT INTO done VALUES ({number})")
            assert await answered(client) == b"T"
        proxy.send(signal.SIGTERM)
        for client in idle:
            await told(client, "57P01", "shutting_down")
            client.close()
        for client in busy:
            await client.query("SELECT pg_sleep(0.01); COMMIT")
        for client in busy:
            assert await answered(client) == b"I"
            await told(client, "57P01", "shutting_down")
            client.close()
        children = descendants(proxy.pid)
        assert await proxy.ended() == 0
    assert alive(children) == set()
    assert sockets(tmp_path) == []
    rows = lakebase["one"].cluster.execute(
        "SELECT count(*), sum(n) FROM done", database=scratch_database
    )
    numbers = range(SESSIONS // 2)
    assert rows.strip() == f"{len(numbers)}|{sum(numbers)}"
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")
    left = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{scratch_database}'"
    await eventually(lambda: lakebase["one"].cluster.execute(left).strip() == "0", "none in it")


async def test_while_it_still_accepts_readiness_says_no_and_clients_are_served(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(
        admin={"enabled": True}, shutdown={"accept_seconds": 1.5, "drain_seconds": 30}
    )
    async with plain_client(proxy) as old:
        await old.start_up()
        assert await readiness(proxy) == 200
        proxy.send(signal.SIGTERM)
        await eventually(lambda: proxy.events("draining"), "it drains")
        assert await readiness(proxy) == 503
        async with plain_client(proxy) as new:
            await new.start_up()
            for client in (old, new):
                await client.query("SELECT 1")
                assert await answered(client) == b"I"
            await told(new, "57P01", "shutting_down")
            await told(old, "57P01", "shutting_down")
    assert await proxy.ended() == 0


async def test_who_waits_for_the_upstream_is_refused_at_once(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 30})
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with plain_client(proxy) as waiting, plain_client(proxy) as silent:
        await waiting.send(startup())
        await eventually(lambda: lakebase.gateway.records, "it is being dialled")
        proxy.send(signal.SIGTERM)
        await told(waiting, "57P01", "shutting_down")
        assert await silent.receive_rest() == b""
    assert await proxy.ended() == 0


async def test_idle_in_a_transaction_is_busy_until_the_deadline(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 0.5})
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("BEGIN")
        assert await answered(client) == b"T"
        proxy.send(signal.SIGTERM)
        assert await client.receive_rest() == b""  # cut, and no message in the midst of it
        assert await proxy.ended() == 3
    (line,) = proxy.events("sessions are cut: the time to drain is over")
    assert line["sessions"] == 1
    assert line["oldest_seconds"] >= 0.4


async def test_a_copy_is_busy_to_its_end(start_process: StartProcess) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 30})
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("CREATE TEMP TABLE t (n int)")
        await answered(client)
        await client.query("COPY t FROM STDIN")
        assert isinstance(await client.message(), Frame)
        proxy.send(signal.SIGTERM)
        await eventually(lambda: proxy.events("sessions are ending"), "it drains")
        for n in range(3):
            await client.send(copy_data(f"{n}\n"))
            with pytest.raises(TimeoutError):
                await client.receive(0.2)
        await client.send(message(b"c"))
        assert await answered(client) == b"I"
        await told(client, "57P01", "shutting_down")
    assert await proxy.ended() == 0


async def test_w47_a_pipeline_gets_all_of_its_answers(start_process: StartProcess) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 30})
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send((extended("SELECT pg_sleep(0.15)") + SYNC) * 5)
        proxy.send(signal.SIGTERM)
        for _ in range(5):
            assert await answered(client) == b"I"
        await told(client, "57P01", "shutting_down")
    assert await proxy.ended() == 0


async def test_drivers_pipelines_get_whole_answers(start_process: StartProcess) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 30})
    async with await psycopg.AsyncConnection.connect(**libpq(proxy, autocommit=True)) as one:
        other = await asyncpg.connect(**asyncpg_arguments(proxy))
        fetching = asyncio.create_task(
            other.fetch("SELECT n, pg_sleep(0.001) FROM generate_series(1, 400) n")
        )
        async with one.pipeline():
            cursors = [one.cursor() for _ in range(10)]
            for n, cursor in enumerate(cursors):
                await cursor.execute("SELECT pg_sleep(0.05), %s::int", (n,))
            proxy.send(signal.SIGTERM)
            await eventually(lambda: proxy.events("sessions are ending"), "it drains")
        numbers = [row[1] for cursor in cursors for row in await cursor.fetchall()]
        assert numbers == list(range(10))
        assert [row["n"] for row in await fetching] == list(range(1, 401))
        with pytest.raises(psycopg.OperationalError):
            await one.execute("SELECT 1")
        await other.close()
    assert await proxy.ended() == 0


async def test_an_idle_session_is_ended_after_its_time_and_leaves_nothing(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen={"idle_timeout_seconds": 0.4})
    async with plain_client(proxy) as first:
        await first.start_up()  # opens what a proxy keeps: its connection to the workspace
        await told(first, "57P05", "idle_timeout")
    await all_over(proxy, lakebase)
    async with nothing_left(), plain_client(proxy) as client:
        await client.start_up()
        await client.send((extended("SELECT pg_sleep(0.3)") + SYNC) * 3)  # longer than the timeout
        for _ in range(3):
            assert await answered(client) == b"I"
        await told(client, "57P05", "idle_timeout")
        client.close()
        await all_over(proxy, lakebase)
    assert proxy.metrics.value("sessions_ended_total", reason="idle_timeout") == 2


async def test_a_session_in_a_transaction_or_in_use_is_not_timed_out(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(listen={"idle_timeout_seconds": 0.4})
    async with plain_client(proxy) as held, plain_client(proxy) as used:
        await held.start_up()
        await used.start_up()
        await held.query("BEGIN")
        assert await answered(held) == b"T"
        for _ in range(6):
            with pytest.raises(TimeoutError):
                await held.receive(0.2)
            await used.query("SELECT 1")
            assert await answered(used) == b"I"
        await held.query("COMMIT")
        assert await answered(held) == b"I"
        await told(held, "57P05", "idle_timeout")
        await used.send(Terminate().encode())


class Service:
    """What a cluster puts before its pods: new connections go to the present one.

    `to` changes where they go; a connection that is open stays where it is.
    """

    listen_host = "127.0.0.1"

    def __init__(self) -> None:
        self.to: ProxyProcess | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.to is not None
        self._writers.add(writer)
        there = await asyncio.open_connection(self.to.listen_host, self.to.listen_port)
        self._writers.add(there[1])
        await asyncio.gather(self._copy(reader, there[1]), self._copy(there[0], writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while received := await reader.read(65536):
                writer.write(received)
                await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self.accept, self.listen_host, 0)
        async with server:
            yield server.sockets[0].getsockname()[1]
            for writer in self._writers:
                writer.close()


async def test_pools_lose_no_transaction_over_three_restarts(start_process: StartProcess) -> None:
    # A pool whose connections live for less than accept_seconds, and that checks them: what a
    # rolling deployment asks of its applications.
    service, done, stopping = Service(), 0, False
    shutdown = {"accept_seconds": 1.5, "drain_seconds": 20}
    service.to = await start_process(shutdown=shutdown)
    async with service.serving() as port:
        where = libpq(service.to, port=port)
        pool = psycopg_pool.AsyncConnectionPool(
            kwargs=where,
            min_size=4,
            max_size=8,
            max_lifetime=0.8,
            check=psycopg_pool.AsyncConnectionPool.check_connection,
            open=False,
        )

        async def work() -> None:
            nonlocal done
            while not stopping:
                async with pool.connection() as connection:
                    await connection.execute("SELECT pg_sleep(0.002)")
                    await connection.execute("SELECT 1")
                done += 1

        async def some_more() -> None:
            goal = done + 20
            await eventually(lambda: done > goal, "transactions go on")

        async with pool, asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(work())
            for _ in range(3):
                old = service.to
                service.to = await start_process(shutdown=shutdown)
                old.send(signal.SIGTERM)
                assert await old.ended(25) == 0
                await some_more()
            stopping = True
    assert done > 100
