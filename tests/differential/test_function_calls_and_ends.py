"""FunctionCall and the ends of a session, direct and through the proxy: also broken messages."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    LEAVING,
    OPENING,
    SYNC,
    TERMINATE,
    Exchange,
    ask,
    bind,
    execute,
    extended,
    fatal,
    function_call,
    in_three_ways,
    message,
    parse,
    query,
    say,
    session,
    startup,
    until_end,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")

# OIDs of pg_proc that every server has.
_INT4PL: Final = 177
_INT4DIV: Final = 154
_UPPER: Final = 871
_LENGTH: Final = 1317
_GENERATE_SERIES: Final = 1067
_NO_FUNCTION: Final = 4_000_000
_ONE: Final = bytes(3) + b"\1"
_TWO: Final = bytes(3) + b"\2"

FUNCTION_CALLS: Final = (
    session("text arguments and result", say(function_call(_INT4PL, "1", "2"))),
    session("binary arguments and result", say(function_call(_INT4PL, _ONE, _TWO, formats=(1,), result=1))),
    session("a format for each argument", say(function_call(_INT4PL, _ONE, "2", formats=(1, 0)))),
    session("text in, text out", say(function_call(_UPPER, "é and more"))),
    session("a null argument", say(function_call(_INT4PL, "1", None))),
    session("an empty argument", say(function_call(_LENGTH, ""))),
    session("an error inside", say(function_call(_INT4DIV, "1", "0")), ask("SELECT 'alive'")),
    session("too few arguments", say(function_call(_INT4PL, "1"))),
    session("too many arguments", say(function_call(_INT4PL, "1", "2", "3"))),
    session("formats that do not match", say(function_call(_INT4PL, "1", "2", formats=(0, 0, 0)))),
    session("a result format that is none", say(function_call(_INT4PL, "1", "2", result=9))),
    session("an argument that is no number", say(function_call(_INT4PL, "one", "2"))),
    session("a function that returns a set", say(function_call(_GENERATE_SERIES, "1", "2"))),
    session("a function that does not exist", say(function_call(_NO_FUNCTION))),
    session("an argument of 1 MB", say(function_call(_LENGTH, "x" * 1_000_000))),
    session("in a transaction", ask("BEGIN"), say(function_call(_INT4PL, "1", "2")), ask("COMMIT")),
    session("in a failed transaction", ask("BEGIN", "SELECT 1/0"), say(function_call(_INT4PL, "1", "2")), ask("ROLLBACK")),
    session("several in one piece", say(*(function_call(_INT4PL, str(n), "1") for n in range(20)), wait=b"Z" * 20)),
    session("between a parse and its sync", say(parse("SELECT 1"), function_call(_INT4PL, "1", "2"), bind(), execute(), SYNC, wait=b"ZZ")),
)  # fmt: skip

ENDS: Final = (
    Exchange("terminate at once", (OPENING, LEAVING)),
    Exchange("terminate in the same piece", (until_end(startup(), TERMINATE),)),
    Exchange("terminate in a transaction", (OPENING, ask("BEGIN"), LEAVING)),
    Exchange("terminate with a body", (OPENING, until_end(message(b"X", b"bye")))),
    fatal("an unknown message type", until_end(message(b"!", b"x"))),
    fatal("a lower case type", until_end(message(b"q", b"SELECT 1\0"))),
    fatal("the NUL type", until_end(bytes(5))),
    fatal("a second startup message", until_end(startup())),
    fatal("an SSLRequest after the login", until_end(b"\0\0\0\x08\x04\xd2\x16\x2f")),
    fatal("a length of 0", until_end(b"Q\0\0\0\0")),
    fatal("a length of 3", until_end(b"Q\0\0\0\3")),
    fatal("a length of 4 for a query", until_end(b"Q\0\0\0\4", TERMINATE)),
    fatal("a negative length", until_end(b"Q\xff\xff\xff\xff")),
    fatal("a length above all bounds", until_end(b"Q\x7f\xff\xff\xff")),
    fatal("a Sync too long", until_end(b"S\0\0\x40\0")),
    fatal("a Sync with a body", until_end(message(b"S", b"x"), TERMINATE)),
    fatal("a Flush with a body", until_end(message(b"H", b"x"), SYNC, TERMINATE)),
    fatal("a password message after the login", until_end(message(b"p", b"not-a-real-secret\0"), TERMINATE)),
    fatal("a Bind cut short", until_end(message(b"B", b"\0\0\0\1"), SYNC, TERMINATE)),
    fatal("a Bind with a value too long", until_end(message(b"B", b"\0\0\0\0\0\1\0\1\0\0x"), SYNC, TERMINATE)),
    fatal("a Parse cut short", until_end(message(b"P", b"s\0SELECT"), SYNC, TERMINATE)),
    fatal("an Execute without its limit", until_end(message(b"E", b"\0"), SYNC, TERMINATE)),
    fatal("a Describe without its name", until_end(message(b"D", b"S"), SYNC, TERMINATE)),
    fatal("a FunctionCall cut short", until_end(message(b"F", b"\0\0"), TERMINATE)),
    fatal("a FunctionCall with a negative count", until_end(message(b"F", b"\0\0\0\xb1\0\0\xff\xff\0\0"), TERMINATE)),
    fatal("an unknown type in a pipeline", until_end(extended("SELECT 1"), SYNC, extended("SELECT 2"), message(b"!"), SYNC)),
    fatal("an unknown type while errors are skipped", until_end(parse("SELEC"), message(b"!"), SYNC)),
    fatal("an unknown type during a copy", say(query("CREATE TEMP TABLE t (n int)")), say(query("COPY t FROM STDIN"), wait=b"G"), until_end(message(b"!"))),
    fatal("a bad length during a copy", say(query("CREATE TEMP TABLE t (n int)")), say(query("COPY t FROM STDIN"), wait=b"G"), until_end(b"d\0\0\0\1")),
    fatal("the server ends the session", until_end(query("SELECT pg_terminate_backend(pg_backend_pid())"))),
    fatal("the server ends the session in a pipeline", until_end(extended("SELECT 1"), SYNC, extended("SELECT pg_terminate_backend(pg_backend_pid())"), SYNC)),
    Exchange("another session ends this one", (OPENING, ask("SELECT set_config('application_name', 'differential-victim', false)"), ask("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'differential-victim'", on=1), until_end())),
    Exchange("another session cancels this one", (OPENING, ask("SET application_name = 'differential-victim'"), say(query("SELECT pg_sleep(60)"), wait=b""), ask("DO $$ BEGIN LOOP PERFORM pg_stat_clear_snapshot(); PERFORM pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'differential-victim' AND wait_event = 'PgSleep'; EXIT WHEN FOUND; END LOOP; END $$", on=1), say(), LEAVING)),
)  # fmt: skip


@in_three_ways(*FUNCTION_CALLS, *ENDS)
async def test_calls_and_ends_are_answered_as_by_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
