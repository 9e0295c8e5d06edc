"""Simple queries, direct and through the proxy: rows, errors, notices, encodings, size."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    Exchange,
    ask,
    in_three_ways,
    query,
    say,
    session,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")

_TYPES: Final = (
    "SELECT true, 1::int2, 2::int4, 3::int8, 1.5::float4, 2.5::float8, 3.25::numeric, 'a'::char,"
    " 'b'::varchar(3), 'c'::text, '\\xdeadbeef'::bytea, '2026-01-02'::date, '03:04:05'::time,"
    " '2026-01-02 03:04:05'::timestamp, '1 day'::interval, '{1,NULL,3}'::int[],"
    " '{\"a\": 1}'::json, '{\"b\": [2]}'::jsonb, '10.0.0.0/8'::cidr, '(1,2)'::point,"
    " '[1,5)'::int4range, 'b1e6a1b2-0000-4000-8000-00000000c0de'::uuid, ROW(1, 'x'), NULL::text"
)
_LONG_BYTES: Final = 4 * 1024 * 1024

EXCHANGES: Final = (
    session("one row", ask("SELECT 1")),
    session("no row", ask("SELECT 1 WHERE false")),
    session("no column", ask("SELECT FROM generate_series(1, 3)")),
    session("many rows", ask("SELECT n, repeat('x', n % 50) FROM generate_series(1, 5000) n")),
    session("many columns", ask("SELECT " + ", ".join(f"{n} AS c{n}" for n in range(1600)))),
    session("all common types", ask(_TYPES)),
    session("a catalogue's columns", ask("SELECT oid, relname FROM pg_class WHERE oid = 1259")),
    session("a null and an empty string", ask("SELECT NULL, ''")),
    session("two statements", ask("SELECT 1; SELECT 2")),
    session("five statements of kinds", ask("SELECT 1; SET work_mem = '5MB'; SHOW work_mem;;BEGIN")),
    session("an error in the second of three", ask("SELECT 1; SELECT 1/0; SELECT 3")),
    session("a parse error ends all statements", ask("SELECT 1; SELEC 2")),
    session("an empty query", ask("")),
    session("only a semicolon", ask(";")),
    session("only a comment", ask("-- nothing")),
    session("a nested comment", ask("/* a /* b */ c */ SELECT 1")),
    session("a query of spaces", ask("   \n\t ")),
    session("a query without terminator", say(b"Q\0\0\0\x0dSELECT 12")),
    session("a query with bytes after its terminator", say(b"Q\0\0\0\x0fSELECT 1\0xx")),
    session("several queries in one piece", say(*(query(f"SELECT {n}") for n in range(20)), wait=b"Z" * 20)),
    session("an error among queries in one piece", say(query("SELECT 1"), query("SELECT 1/0"), query("SELECT 2"), wait=b"ZZZ")),
    session("division by zero", ask("SELECT 1/0")),
    session("an undefined table", ask("SELECT * FROM nowhere")),
    session("an undefined column with a hint", ask("SELECT relnam FROM pg_class")),
    session("an undefined function", ask("SELECT no_such(1)")),
    session("a syntax error and its position", ask("SELECT 'é', FROM")),
    session("an unterminated string", ask("SELECT 'abc")),
    session("invalid UTF-8", ask(b"SELECT '\xff\xfe'")),
    session("a NUL by chr", ask("SELECT chr(0)")),
    session("an error of a cast", ask("SELECT 'x'::int")),
    session("out of range", ask("SELECT 2147483647 + 1")),
    session("permission denied", ask("SELECT * FROM pg_authid")),
    session("a read-only transaction", ask("SET default_transaction_read_only = on", "CREATE TABLE t (n int)")),
    session("a unique violation and its fields", ask("CREATE TEMP TABLE t (n int PRIMARY KEY)", "INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (1)")),
    session("a check violation", ask("CREATE TEMP TABLE t (n int CONSTRAINT small CHECK (n < 3))", "INSERT INTO t VALUES (4)")),
    session("a null violation names the column", ask("CREATE TEMP TABLE t (n int NOT NULL)", "INSERT INTO t VALUES (NULL)")),
    session("a raised error with every field", ask("DO $$ BEGIN RAISE EXCEPTION 'told' USING DETAIL = 'd', HINT = 'h', ERRCODE = 'ZZ999', COLUMN = 'c', CONSTRAINT = 'k', DATATYPE = 'y', TABLE = 't', SCHEMA = 's'; END $$")),
    session("an error with a context", ask("CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1/0; END'", "SELECT pg_temp.f()")),
    session("an error of an inner query", ask("DO $$ BEGIN EXECUTE 'SELECT nothing'; END $$")),
    session("an error message of 100 kB", ask("DO $$ BEGIN RAISE EXCEPTION '%', repeat('é', 50000); END $$")),
    session("rows before an error", ask("SELECT 1 / (1000 - n) FROM generate_series(1, 2000) n")),
    session("statement timeout", ask("SET statement_timeout = 20", "SELECT pg_sleep(30)", "RESET statement_timeout", "SELECT 1")),
    session("insert, update, delete and their tags", ask("CREATE TEMP TABLE t (n int)", "INSERT INTO t SELECT generate_series(1, 9)", "UPDATE t SET n = n + 1 WHERE n > 4", "DELETE FROM t WHERE n > 8", "TRUNCATE t", "DROP TABLE t")),
    session("returning", ask("CREATE TEMP TABLE t (n int)", "INSERT INTO t VALUES (1), (2) RETURNING n * 2 AS twice")),
    session("merge", ask("CREATE TEMP TABLE t (n int)", "MERGE INTO t USING (VALUES (1)) v(n) ON t.n = v.n WHEN NOT MATCHED THEN INSERT VALUES (v.n)")),
    session("select into", ask("SELECT n INTO TEMP t FROM generate_series(1, 4) n", "SELECT sum(n) FROM t")),
    session("explain", ask("EXPLAIN (COSTS off) SELECT 1 WHERE false")),
    session("show all has one shape", ask("SELECT count(*) > 300 FROM pg_settings")),
    session("prepare and execute in SQL", ask("PREPARE p(int) AS SELECT $1 * 2", "EXECUTE p(4)", "DEALLOCATE p", "EXECUTE p(4)")),
    session("do", ask("DO $$ BEGIN PERFORM 1; END $$")),
    session("call a procedure", ask("CREATE PROCEDURE pg_temp.p(INOUT n int) LANGUAGE sql AS 'SELECT n + 1'", "CALL pg_temp.p(3)")),
    session("lock and discard", ask("BEGIN; LOCK TABLE pg_catalog.pg_class IN ACCESS SHARE MODE; COMMIT", "DISCARD ALL")),
    session("identifiers of 63 bytes and more", ask(f'SELECT 1 AS "{"x" * 63}", 2 AS "{"y" * 70}"')),
    session("text of every plane", ask("SELECT 'é€𝄞 and ümlaut' AS \"ñ\"")),
    session("latin1 to the client", ask("SET client_encoding = LATIN1", b"SELECT '\xe9' AS \"\xfc\", 'x'")),
    session("what the client's encoding cannot say", ask("SET client_encoding = LATIN1", "SELECT U&'\\20ac'")),
    session("a query of 4 MB", ask("SELECT length('" + "x" * _LONG_BYTES + "')")),
    session("a query of 4 MB of comment", ask("/*" + "é" * (_LONG_BYTES // 2) + "*/ SELECT 1")),
    session("a query of 4 MB and its error", ask("SELECT '" + "y" * _LONG_BYTES + "' FROM nowhere")),
    session("a value of 8 MB", ask("SELECT repeat('abcdefgh', 1024 * 1024)")),
    session("rows of 100 kB each", ask("SELECT repeat(chr(65 + n), 100000) FROM generate_series(1, 25) n")),
    session("50,000 narrow rows", ask("SELECT n FROM generate_series(1, 50000) n")),
)  # fmt: skip


@in_three_ways(*EXCHANGES, bytes_every=6, random_every=5)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
