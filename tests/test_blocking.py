"""Calls that block: off the loop, under a deadline, bounded in number."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from proxy.blocking import OVERDUE_MAX, THREADS_MAX, BlockingCalls, NoThreadFree


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Release calls that hang at the end, so that no thread outlives the test."""
    event = threading.Event()
    before = threading.active_count()
    yield event
    event.set()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() <= before


async def test_a_call_runs_in_a_daemon_thread_with_its_name() -> None:
    def look() -> tuple[str, bool, bool]:
        here = threading.current_thread()
        return here.name, here.daemon, here is threading.main_thread()

    assert await BlockingCalls("a-name").run(look, 5) == ("a-name", True, False)


async def test_what_a_call_raises_is_raised() -> None:
    with pytest.raises(KeyError, match="what"):
        await BlockingCalls("test").run(_raise, 5)


def _raise() -> None:
    raise KeyError("what")


async def test_a_call_that_hangs_ends_for_its_caller_at_the_deadline(
    release: threading.Event,
) -> None:
    threads = BlockingCalls("test")
    with pytest.raises(TimeoutError):
        await threads.run(release.wait, 0.01)
    assert await threads.run(lambda: 7, 5) == 7


async def test_a_caller_that_is_cancelled_abandons_the_call(release: threading.Event) -> None:
    threads = BlockingCalls("test")
    started = threading.Event()

    def hang() -> None:
        started.set()
        release.wait()

    asking = asyncio.create_task(threads.run(hang, 5))
    assert await asyncio.to_thread(started.wait, 5)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()


async def test_calls_that_hang_cost_the_others_no_thread(release: threading.Event) -> None:
    # Eight logins that never returned left no thread: nothing was minted until a restart, although
    # the API was well again.
    threads = BlockingCalls("test")
    for _ in range(3):
        hanging = [threads.run(release.wait, 0.01) for _ in range(THREADS_MAX)]
        outcomes = await asyncio.gather(*hanging, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TimeoutError}
        assert await threads.run(lambda: 7, 5) == 7


async def test_an_abandoned_call_that_hangs_costs_no_thread_either(
    release: threading.Event,
) -> None:
    threads = BlockingCalls("test")
    asking = [asyncio.create_task(threads.run(release.wait, 0.3)) for _ in range(THREADS_MAX)]
    await asyncio.sleep(0)  # each has its thread
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    assert await threads.run(lambda: 7, 5) == 7


def hanging_threads() -> int:
    """Count the threads of that name: others of this process come and go."""
    return sum(thread.name == "hanging" for thread in threading.enumerate())


async def test_calls_that_hang_are_bounded_in_number_and_the_next_is_told(
    release: threading.Event,
) -> None:
    threads = BlockingCalls("hanging")
    asked = 0
    while hanging_threads() < OVERDUE_MAX:
        hanging = [threads.run(release.wait, 0.01) for _ in range(THREADS_MAX)]
        await asyncio.gather(*hanging, return_exceptions=True)
        asked += THREADS_MAX
        assert asked <= OVERDUE_MAX
    with pytest.raises(NoThreadFree, match=f"{OVERDUE_MAX} earlier calls still hang"):
        await threads.run(lambda: 7, 0.01)
    assert hanging_threads() == OVERDUE_MAX
    release.set()
    async with asyncio.timeout(5):
        while hanging_threads():  # noqa: ASYNC110 - threads tell no loop
            await asyncio.sleep(0.001)
    assert await threads.run(lambda: 7, 5) == 7  # they ended, so there is room again


async def test_a_call_that_gets_no_thread_by_its_deadline_is_told_why(
    release: threading.Event,
) -> None:
    threads = BlockingCalls("test")
    async with asyncio.TaskGroup() as tasks:
        for _ in range(THREADS_MAX):
            tasks.create_task(threads.run(release.wait, 5))
        await asyncio.sleep(0)  # each has its thread
        with pytest.raises(NoThreadFree, match=f"{THREADS_MAX} earlier calls have not ended"):
            await threads.run(lambda: 7, 0.01)
        release.set()


async def test_more_calls_than_threads_wait_their_turn() -> None:
    # A burst of connections with token_max_age_seconds = 0 mints one token each: those beyond the
    # eighth were told that earlier calls hang.
    threads = BlockingCalls("test")
    peak = 0

    def call() -> int:
        nonlocal peak
        peak = max(peak, sum(t.name == "test" for t in threading.enumerate()))
        time.sleep(0.002)
        return 7

    answers = await asyncio.gather(*(threads.run(call, 5) for _ in range(10 * THREADS_MAX)))
    assert answers == [7] * (10 * THREADS_MAX)
    assert peak <= THREADS_MAX
