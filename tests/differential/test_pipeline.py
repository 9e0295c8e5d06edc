"""Pipelines, direct and through the proxy: much sent before anything is read."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    COPY_DONE,
    FLUSH,
    LEAVING,
    SYNC,
    TERMINATE,
    Exchange,
    ask,
    bind,
    close,
    copy_data,
    execute,
    extended,
    in_three_ways,
    parse,
    query,
    say,
    session,
    startup,
    until_end,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _queued(count: int, sync_every: int) -> bytes:
    """Return so many statements with a Sync after every so many."""
    return b"".join(
        extended(f"SELECT {n}") + (SYNC if n % sync_every == sync_every - 1 else b"")
        for n in range(count)
    )


EXCHANGES: Final = (
    session("two statements, one sync", say(extended("SELECT 1"), extended("SELECT 2"), SYNC)),
    session("two statements, two syncs", say(extended("SELECT 1"), SYNC, extended("SELECT 2"), SYNC, wait=b"ZZ")),
    session("100 statements, 100 syncs", say(_queued(100, 1), wait=b"Z" * 100)),
    session("100 statements, one sync", say(_queued(100, 100))),
    session("100 statements, a sync after every 7", say(_queued(100, 7), SYNC, wait=b"Z" * 15)),
    session("an error in the first of three groups", say(extended("SELECT 1/0"), SYNC, extended("SELECT 2"), SYNC, extended("SELECT 3"), SYNC, wait=b"ZZZ")),
    session("an error in the second of three groups", say(extended("SELECT 1"), SYNC, extended("SELECT 2/0"), extended("SELECT 'skipped'"), SYNC, extended("SELECT 3"), SYNC, wait=b"ZZZ")),
    session("an error in the last of three groups", say(extended("SELECT 1"), SYNC, extended("SELECT 2"), SYNC, parse("SELEC"), SYNC, wait=b"ZZZ")),
    session("an error in every group", say(*(extended(f"SELECT {n}/0") + SYNC for n in range(10)), wait=b"Z" * 10)),
    session("an error undoes its group", ask("CREATE TEMP TABLE t (n int)"), say(extended("INSERT INTO t VALUES (1)"), extended("SELECT 1/0"), SYNC, extended("SELECT count(*) FROM t"), SYNC, wait=b"ZZ")),
    session("a group without an error stays", ask("CREATE TEMP TABLE t (n int)"), say(extended("INSERT INTO t VALUES (1)"), SYNC, extended("SELECT 1/0"), SYNC, extended("SELECT count(*) FROM t"), SYNC, wait=b"ZZZ")),
    session("a transaction over several syncs", say(extended("BEGIN"), SYNC, extended("SELECT 1"), SYNC, extended("COMMIT"), SYNC, wait=b"ZZZ")),
    session("a failed transaction over several syncs", say(extended("BEGIN"), SYNC, extended("SELECT 1/0"), SYNC, extended("SELECT 2"), SYNC, extended("COMMIT"), SYNC, wait=b"ZZZZ")),
    session("a commit inside a group", say(extended("BEGIN"), extended("SELECT 1"), extended("COMMIT"), extended("SELECT 2"), SYNC)),
    session("an error after a commit inside a group", ask("CREATE TEMP TABLE t (n int)"), say(extended("BEGIN"), extended("INSERT INTO t VALUES (1)"), extended("COMMIT"), extended("SELECT 1/0"), SYNC), ask("SELECT count(*) FROM t")),
    session("queries between groups", say(query("SELECT 'q'"), extended("SELECT 1"), SYNC, query("SELECT 'r'; SELECT 's'"), extended("SELECT 2"), SYNC, wait=b"ZZZZ")),
    session("a query inside a group", say(parse("SELECT 1"), query("SELECT 'q'"), bind(), execute(), SYNC, wait=b"ZZ")),
    session("flushes instead of syncs", say(extended("SELECT 1"), FLUSH, extended("SELECT 2"), FLUSH, wait=b"CC"), say(SYNC)),
    session("an error that a flush brings", say(extended("SELECT 1/0"), FLUSH, extended("SELECT 'skipped'"), FLUSH, wait=b"E"), say(SYNC)),
    session("no sync at all, then leaving", say(extended("SELECT 1"), wait=b"")),
    session("an error without a sync, then leaving", say(parse("SELEC"), FLUSH, wait=b"E")),
    session("leaving in one piece with the queries", say(query("SELECT 1"), query("SELECT 2"), TERMINATE, wait=b"ZZ")),
    session("statements named and closed in one piece", say(*(parse(f"SELECT {n}", f"s{n}") + bind((), f"s{n}", f"p{n}") + execute(f"p{n}") + close(b"P", f"p{n}") + close(b"S", f"s{n}") for n in range(25)), SYNC)),
    session("a statement parsed and used over syncs", say(parse("SELECT $1::int", "s"), SYNC, bind(("1",), "s"), execute(), SYNC, bind(("x",), "s"), execute(), SYNC, bind(("3",), "s"), execute(), SYNC, wait=b"ZZZZ")),
    session("settings reported in the middle", say(extended("SET application_name = 'a'"), SYNC, extended("SET TimeZone = 'Europe/Lisbon'"), SYNC, wait=b"ZZ")),
    session("notices in the middle", say(extended("SELECT 1"), extended("DO $$ BEGIN RAISE NOTICE 'n'; END $$"), SYNC, extended("SELECT 2"), SYNC, wait=b"ZZ")),
    session("large statements in one piece", say(*(extended(f"SELECT length('{'x' * 300_000}') + {n}") + SYNC for n in range(10)), wait=b"Z" * 10)),
    session("large answers to one piece", say(*(extended(f"SELECT repeat('{n}', 300000)") + SYNC for n in range(10)), wait=b"Z" * 10)),
    session("2,000 queries in one piece", say(*(query(f"SELECT {n}") for n in range(2000)), wait=b"Z" * 2000)),
    session("a copy in a pipeline", ask("CREATE TEMP TABLE t (n int)"), say(extended("COPY t FROM STDIN"), copy_data("1\n2\n"), COPY_DONE, SYNC, extended("SELECT count(*) FROM t"), SYNC, wait=b"ZZ")),
    Exchange("the greeting and a pipeline in one piece", (say(startup(), extended("SELECT 1"), SYNC, query("SELECT 2"), wait=b"ZZZ"), LEAVING)),
    Exchange("a whole life in one piece", (until_end(startup(), query("SELECT 1"), extended("SELECT 2"), SYNC, TERMINATE),)),
)  # fmt: skip


@in_three_ways(*EXCHANGES)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
