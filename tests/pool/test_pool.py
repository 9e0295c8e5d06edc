"""The bounds of a pool, the clients that wait for it, and its spares, on a real PostgreSQL."""

import asyncio
import random

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ErrorKind, ProxyError
from proxy.pool.pooled_session import PooledSession
from proxy.upstream.phases import DialPhases
from tests.support.dialing import asked
from tests.support.fake_clock import FakeClock
from tests.support.pools import Held, PoolOf, client_of, pool_of
from tests.support.running import eventually

SIZE_MAX = 4


async def waiting(pool: PoolOf, count: int) -> None:
    await eventually(lambda: pool.row.present.waiting == count, f"{count} clients wait")


# Spares


async def test_p36_spares_are_dialled_after_clients_alone(lakebase: Lakebase) -> None:
    async with pool_of(lakebase, pool_spare_min=2, pool_idle_seconds=1) as pool:
        client = await pool.open()
        await pool.until_idle(2)
        assert (pool.logins, pool.row.spares["opened"]) == (3, 2)
        # Neither a session that is lost nor one that expires is replaced.
        lost = lakebase.gateway.sessions[-1]
        lakebase["one"].cluster.execute(f"SELECT pg_terminate_backend({lost.real_pid})")
        await pool.until_idle(1)
        await pool.until_idle(0)
        await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 1)
        assert pool.logins == 3
        assert pool.row.retired["unused_spare"] == 1
        client.leave()
        await pool.until_idle(1)
        await pool.until_idle(0)
        assert pool.logins == 3
        # The next client begins them again.
        await pool.open()
        await pool.until_idle(2)
        assert pool.logins == 6


async def test_p36_a_take_that_leaves_too_few_begins_a_spare_of_that_key(
    lakebase: Lakebase,
) -> None:
    async with pool_of(lakebase, pool_spare_min=1) as pool:
        first = await pool.open("a")
        await pool.until_idle(1)
        first.leave()
        await pool.until_idle(2)
        clients = [await pool.open("a")]
        await pool.until_idle(1)
        assert pool.logins == 2, "one was left"
        clients.append(await pool.open("a"))
        await pool.until_idle(1)
        assert pool.logins == 3
        other = await pool.open("b")
        await pool.until_idle(2)
        assert pool.logins == 5
        assert len({held.pid for held in (*clients, other)}) == 3


async def test_p37_a_spare_takes_no_slot_that_clients_use(lakebase: Lakebase) -> None:
    gateway = lakebase.gateway
    async with pool_of(lakebase, connects_max=1, pool_spare_min=1) as pool:
        await pool.open("a")
        await pool.until_idle(1)
        gateway.inject(Stage.PASSWORD, Injection.HANG, times=1)
        slow = asyncio.create_task(pool.open("slow"))
        await gateway.until(lambda: gateway.accepted == 3)
        # The slot is in use: a client waits for it, a spare does not.
        waits = asyncio.create_task(pool.open("b"))
        assert (await pool.open("a")).reused
        await eventually(lambda: pool.row.spares["no_slot"] == 1, "there is no spare")
        gateway.clear_faults()
        await asyncio.gather(slow, waits)


async def test_p37_a_failed_spare_is_no_clients_error_and_not_tried_again_soon(
    lakebase: Lakebase,
) -> None:
    gateway = lakebase.gateway
    async with pool_of(lakebase, pool_spare_min=1) as pool:
        client = await pool.open()
        await pool.until_idle(1)
        gateway.inject(Stage.AUTHENTICATED, Injection.RESET, times=1)
        again = await pool.open()
        await eventually(lambda: pool.row.spares["failed"] == 1, "the spare failed")
        accepted = gateway.accepted
        for held in (client, again):
            held.leave()
        await pool.until_idle(2)
        for _ in range(2):
            assert (await pool.open()).reused
        assert gateway.accepted == accepted


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


# Bounds


async def test_p38_the_least_recently_used_of_another_key_makes_room(lakebase: Lakebase) -> None:
    gateway = lakebase.gateway
    async with pool_of(lakebase, pool_size_max=2, pool_spare_min=0) as pool:
        for key in "ab":
            (await pool.open(key)).leave()
            await pool.until_idle("ab".index(key) + 1)
        assert (await pool.open("a")).reused
        first, second = gateway.sessions
        third = await pool.open("c")
        # Its end was awaited: the database never had three.
        assert (first.closed, second.closed, gateway.open_sessions) == (False, True, 2)
        assert (third.reused, pool.row.takes["waited"], pool.row.retired["surplus"]) == (
            False,
            1,
            1,
        )


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


async def test_p40_the_wait_has_an_end_and_one_that_leaves_takes_nothing(
    lakebase: Lakebase,
) -> None:
    async with pool_of(lakebase, pool_size_max=1, pool_wait_seconds=0.2, pool_spare_min=0) as pool:
        holder = await pool.open("a")
        with pytest.raises(ProxyError) as caught:
            await pool.open("a")
        assert caught.value.kind is ErrorKind.POOL_FULL
        assert "all 1 sessions (upstream.pool_size_max)" in caught.value.detail
        tasks = [asyncio.create_task(pool.open(key)) for key in "aba"]
        await waiting(pool, 3)
        for task in tasks[:2]:
            task.cancel()
        holder.leave()
        assert (await tasks[2]).pid == holder.pid
        assert [task.cancelled() for task in tasks] == [True, True, False]
        assert pool.row.present.waiting == 0
    async with pool_of(lakebase, pool_size_max=1, pool_wait_seconds=0, pool_spare_min=0) as pool:
        await pool.open("a")
        with pytest.raises(ProxyError) as caught:
            await pool.open("b")
        assert caught.value.kind is ErrorKind.POOL_FULL


@pytest.mark.parametrize("seed", [1, 2, 3])
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
