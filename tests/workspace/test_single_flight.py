"""One call for all that want it, and the back-off after a failure."""

import asyncio

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.workspace.single_flight import (
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    RETRY_AFTER_SECONDS_MAX,
    Backoff,
    PendingCalls,
    SingleFlight,
    is_transient,
)
from tests.support.fake_clock import FakeClock

DOWN = ProxyError(ErrorKind.API_UNREACHABLE)


class Call:
    """A call that ends when told to."""

    def __init__(self) -> None:
        self.made = 0
        self.failure: ProxyError | None = None
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.made += 1
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return self.made


async def test_callers_share_the_result_of_a_call_that_is_under_way() -> None:
    call = Call()
    shared = SingleFlight(call, PendingCalls())
    asking = [asyncio.create_task(shared.result()) for _ in range(100)]
    await asyncio.sleep(0)
    call.go.set()
    assert set(await asyncio.gather(*asking)) == {1}
    assert await shared.result() == 2  # later is another call


async def test_a_failure_is_raised_for_each_caller() -> None:
    call = Call()
    call.failure = DOWN
    call.go.set()
    shared = SingleFlight(call, PendingCalls())
    await shared.start()  # no caller waits for its result, and no unretrieved exception is reported
    asking = [asyncio.create_task(shared.result()) for _ in range(3)]
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert outcomes == [DOWN] * 3
    assert call.made == 2


async def test_a_caller_that_gives_up_does_not_end_it_for_the_others() -> None:
    call = Call()
    shared = SingleFlight(call, PendingCalls())
    leaving, staying = (asyncio.create_task(shared.result()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    call.go.set()
    assert await staying == 1


async def test_closing_cancels_the_calls_that_are_under_way_and_waits_for_them() -> None:
    calls = PendingCalls()
    await calls.close()
    call = Call()
    pending = [SingleFlight(call, calls).start() for _ in range(3)]
    await asyncio.sleep(0)
    assert len(calls) == 3
    await calls.close()
    assert all(task.cancelled() for task in pending)
    assert len(calls) == 0


async def test_a_call_that_has_ended_is_pending_no_more() -> None:
    calls = PendingCalls()
    call = Call()
    call.go.set()
    await SingleFlight(call, calls).result()
    assert len(calls) == 0


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_the_back_off_doubles_up_to_its_bound_and_half_of_it_is_certain(jitter: float) -> None:
    clock = FakeClock()
    backoff = Backoff(clock, lambda: jitter)
    assert backoff.remaining_seconds == 0
    ceiling = BACKOFF_SECONDS_MIN
    for _ in range(2000):  # a float would end at 1023 doublings
        backoff.start(DOWN)
        assert backoff.remaining_seconds == pytest.approx(ceiling * (0.5 + jitter / 2), abs=1e-5)
        clock.move(backoff.remaining_seconds + 1e-3)
        assert backoff.remaining_seconds == 0
        assert backoff.failure is DOWN
        ceiling = min(2 * ceiling, BACKOFF_SECONDS_MAX)


def test_failures_that_come_together_are_one() -> None:
    clock = FakeClock()
    backoff = Backoff(clock, lambda: 1.0)
    for _ in range(100):
        backoff.start(DOWN)
    assert backoff.remaining_seconds == pytest.approx(BACKOFF_SECONDS_MIN)


@pytest.mark.parametrize(
    ("asked", "seconds"), [(0, 0), (0.1, 0.1), (30, 30), (86400, RETRY_AFTER_SECONDS_MAX)]
)
def test_a_retry_after_makes_it_longer_but_not_for_ever(asked: float, seconds: float) -> None:
    clock = FakeClock()
    backoff = Backoff(clock, lambda: 1.0)
    backoff.start(ProxyError(ErrorKind.API_THROTTLED, retry_after_seconds=asked))
    # After it, not in place of it: all that were told the same must not come back together.
    assert backoff.remaining_seconds == pytest.approx(seconds + BACKOFF_SECONDS_MIN)
    clock.move(-1)
    assert backoff.remaining_seconds == 0


async def test_waiting_raises_a_permanent_failure_at_once() -> None:
    clock = FakeClock()
    backoff = Backoff(clock, lambda: 1.0)
    await backoff.wait(clock.sleep)
    backoff.start(DOWN)
    await backoff.wait(clock.sleep)
    assert clock() == pytest.approx(FakeClock()() + BACKOFF_SECONDS_MIN)
    backoff.start(ProxyError(ErrorKind.PERMISSION_DENIED))
    with pytest.raises(ProxyError) as refused:
        await backoff.wait(clock.sleep)
    assert refused.value.kind is ErrorKind.PERMISSION_DENIED


def test_a_success_ends_it_and_the_next_failure_begins_anew() -> None:
    backoff = Backoff(FakeClock(), lambda: 1.0)
    backoff.start(DOWN)
    backoff.reset()
    assert (backoff.remaining_seconds, backoff.failure) == (0, None)
    backoff.start(DOWN)
    assert backoff.remaining_seconds == pytest.approx(BACKOFF_SECONDS_MIN)


@pytest.mark.parametrize("back", [60, 3600])
def test_a_clock_that_is_set_back_ends_it(back: float) -> None:
    # It lasted until the clock had come as far again.
    clock = FakeClock()
    backoff = Backoff(clock, lambda: 1.0)
    backoff.start(DOWN)
    clock.move(-back)
    assert backoff.remaining_seconds == 0


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_what_may_be_tried_again_is_transient(kind: ErrorKind) -> None:
    expected = kind.value.disposition.name != "FAIL"
    assert is_transient(ProxyError(kind)) is expected


async def test_a_bug_in_a_shared_call_fails_its_callers_and_nothing_else() -> None:
    # Once it ended the process: the task that failed belonged to a group around the whole program.
    async def broken() -> int:
        raise ZeroDivisionError

    shared = SingleFlight(broken, PendingCalls())
    with pytest.raises(ProxyError) as refused:
        await shared.result()
    assert refused.value.kind is ErrorKind.INTERNAL
