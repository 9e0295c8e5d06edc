"""The same programs direct and through the proxy: psycopg, asyncpg, and PostgreSQL's own.

A program returns all that it saw, errors with their fields included, and both ways must show the
same. A driver picks its own messages here; scripts with every byte told are in the other files.
"""

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import asyncpg
import psycopg
import pytest
import pytest_asyncio

from proxy.emulator.cluster import CLIENT_ID, DATABASE, quoted
from tests.differential.conftest import DirectAndProxied
from tests.support.proxy_process import run_to_end

pytestmark = pytest.mark.asyncio(loop_scope="module")

Where = Mapping[str, Any]
Seen = list[Any]
Connection = psycopg.AsyncConnection[tuple[Any, ...]]

DIAGNOSTICS: Final = [name for name in dir(psycopg.errors.Diagnostic) if not name.startswith("_")]
REPORTED: Final = (
    *("server_version", "server_encoding", "client_encoding", "application_name", "is_superuser"),
    *("session_authorization", "DateStyle", "IntervalStyle", "TimeZone", "integer_datetimes"),
    *("standard_conforming_strings", "in_hot_standby", "default_transaction_read_only", "no_such"),
)
FAILING: Final = (
    *("SELECT 1/0", "SELECT * FROM nowhere", "SELEC", "SELECT 'x'::int", "SELECT * FROM pg_authid"),
    "CREATE TEMP TABLE t (n int CONSTRAINT positive CHECK (n > 0)); INSERT INTO t VALUES (-1)",
    "DO $$ BEGIN RAISE EXCEPTION 'é' USING DETAIL = 'd', HINT = 'h', ERRCODE = 'ZZ999'; END $$",
)
SCRIPT: Final = r"""
\pset format unaligned
SELECT current_user, current_database();
\d pg_class
\dn
CREATE TEMP TABLE t (n int PRIMARY KEY, s text);
\copy t FROM PROGRAM 'printf "1\tone\n2\ttwo\n"'
\copy (SELECT * FROM t ORDER BY n) TO STDOUT
INSERT INTO t VALUES (1, 'again');
\set VERBOSITY verbose
SELECT 1/0;
SELECT * FROM t ORDER BY n \gx
SELECT $1::int + 1 \bind 41 \g
SELECT n FROM generate_series(1, 5) n \gdesc
\set FETCH_COUNT 2
SELECT n FROM generate_series(1, 5) n;
DO $$ BEGIN RAISE NOTICE 'noted'; END $$;
LISTEN news; NOTIFY news;
\encoding
\echo :SERVER_VERSION_NUM :ENCODING :ROW_COUNT :LAST_ERROR_SQLSTATE
"""
SCHEMA: Final = """
CREATE SCHEMA shop;
CREATE TYPE shop.colour AS ENUM ('red', 'green');
CREATE TABLE shop.item (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL,
  colour shop.colour DEFAULT 'red', price numeric(8, 2) CHECK (price > 0));
CREATE INDEX ON shop.item (lower(name));
CREATE VIEW shop.cheap AS SELECT * FROM shop.item WHERE price < 10;
CREATE FUNCTION shop.total() RETURNS numeric LANGUAGE sql AS 'SELECT sum(price) FROM shop.item';
INSERT INTO shop.item (name, price) SELECT 'é ' || n, n FROM generate_series(1, 500) n;
"""


def direct(both: DirectAndProxied) -> dict[str, Any]:
    """Return libpq parameters for PostgreSQL itself."""
    return {"host": str(both.cluster.directory), "port": 5432, "user": CLIENT_ID}


def proxied(both: DirectAndProxied) -> dict[str, Any]:
    """Return libpq parameters for the proxy."""
    return {"host": both.proxy.listen_host, "port": both.proxy.listen_port, "user": CLIENT_ID}


def in_a_pool(both: DirectAndProxied) -> dict[str, Any]:
    """Return libpq parameters for the proxy that keeps its upstream sessions."""
    return {"host": both.pool.listen_host, "port": both.pool.listen_port, "user": CLIENT_ID}


