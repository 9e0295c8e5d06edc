"""The life of a pool's sessions and the clients that wait for one, without clients or relay.

Each bound by itself, and spares: `tests/e2e/test_pool_bounds`.
"""

import asyncio
import random

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.pool.pooled_session import PooledSession
from proxy.upstream.phases import DialPhases
from tests.support.dialing import asked
from tests.support.fake_clock import FakeClock
from tests.support.pools import Held, PoolOf, client_of, pool_of
from tests.support.running import eventually

SIZE_MAX = 4


async def waiting(pool: PoolOf, count: int) -> None:
    await eventually(lambda: pool.row.present.waiting == count, f"{count} clients wait")


# Life


async def test_p23_a_client_that_left_before_its_welcome_was_no_sign_of_life(
    lakebase: Lakebase,
) -> None:
    clock = FakeClock()
    async with pool_of(lakebase, clock=clock, pool_spare_min=0, pool_check_seconds=30) as pool:
        first = await pool.open()
        clock.move(5)
        first.leave()
        await pool.until_idle(1)
        session = first.lease
        assert isinstance(session, PooledSession)
        since = clock()
        assert session.idle_since == since
        clock.move(20)
        opened = await pool.pool.open(client_of("a"), DialPhases())
        assert opened.lease is session
        opened.put_back()
        assert (session.idle_since, pool.row.present.idle) == (since, 1)
        assert (await pool.open()).pid == first.pid


async def test_p18_p43_a_session_is_not_returned_after_its_lifetime_and_never_cut_for_it(
    lakebase: Lakebase,
) -> None:
    clock = FakeClock()
    async with pool_of(lakebase, clock=clock, pool_spare_min=0, pool_lifetime_seconds=100) as pool:
        first = await pool.open()
        session = first.lease
        assert isinstance(session, PooledSession)
        assert 90 <= session.ends_at - session.born_at <= 100
        clock.now = session.ends_at - 1
        first.leave()
        await pool.until_idle(1)
        again = await pool.open()
        assert again.pid == first.pid
        clock.move(1000)
        assert await asked(again.opened, "SELECT 'alive'") == b"alive"
        again.leave()
        await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)
        assert pool.row.retired["lifetime"] == 1


async def test_p46_a_reconnect_while_a_spare_is_dialled_dials_no_other(lakebase: Lakebase) -> None:
    gateway = lakebase.gateway
    async with pool_of(lakebase, pool_spare_min=1) as pool:
        opening = asyncio.create_task(pool.pool.open(client_of("a"), DialPhases()))
        await gateway.until(lambda: gateway.accepted == 2)
        pool.pool.reconnect()
        await eventually(lambda: pool.row.spares["opened"] == 1, "the spare is there")
        assert pool.row.retired["reconnect"] == 1, "it is of before the reconnect"
        assert (pool.row.present.dialling, pool.row.present.idle) == (0, 0)
        (await opening).close()


# Bounds


async def test_p38_p39_those_that_wait_are_served_in_order_whatever_their_key(
    lakebase: Lakebase,
) -> None:
    served: list[tuple[int, Held]] = []

    async def client(number: int, key: str) -> None:
        held = await pool.open(key)
        served.append((number, held))

    async with pool_of(lakebase, pool_size_max=1, pool_spare_min=0) as pool:
        holder, tasks = await pool.open("a"), []
        for number, key in enumerate("abba"):
            tasks.append(asyncio.create_task(client(number, key)))
            await waiting(pool, number + 1)
        found = [holder]
        for number in range(4):
            found[-1].leave()
            await tasks[number]
            assert [one for one, _ in served] == list(range(number + 1))
            found.append(served[-1][1])
            assert lakebase.gateway.open_sessions == 1
        # The same key gets the session itself, another key its room.
        assert [held.reused for held in found] == [False, True, False, True, False]
        assert (found[1].pid, found[3].pid) == (found[0].pid, found[2].pid)
        assert pool.logins == 3
        found[-1].leave()


async def test_p39_what_cannot_be_returned_lets_the_first_of_those_that_wait_dial(
    lakebase: Lakebase,
) -> None:
    async with pool_of(lakebase, pool_size_max=1, pool_spare_min=0) as pool:
        holder = await pool.open("a")
        task = asyncio.create_task(pool.open("a"))
        await waiting(pool, 1)
        holder.leave("busy")
        second = await task
        assert not second.reused
        # A reset that fails does the same.
        lakebase.gateway.inject(Stage.RESET, Injection.CLOSE, times=1)
        task = asyncio.create_task(pool.open("a"))
        await waiting(pool, 1)
        second.leave()
        third = await task
        assert not third.reused
        assert pool.row.retired["reset_failed"] == 1


@pytest.mark.parametrize("seed", [1, 2])
async def test_p38_p39_p41_clients_at_random_never_share_a_session_or_pass_the_bound(
    lakebase: Lakebase, seed: int
) -> None:
    chance, pids = random.Random(seed), set[bytes]()
    bound = SIZE_MAX if seed > 1 else 0

    async def clients(pool: PoolOf) -> None:
        for _ in range(8):
            opening = asyncio.create_task(pool.open(chance.choice("abc")))
            if chance.random() < 0.2:
                await asyncio.wait([opening], timeout=chance.random() / 100)
                opening.cancel()
            try:
                held = await opening
            except asyncio.CancelledError:
                continue
            assert held.pid not in pids
            pids.add(held.pid)
            if bound:
                assert lakebase.gateway.open_sessions <= bound
            await asyncio.sleep(chance.random() / 200)
            pids.remove(held.pid)
            held.leave(chance.choice(["", "", "", "busy"]))

    async with pool_of(lakebase, pool_size_max=bound, pool_idle_max=2) as pool:
        await asyncio.gather(*(clients(pool) for _ in range(12)))
        row = pool.row
        assert (row.present.waiting, row.present.in_use) == (0, 0)
        assert sum(row.takes.values()) > pool.logins
        assert (row.takes["waited"] > 0) is (bound > 0)
