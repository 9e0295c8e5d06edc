"""Tools that a person or a deployment calls do the same directly and through the proxy."""

import asyncio
import faulthandler
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from proxy.emulator.cluster import CLIENT_ID, quoted
from tests.clients.record import record_tool
from tests.clients.tool_ways import (
    TOOL_SECONDS_MAX,
    Environment,
    Ways,
    drop,
    execute,
    run,
    until,
    version_of,
)
from tests.support.running import eventually, without_own_account

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
]

# What pg_dump and pg_restore carry. The suite's is small; a thousand takes minutes.
MEGABYTES: Final = int(os.environ.get("DUMP_MEGABYTES", "30"))
MEGABYTES_A_SECOND_MIN: Final = 1  # on a busy machine, all steps together
TABLES: Final = 4

PSQL_SCRIPT: Final = r"""
\pset format unaligned
\set limit 3
SELECT n, :'limit' AS text FROM generate_series(1, :limit) n;
SELECT 6 * 7 AS answer, current_user AS whom \gset
\echo :answer :whom :SERVER_VERSION_NUM
\if :{?answer} \echo known \else \echo unknown \endif
CREATE TABLE t (n int PRIMARY KEY, s text);
COPY t FROM STDIN;
1	one
2	tab\there
3	\N
\.
\copy t FROM PROGRAM 'printf "4\tfour\n"'
\copy (SELECT * FROM t ORDER BY n) TO STDOUT
COPY t TO STDOUT (FORMAT csv, HEADER);
COPY t FROM STDIN;
5	five
wrong	row
\.
\echo :LAST_ERROR_SQLSTATE
\d t
BEGIN; INSERT INTO t VALUES (9, 'nine'); SELECT 1/0; ROLLBACK;
SELECT count(*) FROM t;
\t on
SELECT 'again' \watch i=0.1 c=3
\t off
\c postgres
SELECT current_database();
\c -reuse-previous=on "dbname=databricks_postgres application_name=elsewhere"
SELECT current_database(), current_setting('application_name');
\errverbose
"""


async def test_psql_prints_the_same(ways: Ways, tmp_path: Path) -> None:
    script = tmp_path / "script.sql"
    script.write_text(PSQL_SCRIPT)
    shown = await ways.prints_the_same("psql", "-X", "-f", str(script))
    assert shown.count("again") == 3
    assert 'connected to database "postgres"' in shown


@asynccontextmanager
async def in_a_terminal(
    program: Path, *arguments: str, way: Environment
) -> AsyncIterator["Terminal"]:
    """Run a program in a terminal for the block; it must end by itself and well."""
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**without_own_account(os.environ), **way},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        yield Terminal(process, ours)
        async with asyncio.timeout(TOOL_SECONDS_MAX):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


@dataclass
class Terminal:
    """A program in a terminal."""

    process: asyncio.subprocess.Process
    file: int
    shown: str = ""

    def type(self, text: str) -> None:
        """Type something, as a person does."""
        os.write(self.file, text.encode())

    def shows(self, pattern: str) -> bool:
        """Read what is shown; return whether the pattern is in all of it."""
        with suppress(OSError):  # nothing now, or it has ended
            self.shown += os.read(self.file, 65536).decode()
        return re.search(pattern, self.shown) is not None


async def test_psql_goes_on_after_ctrl_c(ways: Ways) -> None:
    cancels = len(ways.place.lakebase.gateway.cancels)
    for way in ways.both:
        where = f"wait_event = 'PgSleep' AND datname = '{way['PGDATABASE']}'"
        sleeps = f"SELECT count(*) FROM pg_stat_activity WHERE {where}"
        psql = (ways.program("psql"), "-Xn", "--pset=pager=off")
        async with in_a_terminal(*psql, way=way) as terminal:
            terminal.type("SELECT pg_sleep(60);\n")
            await until(partial(_prints, ways, sleeps, "1"), "it sleeps")
            terminal.process.send_signal(signal.SIGINT)
            terminal.type("SELECT :'LAST_ERROR_SQLSTATE', 6 * 7 AS answer;\n")
            answered = partial(terminal.shows, r"57014 +\| +42")
            await eventually(answered, f"psql goes on: {terminal.shown}")
            assert "canceling statement due to user request" in terminal.shown
            terminal.type("\\q\n")
    assert len(ways.place.lakebase.gateway.cancels) == cancels + 1
    record_tool("psql", await version_of(ways.program("psql")))


async def _prints(ways: Ways, sql: str, expected: str) -> bool:
    return await execute(ways.place.server, sql) == expected


async def test_pgbench_leaves_the_same(ways: Ways) -> None:
    # Each transaction connects anew; four at a time.
    left = []
    program = ways.program("pgbench")
    for way in ways.both:
        await run(way, program, "-i", "-q", "--scale=1")
        for protocol in ("simple", "extended", "prepared"):
            options = ("-n", "-C", "-c", "4", "-j", "2", "-t", "5", "--random-seed=3")
            out = await run(way, program, *options, "-M", protocol)
            assert "number of transactions actually processed: 20/20" in out
        tables = ("accounts", "tellers", "branches")
        sums = [f"SELECT sum({table[0]}balance) FROM pgbench_{table}" for table in tables]
        left.append(await ways.psql(way, ";".join([*sums, "SELECT count(*) FROM pgbench_history"])))
    assert left == [left[0]] * 2
    record_tool("pgbench", await version_of(program))


