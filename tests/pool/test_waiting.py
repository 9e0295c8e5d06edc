"""The clients that wait for a pool's session, each in the order in which they came."""

import asyncio

from proxy.pool.waiting import Waiter, WaitingClients
from proxy.upstream.address_lookup import LoginNames, Target
from proxy.upstream.upstream_session import Prepared
from proxy.wire.startup import V3_0, StartupMessage
from tests.support.running import eventually

TARGET = Target("db.example.com", "", 5432, "verify-full", "system")
KEY = Prepared(TARGET, LoginNames(b"app", b"main"), StartupMessage(V3_0, ((b"user", b"app"),)))
WAIT_SECONDS_MAX = 10.0


async def for_reset(clients: WaitingClients, waiter: Waiter) -> bool:
    """Wait; return whether it was woken with nothing."""
    with clients.for_reset(waiter, KEY):
        await waiter.wait(WAIT_SECONDS_MAX)
    return not (waiter.session or waiter.may_dial)


async def test_p19_two_clients_that_are_given_something_at_once_both_wake() -> None:
    # The second of them once failed: the first had removed the queue of their key.
    clients, waiters = WaitingClients(), [Waiter(KEY) for _ in range(2)]
    tasks = [asyncio.create_task(for_reset(clients, waiter)) for waiter in waiters]
    await eventually(lambda: clients.reset_waiters(KEY) == 2, "both wait")
    for waiter in waiters:
        assert clients.next_for_reset(KEY) is waiter
        waiter.wake()
    assert clients.next_for_reset(KEY) is None
    assert await asyncio.gather(*tasks) == [True, True]
    assert clients.reset_waiters(KEY) == 0


async def test_p39_one_that_has_left_or_waited_too_long_is_passed_over() -> None:
    clients, (first, second, third) = WaitingClients(), (Waiter(KEY) for _ in range(3))

    async def for_room(waiter: Waiter, seconds: float) -> None:
        with clients.for_room(waiter):
            await waiter.wait(seconds)

    left = asyncio.create_task(for_room(first, WAIT_SECONDS_MAX))
    late = asyncio.create_task(for_room(second, 0))
    waits = asyncio.create_task(for_room(third, WAIT_SECONDS_MAX))
    await late
    left.cancel()
    await asyncio.wait([left])
    assert clients.next_for_room() is third
    third.give(None)
    await waits
    assert (first.may_dial, second.may_dial, third.may_dial) == (False, False, True)
    assert clients.next_for_room() is None
    assert len(clients) == 0
