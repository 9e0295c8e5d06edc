"""The end of a client whose upstream is kept: every stream, cut anywhere, answered at any moment.

The judge is a model of PostgreSQL that shares no code with the relay. If a Terminate is withheld
where the model owes something, the next client gets what was owed; if one is sent where it owes
nothing, a session is lost and nothing worse.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, cycle, repeat
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.activity_pair import ActivityPair
from tests.support.cuts import at_offsets
from tests.support.model_upstream import QUERIES, ModelUpstream
from tests.wire.driving import TERMINATE, message

SYNC: Final = message(b"S")
FLUSH: Final = message(b"H")
DATA: Final = message(b"d", b"1\n" + TERMINATE)
DONE: Final = message(b"c")
FAIL: Final = message(b"f", TERMINATE + b"\0")
CALL: Final = message(b"F", TERMINATE)
PARSE: Final = message(b"P", b"X\0" + TERMINATE)
BIND: Final = message(b"B", b"\0\0" + TERMINATE * 2)


def query(word: bytes) -> bytes:
    return message(b"Q", word + b"\0")


def extended(word: bytes) -> bytes:
    return PARSE + BIND + message(b"E", word + b"\0")


class Session:
    """A client's stream on its way to a model of its upstream, as a relay carries it."""

    def __init__(self) -> None:
        self.activity = ActivityPair(walks_ahead=True)
        self.upstream = ModelUpstream()
        self.sent = b""

    def send(self, data: bytes) -> None:
        """Carry a read."""
        self.sent += data
        self.upstream.receive(self.activity.client_ahead(data))

    def answer(self, count: int) -> None:
        """Carry up to so many bytes of what the upstream has said."""
        if taken := self.upstream.take(count):
            self.activity.upstream_sent(taken)

    def judge(self, terminate_at: int) -> None:
        """Check what went upstream so far. `terminate_at` is where the stream has its Terminate."""
        received = bytes(self.upstream.received)
        withheld = self.activity.withheld
        if withheld:
            assert received == self.sent[:terminate_at]
            assert self.upstream.quiet
        elif terminate_at < len(self.sent) < terminate_at + len(TERMINATE):
            assert received == self.sent[:terminate_at]  # 1 to 4 bytes are held back
        else:
            assert received == self.sent
        assert not (self.activity.reusable and not self.upstream.quiet)


def carried(pieces: Iterable[bytes], terminate_at: int, takes: Iterator[int]) -> Session:
    """Carry a stream in these reads; after each, the upstream says so many bytes."""
    session = Session()
    for piece in pieces:
        if piece:
            session.send(piece)
            session.judge(terminate_at)
        session.answer(next(takes))
        session.judge(terminate_at)
    return session


# -- every cut of streams that drivers send --------------------------------------------------------

# Streams of which each part is answered before the next one is sent.
STREAMS: Final = {
    "nothing": (),
    "query": (query(b"ok"),),
    "queries": (query(b"ok") * 2, query(b"notice")),
    "extended": (extended(b"ok") + SYNC,),
    "pipeline": ((extended(b"ok") + SYNC) * 2 + extended(b"fail") + SYNC,),
    "flush": (extended(b"ok") + FLUSH, SYNC),
    "call": (CALL,),
    "transaction": (query(b"begin"), query(b"fail"), query(b"commit")),
    "copy in": (query(b"copy in"), DATA * 2 + DONE),
    "copy that the client fails": (query(b"copy in"), DATA + FAIL),
    "copy by extended query": (extended(b"copy in") + SYNC, DATA + DONE + SYNC),
    "copy out": (query(b"copy out"),),
    "late data of a copy": (query(b"fail"), DATA + DONE),
}
# What is owed when the client leaves.
OWING: Final = {
    "query": query(b"ok"),
    "sync": SYNC,
    "call": CALL,
    "no sync": extended(b"ok"),
    "flush and no sync": extended(b"ok") + FLUSH,
    "error and no sync": extended(b"fail") + FLUSH,
    "transaction": query(b"begin"),
    "failed transaction": query(b"begin") + query(b"fail"),
    "copy in": query(b"copy in"),
    "copy data": query(b"copy in") + DATA,
    "copy by extended query": extended(b"copy in") + SYNC,
    "copy out": query(b"copy out"),
}
ALL: Final = 1 << 30


