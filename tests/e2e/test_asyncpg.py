"""asyncpg through the proxy with plain settings."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.pooling import both_modes
from tests.support.running import asyncpg_arguments

VALUE_BYTES = 64 * 1024 * 1024


@pytest_asyncio.fixture
async def connection(proxy: App, upstream_keys: Mapping[str, object]) -> AsyncIterator[Any]:
    if upstream_keys:  # so that the test's own session is a reused one
        before = await asyncpg.connect(**asyncpg_arguments(proxy))
        await before.execute("SET client_min_messages = error; LISTEN other_news")
        await before.close()
    connection = await asyncpg.connect(**asyncpg_arguments(proxy))
    yield connection
    await connection.close()


async def test_it_queries_with_parameters_of_many_types(
    connection: Any, lakebase: Lakebase
) -> None:
    row = await connection.fetchrow(
        "SELECT current_user::text, $1::int + 1, $2::text, $3::bytea, $4::int[]",
        *(41, "é", b"\x00\xff", [1, None]),
    )
    assert tuple(row) == (lakebase.client_id, 42, "é", b"\x00\xff", [1, None])


async def test_a_prepared_statement_runs_many_times(connection: Any) -> None:
    statement = await connection.prepare("SELECT $1::bigint * 2")
    assert [await statement.fetchval(n) for n in range(50)] == [n * 2 for n in range(50)]


async def test_a_cursor_fetches_in_portions(connection: Any) -> None:
    async with connection.transaction():
        sql = "SELECT n FROM generate_series(1, 1000) n"
        rows = [row[0] async for row in connection.cursor(sql, prefetch=100)]
    assert rows == list(range(1, 1001))


async def test_a_notification_reaches_a_listener_on_another_session(
    connection: Any, proxy: App
) -> None:
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    await connection.add_listener(
        "news", lambda _connection, _pid, channel, payload: heard.put_nowait((channel, payload))
    )
    other = await asyncpg.connect(**asyncpg_arguments(proxy))
    await other.execute("NOTIFY news, 'hello'")
    async with asyncio.timeout(5):
        assert await heard.get() == ("news", "hello")
    await other.close()


@pytest.mark.slow
async def test_a_value_of_64_megabytes_goes_both_ways_unharmed(connection: Any) -> None:
    value = bytes(range(256)) * (VALUE_BYTES // 256)
    digest = hashlib.md5(value).hexdigest()
    assert await connection.fetchval("SELECT md5($1::bytea)", value) == digest
    back = await connection.fetchval(
        "SELECT string_agg(convert_to(chr(65 + n % 26), 'UTF8') || $1::bytea, ''::bytea)"
        " FROM generate_series(1, $2) n",
        *(bytes(1023), VALUE_BYTES // 1024),
        timeout=60,
    )
    assert len(back) == VALUE_BYTES
    assert back[:1024] == b"B" + bytes(1023)


async def test_a_failed_transaction_stays_failed_until_rollback(connection: Any) -> None:
    transaction = connection.transaction()
    await transaction.start()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetchval("SELECT 1 / 0")
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await connection.fetchval("SELECT 1")
    await transaction.rollback()
    assert await connection.fetchval("SELECT 1") == 1


async def test_copy_both_ways(connection: Any) -> None:
    await connection.execute("CREATE TEMP TABLE t (n int, s text)")
    rows = [(n, f"row {n}") for n in range(1000)]
    assert await connection.copy_records_to_table("t", records=rows) == "COPY 1000"
    received: list[bytes] = []

    async def keep(portion: bytes) -> None:
        received.append(portion)

    await connection.copy_from_query("SELECT * FROM t ORDER BY n", output=keep)
    assert b"".join(received).splitlines()[999] == b"999\trow 999"


async def test_a_timeout_in_the_driver_cancels_the_query_and_keeps_the_session(
    connection: Any, lakebase: Lakebase
) -> None:
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.1)
    assert await connection.fetchval("SELECT 1") == 1
    (cancel,) = lakebase.gateway.cancels
    assert cancel.cancel_known
    assert cancel.secure


@both_modes
async def test_its_pool_serves_more_tasks_than_connections(proxy: App) -> None:
    for _ in range(2):  # in a pool of the proxy's, the second time in the sessions of the first
        async with asyncpg.create_pool(**asyncpg_arguments(proxy), min_size=4, max_size=4) as pool:
            answers = await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(40)))
        assert answers == list(range(40))


@both_modes
async def test_server_settings_of_the_client_are_in_force(proxy: App) -> None:
    settings = {"search_path": '"My Schema", public', "work_mem": "5MB", "TimeZone": "Etc/GMT+3"}
    for _ in range(2):
        connection = await asyncpg.connect(**asyncpg_arguments(proxy, server_settings=settings))
        for name, value in settings.items():
            assert await connection.fetchval("SELECT current_setting($1)", name) == value
        await connection.execute("SET search_path = nowhere; SET work_mem = '6MB'")
        await connection.close()


@pytest.mark.parametrize("real", [True, False])
async def test_the_pid_shown_is_the_backends_where_the_upstream_is_honest(
    start_proxy: StartProxy, lakebase: Lakebase, real: bool
) -> None:
    lakebase["one"].endpoint.passes_real_key = real
    proxy = await start_proxy()
    connection = await asyncpg.connect(**asyncpg_arguments(proxy))
    backend = await connection.fetchval("SELECT pg_backend_pid()")
    assert (connection.get_server_pid() == backend) is real
    assert connection.get_server_pid() > 0
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.1)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
