"""The relay between two real TCP connections: order, backpressure, ends, counts."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.fast_path import watched_lanes
from proxy.session.relay import BUFFER_BYTES_MAX, Relay
from tests.support.compiled import need_compiled
from tests.support.running import eventually

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

MEGABYTE = 1_000_000
WAIT_SECONDS_MAX = 10.0
# What the kernel may hold between two ends on one machine, whatever its tuning: 4 MB sent, 6 MB
# received, and then what the relay itself may.
KERNEL_BYTES_MAX = 12 * MEGABYTE
ONE_READ_BYTES_MAX = 256 * 1024
CLIENT_ENDS = (EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for end in (near, far):
        end.setblocking(False)
    return near, far


@dataclass
class Peer:
    """The far end of one of the relay's connections."""

    sock: socket.socket

    async def send(self, content: bytes) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await asyncio.get_running_loop().sock_sendall(self.sock, content)

    async def receive(self, count: int = 65536) -> bytes:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await asyncio.get_running_loop().sock_recv(self.sock, count)

    async def receive_exactly(self, count: int, portion: int = 65536) -> bytes:
        received = bytearray()
        while len(received) < count:
            some = await self.receive(min(portion, count - len(received)))
            assert some, "ended early"
            received += some
        return bytes(received)

    async def receive_rest(self) -> bytes:
        rest = bytearray()
        while some := await self.receive():
            rest += some
        return bytes(rest)

    async def send_until_stalled(self, content: bytes) -> int:
        """Send until nothing is taken any more; return how much was."""
        sent = 0
        deadline = asyncio.get_running_loop().time() + 0.2
        while asyncio.get_running_loop().time() < deadline and sent < len(content):
            try:
                taken = self.sock.send(content[sent : sent + 65536])
            except BlockingIOError:
                await asyncio.sleep(0.001)
                continue
            sent += taken
            deadline = asyncio.get_running_loop().time() + 0.2
        return sent

    def close(self) -> None:
        self.sock.close()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@dataclass
class Setting:
    """A relay that runs, and its two peers."""

    client: Peer
    upstream: Peer
    client_transport: asyncio.Transport
    upstream_transport: asyncio.Transport
    running: asyncio.Task[RelayEnd]

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
    """Give what carries the reads: protocols and transports, or compiled lanes."""
    if request.param == "python":
        yield None
        return
    need_compiled("a relay with lanes")
    with watched_lanes() as watched:
        yield watched


@pytest_asyncio.fixture
async def setting(lanes: "Lanes | None") -> AsyncIterator[Setting]:
    client, upstream, to_client, to_upstream = await transports()
    relay = Relay(to_client, to_upstream, lanes=lanes)
    to_client.set_protocol(relay.from_client)
    to_upstream.set_protocol(relay.from_upstream)
    running = asyncio.create_task(relay.run())
    yield Setting(client, upstream, to_client, to_upstream, running)
    client.close()
    upstream.close()
    running.cancel()
    await asyncio.wait((running,))


async def test_bytes_go_both_ways_unchanged_and_in_order(setting: Setting) -> None:
    there, back = bytes(range(256)) * 4000, bytes(reversed(range(256))) * 4000
    async with asyncio.TaskGroup() as group:
        group.create_task(setting.client.send(there))
        group.create_task(setting.upstream.send(back))
        forward = group.create_task(setting.upstream.receive_exactly(len(there)))
        backward = group.create_task(setting.client.receive_exactly(len(back)))
    assert (forward.result(), backward.result()) == (there, back)


async def test_8_bytes_at_a_time_written_and_read_are_the_same_stream(setting: Setting) -> None:
    content = bytes(range(200)) * 10

    async def drip() -> None:
        for start in range(0, len(content), 8):
            await setting.client.send(content[start : start + 8])
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(drip())
        received = group.create_task(setting.upstream.receive_exactly(len(content), portion=8))
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
    sent = await sender.send_until_stalled(bytes(40 * MEGABYTE))
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
        ("client", "half_close", EndReason.CLIENT_CLOSED),
        ("client", "reset", EndReason.CLIENT_LOST),
        ("upstream", "close", EndReason.UPSTREAM_CLOSED),
        ("upstream", "half_close", EndReason.UPSTREAM_CLOSED),
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
    setting.upstream.half_close()
    assert await setting.client.receive_rest() == b""
    setting.client.close()
    began = loop.time()
    await setting.end()
    assert loop.time() - began < 1


async def test_w34_what_one_side_sent_before_its_end_reaches_the_other(setting: Setting) -> None:
    content = bytes(range(256)) * 40_000
    sending = asyncio.create_task(setting.upstream.send(content))
    await eventually(lambda: setting.client_transport.get_write_buffer_size() > 0, "it is stalled")
    received = bytearray(await setting.client.receive_exactly(1000, portion=8))
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
    setting.upstream.half_close()
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
