"""The relay between two real TCP connections: order, backpressure, ends, counts."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.observe.target_stats import ByteTotals
from proxy.session.direction import CLIENT_POLL_SECONDS
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.fast_path import watched_lanes
from proxy.session.relay import BUFFER_BYTES_MAX, Relay
from proxy.wire.messages import ErrorResponse, ReadyForQuery, Terminate
from tests.support.client import query
from tests.support.compiled import need_compiled
from tests.support.peer import (
    READ_BYTES,
    WAIT_SECONDS_MAX,
    Peer,
    send_until_stalled,
    tcp_pair,
)
from tests.support.running import eventually

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

MEGABYTE = 1_000_000
# What the kernel may hold between two ends on one machine, whatever its tuning: 4 MB sent, 6 MB
# received, and then what the relay itself may.
KERNEL_BYTES_MAX = 12 * MEGABYTE
ONE_READ_BYTES_MAX = 256 * 1024
CLIENT_ENDS = (EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST)


@dataclass
class Setting:
    """A relay that runs, and its two peers."""

    client: Peer
    upstream: Peer
    client_transport: asyncio.Transport
    upstream_transport: asyncio.Transport
    running: asyncio.Task[RelayEnd]
    totals: ByteTotals

    async def end(self) -> RelayEnd:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await self.running


async def transports() -> tuple[Peer, Peer, asyncio.Transport, asyncio.Transport]:
    """Return the two peers, and the relay's own ends of their connections."""
    loop = asyncio.get_running_loop()
    (near_client, client), (near_upstream, upstream) = tcp_pair(), tcp_pair()
    to_client, _ = await loop.create_connection(asyncio.Protocol, sock=near_client)
    to_upstream, _ = await loop.create_connection(asyncio.Protocol, sock=near_upstream)
    return Peer(client), Peer(upstream), to_client, to_upstream


@pytest_asyncio.fixture(params=["python", "compiled"])
async def lanes(request: pytest.FixtureRequest) -> "AsyncIterator[Lanes | None]":
    """Yield what carries the reads: protocols and transports, or compiled lanes."""
    if request.param == "python":
        yield None
        return
    need_compiled("a relay with lanes")
    with watched_lanes() as watched:
        yield watched


@pytest_asyncio.fixture
async def setting(lanes: "Lanes | None") -> AsyncIterator[Setting]:
    client, upstream, to_client, to_upstream = await transports()
    totals = ByteTotals()
    relay = Relay(to_client, to_upstream, lanes=lanes, totals=totals)
    to_client.set_protocol(relay.from_client)
    to_upstream.set_protocol(relay.from_upstream)
    running = asyncio.create_task(relay.run())
    yield Setting(client, upstream, to_client, to_upstream, running, totals)
    client.close()
    upstream.close()
    running.cancel()
    await asyncio.wait((running,))
    assert relay.carried() == (totals.client_bytes[0], totals.upstream_bytes[0])


async def test_bytes_go_both_ways_unchanged_and_in_order(setting: Setting) -> None:
    there, back = bytes(range(256)) * 4000, bytes(reversed(range(256))) * 4000
    async with asyncio.TaskGroup() as group:
        group.create_task(setting.client.send(there))
        group.create_task(setting.upstream.send(back))
        forward = group.create_task(setting.upstream.receive_exactly(len(there)))
        backward = group.create_task(setting.client.receive_exactly(len(back)))
    assert (forward.result(), backward.result()) == (there, back)


async def test_bytes_are_in_the_targets_totals_while_the_session_is_open(setting: Setting) -> None:
    totals = setting.totals
    for number in range(1, 4):
        await setting.client.send(b"there")
        await setting.upstream.receive_exactly(5)
        await setting.upstream.send(b"back")
        await setting.client.receive_exactly(4)
        assert (totals.client_bytes[0], totals.upstream_bytes[0]) == (5 * number, 4 * number)


