"""The compiled idle tracker says after every read what Python's says: two that must not differ.

Its streams are hostile, too: what no driver sends reaches it all the same.
"""

import os
import random
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import native
from proxy.wire.activity import Activity

if TYPE_CHECKING:
    from proxy.native.activity import Activity as CompiledActivity

# A long run by hand: NATIVE_STREAMS=200000.
STREAMS: Final = int(os.environ.get("NATIVE_STREAMS", "3000"))
CLIENT_KINDS: Final = b"QSFPBEDCHdcfXXp?\x00\xff"
UPSTREAM_KINDS: Final = b"ZZZDdGWcCEINSAT123nst?\x00\xff"
LENGTHS: Final = (0, 1, 3, 4, 4, 5, 5, 5, 5, 6, 20, 300, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
STATUS: Final = b"IIITE?\x00"

Read = tuple[bool, bytes]  # whether it is the upstream's, and what


def compare(reads: list[Read]) -> tuple[bool, bool]:
    """Feed both with the reads, also ahead; return what they report at the end."""
    python, compiled = Activity(), native.activity.Activity()
    ahead = Activity(walks_ahead=True), native.activity.Activity(walks_ahead=True)
    for number, (is_upstream, read) in enumerate(reads):
        for tracker in (python, compiled):
            (tracker.upstream_sent if is_upstream else tracker.client_sent)(read)
        if is_upstream:
            for one in ahead:
                one.upstream_sent(read)
        else:
            sent = [one.client_ahead(read) for one in ahead]
            assert sent[0] == sent[1], reads[: number + 1]
        for pair in ((python, compiled), ahead):
            assert said(pair[0]) == said(pair[1]), reads[: number + 1]
    return python.idle, python.terminated


def said(one: "Activity | CompiledActivity") -> tuple[bool, ...]:
    """Return all that an activity says of its session."""
    return (
        one.idle,
        one.in_transaction,
        one.streaming,
        one.copying,
        one.awaits_answer,
        one.terminated,
        one.withheld,
        one.reusable,
    )


def ordinary(rng: random.Random) -> Iterator[Read]:
    """Return messages that a session could consist of, each with a length that is its own."""
    for _ in range(rng.randrange(1, 30)):
        is_upstream = rng.random() < 0.5
        kind = rng.choice(b"ZZZDdGWcCEINSAT" if is_upstream else b"QSFPBEDCHdcfSQX")
        content = bytes((rng.choice(STATUS[:5]),)) if is_upstream and kind == ord("Z") else b""
        content = content or bytes(0 if kind == ord("X") else rng.randrange(0, 12))
        yield is_upstream, bytes((kind,)) + struct.pack("!I", len(content) + 4) + content


def hostile(rng: random.Random) -> Iterator[Read]:
    """Return messages with lengths and types that may be anything."""
    for _ in range(rng.randrange(1, 12)):
        is_upstream = rng.random() < 0.5
        kind = rng.choice(UPSTREAM_KINDS if is_upstream else CLIENT_KINDS)
        content = bytes((rng.choice(STATUS),)) + rng.randbytes(rng.randrange(0, 8))
        yield is_upstream, bytes((kind,)) + struct.pack("!I", rng.choice(LENGTHS)) + content


def cut(rng: random.Random, messages: list[Read]) -> list[Read]:
    """Return the same streams in reads that begin and end anywhere."""
    reads: list[Read] = []
    for is_upstream, content in messages:
        if reads and reads[-1][0] is is_upstream and rng.random() < 0.5:
            content = reads.pop()[1] + content  # noqa: PLW2901 - in one read with it
        while len(content) > 1 and rng.random() < 0.3:
            at = rng.randrange(0, len(content))
            reads.append((is_upstream, content[:at]))
            content = content[at:]  # noqa: PLW2901
        reads.append((is_upstream, content))
    return reads


@pytest.mark.parametrize("messages", [ordinary, hostile])
def test_the_same_after_every_read_of_a_session_at_random(messages: object) -> None:
    assert callable(messages)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown where it fails
    rng, ends = random.Random(seed), set()
    for _ in range(STREAMS):
        ends.add(compare(cut(rng, list(messages(rng)))))
    assert {(True, False), (False, False)} <= ends  # both verdicts were compared


@settings(max_examples=300)
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=40)), max_size=12))
def test_the_same_after_every_read_of_bytes_at_random(reads: list[Read]) -> None:
    compare(reads)


COPY_PARTS: Final = {
    "query": (False, b"Q\0\0\0\4"),
    "sync": (False, b"S\0\0\0\4"),
    "work": (False, b"E\0\0\0\4"),
    "data": (False, b"d\0\0\0\5x"),
    "done": (False, b"c\0\0\0\4"),
    "fail": (False, b"f\0\0\0\4"),
    "copy in": (True, b"G\0\0\0\5x"),
    "complete": (True, b"C\0\0\0\5x"),
    "error": (True, b"E\0\0\0\5x"),
    "ready": (True, b"Z\0\0\0\5I"),
    "notice": (True, b"N\0\0\0\5x"),
}


@settings(max_examples=1500)
@given(st.lists(st.sampled_from(list(COPY_PARTS.values())), max_size=25))
def test_the_same_in_every_order_of_copy_and_doubt(reads: list[Read]) -> None:
    compare(reads)


def test_the_same_when_more_ends_of_copy_are_ahead_than_are_kept() -> None:
    for count in range(60, 70):
        compare([COPY_PARTS["query"], *[COPY_PARTS["done"]] * count, COPY_PARTS["copy in"]])


def test_a_length_of_4_gib_is_followed_to_its_end() -> None:
    # What is still to come of a message is more than 32 bits hold.
    piece = bytes(1 << 24)
    left = 0xFFFFFFFF - 4
    reads: list[Read] = [(True, b"D\xff\xff\xff\xff")]
    while left > len(piece):
        reads.append((True, piece))
        left -= len(piece)
    assert compare([*reads, (True, piece[: left - 1])]) == (False, False)
    assert compare([*reads, (True, piece[:left])]) == (True, False)