@pytest.mark.parametrize("name", STREAMS)
def test_p13_a_terminate_after_the_last_answer_is_withheld_at_every_cut(name: str) -> None:
    parts = STREAMS[name]
    stream = b"".join(parts) + TERMINATE + query(b"ok")
    terminate_at = len(stream) - len(TERMINATE + query(b"ok"))
    ends = [sum(len(part) for part in parts[:count]) for count in range(1, len(parts) + 1)]
    last = range(terminate_at, len(stream) + 1)
    cuts = {(cut, other) for cut in range(len(stream)) for other in (cut, *last)}
    for cut in [*cuts, range(len(stream))]:
        session = carried(at_offsets(stream, (*ends, *cut)), terminate_at, repeat(ALL))
        assert session.activity.withheld, cut
        assert session.activity.reusable


@pytest.mark.parametrize("name", OWING)
@pytest.mark.parametrize("answered", [False, True])
def test_p14_a_terminate_goes_upstream_at_every_cut_while_something_is_owed(
    name: str, answered: bool
) -> None:
    stream = OWING[name] + TERMINATE + query(b"ok")
    terminate_at = len(OWING[name])
    late = {"query", "sync", "call", "copy out"}  # quiet once their answer has been taken
    if answered and name in late:
        return
    for cut in [(cut,) for cut in range(len(stream))] + [tuple(range(len(stream)))]:
        takes = repeat(ALL if answered else 0)
        session = carried(at_offsets(stream, cut), terminate_at, takes)
        assert not session.activity.withheld, cut
        assert session.upstream.ended
        session.answer(ALL)
        assert not session.activity.reusable


@pytest.mark.parametrize("stream", [query(b"ok"), extended(b"ok") + SYNC, SYNC])
def test_p15_a_stream_that_ends_within_a_message_is_not_kept(stream: bytes) -> None:
    for cut in range(1, len(stream)):
        session = carried((stream[:cut],), ALL, repeat(ALL))
        whole = session.upstream.quiet and not session.upstream._unread
        assert session.activity.reusable is whole


# -- any messages in any order ---------------------------------------------------------------------

ATOMS: Final = (
    *(query(word) for word in QUERIES),
    *(extended(word) for word in QUERIES),
    *(extended(word) + SYNC for word in QUERIES),
    *(SYNC, FLUSH, DATA, DONE, FAIL, CALL, PARSE),
    query(b"copy in") + DATA + DONE,
    extended(b"copy in") + SYNC + DATA + DONE + SYNC,
    query(b"begin") + query(b"commit"),
)


@settings(max_examples=500)
@given(
    st.lists(st.sampled_from(ATOMS), max_size=6),
    st.sampled_from((b"", query(b"ok"), TERMINATE)),
    st.lists(st.integers(0, 250), max_size=6),
    st.lists(st.sampled_from((0, 0, 1, 5, 20, ALL)), min_size=1, max_size=8),
    st.booleans(),
)
def test_p12_nothing_is_withheld_while_anything_is_owed(
    atoms: list[bytes], rest: bytes, offsets: list[int], takes: list[int], waits: bool
) -> None:
    before = b"".join(atoms)
    stream = before + TERMINATE + rest
    # Half of the clients wait for their answers before they leave.
    after = chain(takes, repeat(ALL)) if waits else cycle(takes)
    ends = [len(before), len(before)] if waits else []
    session = carried(at_offsets(stream, [*offsets, *ends]), len(before), after)
    assert session.upstream.ended is not session.activity.withheld
    session.answer(ALL)
    session.judge(len(before))


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(ATOMS), max_size=5),
    st.lists(st.integers(0, 250), max_size=6),
    st.lists(st.sampled_from((0, 1, 5, ALL)), min_size=1, max_size=8),
)
def test_p15_an_end_without_terminate_is_kept_only_if_nothing_is_owed(
    atoms: list[bytes], offsets: list[int], takes: list[int]
) -> None:
    stream = b"".join(atoms)
    carried(at_offsets(stream, offsets), ALL, cycle(takes))