def fill(megabytes: int) -> str:
    """Return the SQL of tables with this much in them, and of what else a dump has to order."""
    rows = megabytes * 1000 // TABLES
    tables = "".join(
        f"CREATE TABLE part{n} (id int PRIMARY KEY, body text NOT NULL);"
        f" INSERT INTO part{n} SELECT n, repeat(md5(n::text || '{n}'), 31)"
        f" FROM generate_series(1, {rows}) n;"
        for n in range(TABLES)
    )
    return f"""{tables}
CREATE TYPE colour AS ENUM ('red', 'green');
CREATE TABLE item (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, colour colour DEFAULT 'red',
  part int REFERENCES part0, price numeric(8, 2) CHECK (price > 0), bytes bytea, at timestamptz);
INSERT INTO item (part, price, bytes, at)
  SELECT n, n / 7.0, decode(md5(n::text), 'hex'), 'epoch'::timestamptz + n * interval '1 hour'
  FROM generate_series(1, 1000) n;
CREATE INDEX ON item (colour, (price * 2));
CREATE MATERIALIZED VIEW dear AS SELECT * FROM item WHERE price > 100;
CREATE FUNCTION total() RETURNS numeric LANGUAGE sql AS 'SELECT sum(price) FROM item';
SELECT lo_from_bytea(0, decode(repeat('00ff', 500000), 'hex')) > 0;
"""


SUMS: Final = ";".join(
    [f"SELECT count(*), sum(hashtext(body)) FROM part{n}" for n in range(TABLES)]
    + ["SELECT md5(string_agg(i::text, ';' ORDER BY id)) FROM item i", "SELECT total()"]
    + ["SELECT count(*) FROM dear", "SELECT md5(lo_get(oid)) FROM pg_largeobject_metadata"]
)


async def test_pg_dump_and_pg_restore_with_four_jobs_carry_the_same(
    ways: Ways, tmp_path: Path
) -> None:
    faulthandler.cancel_dump_traceback_later()  # each step has a bound
    seconds_max = TOOL_SECONDS_MAX + MEGABYTES / MEGABYTES_A_SECOND_MIN
    await run(
        *(ways.direct, ways.program("psql"), "-Xqc", fill(MEGABYTES)), seconds_max=seconds_max
    )
    # Both dump the direct way's database, and each restores what it dumped.
    source = ways.direct["PGDATABASE"]
    sums, schema = [], []
    for name, way in (("direct", ways.direct), ("proxied", ways.proxied)):
        target = f"restored_{source}_{name}"
        await execute(
            ways.place.server,
            f"CREATE DATABASE {target} TEMPLATE template0 OWNER {quoted(CLIENT_ID)}",
        )
        try:
            began = time.monotonic()
            dump = ("-Fd", "-j", "4", "-Z", "0", "-f", str(tmp_path / name), "-d", source)
            await run(way, ways.program("pg_dump"), *dump, seconds_max=seconds_max)
            dumped = time.monotonic()
            restore = ("-j", "4", "-d", target, str(tmp_path / name))
            await run(way, ways.program("pg_restore"), *restore, seconds_max=seconds_max)
            restored = time.monotonic()
            sys.stdout.write(
                f"{name}: {MEGABYTES} MB: pg_dump {dumped - began:.1f} s,"
                f" pg_restore {restored - dumped:.1f} s\n"
            )
            there = {**way, "PGDATABASE": target}
            sums.append(await ways.psql(there, SUMS))
            described = ("--schema-only", "--restrict-key=same")
            schema.append(await run(there, ways.program("pg_dump"), *described))
        finally:
            await drop(ways.place, target)
    assert sums == [await ways.psql(ways.direct, SUMS)] * 2
    assert schema[0] == schema[1]
    assert "CREATE MATERIALIZED VIEW" in schema[0]
    _same_files(tmp_path / "direct", tmp_path / "proxied")
    shutil.rmtree(tmp_path)
    version = await version_of(ways.program("pg_dump"))
    record_tool("pg_dump, pg_restore", f"{version}, {MEGABYTES} MB")


def _same_files(one: Path, other: Path) -> None:
    """Fail unless two dumps have the same data; their tables of contents have a time."""
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        if name != "toc.dat":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


async def test_pg_isready_opens_a_whole_session(ways: Ways) -> None:
    gateway = ways.place.lakebase.gateway
    logins = gateway.logins.total()
    said = [await run(way, ways.program("pg_isready")) for way in ways.both]
    assert [one.partition(" - ")[2] for one in said] == ["accepting connections\n"] * 2
    assert gateway.logins.total() == logins + 1
    record_tool("pg_isready", await version_of(ways.program("pg_isready")))
