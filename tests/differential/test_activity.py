"""Idle or busy, against what a real PostgreSQL answers: every scripted exchange of these tests.

Two things are checked. Sound: after the tracker has said idle, the server says nothing more until
it is asked. Complete: where the server rests and its last word was an idle ReadyForQuery, the
tracker says idle, but for the few exchanges that are named here, which no driver makes.
"""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

import socket
from collections.abc import Iterator
from typing import Final

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
from tests.differential.exchange_client import ReadingClient, run
from tests.differential.frontend import (
    COPY_DONE,
    FLUSH,
    LEAVING,
    SYNC,
    TERMINATE,
    Exchange,
    On,
    ask,
    bind,
    copy_data,
    copy_fail,
    execute,
    extended,
    in_three_ways,
    parse,
    query,
    say,
    session,
)
from tests.support.activity_pair import ActivityPair
from tests.support.cuts import Cut, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROBE: Final = "SELECT 'probe'"
_AFTER_REST: Final = (query(PROBE), TERMINATE)
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
    session("a sync after the command, then the data", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_ROW, COPY_DONE, SYNC)),
    session("the same, all in one piece", _TABLE, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC)),
    session("the same, twice", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_ROW, COPY_DONE, SYNC), say(_COPY, SYNC, wait=b"G"), say(_ROW, COPY_DONE, SYNC)),
    session("the same, twice in one piece", _TABLE, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC, _COPY, SYNC, _ROW, COPY_DONE, SYNC, wait=b"ZZ")),
    session("the same with work after it in the same piece", _TABLE, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC, extended("SELECT 1"), SYNC, wait=b"ZZ")),
    session("a bad row after a swallowed sync, then a query", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_BAD_ROW, COPY_DONE, SYNC), ask("SELECT 1")),
    session("a bad row after a swallowed sync, then a group", _TABLE, say(_COPY, SYNC, wait=b"G"), say(_BAD_ROW, COPY_DONE, SYNC), say(extended("SELECT 1"), SYNC)),
    session("a copy that fails before its data answers both syncs", _FAILING_EARLY, say(_COPY, SYNC, wait=b"GEZ"), say(_ROW, COPY_DONE, SYNC), ask("SELECT 1")),
    session("the same, all in one piece", _FAILING_EARLY, say(_COPY, SYNC, _ROW, COPY_DONE, SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a copy into nowhere, all in one piece", say(extended("COPY nowhere FROM STDIN"), SYNC, _ROW, COPY_DONE, SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a simple copy that fails before its data", _FAILING_EARLY, say(query("COPY t FROM STDIN"), wait=b"EZ"), say(_ROW, COPY_DONE, query("SELECT 1"))),
    session("a simple copy with work after it", _TABLE, say(query("COPY t FROM STDIN; SELECT pg_sleep(0.1)"), wait=b"G"), say(_ROW, COPY_DONE)),
    session("a simple copy with syncs among the data", _TABLE, say(query("COPY t FROM STDIN"), wait=b"G"), say(SYNC, _ROW, SYNC, FLUSH, COPY_DONE), ask("SELECT 1")),
    session("a simple copy with a sync after the data", _TABLE, say(query("COPY t FROM STDIN"), wait=b"G"), say(_ROW, COPY_DONE, SYNC, wait=b"ZZ"), ask("SELECT 1")),
    session("a simple copy with a sync at once", _TABLE, say(query("COPY t FROM STDIN"), SYNC, wait=b"G"), say(_ROW, COPY_DONE), ask("SELECT 1")),
    session("two copies in one query, the first fails", _TABLE, say(query("COPY t FROM STDIN; COPY t FROM STDIN"), _BAD_ROW, COPY_DONE, _ROW, COPY_DONE), ask("SELECT 1")),
    session("stray ends of data", say(COPY_DONE, copy_fail("x"), _ROW, SYNC), ask("SELECT 1"), say(COPY_DONE, extended("SELECT 1"), COPY_DONE, SYNC)),
    session("a failed copy and a late end in a group", _TABLE, say(_COPY, FLUSH, wait=b"G"), say(_BAD_ROW, FLUSH, wait=b"E"), say(COPY_DONE, SYNC), say(_COPY, _ROW, COPY_DONE, SYNC)),
    session("a query skipped after an error, then a query", say(parse("SELEC"), query("SELECT 1"), SYNC), ask("SELECT 1")),
    session("a query skipped after a flushed error", say(parse("SELEC"), FLUSH, wait=b"E"), say(query("SELECT 1"), SYNC), ask("SELECT 1")),
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
)
# A Query after extended messages without a Sync between is answered or skipped: not followed, and
# no driver does it.
BUSY_FOR_EVER: Final = {
    "a Query in the middle of skipping",
    "between a parse and its sync",
    "a query inside a group",
    "a query skipped after an error, then a query",
    "a query skipped after a flushed error",
    "an erring query inside a group",
    "a query that takes its time inside a group",
    "two queries inside a group",
}
# Nor is a request among the Syncs of a COPY that may be swallowed, unless what the COPY came to
# was heard before the request was sent.
BUSY_OR_NOT: Final = {
    "the same, twice in one piece",
    "the same with work after it in the same piece",
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


class Observed(ReadingClient):
    """A client whose tracker follows what it sends and what it gets."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.activity = ActivityPair()
        self.last = b""
        self.status = b""
        self.unsound: list[str] = []
        # Whether the server had said last that it is idle, and the tracker, at each rest.
        self.verdicts: list[tuple[bool, bool]] = []
        self._framing = MessageReader(1 << 30)
        self._early = b""
        self._was_idle = False

    async def send(self, content: bytes, cut: Cut = whole) -> None:
        """Send, once the tracker has seen it."""
        if content in _AFTER_REST:
            self.verdicts.append(((self.last, self.status) == (b"Z", b"I"), self.activity.idle))
        if self.status:
            self.activity.client_sent(content)
        else:
            self._early += content
        self._was_idle = bool(self.status) and self.activity.idle
        await super().send(content, cut)

    def arrive(self, received: bytes) -> None:
        """Take what was read, once the tracker has seen it."""
        tracked = received
        self._framing.feed(received)
        begun = bool(self.status)
        while (frame := self._framing.next()) is not None:
            self._follow(frame)
            if self.status and not begun:
                # The session's first ReadyForQuery: what the client sent early goes after it.
                begun = True
                size = UINT32.unpack_from(self._early)[0]
                self.activity.client_sent(self._early[size:])
                tracked = self._framing.trailing_data()
                self._framing.feed(tracked)
        if begun:
            self.activity.upstream_sent(tracked)
            self._was_idle = bool(self.status) and self.activity.idle
        super().arrive(received)

    def _follow(self, frame: Frame) -> None:
        if frame.type in _ASYNCHRONOUS:
            return
        error = decode_backend(frame) if frame.type == b"E" else None
        if self._was_idle and not (isinstance(error, ErrorResponse) and error.severity == "FATAL"):
            self.unsound.append(f"{frame.type!r} after idle")
        self.last = frame.type
        if frame.type == b"Z":
            self.status = frame.payload


def rests(exchange: Exchange) -> bool:
    """Whether the server waits for the client when the exchange is over but for its end."""
    return exchange.steps[-2:] == LEAVING and exchange.name not in NEVER_AT_REST


async def observe(both: DirectAndProxied, exchange: Exchange, cut: Cut = whole) -> Observed:
    """Run the exchange; then let the server rest, ask it once more, and let it rest again."""
    if rests(exchange):
        others = [step.connection for step in exchange.steps if isinstance(step, On)]
        rest = say(query("SELECT pg_sleep(0.03)"), on=max(others, default=0) + 1)
        exchange = Exchange(exchange.name, exchange.steps[:-2], rest, ask(PROBE), rest, LEAVING)

    def pieces(content: bytes) -> Iterator[bytes]:
        return whole(content) if content in _AFTER_REST else cut(content)

    return (await run(Observed, exchange, both.cluster.socket_path, pieces))[0]


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


@in_three_ways(*EXCHANGES, bytes_every=5, random_every=4)
async def test_idle_is_what_postgres_is(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    check(exchange, await observe(both, exchange, cut))


@in_three_ways(*OWN, bytes_every=1, random_every=1)
async def test_idle_is_what_postgres_is_around_copy(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    check(exchange, await observe(both, exchange, cut))
