"""Lanes beside transports: order, backpressure, descriptors, ends."""

import asyncio
import select
import socket
from array import array
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from proxy import native
from proxy.session.end_reason import EndReason
from proxy.session.idle_end import IdleEnd
from proxy.wire.messages import ErrorResponse
from tests.native.relayed import Relayed, relayed
from tests.support.running import eventually
from tests.transport.peers import Contexts

if TYPE_CHECKING:
    from proxy.native.lanes import Lane, Lanes

MIB = 1024 * 1024
ENCRYPTED = pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
SHUTTING_DOWN = ErrorResponse.fatal("57P01", "terminating connection")


# -- order ---------------------------------------------------------------------------------------


@ENCRYPTED
async def test_what_was_queued_before_the_relay_began_goes_first(
    tls: Contexts, encrypted: bool
) -> None:
    # The welcome is written while StartupStream is the protocol, whose pause_writing does nothing.
    # A lane that did not know sent the upstream's next bytes past what was queued, as soon as the
    # client had made room.
    welcome, answer = b"w" * 4 * MIB, b"a" * 1000
    async with relayed(tls=tls if encrypted else None, small=True, first=welcome) as setting:
        assert setting.client_transport.get_write_buffer_size() > 0
        upstream = setting.upstream
        received = setting.client.receive_now()
        upstream.sock.sendall(upstream.encrypted(answer) if encrypted else answer)
        setting.lanes.run_ready()
        received += await setting.client.receive_exactly(4 * MIB + 1000 - len(received))
        assert received == welcome + answer


@pytest.mark.parametrize("laned", [False, True], ids=["python", "compiled"])
async def test_w33_a_client_that_was_full_before_the_relay_began_stalls_its_upstream(
    laned: bool,
) -> None:
    # It did not: what it had not taken was queued, and so was all that followed.
    async with relayed(laned=laned, small=True, first=b"w" * 4 * MIB) as setting:
        content = b"a" * 8 * MIB
        sending = asyncio.create_task(setting.upstream.send(content))
        await eventually(lambda: setting.upstream.stalled, "it is stalled")
        assert setting.client_transport.get_write_buffer_size() <= 4 * MIB
        assert await setting.client.receive_exactly(12 * MIB) == b"w" * 4 * MIB + content
        await sending


@ENCRYPTED
async def test_w34_last_words_reach_a_client_that_was_full(tls: Contexts, encrypted: bool) -> None:
    words = b"".join(b"%07d\n" % number for number in range(200_000))
    async with relayed(tls=tls if encrypted else None, small=True) as setting:
        sending = asyncio.create_task(setting.upstream.send(words))
        await eventually(
            lambda: setting.client_transport.get_write_buffer_size() > 0, "the client is full"
        )
        reading = asyncio.create_task(setting.client.receive_rest())
        await sending
        setting.upstream.end_orderly()
        assert await reading == words
        setting.client.abort()
        assert (await setting.end()).reason is EndReason.UPSTREAM_CLOSED


@ENCRYPTED
async def test_w34_last_words_reach_an_upstream_that_was_full(
    tls: Contexts, encrypted: bool
) -> None:
    words = b"".join(b"%07d\n" % number for number in range(200_000))
    async with relayed(tls=tls if encrypted else None, small=True) as setting:
        sending = asyncio.create_task(setting.client.send(words))
        await eventually(
            lambda: setting.upstream_transport.get_write_buffer_size() > 0, "the upstream is full"
        )
        reading = asyncio.create_task(setting.upstream.receive_rest())
        await sending
        setting.client.end()
        assert await reading == words
        assert setting.upstream.close_notify is encrypted
        setting.upstream.abort()
        assert (await setting.end()).reason is EndReason.CLIENT_CLOSED


# -- its end -------------------------------------------------------------------------------------


async def client_ends(setting: Relayed) -> None:
    setting.client.end()


async def client_resets(setting: Relayed) -> None:
    setting.client.reset()


async def upstream_ends(setting: Relayed) -> None:
    setting.upstream.end()


async def upstream_resets(setting: Relayed) -> None:
    setting.upstream.reset()


async def client_is_cut(setting: Relayed) -> None:
    setting.client_transport.abort()


async def upstream_is_cut(setting: Relayed) -> None:
    setting.upstream_transport.abort()


async def it_is_cancelled(setting: Relayed) -> None:
    setting.running.cancel()


async def it_is_cancelled_while_it_closes(setting: Relayed) -> None:
    setting.upstream.end()
    setting.client.end()  # one of them is not read where the other one is full
    await eventually(lambda: setting.relay.over, "it is closing")
    await asyncio.sleep(0)
    setting.running.cancel()


async def it_is_to_end_when_idle(setting: Relayed) -> None:
    IdleEnd(setting.relay).when_idle(EndReason.SHUTDOWN, SHUTTING_DOWN)


async def it_is_to_end_after_the_idle_grace(setting: Relayed) -> None:
    IdleEnd(setting.relay).when_idle(EndReason.SHUTDOWN, SHUTTING_DOWN, grace_seconds=0.01)


