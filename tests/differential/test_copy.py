"""COPY, direct and through the proxy: in, out and failed, simple and extended."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    COPY_DONE,
    FLUSH,
    SYNC,
    Exchange,
    Steps,
    ask,
    bind,
    copy_data,
    copy_fail,
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

_BINARY_HEAD: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_BINARY_ROW: Final = b"\0\1\0\0\0\4\0\0\0\x2a"
_BINARY_END: Final = b"\xff\xff"
_TABLE: Final = ask("CREATE TEMP TABLE t (n int, s text)")
_COUNT: Final = ask("SELECT count(*), sum(n), md5(string_agg(s, ',' ORDER BY n)) FROM t")


def _begin(sql: str) -> Steps:
    """Return the step that starts a COPY FROM STDIN."""
    return say(query(sql), wait=b"G")


def _rows(count: int, width: int = 5) -> bytes:
    return b"".join(b"%d\t%s\n" % (n, b"v" * width) for n in range(count))


EXCHANGES: Final = (
    session("out as text", ask("COPY (SELECT n, 'row ' || n FROM generate_series(1, 10) n) TO STDOUT")),
    session("out as csv with a header", ask("COPY (SELECT 1 AS a, 'x,\"y' AS b, NULL AS c) TO STDOUT (FORMAT csv, HEADER)")),
    session("out as binary", ask("COPY (SELECT n, n::text, NULL::int FROM generate_series(1, 10) n) TO STDOUT (FORMAT binary)")),
    session("out of nothing", ask("COPY (SELECT 1 WHERE false) TO STDOUT")),
    session("out with escapes", ask("COPY (SELECT E'tab\\there', E'line\\nbreak', E'back\\\\slash', '') TO STDOUT")),
    session("out 50,000 rows", ask("COPY (SELECT n, repeat('x', 20) FROM generate_series(1, 50000) n) TO STDOUT")),
    session("out with an error midway", ask("COPY (SELECT 1 / (500 - n) FROM generate_series(1, 1000) n) TO STDOUT"), ask("SELECT 'alive'")),
    session("out of a missing table", ask("COPY nowhere TO STDOUT")),
    session("out by the extended protocol", say(extended("COPY (SELECT 1, 2) TO STDOUT"), SYNC)),
    session("out by the extended protocol, described", say(parse("COPY (SELECT 1, 2) TO STDOUT"), describe(b"S"), bind(), describe(b"P"), execute(), SYNC)),
    session("out twice in one query", ask("COPY (SELECT 1) TO STDOUT; COPY (SELECT 2) TO STDOUT; SELECT 3")),
    session("out with a row limit", say(parse("COPY (SELECT generate_series(1, 5)) TO STDOUT"), bind(), execute(rows_max=2), SYNC)),
    session("in as text", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n2\tb\n"), COPY_DONE), _COUNT),
    session("in as csv", _TABLE, _begin("COPY t FROM STDIN (FORMAT csv)"), say(copy_data('1,"a,b"\n2,\n'), COPY_DONE), _COUNT),
    session("in as binary", ask("CREATE TEMP TABLE t (n int)"), _begin("COPY t FROM STDIN (FORMAT binary)"), say(copy_data(_BINARY_HEAD + _BINARY_ROW * 3 + _BINARY_END), COPY_DONE), ask("SELECT count(*), sum(n) FROM t")),
    session("in as binary, cut anywhere", ask("CREATE TEMP TABLE t (n int)"), _begin("COPY t FROM STDIN (FORMAT binary)"), say(copy_data(_BINARY_HEAD[:7]), copy_data(_BINARY_HEAD[7:] + _BINARY_ROW[:3]), copy_data(_BINARY_ROW[3:]), copy_data(_BINARY_END), COPY_DONE), ask("SELECT count(*), sum(n) FROM t")),
    session("in as binary without its head", ask("CREATE TEMP TABLE t (n int)"), _begin("COPY t FROM STDIN (FORMAT binary)"), say(copy_data("1\n"), COPY_DONE)),
    session("in of nothing", _TABLE, _begin("COPY t FROM STDIN"), say(COPY_DONE), _COUNT),
    session("in of empty pieces", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data(""), copy_data("1\ta\n"), copy_data(""), COPY_DONE), _COUNT),
    session("in cut inside rows", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\t"), copy_data("a\n2"), copy_data("\tb"), copy_data("\n"), COPY_DONE), _COUNT),
    session("in without the last line end", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n2\tb"), COPY_DONE), _COUNT),
    session("in ended by the old mark", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n\\.\n"), COPY_DONE), _COUNT),
    session("in with data after the old mark", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n\\.\n2\tb\n"), COPY_DONE), _COUNT),
    session("in 20,000 rows", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data(_rows(20_000)), COPY_DONE), _COUNT),
    session("in a message for each row", _TABLE, _begin("COPY t FROM STDIN"), say(*(copy_data(b"%d\tv\n" % n) for n in range(2000)), COPY_DONE), _COUNT),
    session("in one row of 4 MB", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data(_rows(1, 4_000_000)), COPY_DONE), _COUNT),
    session("in all in one piece with its query", _TABLE, say(query("COPY t FROM STDIN"), copy_data("1\ta\n"), COPY_DONE), _COUNT),
    session("in twice in one query", _TABLE, say(query("COPY t FROM STDIN; COPY t FROM STDIN; SELECT 1"), copy_data("1\ta\n"), COPY_DONE, copy_data("2\tb\n"), COPY_DONE), _COUNT),
    session("failed by the client", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n"), copy_fail("not wanted: é")), _COUNT),
    session("failed at once", _TABLE, _begin("COPY t FROM STDIN"), say(copy_fail("")), _COUNT),
    session("failed in a transaction", _TABLE, ask("BEGIN"), _begin("COPY t FROM STDIN"), say(copy_fail("no")), ask("SELECT 1", "ROLLBACK"), _COUNT),
    session("an error midway and data after it", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\nmany\tb\n"), wait=b"EZ"), say(copy_data("3\tc\n"), COPY_DONE, query("SELECT 'alive'")), _COUNT),
    session("an error midway, all in one piece", _TABLE, say(query("COPY t FROM STDIN"), copy_data("many\tb\n"), copy_data("3\tc\n"), COPY_DONE, query("SELECT 'alive'"), wait=b"ZZ"), _COUNT),
    session("an error midway and a fail after it", _TABLE, say(query("COPY t FROM STDIN"), copy_data("many\tb\n"), copy_fail("late"), query("SELECT 'alive'"), wait=b"ZZ")),
    session("too few columns", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\n"), COPY_DONE)),
    session("too many columns", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\tb\n"), COPY_DONE)),
    session("invalid UTF-8 in the data", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data(b"1\t\xff\n"), COPY_DONE)),
    session("in by the extended protocol", _TABLE, say(extended("COPY t FROM STDIN"), FLUSH, wait=b"G"), say(copy_data("1\ta\n"), COPY_DONE, SYNC), _COUNT),
    session("in by the extended protocol, in one piece", _TABLE, say(extended("COPY t FROM STDIN"), copy_data("1\ta\n"), COPY_DONE, SYNC), _COUNT),
    session("failed in the extended protocol", _TABLE, say(extended("COPY t FROM STDIN"), copy_data("1\ta\n"), copy_fail("no"), SYNC), _COUNT),
    session("an error midway in the extended protocol", _TABLE, say(extended("COPY t FROM STDIN"), copy_data("x\ty\n"), copy_data("1\ta\n"), COPY_DONE, SYNC), _COUNT),
    session("a sync among the data is ignored", _TABLE, say(extended("COPY t FROM STDIN"), SYNC, copy_data("1\ta\n"), FLUSH, SYNC, copy_data("2\tb\n"), COPY_DONE, SYNC), _COUNT),
    session("a sync among the data of a failing copy", _TABLE, say(extended("COPY t FROM STDIN"), SYNC, copy_data("x\ty\n"), COPY_DONE, SYNC), _COUNT),
    session("a query among the data", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n"), query("SELECT 1")), _COUNT),
    session("a parse among the data", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n"), parse("SELECT 1"), wait=b"EZ"), _COUNT),
    session("data without a copy", say(copy_data("1\n"), COPY_DONE, copy_fail("x"), query("SELECT 1"))),
    session("in with a view's refusal", ask("CREATE TEMP VIEW v AS SELECT 1 AS n"), say(query("COPY v FROM STDIN"), wait=b"EZ")),
    session("a trigger's notices during the data", _TABLE, ask("CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''%'', NEW.n; RETURN NEW; END'", "CREATE TRIGGER t BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION pg_temp.f()"), _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n2\tb\n"), COPY_DONE)),
    session("in and leaving in the middle", _TABLE, _begin("COPY t FROM STDIN"), say(copy_data("1\ta\n"), wait=b"")),
    session("a file of the server is refused", ask("COPY pg_class TO '/tmp/no'", "COPY pg_class FROM PROGRAM 'true'")),
)  # fmt: skip


@in_three_ways(*EXCHANGES)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
