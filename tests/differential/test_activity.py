"""Idle or busy, against what a real PostgreSQL answers: every scripted exchange of these tests.

Two things are checked. Sound: after the tracker has said idle, the server says nothing more until
it is asked. Complete: where the server rests and its last word was an idle ReadyForQuery, the
tracker says idle, but for the few exchanges that are named here, which no driver makes.
"""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, cast

import pytest

from proxy.wire.framing import MessageReader
from proxy.wire.messages import UINT32, ErrorResponse, Frame, decode_backend
from tests.differential import (
    test_copy,
    test_extended_query,
    test_function_calls_and_ends,
    test_pipeline,
    test_simple_query,
)
from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    COPY_DONE,
    FLUSH,
    LEAVING,
    OPENING,
    SYNC,
    Exchange,
    ask,
    bind,
    copy_data,
    copy_fail,
    execute,
    extended,
    parse,
    query,
    say,
    session,
    small,
)
from tests.support.activity_pair import Trackers
from tests.support.scripted_client import Cut, at_random, byte_by_byte, run_script, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROBE: Final = "SELECT 'probe'"
_AFTER_REST: Final = (query(PROBE), LEAVING.content)
_ASYNCHRONOUS: Final = b"NSA"

_TABLE: Final = ask("CREATE TEMP TABLE t (n int, s text)")
_FAILING_EARLY: Final = ask(
    "CREATE TEMP TABLE t (n int, s text)",
    "CREATE FUNCTION pg_temp.no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'",
    "CREATE TRIGGER no BEFORE INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION pg_temp.no()",
)
_COPY: Final = extended("COPY t FROM STDIN")
_ROW: Final = copy_data("1\ta\n")
_BAD_ROW: Final = copy_data("x\ty\n")