async def it_was_idle_for_long(setting: Relayed) -> None:
    IdleEnd(setting.relay).after_idle(0.01, SHUTTING_DOWN)


@ENCRYPTED
@pytest.mark.parametrize("full", ["neither", "client", "upstream"])
@pytest.mark.parametrize(
    "happens",
    [
        client_ends,
        client_resets,
        upstream_ends,
        upstream_resets,
        client_is_cut,
        upstream_is_cut,
        it_is_cancelled,
        it_is_cancelled_while_it_closes,
        it_is_to_end_when_idle,
        it_is_to_end_after_the_idle_grace,
        it_was_idle_for_long,
    ],
)
async def test_no_lane_is_left_whatever_ends_the_session(
    tls: Contexts, happens: Callable[[Relayed], Awaitable[None]], full: str, encrypted: bool
) -> None:
    async with relayed(tls=tls if encrypted else None, small=True) as setting:
        filling: asyncio.Task[None] | None = None
        rows = b"D\0\0\1\0" + bytes(252)
        if full == "client":
            filling = asyncio.create_task(setting.upstream.send(rows * 8192))
            await eventually(lambda: len(setting.lanes) == 1, "the upstream is not read")
        elif full == "upstream":
            filling = asyncio.create_task(setting.client.send(rows * 8192))
            await eventually(lambda: len(setting.lanes) == 1, "the client is not read")
        else:
            assert len(setting.lanes) == 2
        await happens(setting)
        await eventually(lambda: len(setting.lanes) == 0 or filling is not None, "it ends")
        if filling is not None:
            filling.cancel()
            await asyncio.wait((filling,))
        setting.client.abort()
        setting.upstream.abort()
        await asyncio.wait((setting.running,), timeout=10)
        assert setting.running.done()
        assert len(setting.lanes) == 0
        assert setting.client_transport.is_closing()
        assert setting.upstream_transport.is_closing()


async def test_a_stalled_session_of_which_the_client_has_hung_up_is_not_looked_at_again_and_again(
    tls: Contexts,
) -> None:
    # epoll reports EPOLLHUP whether it was requested or not.
    async with relayed(tls=tls, small=True) as setting:
        filling = asyncio.create_task(setting.client.send(bytes(4 * MIB)))
        await eventually(lambda: len(setting.lanes) == 1, "the client is not read")
        filling.cancel()
        await asyncio.wait((filling,))
        setting.client.reset()
        ready = select.poll()
        ready.register(setting.lanes.fileno(), select.POLLIN)
        assert ready.poll(50) == []


async def test_a_session_that_gets_no_lane_is_relayed_by_its_transports(tls: Contexts) -> None:
    # The kernel watches so many descriptors and no more.
    async with relayed(tls=tls, closed=True) as setting:
        assert len(setting.lanes) == 0
        await setting.client.send(b"there")
        assert await setting.upstream.receive_exactly(5) == b"there"
        await setting.upstream.send(b"back")
        assert await setting.client.receive_exactly(4) == b"back"


# -- lanes alone ---------------------------------------------------------------------------------


@dataclass
class LaneHarness:
    """A lane between two pairs of sockets, and the arguments of its callbacks."""

    lanes: "Lanes"
    pairs: list[tuple[socket.socket, socket.socket]] = field(
        default_factory=lambda: [socket.socketpair(), socket.socketpair()]
    )
    over: list[bytes] = field(default_factory=list)
    ended: list[Exception | None] = field(default_factory=list)
    then: Callable[[], None] = lambda: None
    left: int = 0
    ahead: bool = False
    total: "array[int]" = field(default_factory=lambda: array("Q", (0,)))

    def __post_init__(self) -> None:
        for pair in self.pairs:
            for end in pair:
                end.setblocking(False)
        kind = native.lanes.AheadLane if self.ahead else native.lanes.Lane
        self.activity = native.activity.Activity(walks_ahead=self.ahead)
        self.lane: Lane = kind(
            self.lanes,
            self.near.fileno(),
            self.sink.fileno(),
            source_tls=None,
            sink_tls=None,
            activity=self.activity,
            total=self.total,
            from_upstream=not self.ahead,
            owner=self,
            paused=False,
        )

    @property
    def near(self) -> socket.socket:
        return self.pairs[0][0]

    @property
    def source(self) -> socket.socket:
        return self.pairs[0][1]

    @property
    def sink(self) -> socket.socket:
        return self.pairs[1][0]

    @property
    def taker(self) -> socket.socket:
        return self.pairs[1][1]

    def taken(self) -> bytes:
        try:
            return self.taker.recv(65536)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.lane.close()
        for pair in self.pairs:
            for end in pair:
                end.close()

    # -- what a lane asks of its owner -----------------------------------------------------------

    def overflow(self, rest: bytes) -> None:
        self.over.append(rest)

    def client_left(self) -> None:
        self.left += 1

    def lane_ended(self, error: Exception | None) -> None:
        self.ended.append(error)
        self.then()


