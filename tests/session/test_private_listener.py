"""The listener for this process alone: what it serves, what it closes, what failures it raises."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
import pytest_asyncio

from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ErrorKind, ProxyError
from proxy.server.metric_labels import build_metrics
from proxy.server.serving import open_snapshot
from proxy.session.private_listener import SHARED_MAX, PrivateListener
from proxy.upstream.connector import Connector
from proxy.upstream.name_lookup import NameLookup
from proxy.upstream.upstreams import Upstream
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, CancelRequest, StartupMessage
from proxy.workspace.single_flight import PendingCalls
from tests.support.catalogue import bare_environment
from tests.support.client import Client
from tests.support.running import nothing_left, proxy_settings, psql_path

WAIT_SECONDS_MAX = 20.0


@pytest_asyncio.fixture
async def upstream(lakebase: Lakebase) -> AsyncIterator[Upstream]:
    async with open_snapshot(proxy_settings(lakebase), lambda *_: None) as snapshot:
        opener = snapshot.upstreams["upstream"]
        await opener.credentials.fresh()  # the SDK keeps its connection to the workspace
        await opener.address_lookup.target()
        yield opener


@pytest_asyncio.fixture
async def private() -> AsyncIterator[PrivateListener]:
    resolve = NameLookup(PendingCalls()).resolve
    async with PrivateListener.of_verb(Connector(resolve), build_metrics()) as listener:
        yield listener


async def test_a_connection_has_the_role_and_the_database_of_its_upstream(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase
) -> None:
    async with nothing_left(), private.connect(upstream) as connection:
        row = await connection.fetchrow("select current_user::text, current_database()::text")
        assert tuple(row) == (lakebase.client_id, lakebase.database)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.fetchval("select 1 / 0")
        assert await connection.fetchval("select $1::int8", 5) == 5
    assert lakebase.gateway.sessions[-1].secure
    await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)


async def test_the_users_environment_does_not_change_it(
    private: PrivateListener, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGHOST": "192.0.2.1",
        "PGPORT": "1",
        "PGUSER": "someone",
        "PGDATABASE": "other",
        "PGPASSWORD": "not-a-real-password",
        "PGSSLMODE": "verify-full",
        "PGSSLNEGOTIATION": "direct",
        "PGTARGETSESSIONATTRS": "standby",
        "PGSERVICE": "missing",
        "PGGSSLIB": "none",
    }.items():
        monkeypatch.setenv(name, value)
    async with private.connect(upstream) as connection:
        assert await connection.fetchval("select 1") == 1


async def test_a_notification_arrives_and_the_loss_of_the_upstream_is_noticed(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    lost = asyncio.Event()
    async with asyncio.timeout(WAIT_SECONDS_MAX), private.connect(upstream) as connection:
        connection.add_termination_listener(lambda _: lost.set())
        await connection.add_listener("private", lambda *said: heard.put_nowait(said[-1]))
        async with private.connect(upstream) as other:
            await other.execute("select pg_notify('private', 'news')")
        assert await heard.get() == "news"
        lakebase.shards[0].endpoint.end_sessions(SessionEnd.RESET)
        await lost.wait()


async def test_the_error_of_the_dial_is_raised_as_it_is(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase
) -> None:
    await lakebase.gateway.refuse_connections()
    async with nothing_left():
        with pytest.raises(ProxyError) as refused:
            async with private.connect(upstream):
                raise AssertionError("not reached")
        assert refused.value.kind is ErrorKind.UPSTREAM_UNREACHABLE
    await lakebase.gateway.accept_connections()
    async with private.connect(upstream) as connection:
        assert await connection.fetchval("select 1") == 1


async def test_an_error_of_the_database_at_login_is_raised_with_its_own_words(
    private: PrivateListener, lakebase: Lakebase
) -> None:
    settings = proxy_settings(lakebase, upstream={"database": "no_such_database"})
    async with open_snapshot(settings, lambda *_: None) as snapshot:
        with pytest.raises(ProxyError) as refused:
            async with private.connect(snapshot.upstreams["upstream"]):
                raise AssertionError("not reached")
    assert refused.value.kind is ErrorKind.DATABASE_MISSING


async def test_a_caller_that_gives_up_ends_the_dial(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase
) -> None:
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with nothing_left():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), private.connect(upstream):
                raise AssertionError("not reached")
    lakebase.gateway.clear_faults()


async def test_what_the_block_raises_leaves_it_as_it_is_and_ends_its_statement(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase
) -> None:
    class OwnError(Exception):
        pass

    running: list[asyncio.Future[str]] = []

    async def fail() -> None:
        async with private.connect(upstream) as connection:
            running.append(asyncio.ensure_future(connection.execute("select pg_sleep(60)")))
            await asyncio.sleep(0)
            raise OwnError

    async with nothing_left():
        with pytest.raises(OwnError):
            await fail()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await running[0]
    await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)


async def test_a_statement_that_takes_too_long_is_cancelled_and_the_connection_serves_on(
    private: PrivateListener, upstream: Upstream
) -> None:
    async with asyncio.timeout(WAIT_SECONDS_MAX), private.connect(upstream) as connection:
        with pytest.raises(TimeoutError):
            await connection.execute("select pg_sleep(60)", timeout=0.2)
        assert await connection.fetchval("select 1") == 1


@pytest.mark.parametrize("database", [b"", b"postgres", b"\xff", b"0" * 32])
async def test_a_connection_that_knows_no_name_is_closed(
    private: PrivateListener, lakebase: Lakebase, database: bytes
) -> None:
    client = await Client.connect(("127.0.0.1", private.port))
    await client.send(StartupMessage(V3_0, ((b"user", b"app"), (b"database", database))).encode())
    assert await client.receive_new() == b""
    client.abort()
    assert lakebase.gateway.accepted == 0


async def test_a_cancel_with_an_unknown_key_is_closed(private: PrivateListener) -> None:
    client = await Client.connect(("127.0.0.1", private.port))
    await client.send(CancelRequest(1, Secret(b"1234")).encode())
    assert await client.receive_new() == b""
    client.abort()


async def test_a_name_serves_once(
    private: PrivateListener, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "a" * 2 * size)
    async with private.connect(upstream) as connection:
        client = await Client.connect(("127.0.0.1", private.port))
        message = StartupMessage(V3_0, ((b"user", b"app"), (b"database", b"a" * 32)))
        await client.send(message.encode())
        assert await client.receive_new() == b""
        client.abort()
        assert await connection.fetchval("select 1") == 1


async def test_silent_connections_do_not_keep_it_from_serving(
    private: PrivateListener, upstream: Upstream
) -> None:
    silent = [await Client.connect(("127.0.0.1", private.port)) for _ in range(20)]
    async with private.connect(upstream) as connection:
        assert await connection.fetchval("select 1") == 1
    for client in silent:
        client.abort()


# -- a socket that is shared with other programs ------------------------------------------------


async def psql(path: Path, sql: str) -> tuple[int, str]:
    """Run psql on a shared socket. Return its exit code, and what it printed."""
    host, port = quote(str(path.parent), safe=""), path.suffix.removeprefix(".")
    process = await asyncio.create_subprocess_exec(
        *(psql_path(), "-XAtq", "-c", sql, f"postgresql:///any?host={host}&port={port}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=bare_environment(),
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode().strip()


async def test_a_shared_socket_serves_many_connections_of_other_programs(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase, tmp_path: Path
) -> None:
    path = tmp_path / ".s.PGSQL.1"
    async with nothing_left(), private.share(upstream, path):
        sql = "select current_user, current_database()"
        answers = await asyncio.gather(*(psql(path, sql) for _ in range(4)))
        assert answers == [(0, f"{lakebase.client_id}|{lakebase.database}")] * 4
        code, said = await psql(path, "select 1 / 0")
        assert (code, "division by zero" in said) == (1, True)
        await lakebase.gateway.refuse_connections()
        code, said = await psql(path, "select 1")
        assert (code, "FATAL" in said) == (2, True)
        await lakebase.gateway.accept_connections()


async def test_the_end_of_the_block_closes_what_is_open_on_a_shared_socket(
    private: PrivateListener, upstream: Upstream, lakebase: Lakebase, tmp_path: Path
) -> None:
    path = tmp_path / ".s.PGSQL.1"
    async with nothing_left():
        async with private.share(upstream, path):
            connection = await asyncpg.connect(
                host=str(tmp_path), port=1, user="any", database="any", ssl=False, password=""
            )
            assert await connection.fetchval("select 1") == 1
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.execute("select 1")
        await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)


async def test_a_shared_socket_has_a_bound(
    private: PrivateListener, upstream: Upstream, tmp_path: Path
) -> None:
    path = tmp_path / ".s.PGSQL.1"
    async with AsyncExitStack() as stack, private.share(upstream, path):

        async def opened() -> asyncio.StreamReader:
            reader, writer = await asyncio.open_unix_connection(path)
            stack.push_async_callback(closed, writer)
            return reader

        for _ in range(SHARED_MAX):
            await opened()
        one_more = await opened()
        with suppress(ConnectionError):
            assert await one_more.read() == b""


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