OWN: Final = (
    session("a sync behind the command, then the data", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_ROW, COPY_DONE, SYNC)),
    session("the same, all in one piece", _TABLE, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC)),
    session("the same, twice", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_ROW, COPY_DONE, SYNC), say(_COPY, SYNC, wait=b"G"), say(_ROW, COPY_DONE, SYNC)),
    session("the same, twice in one piece", _TABLE, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC, _COPY, SYNC, _ROW, COPY_DONE, SYNC, wait=b"ZZ")),
    session("the same with work behind it in the same piece", _TABLE, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC, extended("SELECT 1"), SYNC, wait=b"ZZ")),
    session("a bad row behind a swallowed sync, then a query", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_BAD_ROW, COPY_DONE, SYNC), ask("SELECT 1")),
    session("a bad row behind a swallowed sync, then a group", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_BAD_ROW, COPY_DONE, SYNC), say(extended("SELECT 1"), SYNC)),
    session("a copy that fails before its data answers both syncs", _FAILING_EARLY, say(_COPY, SYNC, wait=b"GEZ"), say(_ROW, COPY_DONE, SYNC), ask("SELECT 1")),
    session("the same, all in one piece", _FAILING_EARLY, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a copy into nowhere, all in one piece", say(extended("COPY nowhere FROM STDIN"), SYNC, _ROW, COPY_DONE, SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a simple copy that fails before its data", _FAILING_EARLY, say(query("COPY t FROM STDIN"), wait=b"EZ"), say(_ROW, COPY_DONE, query("SELECT 1"))),
    session("a simple copy with work behind it", _TABLE, say(query("COPY t FROM STDIN; SELECT pg_sleep(0.1)"), wait=b"G"), say(_ROW, COPY_DONE)),
    session("a simple copy with syncs among the data", _TABLE, say(query("COPY t FROM STDIN"), wait=b"G"), say(SYNC, _ROW, SYNC, FLUSH, COPY_DONE), ask("SELECT 1")),
    session("a simple copy with a sync behind the data", _TABLE, say(query("COPY t FROM STDIN"), wait=b"G"), say(_ROW, COPY_DONE, SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a simple copy with a sync at once", _TABLE, say(query("COPY t FROM STDIN"), SYNC, wait=b"G"), say(_ROW, COPY_DONE), ask("SELECT 1")),
    session("two copies in one query, the first fails", _TABLE, say(query("COPY t FROM STDIN; COPY t FROM STDIN"), _BAD_ROW, COPY_DONE, _ROW, COPY_DONE), ask("SELECT 1")),
    session("stray ends of data", say(COPY_DONE, copy_fail("x"), _ROW, SYNC), ask("SELECT 1"), say(COPY_DONE, extended("SELECT 1"), COPY_DONE, SYNC)),
    session("a failed copy and a late end in a group", _TABLE, say(_COPY, FLUSH, wait=b"G"), say(_BAD_ROW, FLUSH, wait=b"E"), say(COPY_DONE, SYNC), say(_COPY, _ROW, COPY_DONE, SYNC)),
    session("a query skipped behind an error, then a query", say(parse("SELEC"), query("SELECT 1"), SYNC), ask("SELECT 1")),
    session("a query skipped behind a flushed error", say(parse("SELEC"), FLUSH, wait=b"E"), say(query("SELECT 1"), SYNC), ask("SELECT 1")),
    session("an erring query inside a group", say(parse("SELECT 1"), query("SELEC"), bind(), execute(), SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a query that takes its time inside a group", say(parse("SELECT 1"), query("SELECT pg_sleep(0.05)"), extended("SELECT pg_sleep(0.1)"), SYNC, wait=b"ZZ")),
    session("two queries inside a group", say(parse("SELECT 1"), query("SELECT 1"), parse("SELEC"), query("SELECT 2"), SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("work without a sync", say(extended("SELECT 1"), FLUSH, wait=b"C"), say(SYNC)),
)  # fmt: skip

EXCHANGES: Final = (
    *test_copy.EXCHANGES,
    *test_extended_query.EXCHANGES,
    *test_function_calls_and_ends.FUNCTION_CALLS,
    *test_function_calls_and_ends.ENDS,
    *test_pipeline.EXCHANGES,
    *test_simple_query.EXCHANGES,
    *OWN,
)
# A Query behind extended messages without a Sync between is answered or skipped: not followed, and
# no driver does it.
BUSY_FOR_EVER: Final = {
    "a Query in the middle of skipping",
    "between a parse and its sync",
    "a query inside a group",
    "a query skipped behind an error, then a query",
    "a query skipped behind a flushed error",
    "an erring query inside a group",
    "a query that takes its time inside a group",
    "two queries inside a group",
}
# Nor is a request among the Syncs of a COPY that may be swallowed, unless what the COPY came to
# was heard before the request was sent.
BUSY_OR_NOT: Final = {
    "the same, twice in one piece",
    "the same with work behind it in the same piece",
}
# What these leave open lets the server end the session, or never rest.
NEVER_AT_REST: Final = {
    "a query among the data",
    "a parse among the data",
    "in and leaving in the middle",
    "no sync at all, then leaving",
    "an error without a sync, then leaving",
    "leaving in one piece with the queries",
}


@dataclass(slots=True)
class Observed(asyncio.Protocol):
    """A client's protocol seen from between: what it writes and what it gets go to a tracker."""

    client: asyncio.Protocol
    activity: Trackers = field(default_factory=Trackers)
    last: bytes = b""
    status: bytes = b""
    unsound: list[str] = field(default_factory=list)
    verdicts: list[tuple[bool, bool]] = field(default_factory=list)
    """Whether the server had said last that it is idle, and the tracker, at each rest."""
    transport: asyncio.Transport | None = None
    _reader: MessageReader = field(default_factory=lambda: MessageReader(1 << 30))
    _early: bytearray = field(default_factory=bytearray)
    _was_idle: bool = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.client.connection_made(cast(asyncio.BaseTransport, self))

    def write(self, content: bytes) -> None:
        assert self.transport is not None
        if content in _AFTER_REST:
            self.verdicts.append(((self.last, self.status) == (b"Z", b"I"), self.activity.idle))
        self._was_idle = False
        if self.status:
            self.activity.client_sent(content)
        else:
            self._early += content
        self.transport.write(content)
        self._was_idle = bool(self.status) and self.activity.idle

    def is_closing(self) -> bool:
        assert self.transport is not None
        return self.transport.is_closing()

    def abort(self) -> None:
        assert self.transport is not None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        tracked = data
        self._reader.feed(data)
        begun = bool(self.status)
        while (frame := self._reader.next()) is not None:
            self._follow(frame)
            if self.status and not begun:
                # The session's first ReadyForQuery: what the client sent early goes behind it.
                begun = True
                size = UINT32.unpack_from(self._early)[0]
                self.activity.client_sent(bytes(self._early[size:]))
                tracked = self._reader.trailing_data()
                self._reader.feed(tracked)
        if begun:
            self.activity.upstream_sent(tracked)
            self._was_idle = bool(self.status) and self.activity.idle
        self.client.data_received(data)

    def _follow(self, frame: Frame) -> None:
        if frame.type in _ASYNCHRONOUS:
            return
        error = decode_backend(frame) if frame.type == b"E" else None
        if self._was_idle and not (isinstance(error, ErrorResponse) and error.severity == "FATAL"):
            self.unsound.append(f"{frame.type!r} after idle")
        self.last = frame.type
        if frame.type == b"Z":
            self.status = frame.payload

    def eof_received(self) -> bool | None:
        return self.client.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.connection_lost(exc)


def rests(exchange: Exchange) -> bool:
    """Whether the server waits for the client when the exchange is over but for its end."""
    return exchange.steps[-1] == LEAVING and exchange.name not in NEVER_AT_REST


async def observe(pair: DirectAndProxied, exchange: Exchange, cut: Cut = whole) -> Observed:
    """Run the exchange; then let the server rest, ask it once more, and let it rest again."""
    seen: list[Observed] = []

    async def connect(client: Callable[[], asyncio.Protocol]) -> None:
        def between() -> asyncio.Protocol:
            seen.append(Observed(client()))
            return seen[-1]

        await pair.connect_direct(between)

    steps = exchange.steps
    if rests(exchange):
        rest = say(query("SELECT pg_sleep(0.03)"), on=max(step.on for step in steps) + 1)
        steps = (*steps[:-1], rest, *ask(PROBE), rest, LEAVING)

    def pieces(content: bytes) -> Iterator[bytes]:
        return whole(content) if content in _AFTER_REST else cut(content)

    await run_script(connect, steps, OPENING, pieces)
    return seen[0]


def check(exchange: Exchange, seen: Observed) -> None:
    assert seen.unsound == []
    if rests(exchange):
        (rested, idle), (rested_again, idle_again) = seen.verdicts
        assert idle <= rested
        assert idle_again <= rested_again
        if exchange.name not in BUSY_OR_NOT:
            followed = exchange.name not in BUSY_FOR_EVER
            assert idle == (rested and followed)
            assert idle_again == (rested_again and followed)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
async def test_idle_is_what_postgres_is(exchange: Exchange, pair: DirectAndProxied) -> None:
    check(exchange, await observe(pair, exchange))


@pytest.mark.parametrize("exchange", small(EXCHANGES, 5) + small(OWN, 1), ids=str)
async def test_a_byte_at_a_time(exchange: Exchange, pair: DirectAndProxied) -> None:
    check(exchange, await observe(pair, exchange, byte_by_byte))


@pytest.mark.parametrize("exchange", small(EXCHANGES, 4) + small(OWN, 1), ids=str)
async def test_cut_at_random(exchange: Exchange, pair: DirectAndProxied) -> None:
    check(exchange, await observe(pair, exchange, at_random(exchange.name)))
