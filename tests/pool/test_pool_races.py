"""What happens to a session, or to room for a dial, in the moment in which a client is given it."""

import asyncio
import gc
import itertools

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.pool.policy import RESET_FAILURES_MAX
from proxy.pool.pool_counts import RetireReason
from proxy.pool.pooled_session import PooledSession, State
from proxy.upstream.phases import DialPhases
from proxy.wire.messages import ErrorResponse
from tests.support.pools import Held, PoolOf, client_of, pool_of
from tests.support.running import eventually


def pooled(held: Held) -> PooledSession:
    assert isinstance(held.lease, PooledSession)
    return held.lease


async def waits_for_reset(pool: PoolOf) -> tuple[PooledSession, "asyncio.Task[Held]"]:
    """Return a session in a reset that has no answer, and a client that waits for it."""
    first = await pool.open()
    pool.lakebase.gateway.inject(Stage.RESET, Injection.HANG, times=1)
    first.leave()
    task = asyncio.create_task(pool.open())
    await asyncio.sleep(0)
    session = pooled(first)
    assert session.state is State.RESETTING
    return session, task


async def test_p47_a_client_that_waits_for_a_reset_is_drained_with_the_pool(
    lakebase: Lakebase,
) -> None:
    # It was woken, and gave back room for a dial that it had never had: the count was -1, and
    # `wait_closed`, which ends the process, waited for ever.
    async with pool_of(lakebase, pool_spare_min=0) as pool:
        _, task = await waits_for_reset(pool)
        pool.pool.drain()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert pool.row.present.dialling == 0


async def test_p38_a_client_that_leaves_when_a_reset_has_failed_frees_no_room(
    lakebase: Lakebase,
) -> None:
    async with pool_of(lakebase, pool_spare_min=0, pool_size_max=1) as pool:
        session, task = await waits_for_reset(pool)
        session.eof_received()
        task.cancel()
        await asyncio.wait([task])
        await eventually(lambda: session.state is State.CLOSED, "the session is closed")
        assert pool.row.present.dialling == 0
        await pool.open()
        assert lakebase.gateway.open_sessions == 1


@pytest.mark.parametrize(
    "end", [Injection.CLOSE, ErrorResponse.fatal("57P01", "bye").encode()], ids=["EOF", "57P01"]
)
async def test_p24_p34_an_end_within_a_reset_is_no_failed_reset(
    lakebase: Lakebase, end: Injection | bytes
) -> None:
    # A failover once made a key unpoolable for a minute. What is idle may have ended, too.
    async with pool_of(lakebase, pool_spare_min=0) as pool:
        for failures in range(1, RESET_FAILURES_MAX + 1):
            leaving, staying = await pool.open(), await pool.open()
            staying.leave()
            await pool.until_idle(1)
            lakebase.gateway.inject(Stage.RESET, end, times=1)
            leaving.leave()
            await pool.until_idle(1)
            assert pool.row.retired["reset_failed"] == failures
            task = asyncio.create_task(pool.open())
            await asyncio.sleep(0)
            assert pooled(staying).state is State.CHECKING
            (await task).leave("busy")
        (await pool.open()).leave()
        await pool.until_idle(1)


@pytest.mark.parametrize("leaves", [False, True])
async def test_p32_a_session_that_ends_when_it_is_given_to_a_client_reaches_none(
    lakebase: Lakebase, leaves: bool
) -> None:
    # The client had not woken up yet. It got a session that was closing; and if it left, that
    # session was idle again, for the next one.
    async with pool_of(lakebase, pool_spare_min=0, pool_size_max=1) as pool:
        holder = await pool.open()
        task = asyncio.create_task(pool.open())
        await eventually(lambda: pool.row.present.waiting == 1, "a client waits")
        session = pooled(holder)
        holder.leave()
        # The reset ends, and in the same turn of the loop the session sends something.
        transport, received = session.transport, asyncio.Event()
        deliver = session.data_received

        def answered_and_more(data: bytes) -> None:
            deliver(data)
            if session.state is State.RESETTING:
                return  # the rest of the answer comes with the next segment
            assert session.state is State.IDLE
            deliver(b"A")
            if leaves:
                task.cancel()
            received.set()

        protocol = type("Protocol", (asyncio.Protocol,), {})()
        protocol.data_received = answered_and_more
        protocol.eof_received = session.eof_received
        protocol.connection_lost = session.connection_lost
        transport.set_protocol(protocol)
        await received.wait()
        await asyncio.wait([task])
        if leaves:
            assert task.cancelled()
            assert pool.row.present.idle == 0
            assert not (await pool.open()).reused
        else:
            assert not (await task).reused
        assert pool.row.retired["upstream_ended"] == 1


