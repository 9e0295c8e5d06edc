"""A connection during startup: which bytes wait, how many, and which protocol gets them."""

import asyncio
from collections.abc import Callable

import pytest

from proxy.transport.stream import INBOX_BYTES_MAX
from tests.support.peer import WAIT_SECONDS_MAX
from tests.transport.peers import Notes, contexts, linked, resident_bytes, start

MIB = 1024 * 1024


async def test_bytes_wait_for_who_asks() -> None:
    async with linked() as (stream, peer):
        await peer.send(b"one")
        assert await stream.receive() == b"one"
        asking = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        assert not asking.done()
        await peer.send(b"two")
        assert await asking == b"two"


async def test_the_peers_end_is_empty_and_stays_so() -> None:
    async with linked() as (stream, peer):
        await peer.send(b"last")
        peer.end()
        await stream.gone
        assert await stream.receive() == b"last"
        assert await stream.receive() == b""
        assert await stream.receive() == b""
        stream.write(b"an answer all the same")
        assert await peer.receive_exactly(22) == b"an answer all the same"


async def test_a_reset_ends_a_wait_for_bytes() -> None:
    async with linked() as (stream, peer):
        asking = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        peer.reset()
        assert await asking == b""
        assert stream.gone.done()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_write_on_a_lost_connection_does_nothing(secure: bool) -> None:
    # uvloop's transport raises RuntimeError; the answer to a client that has just left went there.
    async with linked() as (stream, peer):
        if secure:
            tls = contexts()
            async with asyncio.TaskGroup() as group:
                group.create_task(peer.handshake(tls.client, server_side=False))
                await start(stream, tls, server_side=True)
        peer.reset()
        await stream.gone
        await asyncio.sleep(0)
        stream.write(b"into the void")
        stream.write(b"")
        await stream.close()


async def test_w33_a_full_inbox_stops_reading_until_it_is_emptied() -> None:
    async with linked() as (stream, peer):
        content = bytes(range(256)) * (32 * MIB // 256)
        before = resident_bytes()
        sending = asyncio.create_task(peer.send(content))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not sending.done()
        received = bytearray(await stream.receive())
        # One read of uvloop is 256 KiB at most.
        assert INBOX_BYTES_MAX < len(received) <= INBOX_BYTES_MAX + 256 * 1024
        assert resident_bytes() - before < 48 * MIB  # the 32 are the peer's
        while len(received) < len(content):
            received += await stream.receive()
        assert received == content
        await sending


async def test_an_end_after_a_full_inbox_comes_after_its_bytes() -> None:
    async with linked() as (stream, peer):
        content = b"x" * (INBOX_BYTES_MAX * 3)
        await peer.send(content)
        peer.end()
        received = bytearray()
        while piece := await stream.receive():
            received += piece
        assert received == content
        assert stream.gone.done()


async def test_hand_over_gives_what_waits_and_then_everything_to_the_new_protocol() -> None:
    async with linked() as (stream, peer):
        content = b"x" * (INBOX_BYTES_MAX * 8)
        sending = asyncio.create_task(peer.send(content))
        await _until(lambda: not stream.transport.is_reading())  # the inbox is full
        notes = Notes()
        waiting = stream.hand_over(notes)
        assert len(waiting) > INBOX_BYTES_MAX
        await notes.until_received(len(content) - len(waiting))
        assert waiting + notes.received == content
        await sending
        peer.end()
        await notes.until_told("eof")


async def test_plaintext_that_waits_at_the_switch_to_tls_is_a_bug_of_ours() -> None:
    async with linked() as (stream, peer):
        await peer.send(b"plaintext")
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            assert await stream.receive() == b"plaintext"
        await peer.send(b"more")
        await _until(lambda: bool(stream._inbox))
        with pytest.raises(ConnectionAbortedError, match="plaintext"):
            await start(stream, contexts(), server_side=True)


async def test_closing_a_stream_whose_peer_has_gone_does_not_linger() -> None:
    async with linked() as (stream, peer):
        peer.end()
        await stream.gone
        stream.write(b"last words")
        closing = asyncio.create_task(stream.close())
        assert await peer.receive_exactly(10) == b"last words"
        assert await peer.receive() == b""
        async with asyncio.timeout(1):  # the linger is 2 s
            await closing


async def test_closing_waits_a_moment_for_the_peer_to_end_too() -> None:
    async with linked() as (stream, peer):
        stream.write(b"last words")
        closing = asyncio.create_task(stream.close())
        assert await peer.receive_exactly(10) == b"last words"
        assert await peer.receive() == b""
        assert not closing.done()
        peer.end()
        async with asyncio.timeout(1):
            await closing


async def _until(happened: Callable[[], bool]) -> None:
    """Run the loop until something is true."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not happened():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


@pytest.mark.parametrize("way", ["end", "close", "reset"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_w41_the_end_of_a_peer_that_sent_more_than_the_inbox_takes_is_seen(
    secure: bool, way: str
) -> None:
    # Its end was behind bytes that were not read, so it was seen only after connect_timeout.
    async with linked() as (stream, peer):
        if secure:
            tls = contexts()
            async with asyncio.TaskGroup() as group:
                group.create_task(peer.handshake(tls.client, server_side=False))
                await start(stream, tls, server_side=True)
        await peer.send(b"x" * (2 * INBOX_BYTES_MAX))
        await asyncio.sleep(0)
        assert not stream.gone.done()
        getattr(peer, way)()
        async with asyncio.timeout(1):
            await stream.gone
        if way == "end":
            assert await stream.receive()