async def test_8_bytes_at_a_time_written_and_read_are_the_same_stream(setting: Setting) -> None:
    content = bytes(range(200)) * 10

    async def drip() -> None:
        for start in range(0, len(content), 8):
            await setting.client.send(content[start : start + 8])
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(drip())
        setting.upstream.read_bytes = 8
        received = group.create_task(setting.upstream.receive_exactly(len(content)))
    assert received.result() == content


async def test_one_byte_is_passed_on_without_waiting_for_more(setting: Setting) -> None:
    for byte in b"abc":
        await setting.client.send(bytes((byte,)))
        assert await setting.upstream.receive() == bytes((byte,))
        await setting.upstream.send(bytes((byte,)))
        assert await setting.client.receive() == bytes((byte,))


@pytest.mark.parametrize("stalled", ["client", "upstream"])
async def test_w33_while_one_side_does_not_read_only_a_bounded_amount_is_held(
    setting: Setting, stalled: str
) -> None:
    sender, full = (
        (setting.upstream, setting.client_transport)
        if stalled == "client"
        else (setting.client, setting.upstream_transport)
    )
    sent = await send_until_stalled(sender, bytes(40 * MEGABYTE))
    assert sent < 2 * KERNEL_BYTES_MAX + BUFFER_BYTES_MAX
    assert 0 < full.get_write_buffer_size() <= BUFFER_BYTES_MAX + ONE_READ_BYTES_MAX


async def test_w32_each_direction_flows_while_the_other_is_blocked(setting: Setting) -> None:
    # The client reads nothing until all of its own is sent, and the upstream takes all of that
    # though its answers are not read: 24 MB in each direction.
    size = 24 * MEGABYTE
    answering = asyncio.create_task(setting.upstream.send(bytes(size)))
    async with asyncio.TaskGroup() as group:
        group.create_task(setting.client.send(bytes(size)))
        group.create_task(setting.upstream.receive_exactly(size))
    assert len(await setting.client.receive_exactly(size)) == size
    await answering


async def test_a_reader_that_goes_on_gets_all_that_was_held_back(setting: Setting) -> None:
    sending = asyncio.create_task(setting.upstream.send(b"x" * 30 * MEGABYTE))
    await eventually(lambda: setting.client_transport.get_write_buffer_size() > 0, "it is stalled")
    assert await setting.client.receive_exactly(30 * MEGABYTE) == b"x" * 30 * MEGABYTE
    await sending


@pytest.mark.parametrize(
    ("side", "method", "reason"),
    [
        ("client", "close", EndReason.CLIENT_CLOSED),
        ("client", "end", EndReason.CLIENT_CLOSED),
        ("client", "reset", EndReason.CLIENT_LOST),
        ("upstream", "close", EndReason.UPSTREAM_CLOSED),
        ("upstream", "end", EndReason.UPSTREAM_CLOSED),
        ("upstream", "reset", EndReason.UPSTREAM_LOST),
    ],
)
async def test_w34_the_end_of_one_side_ends_both_and_is_the_reason(
    setting: Setting, side: str, method: str, reason: EndReason
) -> None:
    ended, other = setting.client, setting.upstream
    if side == "upstream":
        ended, other = other, ended
    getattr(ended, method)()
    assert await other.receive_rest() == b""
    other.close()
    end = await setting.end()
    assert end.reason is reason
    assert setting.client_transport.is_closing()
    assert setting.upstream_transport.is_closing()


async def test_the_first_end_is_the_reason_when_the_other_follows(setting: Setting) -> None:
    setting.upstream.close()
    assert await setting.client.receive() == b""
    setting.client.reset()
    assert (await setting.end()).reason is EndReason.UPSTREAM_CLOSED


async def test_an_end_is_not_waited_for_twice(setting: Setting) -> None:
    # The upstream ended, then the client: a delay is of no use to either. This once
    # kept a client's slot for two more seconds.
    loop = asyncio.get_running_loop()
    setting.upstream.end()
    assert await setting.client.receive_rest() == b""
    setting.client.close()
    began = loop.time()
    await setting.end()
    assert loop.time() - began < 1


