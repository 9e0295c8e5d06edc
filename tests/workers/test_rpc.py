"""Frames, errors in them, and calls between two tasks over a real socket pair."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ErrorKind, ProxyError
from proxy.workers import rpc as module
from proxy.workers.rpc import (
    FrameReader,
    Message,
    MessageTooLong,
    Methods,
    RpcConnection,
    RpcConnectionLost,
    encode,
    error_as_dict,
    error_from_dict,
)
from tests.support.running import captured_log, nothing_left

# -- frames --------------------------------------------------------------------------------------

MESSAGES: list[Message] = [
    {"call": 1, "name": "fresh", "arguments": {"workspace": "é"}},
    {"cancel": 1},
    {},
]


@given(st.lists(st.integers(min_value=1, max_value=40), max_size=60))
def test_messages_come_out_as_they_went_in_however_they_are_split(sizes: list[int]) -> None:
    sent = b"".join(encode(message) for message in MESSAGES)
    reader = FrameReader()
    received: list[Message] = []
    for size in [*sizes, len(sent)]:
        received += reader.feed(sent[:size])
        sent = sent[size:]
    assert received == MESSAGES


def test_a_message_over_the_bound_is_neither_sent_nor_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MESSAGE_BYTES_MAX", 100)
    with pytest.raises(MessageTooLong):
        encode({"name": "x" * 100})
    # Its length alone is enough: the rest is not waited for.
    with pytest.raises(MessageTooLong):
        list(FrameReader().feed(struct.pack("!I", 101)))


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_error_means_the_same_on_the_other_side(kind: ErrorKind) -> None:
    error = ProxyError(kind, "why", retry_after_seconds=2.5, final=True)
    (content,) = FrameReader().feed(encode(error_as_dict(error)))
    there = error_from_dict(content)
    assert (there.kind, there.detail, there.retry_after_seconds) == (kind, "why", 2.5)
    assert there.final
    assert there.response() == error.response()


# -- calls ---------------------------------------------------------------------------------------


@asynccontextmanager
async def connections(methods: Methods) -> AsyncIterator[tuple[RpcConnection, RpcConnection]]:
    """Yield both ends; the second one answers."""
    ours, theirs = socket.socketpair()
    one, other = await RpcConnection.open(ours, {}), await RpcConnection.open(theirs, methods)
    try:
        yield one, other
    finally:
        one.close()
        await one.lost.wait()
        await other.lost.wait()


async def double(number: int) -> int:
    return 2 * number


async def test_each_call_gets_its_own_answer_in_any_order() -> None:
    asked: list[int] = []
    all_asked = asyncio.Event()

    async def later(number: int) -> int:
        asked.append(number)
        if len(asked) == 3:
            all_asked.set()
        await all_asked.wait()
        for _ in range(3 - number):
            await asyncio.sleep(0)
        return number

    async with connections({"later": later}) as (one, _):
        found = await asyncio.gather(*(one.call("later", number=n) for n in range(3)))
    assert found == [0, 1, 2]


async def test_a_refusal_is_raised_where_it_was_asked_for() -> None:
    async def refuse() -> None:
        raise ProxyError(ErrorKind.API_THROTTLED, "later", retry_after_seconds=7)

    async with connections({"refuse": refuse}) as (one, _):
        with pytest.raises(ProxyError) as caught:
            await one.call("refuse")
    assert caught.value.kind is ErrorKind.API_THROTTLED
    assert caught.value.retry_after_seconds == 7


async def test_a_bug_costs_its_call_and_not_the_connection() -> None:
    async def broken() -> None:
        raise ValueError("for the log alone")

    with captured_log() as log:
        async with connections({"broken": broken, "double": double}) as (one, _):
            with pytest.raises(ProxyError) as caught:
                await one.call("broken")
            assert await one.call("double", number=2) == 4
    assert caught.value.kind is ErrorKind.INTERNAL
    assert caught.value.detail == "ValueError"
    assert log.events("a call from another process failed")


async def test_a_call_that_is_given_up_ends_the_work_on_the_other_side() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with connections({"hang": hang, "double": double}) as (one, _):
        asking = asyncio.ensure_future(one.call("hang"))
        await begun.wait()
        asking.cancel()
        async with asyncio.timeout(5):
            await ended.wait()
        assert await one.call("double", number=1) == 2
        with pytest.raises(asyncio.CancelledError):
            await asking


@pytest.mark.parametrize("here", [True, False])
async def test_when_one_end_goes_every_waiting_call_fails_and_nothing_is_left(here: bool) -> None:
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with connections({}):
        pass  # the loop's first sockets bring descriptors of its own
    async with nothing_left(), connections({"hang": hang}) as (one, other):
        asking = asyncio.ensure_future(one.call("hang"))
        await begun.wait()
        (one if here else other).close()
        with pytest.raises(RpcConnectionLost):
            await asking
        with pytest.raises(RpcConnectionLost):
            await one.call("hang")
        one.notify("hang")  # which is dropped


async def test_more_calls_than_the_bound_wait_for_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CALLS_MAX", 2)
    under_way, most = 0, 0

    async def work() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(3):
            await asyncio.sleep(0)
        under_way -= 1

    async with connections({"work": work}) as (one, _):
        await asyncio.gather(*(one.call("work") for _ in range(10)))
    assert most == 2


async def test_a_peer_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNSENT_BYTES_MAX", 1_000_000)
    ours, theirs = socket.socketpair()
    with theirs:
        one = await RpcConnection.open(ours, {})
        one.notify("much", text="x" * 3_000_000)
        async with asyncio.timeout(5):
            await one.lost.wait()


async def test_a_peer_that_sends_nonsense_is_cut() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        one = await RpcConnection.open(ours, {})
        theirs.sendall(b"\xff" * 8)
        async with asyncio.timeout(5):
            await one.lost.wait()
