"""MessageReader: whole messages out of any cut of the stream, and no length believed unchecked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.framing import MessageReader
from proxy.wire.messages import Frame
from proxy.wire.violations import UpstreamViolation
from tests.support.cuts import byte_by_byte, three_ways
from tests.wire.driving import READY_FOR_QUERY, TERMINATE, message

LIMIT = 10

MESSAGES = {
    "no payload": (TERMINATE, Frame(b"X", b"")),
    "one byte": (READY_FOR_QUERY, Frame(b"Z", b"I")),
    "one below the limit": (message(b"A", b"x" * 9), Frame(b"A", b"x" * 9)),
    "at the limit": (message(b"A", b"x" * 10), Frame(b"A", b"x" * 10)),
    "type byte zero": (message(b"\0", b"ab"), Frame(b"\0", b"ab")),
    "payload that looks like a header": (
        message(b"A", b"Z\0\0\0\5I"),
        Frame(b"A", b"Z\0\0\0\5I"),
    ),
}


def read_all(reader: MessageReader) -> list[Frame]:
    found: list[Frame] = []
    while (frame := reader.next()) is not None:
        found.append(frame)
    return found


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_comes_out_however_it_was_cut(name: str) -> None:
    wire, frame = MESSAGES[name]
    for chunks in three_ways(wire):
        reader = MessageReader(LIMIT)
        found: list[Frame] = []
        for chunk in chunks:
            reader.feed(chunk)
            found += read_all(reader)
        assert found == [frame]
        assert reader.trailing_data() == b""


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_comes_out_only_with_its_last_byte(name: str) -> None:
    wire, frame = MESSAGES[name]
    reader = MessageReader(LIMIT)
    for chunk in byte_by_byte(wire[:-1]):
        reader.feed(chunk)
        assert reader.next() is None
    reader.feed(wire[-1:])
    assert reader.next() == frame


@pytest.mark.parametrize("name", MESSAGES)
def test_what_follows_a_message_is_kept(name: str) -> None:
    wire, frame = MESSAGES[name]
    reader = MessageReader(LIMIT)
    reader.feed(wire + b"Z\0\0")
    assert read_all(reader) == [frame]
    assert reader.trailing_data() == b"Z\0\0"
    assert reader.trailing_data() == b""


def test_messages_come_out_in_order() -> None:
    reader = MessageReader(LIMIT)
    reader.feed(b"".join(wire for wire, _ in MESSAGES.values()))
    assert read_all(reader) == [frame for _, frame in MESSAGES.values()]


def test_an_empty_reader_has_nothing() -> None:
    reader = MessageReader(0)
    reader.feed(b"")
    assert reader.next() is None
    assert reader.trailing_data() == b""


@pytest.mark.parametrize("length", [0, 1, 2, 3, 15, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_w53_an_impossible_length_is_refused_on_its_last_byte(length: int) -> None:
    reader = MessageReader(LIMIT)
    header = b"A" + length.to_bytes(4, "big")
    reader.feed(header[:4])
    assert reader.next() is None
    reader.feed(header[4:])
    with pytest.raises(UpstreamViolation, match=f"length of {length}, outside 4 to 14"):
        reader.next()


def test_w53_a_refused_length_stays_refused() -> None:
    reader = MessageReader(LIMIT)
    reader.feed(b"A\0\0\0\0")
    for _ in range(2):
        with pytest.raises(UpstreamViolation):
            reader.next()


def test_messages_before_an_impossible_length_still_come_out() -> None:
    reader = MessageReader(LIMIT)
    reader.feed(READY_FOR_QUERY + b"A\0\0\0\3")
    assert reader.next() == Frame(b"Z", b"I")
    with pytest.raises(UpstreamViolation):
        reader.next()


# -- a run of ParameterStatus --------------------------------------------------------------------

STATUS = message(b"S", b"a\0b\0")


def taken(content: bytes) -> tuple[bytes, bytes]:
    """Return what is taken as parameters, and what is left."""
    reader = MessageReader(LIMIT)
    reader.feed(content)
    return reader.take_parameters(), reader.trailing_data()


@pytest.mark.parametrize(
    "following",
    [
        b"",
        READY_FOR_QUERY,
        b"S",
        b"S\0\0\0",
        STATUS[:-1],
        message(b"S", b""),
        message(b"S", b"ab"),
        message(b"S", b"a\0"),
        message(b"S", b"a\0b"),
        message(b"S", b"\0a\0b"),
        message(b"S", b"a\0b\0\0"),
        message(b"S", b"a\0" + b"b" * (LIMIT - 2) + b"\0"),
        b"S\0\0\0\3" + STATUS,
        b"S\0\0\0\0" + STATUS,
        b"S\xff\xff\xff\xff" + STATUS,
    ],
)
def test_parameters_come_out_together_and_anything_else_stays(following: bytes) -> None:
    assert taken(following) == (b"", following)
    assert taken(STATUS * 3 + following) == (STATUS * 3, following)


def test_a_parameter_at_the_limit_comes_out() -> None:
    status = message(b"S", b"a\0" + b"b" * (LIMIT - 3) + b"\0")
    assert taken(status) == (status, b"")


PIECES = [STATUS, message(b"S", b"\0\0"), READY_FOR_QUERY, message(b"S", b"ab"), b"S\0\0\0\4"]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=12))).map(b"".join))
def test_what_is_taken_is_what_comes_out_one_by_one(content: bytes) -> None:
    parameters, rest = taken(content)
    assert parameters + rest == content
    reader = MessageReader(LIMIT)
    reader.feed(parameters)
    frames = read_all(reader)
    assert b"".join(frame.encode() for frame in frames) == parameters
    assert {frame.type for frame in frames} <= {b"S"}
    assert all(len(frame.payload.split(b"\0")) == 3 for frame in frames)
