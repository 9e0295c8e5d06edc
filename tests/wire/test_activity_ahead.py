"""The client's stream of a session that is kept, walked before it is sent: P12 to P15.

The streams in any order, cut anywhere, are in `tests/property/test_terminate.py`.
"""

import pytest

from tests.support.activity_pair import ActivityPair
from tests.support.cuts import three_ways
from tests.wire.driving import TERMINATE, message
from tests.wire.test_activity import (
    ANSWER,
    CALL,
    COMPLETE,
    DATA,
    DONE,
    ERROR,
    GO_AHEAD,
    NOTICE,
    QUERY,
    SYNC,
    WORK,
    ready,
)

FLUSH = message(b"H")
COPY_IN = (
    ("client", QUERY),
    ("upstream", GO_AHEAD),
    ("client", DATA + DONE),
    ("upstream", COMPLETE + ready()),
)
COPY_OUT = message(b"H", bytes(3)) + DATA + DONE + COMPLETE + ready()
BIND = message(b"B", b"\0\0\0\0\0\1" + b"\0\0\0\5" + TERMINATE + b"\0\0")
AFTER = b"anything"


def session(*reads: tuple[str, bytes]) -> tuple[ActivityPair, bytes]:
    """Feed a session with its reads. Return it, and what went upstream."""
    activity, ahead = ActivityPair(walks_ahead=True), b""
    for who, data in reads:
        if who == "client":
            ahead += activity.client_ahead(data)
        else:
            activity.upstream_sent(data)
    return activity, ahead


ASKED = ("client", QUERY), ("upstream", ANSWER + ready())


# -- nothing is owed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        (),
        ASKED,
        (("client", WORK + SYNC), ("upstream", ANSWER + ready())),
        (("client", CALL), ("upstream", ready())),
        (("client", FLUSH),),
        COPY_IN,
        (("client", QUERY), ("upstream", COPY_OUT)),
        (("client", QUERY), ("upstream", GO_AHEAD + ERROR + ready()), ("client", DATA + DONE)),
        (("client", QUERY), ("upstream", ready(b"T")), ("client", QUERY), ("upstream", ready())),
        (*ASKED, ("upstream", NOTICE)),
    ],
    ids=[
        "nothing",
        "Q",
        "PBES",
        "F",
        "H",
        "copy-in",
        "copy-out",
        "failed-copy",
        "transaction",
        "notice",
    ],
)
def test_p13_a_terminate_while_nothing_is_owed_is_withheld_with_all_after_it(
    before: tuple[tuple[str, bytes], ...],
) -> None:
    asked = b"".join(data for who, data in before if who == "client")
    for pieces in three_ways(TERMINATE + AFTER):
        activity, ahead = session(*before, *(("client", piece) for piece in pieces))
        assert ahead == asked
        assert activity.terminated
        assert activity.withheld
        assert activity.reusable
        assert activity.client_ahead(QUERY) == b""
        assert activity.reusable


def test_p13_what_stands_before_terminate_in_the_same_read_is_sent() -> None:
    activity, ahead = session(("client", FLUSH + TERMINATE + AFTER))
    assert (ahead, activity.withheld, activity.reusable) == (FLUSH, True, True)


@pytest.mark.parametrize("cut", range(1, 5))
def test_p13_a_cut_header_that_begins_with_x_waits_for_the_rest(cut: int) -> None:
    activity, ahead = session(*ASKED, ("client", TERMINATE[:cut]))
    assert ahead == QUERY
    assert not activity.terminated
    assert not activity.reusable  # P15: an end of the stream here is no clean end
    assert activity.client_ahead(TERMINATE[cut:]) == b""
    assert activity.reusable


@pytest.mark.parametrize("kind", b"QSFPBEDCHdcf?")
def test_p13_no_other_cut_header_is_held_back(kind: int) -> None:
    activity, ahead = session(("client", QUERY + bytes((kind,))), ("client", b"\0"))
    assert ahead == QUERY + bytes((kind, 0))
    assert not activity.reusable


@pytest.mark.parametrize(
    ("stream", "answer"),
    [
        (
            message(b"P", b"\0SELECT $1\0\0\0") + BIND + message(b"E", bytes(5)) + SYNC,
            ANSWER + ready(),
        ),
        (message(b"Q", b"SELECT '" + TERMINATE + b"'\0"), ANSWER + ready()),
        (message(b"F", TERMINATE * 3), ready()),
    ],
    ids=["parameter", "text", "function-call"],
)
def test_p13_the_bytes_of_a_terminate_inside_a_message_are_none(
    stream: bytes, answer: bytes
) -> None:
    for cut in range(len(stream)):
        activity, ahead = session(("client", stream[:cut]), ("client", stream[cut:]))
        assert ahead == stream
        activity.upstream_sent(answer)
        assert not activity.terminated
        assert activity.reusable


