"""Lanes from the client of a session whose upstream is kept: what they hold back, P13 to P16."""

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from proxy import native
from tests.native.test_lanes import LaneHarness, fill
from tests.support.cuts import three_ways
from tests.wire.driving import TERMINATE

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes


@pytest.fixture
def lanes() -> "Iterator[Lanes]":
    with closing(native.lanes.Lanes()) as made:
        yield made


def carried(harness: LaneHarness, *pieces: bytes) -> bytes:
    """Carry the pieces, one read each. Return what has come out."""
    for piece in pieces:
        harness.source.send(piece)
        harness.lanes.run_ready()
    return harness.taken()


def test_p13_a_terminate_ends_the_lane_and_is_not_sent(lanes: "Lanes") -> None:
    query = b"Q\0\0\0\4"
    for pieces in three_ways(TERMINATE):
        harness = LaneHarness(lanes, ahead=True)
        assert carried(harness, query) == query
        harness.activity.upstream_sent(b"Z\0\0\0\5I")
        assert carried(harness, *filter(None, pieces)) == b""
        assert (harness.left, harness.ended, len(lanes)) == (1, [], 0)
        assert harness.lane.carried_bytes == harness.total[0] == len(query + TERMINATE)
        harness.close()


def test_p14_a_cut_header_that_was_held_back_is_sent_with_the_rest(lanes: "Lanes") -> None:
    query = b"Q\0\0\0\4"
    for pieces in three_ways(TERMINATE):
        harness = LaneHarness(lanes, ahead=True)
        assert (
            carried(harness, query, *filter(None, pieces), b"more") == query + TERMINATE + b"more"
        )
        assert (harness.left, len(lanes)) == (0, 1)
        assert harness.lane.carried_bytes == len(query + TERMINATE + b"more")
        harness.close()


def test_p16_what_a_full_sink_does_not_take_ahead_of_a_terminate_is_handed_over(
    lanes: "Lanes",
) -> None:
    harness = LaneHarness(lanes, ahead=True)
    filled = fill(harness.sink)
    late = b"d\0\0\x20\4" + bytes(8192)
    harness.source.send(late + TERMINATE + b"anything")
    lanes.run_ready()
    received = bytearray()
    while some := harness.taken():
        received += some
    assert bytes(received[filled:]) + b"".join(harness.over) == late
    assert (harness.left, harness.ended, len(lanes)) == (1, [], 0)
    harness.close()