class Failing(LaneHarness):
    """A lane whose owner fails in `overflow`."""

    failure = ZeroDivisionError("a bug")

    def overflow(self, rest: bytes) -> None:
        raise self.failure


@pytest.fixture
def lanes() -> "Iterator[Lanes]":
    with closing(native.lanes.Lanes()) as made:
        yield made


def test_a_descriptor_that_is_given_anew_in_the_same_turn_is_the_new_ones(lanes: "Lanes") -> None:
    # The end of one lane closes another one's connection, of which the same turn has an event,
    # and a new connection gets its number.
    first, second = LaneHarness(lanes), LaneHarness(lanes)
    number = second.near.fileno()
    reborn: list[LaneHarness] = []

    def then() -> None:
        second.close()
        held = []
        while True:  # descriptors are given lowest first
            pair = socket.socketpair()
            if number in (pair[0].fileno(), pair[1].fileno()):
                break
            held.append(pair)
        if pair[1].fileno() == number:
            pair = pair[1], pair[0]
        reborn.append(LaneHarness(lanes, [pair, socket.socketpair()]))
        for one, other in held:
            one.close()
            other.close()

    first.then = then
    first.source.close()
    second.source.send(b"the second's")
    lanes.run_ready()
    assert first.ended == [None]
    assert (second.ended, second.over) == ([], [])
    (new,) = reborn
    assert new.near.fileno() == number
    assert (new.taken(), new.ended) == (b"", [])
    new.source.send(b"the new one's")
    lanes.run_ready()
    assert new.taken() == b"the new one's"
    first.close()
    new.close()


def test_a_callback_that_fails_ends_its_own_lane_and_no_other(lanes: "Lanes") -> None:
    first, second = Failing(lanes), LaneHarness(lanes)
    fill(first.sink)
    first.source.send(b"x")
    second.source.send(b"y")
    lanes.run_ready()
    assert first.ended == [first.failure]
    assert second.taken() == b"y"
    assert len(lanes) == 1
    first.close()
    second.close()


def test_an_end_that_fails_is_told_and_its_lane_is_closed_all_the_same(lanes: "Lanes") -> None:
    harness = LaneHarness(lanes)

    def fail() -> None:
        raise ZeroDivisionError

    harness.then = fail
    harness.source.close()
    with pytest.raises(ZeroDivisionError):
        lanes.run_ready()
    assert (len(lanes), harness.ended) == (0, [None])
    lanes.run_ready()
    harness.close()


def test_what_a_full_sink_does_not_take_is_handed_over_whole(lanes: "Lanes") -> None:
    harness = LaneHarness(lanes)
    filled = fill(harness.sink)
    content = bytes(range(256)) * 100
    harness.source.send(content)
    lanes.run_ready()
    received = bytearray()
    while some := harness.taken():
        received += some
    assert bytes(received[filled:]) + b"".join(harness.over) == content
    assert harness.over
    assert harness.lane.carried_bytes == harness.total[0] == len(content)
    harness.close()


def test_lanes_of_one_target_add_to_one_total(lanes: "Lanes") -> None:
    total = array("Q", (2**40,))
    first, second = LaneHarness(lanes, total=total), LaneHarness(lanes, total=total, ahead=True)
    for number in range(3):
        first.source.send(b"answer")
        second.source.send(b"Q\0\0\0\4")
        lanes.run_ready()
        assert total[0] == 2**40 + (number + 1) * (6 + 5), "while both are open"
    assert (first.lane.carried_bytes, second.lane.carried_bytes) == (18, 15)
    first.close()
    second.close()


def test_a_lane_that_cannot_be_watched_again_ends(lanes: "Lanes") -> None:
    # It was neither read nor closed: a session that hung.
    harness = LaneHarness(lanes)
    harness.lane.pause()
    lanes.close()
    harness.lane.resume()
    (error,) = harness.ended
    assert isinstance(error, OSError)
    assert len(lanes) == 0
    harness.close()


def test_a_closed_lane_does_nothing_more(lanes: "Lanes") -> None:
    harness = LaneHarness(lanes)
    harness.lane.close()
    for call in (harness.lane.close, harness.lane.pause, harness.lane.resume, lanes.run_ready):
        call()
    harness.source.send(b"x")
    lanes.run_ready()
    assert (harness.taken(), harness.over, harness.ended, len(lanes)) == (b"", [], [], 0)
    harness.close()


def test_more_lanes_than_a_turn_has_events_for_are_all_served(lanes: "Lanes") -> None:
    harnesses = [LaneHarness(lanes) for _ in range(300)]
    for number, harness in enumerate(harnesses):
        harness.source.send(b"%d" % number)
    for _ in range(5):
        lanes.run_ready()
    assert [harness.taken() for harness in harnesses] == [b"%d" % number for number in range(300)]
    for harness in harnesses:
        harness.close()
    assert len(lanes) == 0


def fill(sock: socket.socket) -> int:
    """Send until nothing is taken any more; return how much was."""
    filled = 0
    try:
        while True:
            filled += sock.send(bytes(65536))
    except BlockingIOError:
        return filled