async def test_w34_what_one_side_sent_before_its_end_reaches_the_other(setting: Setting) -> None:
    content = bytes(range(256)) * 40_000
    sending = asyncio.create_task(setting.upstream.send(content))
    await eventually(lambda: setting.client_transport.get_write_buffer_size() > 0, "it is stalled")
    setting.client.read_bytes = 8
    received = bytearray(await setting.client.receive_exactly(1000))
    setting.client.read_bytes = READ_BYTES
    reading = asyncio.create_task(setting.client.receive_rest())
    await sending
    setting.upstream.close()
    received += await reading
    setting.client.close()
    assert bytes(received) == content
    assert (await setting.end()).reason is EndReason.UPSTREAM_CLOSED


async def test_last_words_are_not_lost_when_the_client_still_sends(setting: Setting) -> None:
    # Bytes that are not read any more make a kernel answer a close with RST, which destroys what
    # the client has not read yet.
    await setting.client.send(b"q" * 100_000)
    await setting.upstream.send(b"last words")
    setting.upstream.end()
    await setting.client.send(b"q" * 100_000)
    assert await setting.client.receive_rest() == b"last words"
    setting.client.close()
    assert (await setting.end()).reason is EndReason.UPSTREAM_CLOSED


async def test_bytes_are_counted_by_direction(setting: Setting) -> None:
    await setting.client.send(b"12345")
    await setting.upstream.receive_exactly(5)
    await setting.upstream.send(b"123")
    await setting.client.receive_exactly(3)
    setting.client.close()
    assert await setting.upstream.receive() == b""
    setting.upstream.close()
    assert await setting.end() == RelayEnd(EndReason.CLIENT_CLOSED, 5, 3)


async def test_cancelling_cuts_both_sides_at_once(setting: Setting) -> None:
    await setting.client.send(b"x")
    await setting.upstream.receive()
    setting.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await setting.end()
    assert setting.client_transport.is_closing()
    assert setting.upstream_transport.is_closing()
    for peer in (setting.client, setting.upstream):
        assert await peer.receive() == b""


@pytest.mark.parametrize("lost", ["client", "upstream"])
async def test_what_arrives_for_a_side_that_was_just_lost_is_dropped(lost: str) -> None:
    # The relay hears of a loss before it has switched the other side off. What came in between
    # was written to a closed transport, which the event loop logged as a fatal error.
    client, upstream, to_client, to_upstream = await transports()
    relay = Relay(to_client, to_upstream)
    gone, survivor = to_client, to_upstream
    of_gone, of_survivor = relay.from_client, relay.from_upstream
    if lost == "upstream":
        gone, survivor, of_gone, of_survivor = survivor, gone, of_survivor, of_gone
    gone.set_protocol(of_gone)
    survivor.set_protocol(of_survivor)
    gone.abort()
    await eventually(relay._ended.done, "the loss is known")
    of_survivor.data_received(b"late")
    of_survivor.pause_writing()
    of_survivor.resume_writing()
    for end in (to_client, to_upstream):
        end.abort()
    client.close()
    upstream.close()
    assert of_survivor.received_bytes == len(b"late")


# -- a client that has sent Terminate --------------------------------------------------------------

READY = ReadyForQuery(b"I").encode()
STATEMENTS = query("SELECT '" + "x" * 100_000 + "'") * 300 + Terminate().encode()


async def test_a_terminate_that_answers_the_end_of_a_statement_is_not_the_reason(
    setting: Setting,
) -> None:
    # A driver answers FATAL 57P01 with a Terminate, before the server has closed: a session that
    # was ended for a move of its key was counted as completed.
    await setting.client.send(query("SELECT 1"))
    await setting.upstream.receive_exactly(len(query("SELECT 1")))
    fatal = ErrorResponse.fatal("57P01", "ended").encode()
    await setting.upstream.send(fatal)
    assert await setting.client.receive_exactly(len(fatal)) == fatal
    await setting.client.send(Terminate().encode())
    setting.client.end()
    assert await setting.upstream.receive_exactly(5) == Terminate().encode()
    setting.upstream.end()
    setting.client.close()
    assert (await setting.end()).reason is EndReason.UPSTREAM_CLOSED


