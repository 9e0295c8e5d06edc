"""What an upstream reports while a client has a pooled session: kept whole in any split (P22)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.activity import REPORTED_BYTES_MAX
from proxy.wire.own_answer import reported_parameters
from tests.support.activity_pair import ActivityPair
from tests.support.cuts import THREE_WAYS, Cut, at_offsets
from tests.wire.driving import READY_FOR_QUERY, message

QUERY = message(b"Q", b"SELECT 1\0")
STANDBY = message(b"S", b"in_hot_standby\0on\0")
ZONE = message(b"S", b"TimeZone\0Asia/Tokyo\0")
OTHERS = [
    message(b"T", b"\0\1"),
    message(b"D", b"S\0\0\0\x06" * 3),
    message(b"C", b"SELECT 1\0"),
    message(b"N", b"SNOTICE\0\0"),
    message(b"1"),
]


@given(
    st.lists(st.sampled_from([*OTHERS, STANDBY, ZONE]), max_size=12),
    st.lists(st.integers(0, 250), max_size=10),
    st.booleans(),
)
def test_p22_what_was_reported_is_kept_in_any_split(
    messages: list[bytes], offsets: list[int], walks_ahead: bool
) -> None:
    pair = ActivityPair(walks_ahead=walks_ahead)
    (pair.client_ahead if walks_ahead else pair.client_sent)(QUERY)
    for piece in at_offsets(b"".join([*messages, READY_FOR_QUERY]), offsets):
        pair.upstream_sent(piece)
    assert pair.idle
    expected = b"".join(one for one in messages if one[:1] == b"S") if walks_ahead else b""
    assert pair.reported == expected


@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize("extra", [0, 1])
def test_p22_what_is_kept_of_it_is_bounded(cut: Cut, extra: int) -> None:
    frame = len(message(b"S", b"TimeZone\0\0"))
    long = message(b"S", b"TimeZone\0" + b"x" * (REPORTED_BYTES_MAX - frame + extra) + b"\0")
    pair = ActivityPair(walks_ahead=True)
    pair.client_ahead(QUERY)
    for piece in cut(long + READY_FOR_QUERY):
        pair.upstream_sent(piece)
    assert pair.idle
    assert pair.reported == (None if extra else long)


def test_p22_after_too_many_nothing_is_kept() -> None:
    pair = ActivityPair(walks_ahead=True)
    pair.client_ahead(QUERY)
    names = (message(b"S", b"name %04d\0x\0" % at) for at in range(REPORTED_BYTES_MAX // 17 + 1))
    pair.upstream_sent(b"".join(names) + ZONE[:7])
    assert pair.reported is None
    pair.upstream_sent(ZONE[7:] + READY_FOR_QUERY)
    assert pair.idle
    assert pair.reported is None


def test_p22_a_name_among_hundreds_is_not_looked_for_at_each_report() -> None:
    # It was: an upstream that sent one without end took 6 seconds of the process with each read.
    pair = ActivityPair(walks_ahead=True)
    pair.client_ahead(QUERY)
    names = [message(b"S", b"name %03d\0\0" % at) for at in range(REPORTED_BYTES_MAX // 15 - 2)]
    again = names[0] * 20
    pair.upstream_sent(b"".join(names) + again + READY_FOR_QUERY)
    assert pair.idle
    assert pair.reported is None


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1500)), max_size=30),
    st.lists(st.integers(0, 9999), max_size=5),
)
def test_p22_of_each_name_the_last_report_is_kept_however_many_there_are(
    reports: list[tuple[str, int]], offsets: list[int]
) -> None:
    # A client that set its application_name at each checkout of a pool lost its session by that.
    sent = [(name.encode(), b"%d" % at + b"x" * size) for at, (name, size) in enumerate(reports)]
    pair = ActivityPair(walks_ahead=True)
    pair.client_ahead(QUERY)
    stream = b"".join(message(b"S", name + b"\0" + value + b"\0") for name, value in sent)
    for piece in at_offsets(STANDBY + stream + READY_FOR_QUERY, offsets):
        pair.upstream_sent(piece)
    assert pair.idle
    if pair.reported is not None:
        assert len(pair.reported) <= REPORTED_BYTES_MAX
        assert reported_parameters(pair.reported) == {b"in_hot_standby": b"on", **dict(sent)}
    else:
        assert sum(max(n for m, n in reports if m == name) for name in dict(reports)) > 2000


def test_p22_an_application_name_at_each_checkout_is_no_change() -> None:
    pair = ActivityPair(walks_ahead=True)
    for at in range(1000):
        pair.client_ahead(QUERY)
        name = message(b"S", b"application_name\0checkout %d\0" % at)
        pair.upstream_sent((STANDBY if at == 0 else b"") + name + READY_FOR_QUERY)
    assert pair.reported is not None
    last = {b"in_hot_standby": b"on", b"application_name": b"checkout 999"}
    assert reported_parameters(pair.reported) == last
    assert pair.reusable


def test_p12_a_session_within_a_report_is_not_reusable() -> None:
    pair = ActivityPair(walks_ahead=True)
    pair.upstream_sent(STANDBY[:9])
    before = (pair.idle, pair.reusable)
    pair.upstream_sent(STANDBY[9:])
    assert (before, (pair.idle, pair.reusable)) == ((False, False), (True, True))
    assert pair.reported == STANDBY