def test_p13_the_bytes_of_a_terminate_inside_copy_data_are_none() -> None:
    data = message(b"d", TERMINATE) + message(b"d", b"1\n" + TERMINATE * 2 + b"\n")
    for cut in range(len(data)):
        activity, ahead = session(
            ("client", QUERY),
            ("upstream", GO_AHEAD),
            ("client", data[:cut]),
            ("client", data[cut:] + DONE),
            ("upstream", COMPLETE + ready()),
        )
        assert ahead == QUERY + data + DONE
        assert activity.reusable
        assert not activity.terminated


@pytest.mark.parametrize("stream", [QUERY, WORK + SYNC, DATA])
def test_p13_a_terminate_is_content_of_an_unfinished_message(stream: bytes) -> None:
    for cut in range(1, len(stream)):
        activity, ahead = session(("client", stream[:cut]), ("client", TERMINATE))
        assert ahead == stream[:cut] + TERMINATE
        assert not activity.withheld
        assert not activity.reusable


@pytest.mark.parametrize("length", [0, 1, 3, 5, 9, 10_000, 1 << 31, (1 << 32) - 1])
def test_p13_a_terminate_of_another_length_goes_upstream(length: int) -> None:
    odd = b"X" + length.to_bytes(4, "big") + bytes(8)
    for pieces in three_ways(odd):
        activity, ahead = session(*ASKED, *(("client", piece) for piece in pieces))
        assert ahead == QUERY + odd
        assert not activity.withheld
        assert not activity.reusable


# -- something is owed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        (("client", QUERY),),
        (("client", SYNC),),
        (("client", CALL),),
        (("client", QUERY + QUERY), ("upstream", ANSWER + ready())),
        (("client", QUERY), ("upstream", ANSWER)),
        (("client", QUERY), ("upstream", ANSWER + ready()[:5])),
        (("client", QUERY), ("upstream", ready(b"T"))),
        (("client", QUERY), ("upstream", ERROR + ready(b"E"))),
        (("client", WORK),),
        (("client", WORK + FLUSH), ("upstream", ANSWER)),
        (("client", WORK + FLUSH), ("upstream", ERROR)),
        (("client", QUERY), ("upstream", GO_AHEAD)),
        (("client", QUERY), ("upstream", GO_AHEAD), ("client", DATA)),
        (("client", QUERY), ("upstream", GO_AHEAD), ("client", DATA + DONE)),
        (("client", QUERY), ("upstream", message(b"H", bytes(3)) + DATA)),
        (
            ("client", WORK + SYNC),
            ("upstream", GO_AHEAD),
            ("client", DATA + DONE + SYNC),
            ("upstream", ERROR + ready()),
        ),
        (*ASKED, ("upstream", NOTICE[:7])),
        (*ASKED, ("upstream", NOTICE[:3])),
        (("client", b"?\0\0\0\4"),),
        (("upstream", ready()),),
    ],
)
def test_p12_p14_a_terminate_while_anything_is_owed_goes_upstream(
    before: tuple[tuple[str, bytes], ...],
) -> None:
    asked = b"".join(data for who, data in before if who == "client")
    for pieces in three_ways(TERMINATE + AFTER):
        activity, ahead = session(*before, *(("client", piece) for piece in pieces))
        assert ahead == asked + TERMINATE + AFTER
        assert not activity.withheld
        activity.upstream_sent(ANSWER + ready())
        assert not activity.reusable
        assert activity.client_ahead(TERMINATE) == TERMINATE  # it was not the first one
        assert not activity.withheld


def test_p14_query_and_terminate_in_one_write_go_upstream() -> None:
    for pieces in three_ways(QUERY + TERMINATE):
        activity, ahead = session(*(("client", piece) for piece in pieces))
        assert (ahead, activity.withheld) == (QUERY + TERMINATE, False)


def test_p14_an_answer_before_the_rest_of_a_terminate_is_in_time() -> None:
    activity, ahead = session(("client", QUERY + TERMINATE[:3]), ("upstream", ANSWER + ready()))
    assert ahead == QUERY
    assert activity.client_ahead(TERMINATE[3:]) == b""
    assert activity.reusable


# -- without a Terminate ---------------------------------------------------------------------------


def test_p15_a_session_can_be_kept_without_a_terminate_while_it_is_idle() -> None:
    activity, _ = session()
    assert activity.reusable
    activity, _ = session(*ASKED)
    assert activity.reusable
    activity.client_ahead(QUERY)
    assert not activity.reusable


def test_p12_what_comes_after_a_terminate_was_withheld_must_be_whole() -> None:
    # While the client is closed the upstream may still say something of its own accord.
    activity, _ = session(*ASKED, ("client", TERMINATE))
    said = []
    for read in (NOTICE[:9], NOTICE[9:], ready()):  # the last one answers nothing
        activity.upstream_sent(read)
        said.append((activity.withheld, activity.reusable))
    assert said == [(True, False), (True, True), (True, False)]