async def test_p20_a_reset_that_is_answered_in_single_bytes_succeeds(lakebase: Lakebase) -> None:
    async with pool_of(lakebase, pool_spare_min=0) as pool:
        session = pooled(first := await pool.open())
        first.leave()
        transport = session.transport

        def in_single_bytes(data: bytes) -> None:
            for at in range(len(data)):
                assert session.state is State.RESETTING
                session.data_received(data[at : at + 1])
            transport.set_protocol(session)

        protocol = type("Protocol", (asyncio.Protocol,), {})()
        protocol.data_received = in_single_bytes
        transport.set_protocol(protocol)
        await pool.until_idle(1)
        assert (await pool.open()).pid == first.pid


async def test_p34_an_end_of_a_session_in_use_makes_idle_ones_suspect(lakebase: Lakebase) -> None:
    async with pool_of(lakebase, pool_spare_min=0) as pool:
        first, second = await pool.open(), await pool.open()
        first.leave()
        await pool.until_idle(1)
        second.leave("upstream_ended")
        task = asyncio.create_task(pool.open())
        await asyncio.sleep(0)
        assert pooled(first).state is State.CHECKING
        assert (await task).pid == first.pid


async def test_p34_an_end_that_the_next_client_is_the_first_to_notice_makes_others_suspect(
    lakebase: Lakebase,
) -> None:
    # That client was given the next one unchecked, which may have ended silently with the first.
    async with pool_of(lakebase, pool_spare_min=0) as pool:
        first, second = await pool.open(), await pool.open()
        for kept, held in enumerate((first, second), 1):
            held.leave()
            await pool.until_idle(kept)

        async def comes_in_the_moment_of_the_end() -> Held:
            pooled(second).transport.abort()
            return await pool.open()

        task = asyncio.create_task(comes_in_the_moment_of_the_end())
        await asyncio.sleep(0)
        assert pooled(first).state is State.CHECKING
        assert (await task).pid == first.pid
        assert pool.row.retired["upstream_ended"] == 1


async def test_p23_a_session_that_ends_right_after_its_sign_of_life_is_no_clients(
    lakebase: Lakebase,
) -> None:
    async with pool_of(lakebase, pool_spare_min=0, pool_check_seconds=0) as pool:
        first = await pool.open()
        first.leave()
        await pool.until_idle(1)
        session = pooled(first)
        deliver = session.data_received

        def answered_and_ended(data: bytes) -> None:
            deliver(data)
            session.eof_received()

        task = asyncio.create_task(pool.open())
        await asyncio.sleep(0)
        assert session.state is State.CHECKING
        protocol = type("Protocol", (asyncio.Protocol,), {})()
        protocol.data_received = answered_and_ended
        protocol.connection_lost = session.connection_lost
        session.transport.set_protocol(protocol)
        assert not (await task).reused


async def test_p46_a_reconnect_while_a_spare_is_dialled_dials_no_other(
    lakebase: Lakebase,
) -> None:
    gateway = lakebase.gateway
    async with pool_of(lakebase, pool_spare_min=1) as pool:
        await pool.open()
        await pool.until_idle(1)
        gateway.inject(Stage.PASSWORD, Injection.HANG, times=1)
        await pool.open()
        await eventually(lambda: pool.row.present.dialling == 1, "a spare is dialled")
        await gateway.until(lambda: gateway.accepted == 3)
        pool.pool.reconnect()
        gateway.clear_faults()
        await pool.until_idle(0)
        assert gateway.accepted == 3
        assert pool.row.retired[RetireReason.RECONNECT] == 1


async def test_p36_a_spare_that_is_not_kept_is_followed_by_no_other(lakebase: Lakebase) -> None:
    # Each was dialled because the one before it was not there: without end.
    ticks = itertools.count()
    async with pool_of(
        lakebase, clock=lambda: float(next(ticks)), pool_spare_min=1, pool_lifetime_seconds=1
    ) as pool:
        await pool.open()
        await eventually(lambda: pool.row.retired["unused_spare"] == 1, "the spare is too old")
        await pool.open()
        await eventually(lambda: pool.row.retired["unused_spare"] == 2, "the spare is too old")
        assert pool.logins == 4


async def test_p49_a_session_that_has_ended_is_freed_without_the_garbage_collector(
    lakebase: Lakebase,
) -> None:
    def sessions() -> int:
        return sum(isinstance(one, PooledSession) for one in gc.get_objects())

    gc.collect()
    before = sessions()
    async with pool_of(lakebase, pool_spare_min=0) as pool:
        gc.disable()
        try:
            for _ in range(3):
                await leave_idle(pool)
                pool.pool.reconnect()
                await eventually(lambda: pool.row.present.oldest_seconds == 0, "all have ended")
                await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)
            await asyncio.sleep(0)
            assert sessions() == before
        finally:
            gc.enable()


async def leave_idle(pool: PoolOf) -> None:
    opened = await pool.pool.open(client_of("a"), DialPhases())
    opened.put_back()
    await pool.until_idle(1)
