"""psycopg 3 and psycopg_pool through the proxy with plain settings."""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import psycopg
import psycopg_pool
import pytest
import pytest_asyncio

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.pooling import both_modes, states
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually, libpq, query_runs

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
POOL_SIZE = 10


@pytest_asyncio.fixture
async def connection(proxy: App, upstream_keys: Mapping[str, object]) -> AsyncIterator[Connection]:
    if upstream_keys:  # so that the test's own session is a reused one
        async with await Connection.connect(**libpq(proxy), autocommit=True) as before:
            await before.execute("PREPARE other AS SELECT 1; CREATE TEMP TABLE other (n int)")
    async with await Connection.connect(**libpq(proxy), autocommit=True) as connection:
        yield connection


async def value(connection: Connection, sql: str, *arguments: object) -> Any:
    row = await (await connection.execute(sql, arguments)).fetchone()
    assert row is not None
    return row[0]


async def divide_by_zero_in_a_pipeline(connection: Connection) -> None:
    async with connection.pipeline() as pipeline:
        await connection.execute("SELECT 1 / %s", (0,))
        await connection.execute("SELECT 'not run'")
        await pipeline.sync()


async def insert_twice(connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute("INSERT INTO t VALUES (1)")
        await connection.execute("INSERT INTO t VALUES (1)")


def in_a_thread(proxy: App) -> Any:
    with psycopg.connect(**libpq(proxy)) as connection:
        connection.execute("CREATE TEMP TABLE t (n int)")
        connection.cursor().executemany("INSERT INTO t VALUES (%s)", [(n,) for n in range(100)])
        return connection.execute("SELECT sum(n), current_user FROM t").fetchone()


@both_modes
async def test_synchronous_psycopg_works_in_a_thread(proxy: App, lakebase: Lakebase) -> None:
    for _ in range(2):  # in a pool, the second time in the session of the first
        assert await asyncio.to_thread(in_a_thread, proxy) == (4950, lakebase.client_id)


async def test_a_statement_is_prepared_and_runs_many_times(connection: Connection) -> None:
    for n in range(20):
        cursor = await connection.execute("SELECT %s::int + 1", (n,), prepare=True)
        assert await cursor.fetchone() == (n + 1,)
    assert await value(connection, "SELECT count(*) FROM pg_prepared_statements") == 1


async def test_pipeline_mode_sends_ahead_of_the_answers(connection: Connection) -> None:
    async with connection.pipeline():
        cursors = [await connection.execute("SELECT %s::int", (n,)) for n in range(200)]
        assert [await cursor.fetchone() for cursor in cursors] == [(n,) for n in range(200)]


async def test_an_error_in_a_pipeline_ends_only_what_stands_after_it(
    connection: Connection,
) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await divide_by_zero_in_a_pipeline(connection)
    assert await value(connection, "SELECT 1") == 1


async def test_notifications_are_heard(connection: Connection, proxy: App) -> None:
    await connection.execute("LISTEN news")
    async with await Connection.connect(**libpq(proxy), autocommit=True) as other:
        await other.execute("NOTIFY news, 'hello'")
    async for heard in connection.notifies(timeout=5, stop_after=1):
        assert (heard.channel, heard.payload) == ("news", "hello")
        return
    pytest.fail("nothing was heard")


async def test_a_transaction_that_fails_is_rolled_back(connection: Connection) -> None:
    await connection.execute("CREATE TEMP TABLE t (n int PRIMARY KEY)")
    with pytest.raises(psycopg.errors.UniqueViolation) as raised:
        await insert_twice(connection)
    assert raised.value.diag.constraint_name == "t_pkey"
    assert await value(connection, "SELECT count(*) FROM t") == 0


async def test_large_objects_are_written_and_read_by_function_call(connection: Connection) -> None:
    content = bytes(range(256)) * 1024
    async with connection.transaction():
        identifier = await value(connection, "SELECT lo_from_bytea(0, %b)", content)
        opened = await value(connection, "SELECT lo_open(%s, x'60000'::int)", identifier)
        assert await value(connection, "SELECT loread(%s, 1000000)", opened) == content
        await value(connection, "SELECT lo_unlink(%s)", identifier)


async def test_copy_both_ways(connection: Connection) -> None:
    await connection.execute("CREATE TEMP TABLE t (n int, s text)")
    async with connection.cursor().copy("COPY t FROM STDIN") as copy:
        for n in range(1000):
            await copy.write_row((n, f"row {n}"))
    async with connection.cursor().copy("COPY (SELECT * FROM t ORDER BY n) TO STDOUT") as copy:
        rows = [bytes(portion) async for portion in copy]
    assert rows[999] == b"999\trow 999\n"
    assert len(rows) == 1000


async def test_cancel_ends_the_query_and_not_the_session(
    connection: Connection, lakebase: Lakebase
) -> None:
    sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
    await query_runs(lakebase)
    await connection.cancel_safe(timeout=5)
    with pytest.raises(psycopg.errors.QueryCanceled):
        await sleeping
    assert await value(connection, "SELECT 1") == 1


# PQcancel blocks with the interpreter's lock held, and the emulator needs that lock: so it is run
# in a process of its own.
_OLD_CANCEL = """
import psycopg, sys, threading
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    connection.add_notice_handler(lambda notice: threading.Thread(target=connection.cancel).start())
    try:
        connection.execute("DO $$ BEGIN RAISE NOTICE 'running'; PERFORM pg_sleep(60); END $$")
    except psycopg.errors.QueryCanceled as error:
        print(error.diag.sqlstate, connection.execute("SELECT 'alive'").fetchone()[0])
"""


@both_modes
async def test_the_old_blocking_cancel_call_works_too(proxy: App) -> None:
    conninfo = psycopg.conninfo.make_conninfo(**libpq(proxy))
    for _ in range(2):
        code, out, err = await run_to_end(sys.executable, "-c", _OLD_CANCEL, conninfo)
        assert (code, out.split(), err) == (0, ["57014", "alive"], "")


@both_modes
async def test_a_pool_of_ten_serves_a_hundred_tasks(
    proxy: App, lakebase: Lakebase, upstream_keys: Mapping[str, object]
) -> None:
    for opened in range(POOL_SIZE, 3 * POOL_SIZE, POOL_SIZE):
        await use_a_pool(proxy)
        await eventually(lambda: proxy.metrics.value("connections") == 0, "all ten are closed")
        await eventually(lambda: set(states(proxy)) <= {"idle"}, "they are kept")
        sessions = POOL_SIZE if upstream_keys else opened
        assert len(lakebase.gateway.sessions) == sessions
    # Ten connections at once share one token.
    assert len(lakebase.workspace.mints) == 1
    left = POOL_SIZE if upstream_keys else 0
    await eventually(lambda: lakebase.gateway.open_sessions == left, f"{left} are open")


async def use_a_pool(proxy: App) -> None:
    pool = psycopg_pool.AsyncConnectionPool(
        kwargs={**libpq(proxy), "autocommit": True},
        min_size=POOL_SIZE,
        max_size=POOL_SIZE,
        open=False,
    )

    async def task(n: int) -> Any:
        async with pool.connection() as connection:
            return await value(connection, "SELECT %s::int", n)

    async with pool:
        await pool.wait(timeout=10)
        assert await asyncio.gather(*(task(n) for n in range(100))) == list(range(100))


async def test_the_client_encoding_and_error_fields_are_those_of_postgres(
    connection: Connection,
) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable) as raised:
        await connection.execute("SELECT * FROM nowhere")
    assert raised.value.diag.statement_position == "15"
    assert raised.value.diag.source_function is not None
    assert connection.info.encoding == "utf-8"
    assert connection.info.server_version >= 160000


async def test_the_guides_pgsslmode_is_refused_unless_it_is_overridden(
    proxy: App, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    certified = await start_proxy(listen={"tls": "self-signed"})
    monkeypatch.setenv("PGSSLMODE", "require")
    with pytest.raises(psycopg.OperationalError, match="but SSL was required"):
        await Connection.connect(**libpq(proxy))
    for where in (libpq(proxy, sslmode="disable"), libpq(certified)):
        async with await Connection.connect(**where) as connection:
            assert await value(connection, "SELECT 1") == 1
