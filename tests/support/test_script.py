"""The step language and the cuts, without any connection."""

import pytest

from tests.support.cuts import THREE_WAYS, Cut, at_offsets, at_random, whole
from tests.support.script import (
    Close,
    Expect,
    ExpectMessage,
    ExpectPacket,
    PeerEnded,
    ReadBytes,
    ReadToEnd,
    ReadUntil,
    Reset,
    Script,
    Send,
    SendSplit,
    Step,
)

READY = b"Z\0\0\0\5I"
NOTICE = b"N\0\0\0\4"


def fed(script: Script, content: bytes, cut: Cut = whole) -> None:
    for piece in cut(content):
        assert script.next_action() is None
        script.receive_data(piece)


@pytest.mark.parametrize("cut", THREE_WAYS)
@pytest.mark.parametrize("content", [b"", b"x", b"a content of more bytes than a piece has"])
def test_pieces_are_the_content(content: bytes, cut: Cut) -> None:
    assert b"".join(cut(content)) == content
    assert list(cut(content)) == list(cut(content))


def test_pieces_end_at_the_offsets() -> None:
    assert list(at_offsets(b"abcdef", (4, 1, 1, 9))) == [b"a", b"", b"bcd", b"ef"]


@pytest.mark.parametrize("cut", THREE_WAYS)
def test_steps_read_what_they_need_and_no_more(cut: Cut) -> None:
    script = Script(
        (Expect(b"abc"), ExpectPacket(), ReadBytes(1), ExpectMessage(b"Z"), ReadUntil(b"ZZ"))
    )
    fed(script, b"abc" + b"\0\0\0\6xy" + b"S" + READY + NOTICE + READY + READY + b"rest", cut)
    assert script.next_action() is None
    assert script.done
    assert script.packets == [b"\0\0\0\6xy", READY]
    assert script.bare == b"S"
    assert [frame.type for frame in script.messages] == [b"N", b"Z", b"Z"]
    assert script.trailing_data() == b"rest"
    assert script.trailing_data() == b""


def test_actions_come_in_order_and_wait_for_what_is_expected() -> None:
    script = Script((Send(b"hello"), Expect(b"ok"), SendSplit(b"ab"), Close(), Reset()))
    assert script.next_action() == Send(b"hello")
    assert script.next_action() is None
    assert not script.done
    script.receive_data(b"ok")
    actions = [script.next_action() for _ in range(4)]
    assert actions == [Send(b"a"), Send(b"b"), Close(), Reset()]
    assert script.next_action() is None
    assert (script.done, script.actions_taken) == (True, 5)


def test_a_script_sends_in_the_pieces_of_its_cut() -> None:
    script = Script((Send(b"x" * 100),), at_random)
    sent = b""
    while isinstance(action := script.next_action(), Send):
        sent += action.content
    assert sent == b"x" * 100
    assert script.actions_taken > 100 // 11


@pytest.mark.parametrize("step", [Expect(b"abc"), ExpectMessage(b"Z")])
def test_other_bytes_than_the_expected_ones_are_an_error_at_once(step: Step) -> None:
    script = Script((step,))
    script.receive_data(b"x")
    with pytest.raises(AssertionError, match="expected"):
        script.next_action()


@pytest.mark.parametrize("step", [Expect(b"abc"), ExpectPacket(), ExpectMessage(b"Z")])
def test_an_end_instead_of_what_is_expected_is_told(step: Step) -> None:
    script = Script((step,))
    assert script.next_action() is None
    script.receive_eof()
    with pytest.raises(PeerEnded):
        script.next_action()


@pytest.mark.parametrize("step", [ReadBytes(9), ReadUntil(b"ZZ"), ReadToEnd()])
def test_what_is_only_read_ends_with_the_stream(step: Step) -> None:
    script = Script((step, Send(b"too late")))
    fed(script, READY)
    script.receive_eof()
    assert script.next_action() == Send(b"too late")
    assert script.done


def test_a_length_that_cannot_be_is_that_of_a_header_alone() -> None:
    script = Script((ReadToEnd(),))
    fed(script, b"E\0\0\0\1" + READY)
    script.receive_eof()
    assert script.next_action() is None
    assert [frame.type for frame in script.messages] == [b"E", b"Z"]
