"""The extended protocol, direct and through the proxy: each message, its errors, its formats."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    FLUSH,
    SYNC,
    Exchange,
    ask,
    bind,
    close,
    describe,
    execute,
    extended,
    in_three_ways,
    parse,
    query,
    say,
    session,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")

_INT4: Final = 23
_TEXT: Final = 25
_UNKNOWN: Final = 705
_NO_TYPE: Final = 4_000_000  # an OID that no type has

EXCHANGES: Final = (
    session("parse, bind, describe, execute, sync", say(extended("SELECT 1"), SYNC)),
    session("parse alone", say(parse("SELECT 1"), SYNC)),
    session("sync alone", say(SYNC)),
    session("sync five times", say(SYNC * 5, wait=b"ZZZZZ")),
    session("flush alone, then sync", say(FLUSH, wait=b""), say(SYNC)),
    session("flush after each message", say(parse("SELECT 7"), FLUSH, wait=b"1"), say(bind(), FLUSH, wait=b"2"), say(describe(b"P"), FLUSH, wait=b"T"), say(execute(), FLUSH, wait=b"C"), say(SYNC)),
    session("describe a statement with parameters", say(parse("SELECT $1::int + $2, $3::text"), describe(b"S"), SYNC)),
    session("describe a statement without rows", say(parse("SET work_mem = '5MB'"), describe(b"S"), SYNC)),
    session("describe a portal without rows", say(parse("BEGIN"), bind(), describe(b"P"), SYNC)),
    session("parameters with types given", say(parse("SELECT $1, $2", types=(_INT4, _TEXT)), describe(b"S"), bind(("5", "five")), execute(), SYNC)),
    session("parameters of unknown type", say(parse("SELECT $1 || 'x'", types=(_UNKNOWN,)), describe(b"S"), bind(("a",)), execute(), SYNC)),
    session("more types than parameters", say(parse("SELECT $1::int", types=(_INT4, _TEXT, 0)), describe(b"S"), bind(("1", "2", "3")), execute(), SYNC)),
    session("a null and an empty parameter", say(parse("SELECT $1::text IS NULL, $2::text = ''"), bind((None, "")), execute(), SYNC)),
    session("binary parameters", say(parse("SELECT $1::int8 + 1, $2::bytea"), bind((bytes(7) + b"\x29", b"\0\xff"), formats=(1,)), execute(), SYNC)),
    session("a format for each parameter", say(parse("SELECT $1::int4, $2::text"), bind((bytes(3) + b"\x07", "t"), formats=(1, 0)), execute(), SYNC)),
    session("binary results", say(extended("SELECT true, 1::int2, 2, 3::int8, 1.5::float8, 12.34::numeric, 'é', '\\x00ff'::bytea, '2026-01-02'::date, '{1,2}'::int[], NULL::int", results=(1,)), SYNC)),
    session("a format for each result", say(extended("SELECT 1, 2, 'x'", results=(0, 1, 1)), SYNC)),
    session("too few result formats", say(extended("SELECT 1, 2, 'x'", results=(0, 1)), SYNC)),
    session("a result format that is none", say(extended("SELECT 1", results=(7,)), SYNC)),
    session("a binary result that has no binary form", say(extended("SELECT '=(integer,integer)'::regoperator, '=r/postgres'::aclitem", results=(1,)), SYNC)),
    session("a named statement twice", say(parse("SELECT $1::int * 2", "double"), SYNC), say(bind(("4",), "double"), execute(), SYNC), say(bind(("5",), "double"), execute(), SYNC)),
    session("a named statement is not parsed twice", say(parse("SELECT 1", "s"), SYNC), say(parse("SELECT 2", "s"), SYNC)),
    session("the unnamed statement is replaced", say(parse("SELECT 1"), SYNC), say(parse("SELECT 2"), SYNC), say(bind(), execute(), SYNC)),
    session("a Query ends the unnamed statement", say(parse("SELECT 1"), SYNC), ask("SELECT 3"), say(bind(), execute(), SYNC)),
    session("close a statement and use it", say(parse("SELECT 1", "s"), close(b"S", "s"), SYNC), say(bind((), "s"), SYNC)),
    session("close what does not exist", say(close(b"S", "no"), close(b"P", "no"), SYNC)),
    session("close the unnamed ones", say(parse("SELECT 1"), bind(), close(b"P"), close(b"S"), SYNC), say(bind(), SYNC)),
    session("close of neither kind", say(close(b"X", "s"), SYNC)),
    session("describe of neither kind", say(describe(b"Q", "s"), SYNC)),
    session("describe a missing statement", say(describe(b"S", "missing"), SYNC)),
    session("describe a missing portal", say(describe(b"P", "missing"), SYNC)),
    session("execute a missing portal", say(execute("missing"), SYNC)),
    session("bind a missing statement", say(bind((), "missing"), SYNC)),
    session("bind with too few values", say(parse("SELECT $1::int, $2::int"), bind(("1",)), SYNC)),
    session("bind with too many values", say(parse("SELECT 1"), bind(("1",)), SYNC)),
    session("bind with formats that do not match", say(parse("SELECT $1::int"), bind(("1",), formats=(0, 0, 0)), SYNC)),
    session("bind a value that is no number", say(parse("SELECT $1::int"), bind(("many",)), SYNC)),
    session("bind a binary value too short", say(parse("SELECT $1::int"), bind((b"\0\1",), formats=(1,)), SYNC)),
    session("bind invalid UTF-8", say(parse("SELECT $1::text"), bind((b"\xff\xfe",)), SYNC)),
    session("an error in parse", say(parse("SELEC 1"), bind(), execute(), SYNC), ask("SELECT 'alive'")),
    session("an unknown parameter type", say(parse("SELECT $1", types=(_NO_TYPE,)), SYNC)),
    session("a parameter whose type cannot be told", say(parse("SELECT $1 = $2"), describe(b"S"), SYNC)),
    session("two statements in one parse", say(parse("SELECT 1; SELECT 2"), SYNC)),
    session("an error in execute", say(extended("SELECT 1 / $1::int", "0"), SYNC), ask("SELECT 'alive'")),
    session("an error after rows", say(extended("SELECT 10 / (3 - n) FROM generate_series(1, 5) n"), SYNC)),
    session("what follows an error is skipped", say(extended("SELECT 1/0"), extended("SELECT 2"), describe(b"S", "no"), SYNC), say(SYNC)),
    session("a Query in the middle of skipping", say(parse("SELEC"), query("SELECT 1"), SYNC)),
    session("an empty statement", say(extended(""), SYNC)),
    session("an empty statement without its description", say(parse(""), bind(), execute(), SYNC)),
    session("row limits suspend a portal", say(parse("SELECT n FROM generate_series(1, 5) n"), bind(portal="p"), execute("p", 2), execute("p", 2), execute("p", 2), execute("p", 2), SYNC)),
    session("a row limit of exactly all rows", say(parse("SELECT n FROM generate_series(1, 3) n"), bind(portal="p"), execute("p", 3), execute("p", 3), SYNC)),
    session("a portal ends with its transaction", say(parse("SELECT n FROM generate_series(1, 5) n"), bind(portal="p"), execute("p", 1), SYNC), say(execute("p", 1), SYNC)),
    session("a portal lives in a transaction", ask("BEGIN"), say(parse("SELECT n FROM generate_series(1, 5) n"), bind(portal="p"), execute("p", 2), SYNC), say(execute("p", 2), SYNC), say(execute("p"), SYNC), ask("COMMIT")),
    session("two portals side by side", ask("BEGIN"), say(parse("SELECT n FROM generate_series(1, 4) n", "s"), bind((), "s", "a"), bind((), "s", "b"), execute("a", 1), execute("b", 2), execute("a", 2), execute("b", 9), SYNC), ask("COMMIT")),
    session("a portal's name is taken", ask("BEGIN"), say(parse("SELECT 1", "s"), bind((), "s", "p"), bind((), "s", "p"), SYNC), ask("ROLLBACK")),
    session("a negative row limit", say(parse("SELECT n FROM generate_series(1, 3) n"), bind(), execute(rows_max=-1), SYNC)),
    session("insert returning with a row limit", ask("CREATE TEMP TABLE t (n int)"), say(parse("INSERT INTO t SELECT generate_series(1, 4) RETURNING n + 0"), bind(portal="p"), execute("p", 2), execute("p", 2), execute("p", 2), SYNC)),
    session("insert, update, delete and their tags", ask("CREATE TEMP TABLE t (n int)"), say(extended("INSERT INTO t VALUES ($1)", "1"), extended("UPDATE t SET n = $1", "2"), extended("DELETE FROM t WHERE n = $1", "2"), SYNC)),
    session("set by a parameterised statement", say(extended("SELECT set_config('application_name', $1, false)", "told"), SYNC)),
    session("show", say(extended("SHOW TimeZone"), SYNC)),
    session("begin, work and commit", say(extended("BEGIN"), extended("SELECT 1"), extended("COMMIT"), SYNC)),
    session("syncs in a transaction", say(extended("BEGIN"), SYNC, extended("SELECT 1/0"), SYNC, extended("SELECT 2"), SYNC, extended("ROLLBACK"), SYNC, wait=b"ZZZZ")),
    session("a prepared statement outlives its table", ask("CREATE TEMP TABLE t (n int)"), say(parse("SELECT n + 0 FROM t", "s"), SYNC), ask("DROP TABLE t"), say(bind((), "s"), execute(), SYNC)),
    session("a cached plan must not change its result", ask("CREATE TEMP TABLE t (n int)"), say(parse("SELECT * FROM t", "s"), SYNC), ask("ALTER TABLE t ADD COLUMN m int"), say(bind((), "s"), execute(), SYNC)),
    session("deallocate from SQL", say(parse("SELECT 1", "s"), SYNC), ask("DEALLOCATE s"), say(bind((), "s"), SYNC)),
    session("a statement made in SQL", ask("PREPARE s AS SELECT $1::int + 1"), say(bind(("4",), "s"), describe(b"P"), execute(), SYNC)),
    session("a statement's name of 60 bytes", say(parse("SELECT 1", "n" * 60), bind((), "n" * 60), execute(), SYNC)),
    session("a parameter of 3 MB", say(extended("SELECT length($1::text), md5($1::text)", "z" * 3_000_000), SYNC)),
    session("a statement of 3 MB", say(extended("SELECT length('" + "z" * 3_000_000 + "')"), SYNC)),
    session("1,000 parameters", say(extended("SELECT " + "+".join(f"${n}::int" for n in range(1, 1001)), *(str(n) for n in range(1000))), SYNC)),
    session("a notice inside execute", say(extended("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$"), SYNC)),
    session("explain by parameters", say(extended("EXPLAIN (COSTS off) SELECT $1::int", "1"), SYNC)),
    session("fetch from a declared cursor", ask("BEGIN; DECLARE c CURSOR FOR SELECT n FROM generate_series(1, 4) n"), say(extended("FETCH 2 FROM c"), extended("FETCH ALL FROM c"), SYNC), ask("COMMIT")),
)  # fmt: skip


@in_three_ways(*EXCHANGES)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