async def error_of(work: Awaitable[object]) -> Seen:
    with pytest.raises(psycopg.Error) as raised:
        await work
    diagnostics = raised.value.diag
    values = (getattr(diagnostics, name) for name in DIAGNOSTICS)
    return [type(raised.value), *(without_backend(value) for value in values)]


def without_backend(value: str | None) -> str | None:
    """Return a field without the number of its backend, which a temporary schema's name has."""
    return value and re.sub(r"^pg_temp_\d+$", "pg_temp", value)


async def psycopg_reports(where: Where) -> Seen:
    async with await Connection.connect(**where, dbname=DATABASE, application_name="app") as one:
        info = one.info
        seen: Seen = [info.parameter_status(name) for name in REPORTED]
        seen += [
            info.server_version,
            info.encoding,
            info.dbname,
            info.user,
            info.transaction_status,
        ]
        row = await (await one.execute("SELECT pg_backend_pid()")).fetchone()
        assert row == (info.backend_pid,)
        await one.execute("SET TimeZone = 'Asia/Tokyo'")
        return [*seen, info.timezone, info.transaction_status, info.pipeline_status]


async def psycopg_errors(where: Where) -> Seen:
    async with await Connection.connect(**where, dbname=DATABASE, autocommit=True) as one:
        return [await error_of(one.execute(sql.encode())) for sql in FAILING]


async def psycopg_rows(where: Where) -> Seen:
    async with await Connection.connect(**where, dbname=DATABASE, autocommit=True) as one:
        seen: Seen = []
        for binary in (False, True):
            cursor = one.cursor(binary=binary)
            await cursor.execute(
                "SELECT %s::int, %s::text, %s::bytea, %s::numeric, '{1,2}'::int[], now() IS NULL,"
                " '2026-01-02 03:04:05+00'::timestamptz, '{\"a\": 1}'::jsonb",
                (1, "é", b"\0\xff", "1.50"),
            )
            seen += [repr(cursor.description), await cursor.fetchall(), cursor.statusmessage]
        cursor = await one.execute("SELECT n FROM generate_series(1, 9) n", prepare=True)
        return [*seen, await cursor.fetchall(), cursor.rowcount]


async def psycopg_pipeline(where: Where) -> Seen:
    async with await Connection.connect(**where, dbname=DATABASE, autocommit=True) as one:
        async with one.pipeline():
            cursors = [await one.execute("SELECT %s::int", (n,)) for n in range(50)]
            seen: Seen = [await cursor.fetchone() for cursor in cursors]

        async def failing() -> None:
            async with one.pipeline() as pipeline:
                await one.execute("SELECT 1 / %s", (0,))
                await one.execute("SELECT 'not run'")
                await pipeline.sync()

        return [*seen, await error_of(failing()), one.info.transaction_status]


async def psycopg_notices_and_copy(where: Where) -> Seen:
    async with await Connection.connect(**where, dbname=DATABASE, autocommit=True) as one:
        seen: Seen = []
        one.add_notice_handler(
            lambda told: seen.append([getattr(told, name) for name in DIAGNOSTICS])
        )
        await one.execute("DO $$ BEGIN RAISE WARNING 'w' USING HINT = 'h'; END $$")
        await one.execute("CREATE TEMP TABLE t (n int, s text)")
        async with one.cursor().copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            for n in range(200):
                await copy.write_row((n, f"row {n}"))
        async with one.cursor().copy("COPY t TO STDOUT") as copy:
            seen.append(b"".join([bytes(part) async for part in copy]))
        async with one.transaction(), one.cursor("named") as named:
            await named.execute("SELECT n + 0 FROM t ORDER BY 1")
            seen += [await named.fetchmany(3), await named.fetchone()]
        return seen


