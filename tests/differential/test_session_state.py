"""A session's state, direct and through the proxy: transactions, settings, notices, cursors."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    Exchange,
    ask,
    in_three_ways,
    query,
    session,
    until_end,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXCHANGES: Final = (
    session("begin and commit", ask("BEGIN", "SELECT 1", "COMMIT", "SELECT 2")),
    session("begin and rollback", ask("BEGIN", "CREATE TEMP TABLE t (n int)", "ROLLBACK", "SELECT count(*) FROM pg_class WHERE relname = 't'")),
    session("a failed transaction", ask("BEGIN", "SELECT 1/0", "SELECT 1", "COMMIT", "SELECT 2")),
    session("a failed transaction rolled back", ask("BEGIN", "SELECT nothing", "ROLLBACK")),
    session("a savepoint saves", ask("BEGIN", "SAVEPOINT a", "SELECT 1/0", "ROLLBACK TO a", "SELECT 1", "COMMIT")),
    session("a missing savepoint", ask("BEGIN", "ROLLBACK TO nowhere", "ROLLBACK")),
    session("begin in a transaction warns", ask("BEGIN", "BEGIN", "COMMIT")),
    session("commit outside a transaction warns", ask("COMMIT", "ROLLBACK")),
    session("an implicit transaction made explicit", ask("SELECT 1; BEGIN; SELECT 2", "COMMIT")),
    session("commit in one query", ask("BEGIN; SELECT 1; COMMIT; SELECT 2")),
    session("an error in an implicit block", ask("CREATE TEMP TABLE t (n int)", "INSERT INTO t VALUES (1); SELECT 1/0", "SELECT count(*) FROM t")),
    session("commit and chain", ask("BEGIN ISOLATION LEVEL SERIALIZABLE", "COMMIT AND CHAIN", "SHOW transaction_isolation", "ROLLBACK")),
    session("isolation set too late", ask("BEGIN", "SELECT 1", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "ROLLBACK")),
    session("a deferred constraint fails at commit", ask("CREATE TEMP TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)", "BEGIN", "INSERT INTO t VALUES (1), (1)", "COMMIT")),
    session("idle in transaction ends the session", ask("SET idle_in_transaction_session_timeout = 20"), until_end(query("BEGIN"))),
    session("an idle session ends", until_end(query("SET idle_session_timeout = 20"))),
    session("a setting that is reported", ask("SET application_name = 'told'")),
    session("every setting that is reported", ask("SET client_encoding = LATIN1; SET DateStyle = 'German, YMD'; SET IntervalStyle = iso_8601; SET TimeZone = 'Europe/Lisbon'; SET standard_conforming_strings = off; SET default_transaction_read_only = on; SET application_name = 'é'")),
    session("a setting that is not reported", ask("SET work_mem = '5MB'", "SHOW work_mem")),
    session("reset reports again", ask("SET TimeZone = 'Asia/Tokyo'", "RESET TimeZone", "RESET ALL")),
    session("a rolled back setting is reported twice", ask("BEGIN", "SET TimeZone = 'Asia/Tokyo'", "ROLLBACK")),
    session("a local setting", ask("BEGIN", "SET LOCAL TimeZone = 'Asia/Tokyo'", "COMMIT")),
    session("the same value is not reported", ask("SET TimeZone = 'Asia/Tokyo'", "SET TimeZone = 'Asia/Tokyo'")),
    session("set_config reports", ask("SELECT set_config('TimeZone', 'Asia/Tokyo', false)")),
    session("a setting in a function is reported when it stays", ask("DO $$ BEGIN SET TimeZone = 'Asia/Tokyo'; END $$")),
    session("discard all reports the defaults", ask("SET TimeZone = 'Asia/Tokyo'; SET application_name = 'x'", "DISCARD ALL")),
    session("an unknown setting", ask("SET no_such = 1", "SHOW no_such")),
    session("a setting of the wrong kind", ask("SET work_mem = 'much'", "SET port = 5433", "SET log_statement = 'all'")),
    session("a custom setting", ask("SET my.own = 'x'", "SHOW my.own", "RESET my.own")),
    session("set role is not allowed to a superuser", ask("SET ROLE postgres", "SET SESSION AUTHORIZATION postgres")),
    session("set role to a group", ask('SET ROLE "demo-engineers"', "SELECT current_user", "RESET ROLE", "SELECT current_user = session_user")),
    session("the client's name and database", ask("SELECT current_user, session_user, current_database()")),
    session("notices of every level", ask("SET client_min_messages = debug1; DO $$ BEGIN RAISE DEBUG 'd'; RAISE LOG 'l'; RAISE INFO 'i'; RAISE NOTICE 'n'; RAISE WARNING 'w'; END $$")),
    session("notices below the level", ask("SET client_min_messages = error", "DO $$ BEGIN RAISE WARNING 'w'; END $$")),
    session("a notice with every field", ask("DO $$ BEGIN RAISE NOTICE 'told' USING DETAIL = 'd', HINT = 'h', ERRCODE = '01234', COLUMN = 'c', TABLE = 't'; END $$")),
    session("a thousand notices", ask("DO $$ BEGIN FOR n IN 1..1000 LOOP RAISE NOTICE 'n %', n; END LOOP; END $$")),
    session("a notice of 1 MB", ask("DO $$ BEGIN RAISE NOTICE '%', repeat('n', 1000000); END $$")),
    session("a notice that something exists", ask("CREATE TEMP TABLE t (n int)", "CREATE TEMP TABLE IF NOT EXISTS t (n int)", "DROP TABLE IF EXISTS nowhere")),
    session("a notice before rows", ask("CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''called''; RETURN 1; END'", "SELECT pg_temp.f() FROM generate_series(1, 3)")),
    session("a cursor", ask("BEGIN; DECLARE c CURSOR FOR SELECT n FROM generate_series(1, 9) n", "FETCH 2 FROM c", "MOVE 3 IN c", "FETCH ALL FROM c", "FETCH 1 FROM c", "CLOSE c; COMMIT")),
    session("a cursor that goes back", ask("BEGIN; DECLARE c SCROLL CURSOR FOR SELECT n FROM generate_series(1, 5) n", "FETCH LAST FROM c", "FETCH PRIOR FROM c", "FETCH FIRST FROM c", "FETCH ABSOLUTE 3 FROM c", "FETCH RELATIVE -1 FROM c", "COMMIT")),
    session("a cursor that cannot go back", ask("BEGIN; DECLARE c NO SCROLL CURSOR FOR SELECT n FROM generate_series(1, 5) n", "FETCH 2 FROM c", "FETCH PRIOR FROM c", "ROLLBACK")),
    session("a cursor with hold", ask("DECLARE c CURSOR WITH HOLD FOR SELECT n FROM generate_series(1, 5) n", "FETCH 2 FROM c", "CLOSE ALL", "FETCH 1 FROM c")),
    session("a binary cursor", ask("BEGIN; DECLARE c BINARY CURSOR FOR SELECT 1, 'x'::text, 1.5::float8", "FETCH ALL FROM c", "COMMIT")),
    session("a cursor outside a transaction", ask("DECLARE c CURSOR FOR SELECT 1")),
    session("a refcursor from a function", ask("BEGIN", "CREATE FUNCTION pg_temp.f() RETURNS refcursor LANGUAGE plpgsql AS 'DECLARE r refcursor := ''r''; BEGIN OPEN r FOR SELECT 1; RETURN r; END'", "SELECT pg_temp.f()", "FETCH ALL FROM r", "ROLLBACK")),
    session("a large object by SQL", ask("BEGIN", "SELECT lo_from_bytea(4242, '\\x0102')", "SELECT loread(lo_open(4242, 262144), 10)", "SELECT lo_unlink(4242)", "ROLLBACK")),
    session("a temporary table and its prepared statement", ask("CREATE TEMP TABLE t AS SELECT generate_series(1, 5) n", "PREPARE p AS SELECT sum(n) FROM t", "EXECUTE p", "DISCARD TEMP", "EXECUTE p")),
    session("an advisory lock", ask("SELECT pg_advisory_lock(-77)", "SELECT pg_advisory_unlock(-77)", "SELECT pg_advisory_unlock(-77)")),
    session("a lock that is not waited for", ask("CREATE TABLE IF NOT EXISTS public.differential_lock (n int)", "BEGIN; LOCK TABLE public.differential_lock"), ask("LOCK TABLE public.differential_lock NOWAIT", on=1), ask("DROP TABLE public.differential_lock; COMMIT")),
)  # fmt: skip


@in_three_ways(*EXCHANGES)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
