"""Frames between processes: whole, split, too long; and errors that keep what they mean."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ErrorKind, ProxyError
from proxy.workers import rpc_frames
from proxy.workers.rpc_frames import (
    Frames,
    Message,
    MessageTooLong,
    encode,
    error_as_dict,
    error_from_dict,
)

MESSAGES: list[Message] = [
    {"call": 1, "name": "fresh", "arguments": {"workspace": "é"}},
    {"forget": 1},
    {},
]


@given(st.lists(st.integers(min_value=1, max_value=40), max_size=60))
def test_messages_come_out_as_they_went_in_however_they_are_split(sizes: list[int]) -> None:
    sent = b"".join(encode(message) for message in MESSAGES)
    frames = Frames()
    received: list[Message] = []
    for size in [*sizes, len(sent)]:
        received += frames.feed(sent[:size])
        sent = sent[size:]
    assert received == MESSAGES


def test_a_message_over_the_bound_is_neither_sent_nor_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc_frames, "MESSAGE_BYTES_MAX", 100)
    with pytest.raises(MessageTooLong):
        encode({"name": "x" * 100})
    # Its length alone is enough: it is not held until it is there.
    with pytest.raises(MessageTooLong):
        list(Frames().feed(struct.pack("!I", 101)))


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_error_means_the_same_on_the_other_side(kind: ErrorKind) -> None:
    error = ProxyError(kind, "why", retry_after_seconds=2.5)
    (content,) = Frames().feed(encode(error_as_dict(error)))
    there = error_from_dict(content)
    assert (there.kind, there.detail, there.retry_after_seconds) == (kind, "why", 2.5)
    assert there.response() == error.response()