async def asyncpg_all(where: Where) -> Seen:
    one = await asyncpg.connect(**where, database=DATABASE, server_settings={"geqo": "off"})
    settings = one.get_settings()
    seen: Seen = [
        one.get_server_version(),
        {name: getattr(settings, name, "") for name in REPORTED},
    ]
    statement = await one.prepare("SELECT $1::int + 1 AS a, $2::text AS b, $3::jsonb AS c")
    seen += [statement.get_parameters(), statement.get_attributes()]
    seen.append([tuple(row) for row in await statement.fetch(1, "é", '{"a": 1}')])
    for sql in FAILING:
        with pytest.raises(asyncpg.PostgresError) as raised:
            await one.execute(sql)
        seen.append(raised.value.as_dict())
    async with one.transaction():
        seen.append(
            [row[0] async for row in one.cursor("SELECT generate_series(1, 99)", prefetch=9)]
        )
    seen.append(await one.fetch("SHOW geqo"))
    await one.close()
    return seen


@pytest.mark.parametrize(
    "program",
    [
        *(psycopg_reports, psycopg_errors, psycopg_rows, psycopg_pipeline),
        *(psycopg_notices_and_copy, asyncpg_all),
    ],
)
async def test_a_driver_sees_the_same(
    program: Callable[[Where], Awaitable[Seen]], both: DirectAndProxied
) -> None:
    seen = await program(direct(both))
    for where in (proxied(both), in_a_pool(both), in_a_pool(both)):
        assert await program(where) == seen


async def run(
    both: DirectAndProxied, program: str, where: Where, *arguments: str
) -> tuple[int, str, str]:
    address = ("-h", where["host"], "-p", str(where["port"]), "-U", where["user"])
    path = both.cluster.binaries / program
    code, out, err = await run_to_end(path, *address, *arguments)
    return code, out, err


@pytest_asyncio.fixture(loop_scope="module")
async def databases(both: DirectAndProxied) -> AsyncIterator[tuple[str, ...]]:
    """Return three empty databases, one for each."""
    suffix = uuid.uuid4().hex[:8]
    names = (f"direct_{suffix}", f"proxied_{suffix}", f"pooled_{suffix}")
    for name in names:
        both.cluster.execute(f"CREATE DATABASE {name} OWNER {quoted(CLIENT_ID)}")
    yield names
    for name in names:
        both.cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_psql_prints_the_same(both: DirectAndProxied) -> None:
    steps = [part for line in SCRIPT.strip().splitlines() for part in ("-c", line)]
    one, *others = [
        await run(both, "psql", where, "-X", "-d", DATABASE, *steps)
        for where in (direct(both), proxied(both), in_a_pool(both), in_a_pool(both))
    ]
    own = "server process with PID "  # of the notification, another one each time
    assert own in one[1]
    for other in others:
        assert _without_pid(one[1], own) == _without_pid(other[1], own)
        assert (one[0], one[2]) == (other[0], other[2])


def _without_pid(text: str, before: str) -> str:
    head, _, tail = text.partition(before)
    return head + tail.lstrip("0123456789")


async def test_pg_dump_writes_the_same(both: DirectAndProxied, databases: tuple[str, ...]) -> None:
    database, *_ = databases
    both.cluster.execute(SCHEMA, database=database, user=CLIENT_ID)
    options = ("--restrict-key=same", "-d", database)
    one, *others = [
        await run(both, "pg_dump", where, *options)
        for where in (direct(both), proxied(both), in_a_pool(both))
    ]
    assert others == [one, one]
    assert one[0] == 0
    assert "COPY shop.item" in one[1]


@pytest.mark.slow
async def test_pgbench_leaves_the_same_in_all_three_protocols(
    both: DirectAndProxied, databases: tuple[str, ...]
) -> None:
    left = []
    ways = (direct(both), proxied(both), in_a_pool(both))
    for database, where in zip(databases, ways, strict=True):
        code, _, err = await run(both, "pgbench", where, "-i", "-q", "--scale=1", database)
        assert code == 0, err
        for protocol in ("simple", "extended", "prepared"):
            options = ("-n", "-M", protocol, "-t", "20", "--random-seed=3", database)
            code, out, err = await run(both, "pgbench", where, *options)
            assert code == 0, err
            assert "number of transactions actually processed: 20/20" in out
        tables = ("accounts", "tellers", "branches")
        sums = [
            f"SELECT md5(string_agg(b::text, '' ORDER BY 1)) FROM pgbench_{t} b" for t in tables
        ]
        left.append(both.cluster.execute(";".join(sums), database=database))
    assert left == [left[0]] * 3
