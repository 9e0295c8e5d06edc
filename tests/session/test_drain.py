"""Drain: what each stage of a session gets, what is waited for, and what is counted as cut."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.session.drain import AcceptPeriod, OpenSession, OpenSessions
from proxy.session.end_reason import EndReason
from proxy.session.idle_end import IdleEnd
from proxy.session.relay import Relay
from proxy.transport.stream import StartupStream
from proxy.wire.messages import ErrorResponse, ReadyForQuery, Terminate
from tests.support.client import query
from tests.support.peer import Peer
from tests.transport.peers import linked

QUERY = query("SELECT 1")
READY = ReadyForQuery(b"I").encode()
SHUTTING_DOWN = ProxyError(ErrorKind.SHUTTING_DOWN).response().encode()
IDLE_TIMEOUT = ErrorResponse.fatal("57P05", "idle for too long")
WAIT_SECONDS_MAX = 10.0


@dataclass
class Relayed:
    """A session that is relayed, and its two peers."""

    client: Peer
    upstream: Peer
    relay: Relay
    task: asyncio.Task[None]

    async def begin_query(self) -> None:
        await self.client.send(QUERY)
        assert await self.upstream.receive_exactly(len(QUERY)) == QUERY


@asynccontextmanager
async def relayed(sessions: OpenSessions) -> AsyncIterator[Relayed]:
    async with linked() as (to_client, client), linked() as (to_upstream, upstream):
        relay = Relay(to_client.transport, to_upstream.transport)
        task = sessions.start(partial(serve, to_client, to_upstream, relay))
        await asyncio.sleep(0)  # it begins
        yield Relayed(client, upstream, relay, task)
        task.cancel()
        await asyncio.wait((task,))


async def serve(
    client: StartupStream, upstream: StartupStream, relay: Relay, entry: OpenSession
) -> None:
    try:
        entry.opening()
        entry.refuse_if_draining()
        client.hand_over(relay.from_client)
        upstream.hand_over(relay.from_upstream)
        entry.relaying(relay)
        await relay.run()
    finally:
        entry.closing()


async def drained(sessions: OpenSessions, seconds: float) -> int:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        return await sessions.drain(seconds)


async def test_a_drain_without_sessions_ends_at_once() -> None:
    assert await drained(OpenSessions(), 60) == 0


async def test_w47_an_idle_session_ends_with_an_error_and_is_not_counted_as_cut() -> None:
    sessions = OpenSessions()
    async with relayed(sessions) as session:
        draining = asyncio.create_task(drained(sessions, 60))
        assert await session.client.receive_rest() == SHUTTING_DOWN
        assert await session.upstream.receive_rest() == Terminate().encode()
        session.client.end()
        session.upstream.end()
        assert await draining == 0
    assert len(sessions) == 0


async def test_w47_a_busy_session_ends_when_its_client_has_its_answer() -> None:
    sessions = OpenSessions()
    async with relayed(sessions) as session:
        await session.begin_query()
        draining = asyncio.create_task(drained(sessions, 60))
        await asyncio.sleep(0)
        assert not draining.done()
        await session.upstream.send(READY)
        assert await session.client.receive_rest() == READY + SHUTTING_DOWN
        session.client.end()
        session.upstream.end()
        assert await draining == 0


async def test_what_is_busy_until_the_end_is_cut_and_counted() -> None:
    sessions = OpenSessions()
    async with relayed(sessions) as one, relayed(sessions) as two, relayed(sessions) as idle:
        for session in (one, two):
            await session.begin_query()
        idle.client.end()
        idle.upstream.end()
        assert await drained(sessions, 0.1) == 2
        await sessions.wait_closed()
        assert one.task.cancelled()
        assert not idle.task.cancelled()


async def test_a_second_drain_hastens_the_first_and_both_count_what_is_cut() -> None:
    sessions = OpenSessions()
    async with relayed(sessions) as session:
        await session.begin_query()
        first = asyncio.create_task(drained(sessions, 60))
        await asyncio.sleep(0)
        assert await drained(sessions, 0) == 1
        assert await first == 1


async def test_w49_a_connection_that_says_nothing_is_closed_and_not_counted() -> None:
    async def starting(_entry: OpenSession) -> None:
        await asyncio.Event().wait()

    ended: list[int] = []
    sessions = OpenSessions(lambda: ended.append(1))
    task = sessions.start(starting)
    assert len(sessions) == 1
    assert await drained(sessions, 0.01) == 0
    await sessions.wait_closed()
    assert task.cancelled()
    assert (len(sessions), ended) == (0, [1])


async def test_a_client_that_waits_for_its_upstream_is_cancelled_to_be_refused() -> None:
    refused = asyncio.Event()

    async def opening(entry: OpenSession) -> None:
        entry.opening()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            refused.set()
            raise

    sessions = OpenSessions()
    sessions.start(opening)
    await asyncio.sleep(0)
    assert await drained(sessions, 60) == 0
    assert refused.is_set()


async def test_no_session_is_opened_once_a_drain_has_begun() -> None:
    entered: asyncio.Future[OpenSession] = asyncio.get_running_loop().create_future()
    end = asyncio.Event()

    async def late(entry: OpenSession) -> None:
        entered.set_result(entry)
        await end.wait()

    sessions = OpenSessions()
    sessions.start(late)
    draining = asyncio.create_task(drained(sessions, 60))
    with pytest.raises(ProxyError) as raised:
        (await entered).refuse_if_draining()
    assert raised.value.kind is ErrorKind.SHUTTING_DOWN
    end.set()
    assert await draining == 0


async def test_an_accept_period_ends_with_its_time_or_with_another_call() -> None:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await AcceptPeriod().wait(0.01)
        period = AcceptPeriod()
        waiting = asyncio.create_task(period.wait(60))
        await asyncio.sleep(0)
        assert not waiting.done()
        await period.wait(0)
        await waiting
        await period.wait(60)


async def test_the_idle_timeout_ends_an_idle_session_and_no_busy_one() -> None:
    sessions = OpenSessions()
    async with relayed(sessions) as busy, relayed(sessions) as idle:
        await busy.begin_query()
        enders = [IdleEnd(session.relay) for session in (busy, idle)]
        for ender in enders:
            ender.after_idle(0.01, IDLE_TIMEOUT)
        assert await idle.client.receive_rest() == IDLE_TIMEOUT.encode()
        assert not busy.relay.over
        await busy.upstream.send(READY)
        assert await busy.client.receive_rest() == READY + IDLE_TIMEOUT.encode()
        assert busy.relay.ended(EndReason.SHUTDOWN).reason is EndReason.IDLE_TIMEOUT
        for ender in enders:
            ender.close()
