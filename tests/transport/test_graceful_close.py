"""The end of a connection: last words arrive, nothing waits for ever."""

import asyncio

import pytest

from proxy.transport.graceful_close import FLUSH_SECONDS_MAX, LINGER_SECONDS, close_gracefully
from tests.support.loops import LOOPS, NewLoop, run
from tests.support.peer import WAIT_SECONDS_MAX
from tests.transport.peers import linked

MIB = 1024 * 1024


@LOOPS
def test_a_slow_reader_gets_every_last_byte_and_then_the_end(new_loop: NewLoop) -> None:
    async def story() -> None:
        async with linked() as (stream, peer):
            stream.write(b"x" * (16 * MIB))
            ending = asyncio.create_task(close_gracefully(stream.transport))
            received = 0
            while piece := await peer.receive():
                received += len(piece)
                await asyncio.sleep(0)
            assert received == 16 * MIB
            peer.end()
            await ending

    run(new_loop, story)


@LOOPS
def test_a_peer_that_still_sends_does_not_turn_our_end_into_a_reset(
    new_loop: NewLoop,
) -> None:
    async def story() -> None:
        async with linked() as (stream, peer):
            await peer.send(b"unread" * 1000)
            stream.write(b"last words")
            ending = asyncio.create_task(close_gracefully(stream.transport))
            await peer.send(b"unread too" * 1000)
            assert await peer.receive() == b"last words"
            await peer.send(b"and on" * 1000)
            assert await peer.receive() == b""  # an end; a reset would be ConnectionResetError
            peer.end()
            await ending

    run(new_loop, story)


@LOOPS
def test_a_peer_that_ends_while_it_is_flushed_to_still_gets_everything(
    new_loop: NewLoop,
) -> None:
    # asyncio's own transport cannot be aborted once it is lost without an error.
    async def story() -> None:
        async with linked() as (stream, peer):
            stream.write(b"x" * (8 * MIB))
            ending = asyncio.create_task(close_gracefully(stream.transport))
            await asyncio.sleep(0)
            peer.end()
            assert len(await peer.receive_rest()) == 8 * MIB
            await ending

    run(new_loop, story)


@LOOPS
def test_a_reset_in_the_middle_of_the_flush_ends_it(new_loop: NewLoop) -> None:
    async def story() -> None:
        async with linked() as (stream, peer):
            stream.write(b"x" * (8 * MIB))
            ending = asyncio.create_task(close_gracefully(stream.transport))
            await asyncio.sleep(0)
            peer.reset()
            await ending
            assert stream.transport.is_closing()

    run(new_loop, story)


@LOOPS
def test_a_peer_that_never_ends_is_left_after_the_linger(new_loop: NewLoop) -> None:
    async def story() -> None:
        async with linked() as (stream, peer):
            await close_gracefully(stream.transport, linger_seconds=0.05)
            assert stream.transport.is_closing()
            assert await peer.receive() == b""

    run(new_loop, story)


@LOOPS
def test_cancelling_cuts_at_once(new_loop: NewLoop) -> None:
    async def story() -> None:
        async with linked() as (stream, _):
            stream.write(b"x" * (8 * MIB))  # the peer does not read
            ending = asyncio.create_task(close_gracefully(stream.transport))
            await asyncio.sleep(0)
            ending.cancel()
            await asyncio.wait([ending])
            assert ending.cancelled()
            assert stream.transport.is_closing()

    run(new_loop, story)


@LOOPS
def test_closing_twice_and_closing_what_is_closed_do_nothing(new_loop: NewLoop) -> None:
    async def story() -> None:
        async with linked() as (stream, peer):
            peer.reset()
            await stream.gone
            await asyncio.sleep(0)
            await close_gracefully(stream.transport)
            await close_gracefully(stream.transport)

    run(new_loop, story)


async def test_a_peer_that_does_not_read_is_left_after_a_time() -> None:
    async with linked() as (stream, _):
        stream.write(b"x" * (8 * MIB))
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            assert not await close_gracefully(stream.transport, flush_seconds=0.05)
        assert stream.transport.is_closing()


async def test_a_peer_that_pauses_is_not_left_while_it_goes_on_reading() -> None:
    # The bound was for the whole: who read slowly lost the end of the result and the last words.
    async with linked() as (stream, peer):
        stream.write(b"x" * (24 * MIB))
        closing = asyncio.create_task(close_gracefully(stream.transport, flush_seconds=0.5))
        received = 0
        for _ in range(8):  # twice the bound in all
            received += len(await peer.receive_exactly(MIB))
            await asyncio.wait((closing,), timeout=0.125)
        received += len(await peer.receive_rest())
        peer.end()
        assert await closing
        assert received == 24 * MIB


async def test_a_peer_that_does_not_read_can_be_told_by_a_reset() -> None:
    async with linked() as (stream, peer):
        stream.write(b"x" * (8 * MIB))
        await close_gracefully(stream.transport, flush_seconds=0.05, resets=True)
        with pytest.raises(ConnectionResetError):
            await peer.receive_rest()


def test_the_bounds_are_those_that_the_drain_is_planned_with() -> None:
    assert (FLUSH_SECONDS_MAX, LINGER_SECONDS) == (300.0, 2.0)


@LOOPS
def test_a_reset_that_the_loop_has_not_seen_yet_is_no_failure(new_loop: NewLoop) -> None:
    # The kernel knew of the RST, and shutdown(2) failed with ENOTCONN. The session was counted as
    # an internal error, with a traceback.
    async def story() -> None:
        async with linked() as (stream, peer):
            peer.reset()
            await close_gracefully(stream.transport)

    run(new_loop, story)
