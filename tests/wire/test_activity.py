"""Idle or busy, message by message; what PostgreSQL does with each is in `differential`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.activity_pair import ActivityPair
from tests.wire.driving import message

QUERY = message(b"Q", b"SELECT 1\0")
SYNC = message(b"S")
CALL = message(b"F", bytes(12))
WORK = message(b"P", b"\0SELECT 1\0\0\0") + message(b"B", bytes(8)) + message(b"E", bytes(5))
DATA = message(b"d", b"1\n")
DONE = message(b"c")
ANSWER = message(b"T", bytes(9)) + message(b"D", bytes(7)) + message(b"C", b"SELECT 1\0")
GO_AHEAD = message(b"G", bytes(3))
COMPLETE = message(b"C", b"COPY 1\0")
ERROR = message(b"E", b"SERROR\0\0")
NOTICE = message(b"N", b"SNOTICE\0\0")


def ready(status: bytes = b"I") -> bytes:
    return message(b"Z", status)


def after(*reads: tuple[str, bytes]) -> ActivityPair:
    activity = ActivityPair()
    for who, data in reads:
        (activity.client_sent if who == "client" else activity.upstream_sent)(data)
    return activity


def test_a_new_session_is_idle() -> None:
    assert ActivityPair().idle


@pytest.mark.parametrize("request_", [QUERY, SYNC, CALL, WORK + SYNC], ids=["Q", "S", "F", "PBES"])
def test_a_request_is_busy_until_its_ready_for_query(request_: bytes) -> None:
    activity = after(("client", request_))
    assert not activity.idle
    activity.upstream_sent(ANSWER)
    assert not activity.idle
    activity.upstream_sent(ready())
    assert activity.idle


@pytest.mark.parametrize("status", [b"T", b"E"])
def test_a_transaction_is_busy(status: bytes) -> None:
    activity = after(("client", QUERY), ("upstream", ready(status)))
    assert not activity.idle
    activity.client_sent(QUERY)
    activity.upstream_sent(ready())
    assert activity.idle


def test_w47_a_pipeline_is_busy_until_its_last_answer() -> None:
    activity = after(("client", (WORK + SYNC) * 3))
    for expected in (False, False, True):
        activity.upstream_sent(ANSWER + ready())
        assert activity.idle is expected


@pytest.mark.parametrize("stream", [QUERY, WORK + SYNC, SYNC])
def test_half_a_message_of_the_client_is_busy(stream: bytes) -> None:
    for cut in range(1, len(stream)):
        assert not after(("client", stream[:cut])).idle


def test_half_a_message_of_the_upstream_is_busy() -> None:
    for cut in range(1, len(NOTICE)):
        assert not after(("upstream", NOTICE[:cut])).idle
    assert after(("upstream", NOTICE)).idle


def test_a_ready_for_query_inside_a_row_is_none() -> None:
    row = message(b"D", b"x" * 20 + ready())
    activity = after(("client", QUERY), ("upstream", row))
    assert not activity.idle
    activity.upstream_sent(row[:-6])
    activity.upstream_sent(row[-6:])
    assert not activity.idle
    activity.upstream_sent(ready())
    assert activity.idle


def test_work_without_a_sync_is_busy_and_a_flush_is_not_work() -> None:
    activity = after(("client", WORK + message(b"H")), ("upstream", ANSWER))
    assert not activity.idle
    assert after(("client", message(b"H"))).idle


def test_a_copy_is_busy_until_it_is_answered() -> None:
    activity = after(("client", QUERY), ("upstream", GO_AHEAD))
    for who, data in (("client", DATA), ("client", DONE), ("upstream", COMPLETE)):
        (activity.client_sent if who == "client" else activity.upstream_sent)(data)
        assert not activity.idle
    activity.upstream_sent(ready())
    assert activity.idle


def test_a_sync_among_copy_data_is_swallowed() -> None:
    activity = after(("client", WORK + SYNC), ("upstream", GO_AHEAD), ("client", DATA + SYNC))
    activity.client_sent(DONE + SYNC)
    activity.upstream_sent(COMPLETE)
    assert not activity.idle
    activity.upstream_sent(ready())
    assert activity.idle


def test_a_copy_whose_only_sync_was_swallowed_is_busy_until_the_next_one() -> None:
    # It was idle: a pool would have committed the COPY of a client that left without a Sync.
    activity = after(("client", WORK + SYNC), ("upstream", GO_AHEAD), ("client", DATA + DONE))
    activity.upstream_sent(COMPLETE)
    assert not activity.idle
    activity.client_sent(SYNC)
    activity.upstream_sent(ready())
    assert activity.idle


def test_a_failed_copy_leaves_doubt_until_the_next_answer() -> None:
    activity = after(
        ("client", WORK + SYNC), ("upstream", GO_AHEAD), ("client", DATA + DONE + SYNC)
    )
    activity.upstream_sent(ERROR + ready())
    assert not activity.idle  # a second one may come: it was not read as far as that
    activity.client_sent(QUERY)
    activity.upstream_sent(NOTICE)
    assert not activity.idle
    activity.upstream_sent(ANSWER + ready())
    assert activity.idle


def test_a_copy_that_failed_before_its_data_answers_both_syncs() -> None:
    activity = after(
        ("client", WORK + SYNC), ("upstream", GO_AHEAD), ("client", DATA + DONE + SYNC)
    )
    activity.upstream_sent(ERROR + ready())
    activity.client_sent(QUERY)
    activity.upstream_sent(ready())
    assert not activity.idle  # that was the second Sync's: the query runs
    activity.upstream_sent(ANSWER + ready())
    assert activity.idle


def test_a_flushed_copy_that_fails_leaves_no_doubt() -> None:
    activity = after(
        ("client", WORK), ("upstream", GO_AHEAD), ("client", DATA), ("upstream", ERROR)
    )
    assert not activity.idle
    activity.client_sent(DONE + SYNC)
    activity.upstream_sent(ready())
    assert activity.idle


def test_a_query_among_copy_data_is_busy_for_ever() -> None:
    activity = after(("client", QUERY), ("upstream", GO_AHEAD), ("client", DATA + QUERY))
    activity.upstream_sent(ready() * 2)
    assert not activity.idle


def test_a_query_after_work_without_a_sync_is_busy_for_ever() -> None:
    # It was once taken for settled by the ReadyForQuery of an earlier group: what the work was
    # answered with then counted for the next request, and a session ended inside an answer.
    group = message(b"P", b"\0SELECT 1\0\0\0")
    activity = after(("client", group + SYNC), ("client", group + QUERY))
    activity.upstream_sent(message(b"1") + ready())
    activity.client_sent(QUERY)
    activity.upstream_sent(message(b"1") + ANSWER + ready())
    assert not activity.idle  # the second Query is owed its answer
    activity.upstream_sent(ANSWER + ready())
    assert not activity.idle


def test_a_query_after_a_flushed_copy_is_not_taken_for_swallowed() -> None:
    activity = after(("client", WORK + message(b"H")), ("upstream", GO_AHEAD))
    activity.client_sent(DATA + DONE + QUERY)
    activity.upstream_sent(COMPLETE)
    assert not activity.idle
    activity.upstream_sent(ready())
    assert not activity.idle


COPY_GROUP = WORK + SYNC + DATA + DONE + SYNC


@pytest.mark.parametrize(
    "request_", [QUERY, WORK, WORK + SYNC, CALL], ids=["Q", "PBE", "PBES", "F"]
)
def test_a_request_in_one_piece_with_a_copy_in_doubt_is_busy_for_ever(request_: bytes) -> None:
    # The COPY fails before its data: both Syncs are answered, and the request runs on. The next
    # request must not take what answers this one for its own.
    activity = after(
        ("client", COPY_GROUP + request_), ("upstream", GO_AHEAD + ERROR + ready() + ready())
    )
    activity.client_sent(QUERY)
    activity.upstream_sent(ANSWER + ready())
    assert not activity.idle


def test_a_request_after_a_copy_in_doubt_is_busy_for_ever() -> None:
    activity = after(("client", WORK + SYNC), ("upstream", GO_AHEAD))
    activity.client_sent(DATA + DONE + SYNC + QUERY)
    activity.upstream_sent(ERROR + ready() + ready())
    activity.client_sent(QUERY)
    activity.upstream_sent(ANSWER + ready())
    assert not activity.idle


def test_requests_in_one_piece_settle_the_doubt_of_a_failed_copy() -> None:
    activity = after(("client", WORK + SYNC), ("upstream", GO_AHEAD))
    activity.client_sent(DATA + DONE + SYNC)
    activity.upstream_sent(ERROR + ready())
    activity.client_sent((WORK + SYNC) * 2)
    activity.upstream_sent(ANSWER + ready())
    assert not activity.idle
    activity.upstream_sent(ANSWER + ready())
    assert activity.idle


def test_other_answers_while_a_copy_is_entered_tell_nothing() -> None:
    other = message(b"T", bytes(9))
    activity = after(("client", QUERY), ("upstream", GO_AHEAD + other), ("client", DATA + DONE))
    activity.upstream_sent(COMPLETE + ready())
    assert activity.idle


def test_the_late_end_of_a_failed_copy_does_not_end_the_next_one() -> None:
    nowhere = WORK + DATA + DONE + SYNC
    activity = after(("client", nowhere + WORK + SYNC), ("upstream", ERROR + ready()))
    activity.upstream_sent(GO_AHEAD)
    activity.client_sent(DATA + DONE + SYNC)
    activity.upstream_sent(COMPLETE)
    assert not activity.idle
    activity.upstream_sent(ready())
    assert activity.idle


def test_late_ends_of_data_are_nothing() -> None:
    assert after(("client", DATA + DONE + DONE)).idle


@pytest.mark.parametrize(
    "stream",
    [
        *(b"Q" + length.to_bytes(4, "big") for length in range(4)),
        *(b"S" + length.to_bytes(4, "big") for length in range(4)),
        message(b"!"),
        message(b"p", b"x\0"),
        bytes(5),
        b"d\0\0\0\0",
        DONE * 100,
    ],
    ids=repr,
)
def test_a_stream_that_cannot_be_followed_is_busy_for_ever(stream: bytes) -> None:
    activity = after(("client", QUERY + stream + b"\0"))
    for _ in range(5):
        activity.client_sent(QUERY)
        activity.upstream_sent(ready())
        assert not activity.idle


@pytest.mark.parametrize(
    "answer",
    [ready() * 2, b"Z\0\0\0\6II", b"C\0\0\0\3" + ready(), message(b"Z")],
    ids=["one too many", "too long", "a bad length", "no status"],
)
def test_an_upstream_that_cannot_be_followed_is_busy_for_ever(answer: bytes) -> None:
    activity = after(("client", QUERY), ("upstream", answer))
    for _ in range(3):
        activity.client_sent(QUERY)
        activity.upstream_sent(ready())
        assert not activity.idle


def test_a_client_that_said_terminate_is_not_idle_and_known_for_it() -> None:
    activity = after(("client", message(b"X")))
    assert activity.terminated
    assert not activity.idle


CLIENT = [QUERY, SYNC, CALL, WORK, DATA, DONE, message(b"f", b"no\0"), message(b"H")]
UPSTREAM = [ready(), ready(b"T"), ANSWER, GO_AHEAD, COMPLETE, ERROR, NOTICE, message(b"1")]
READS = st.lists(
    st.one_of(
        st.tuples(st.just("client"), st.sampled_from(CLIENT)),
        st.tuples(st.just("upstream"), st.sampled_from(UPSTREAM)),
    ),
    max_size=30,
)


@given(READS, st.data())
def test_where_the_reads_are_cut_does_not_matter(
    reads: list[tuple[str, bytes]], draw: st.DataObject
) -> None:
    pieces: list[tuple[str, bytes]] = []
    for who, data in reads:
        cut = draw.draw(st.integers(0, len(data)))
        pieces += [(who, data[:cut]), (who, data[cut:])]
    assert after(*pieces).idle == after(*reads).idle


@given(READS)
def test_an_idle_session_owes_nothing_by_the_simplest_count(
    reads: list[tuple[str, bytes]],
) -> None:
    # Without COPY and without work in front of a Query, each sync point has one answer.
    plain = [(who, data) for who, data in reads if data not in (GO_AHEAD, WORK)]
    asked = sum(who == "client" and data in (QUERY, SYNC, CALL) for who, data in plain)
    answers = [data for who, data in plain if who == "upstream" and data[:1] == b"Z"]
    if after(*plain).idle:
        assert asked == len(answers)
        assert answers[-1:] in ([], [ready()])


# -- replication streams -------------------------------------------------------------------------

COPY_BOTH = b"W\0\0\0\x07\0\0\0"
COPY_DONE = b"c\0\0\0\x04"
KEEPALIVE = b"d\0\0\0\x06k\0"
TERMINATE = b"X\0\0\0\x04"


@pytest.mark.parametrize(
    ("then", "streaming"),
    [
        ((), True),
        ((("upstream", KEEPALIVE), ("client", KEEPALIVE)), True),
        ((("upstream", KEEPALIVE[:4]),), False),
        ((("client", KEEPALIVE[:6]),), False),
        ((("client", COPY_DONE),), False),
        ((("upstream", COPY_DONE),), False),
        ((("client", QUERY),), False),
        ((("client", TERMINATE),), False),
        ((("upstream", ready()),), False),
    ],
)
def test_w47_a_replication_stream_may_end_between_two_messages(
    then: tuple[tuple[str, bytes], ...], streaming: bool
) -> None:
    tracker = after(("client", QUERY), ("upstream", COPY_BOTH), *then)
    assert tracker.streaming is streaming
    assert tracker.idle is (then == (("upstream", ready()),))


@pytest.mark.parametrize(
    ("then", "awaits"),
    [
        ((), True),
        ((("client", TERMINATE),), False),
        ((("upstream", KEEPALIVE[:4]), ("client", TERMINATE)), False),
        ((("upstream", ERROR), ("client", TERMINATE)), True),
        ((("client", COPY_DONE), ("client", TERMINATE)), True),
        ((("client", QUERY), ("client", TERMINATE)), True),
    ],
)
def test_a_terminate_is_the_end_of_a_replication_stream(
    then: tuple[tuple[str, bytes], ...], awaits: bool
) -> None:
    # A subscription that was dropped was counted as lost: its START_REPLICATION had no answer.
    tracker = after(("client", QUERY), ("upstream", COPY_BOTH), *then)
    assert tracker.awaits_answer is awaits


def test_w47_after_a_replication_stream_the_session_is_idle_again() -> None:
    ends = (("client", COPY_DONE), ("upstream", COPY_DONE), ("upstream", ready()))
    again = (("client", QUERY), ("upstream", ready()))
    assert after(("client", QUERY), ("upstream", COPY_BOTH), *ends).idle
    assert after(("client", QUERY), ("upstream", COPY_BOTH), *ends, *again).idle


# -- COPY data -----------------------------------------------------------------------------------

COPY_IN = b"G\0\0\0\x07\0\0\0"


@pytest.mark.parametrize(
    ("then", "copying"),
    [
        ((), True),
        ((("client", KEEPALIVE[:6]),), True),
        ((("client", KEEPALIVE), ("client", SYNC)), True),
        ((("client", COPY_DONE),), False),
        ((("client", COPY_DONE[:4]),), True),
        ((("upstream", b"E\0\0\0\x04"), ("upstream", b"x")), False),
        ((("client", QUERY),), False),  # not allowed: what it is about is unknown from here on
        ((("client", b"?\0\0\0\x04"),), False),
        ((("upstream", b"?\0\0\0\x03"), ("upstream", b"x")), False),
    ],
)
def test_w35_copy_data_are_known_until_their_end(
    then: tuple[tuple[str, bytes], ...], copying: bool
) -> None:
    # What is in the middle of its data does not commit, so it may be cancelled.
    assert after(("client", QUERY), ("upstream", COPY_IN), *then).copying is copying