async def test_w34_after_terminate_a_client_that_reads_on_gets_all_answers(
    setting: Setting,
) -> None:
    # Its end closed the upstream, which PostgreSQL does only when it has run everything.
    sent = query("SELECT 1") + Terminate().encode()
    await setting.client.send(sent)
    setting.client.end()
    assert await setting.upstream.receive_exactly(len(sent)) == sent
    await setting.upstream.send(b"C" + READY[1:])
    with pytest.raises(TimeoutError):
        await setting.upstream.receive(0.1)  # no end: a server would end the statement by it
    await setting.upstream.send(READY)
    setting.upstream.end()
    assert await setting.client.receive_rest() == b"C" + READY[1:] + READY
    setting.client.close()
    await setting.end()


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w34_after_terminate_the_answers_for_a_client_that_left_are_discarded(
    setting: Setting, way: str
) -> None:
    sent = query("SELECT 1") * 2 + Terminate().encode()
    await setting.client.send(sent)
    assert await setting.upstream.receive_exactly(len(sent)) == sent
    getattr(setting.client, way)()
    for _ in range(20):
        await setting.upstream.send(b"D" + (4 + 100_000).to_bytes(4, "big") + bytes(100_000))
    with pytest.raises(TimeoutError):
        await setting.upstream.receive(0.1)
    setting.upstream.end()
    await setting.end()
    assert await setting.upstream.receive_rest() == b""


@pytest.mark.slow
async def test_w34_what_was_sent_before_a_half_close_is_delivered_however_late(
    setting: Setting,
) -> None:
    # An end with unread bytes before it was taken for a vanished client: of 380 statements and a
    # Terminate 2 ran.
    sending = asyncio.create_task(setting.client.send(STATEMENTS))
    await eventually(lambda: setting.upstream_transport.get_write_buffer_size() > 0, "it is full")
    received = bytearray()
    while not sending.done():  # until the kernel has the rest: the end comes after it
        received += await setting.upstream.receive()
        await asyncio.sleep(0)
    setting.client.end()
    with pytest.raises(TimeoutError):
        await setting.client.receive(2 * CLIENT_POLL_SECONDS)
    received += await setting.upstream.receive_exactly(len(STATEMENTS) - len(received))
    assert received == STATEMENTS
    setting.upstream.end()
    assert await setting.client.receive_rest() == b""
    setting.client.close()
    await setting.end()


@pytest.mark.slow
async def test_w35_a_reset_with_unread_bytes_before_it_is_a_lost_client(setting: Setting) -> None:
    # While the upstream reads nothing the client is not read: its reset has to be polled for.
    await send_until_stalled(setting.client, query("x" * 40 * MEGABYTE))
    setting.client.reset()
    assert (await setting.end()).reason is EndReason.CLIENT_LOST


# -- a client that pauses in its result ------------------------------------------------------------


@pytest.mark.parametrize("way", ["time", "drain"])
async def test_w34_a_client_that_is_cut_in_its_result_is_a_reason_of_its_own(way: str) -> None:
    # The log said `upstream_closed` and counted bytes that the client never received.
    client, upstream, to_client, to_upstream = await transports()
    seconds = 0.2 if way == "time" else 60
    relay = Relay(to_client, to_upstream, flush_seconds_max=seconds)
    to_client.set_protocol(relay.from_client)
    to_upstream.set_protocol(relay.from_upstream)
    running = asyncio.create_task(relay.run())
    sending = asyncio.create_task(upstream.send(bytes(20 * MEGABYTE)))
    await eventually(lambda: to_client.get_write_buffer_size() > 0, "the client is full")
    sending.cancel()
    await asyncio.wait((sending,))
    upstream.abort()
    # Its end is behind bytes that are not read while the client is full.
    relay.from_upstream.end(EndReason.UPSTREAM_CLOSED)
    if way == "drain":
        for _ in range(10):
            await asyncio.sleep(0)
        running.cancel()
    await asyncio.wait((running,), timeout=WAIT_SECONDS_MAX)
    assert relay.ended(EndReason.SHUTDOWN).reason is EndReason.CLIENT_NOT_READING
    client.close()
