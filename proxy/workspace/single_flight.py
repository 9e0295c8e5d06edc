"""A call that many callers want at once, made once: those that come meanwhile share its outcome.

A failure is an outcome too, and is raised for each caller that waited. A caller that gives up does
not end the call for the others. After a failure no call is made for some time: see `Backoff`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.observe.logs import get_logger

# The back-off after a failed call; it doubles from the first to the last.
BACKOFF_SECONDS_MIN: Final = 0.5
BACKOFF_SECONDS_MAX: Final = 8.0
# The most that a Retry-After can make of it: longer than for a limit of calls a minute is not
# plausible.
RETRY_AFTER_SECONDS_MAX: Final = 60.0
_GROWTHS_MAX: Final = 10  # beyond the last; 2.0 ** n overflows above 1023

_log = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delay:
    """How long a back-off lasts: a sure part, and a random part that grows up to its bound."""

    random_seconds_min: float
    random_seconds_max: float
    sure_seconds: float = 0.0
    sure_share: float = 0.0
    """The share of the random part that is sure."""
    growth: float = 2.0
    """The factor of the random part with each failure in a row."""
    retry_after_seconds_max: float = RETRY_AFTER_SECONDS_MAX

    def seconds(self, failures: int, jitter: float, retry_after_seconds: float) -> float:
        """Return the back-off after so many earlier failures in a row; `jitter` is from 0 to 1."""
        grown = self.random_seconds_min * self.growth ** min(failures, _GROWTHS_MAX)
        share = self.sure_share + (1 - self.sure_share) * jitter
        random_seconds = min(self.random_seconds_max, grown) * share
        wanted = min(retry_after_seconds, self.retry_after_seconds_max)
        return max(self.sure_seconds, wanted) + random_seconds


# At least half of it is sure: with a jitter near 0 the next call would follow at once.
CALL_DELAY: Final = Delay(BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX, sure_share=0.5)


class Backoff:
    """How long no call is made after a failure, and what the last failure was."""

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float]) -> None:
        """`clock` returns seconds since the epoch, `jitter` a number from 0 to 1."""
        self._clock = clock
        self._jitter = jitter
        self._failures = 0  # consecutive ones
        self._until = 0.0
        self._length_seconds = 0.0
        self.failure: ProxyError | None = None

    @property
    def remaining_seconds(self) -> float:
        """The time until the next call may be made; 0 if the clock was set back."""
        seconds = self._until - self._clock()
        return seconds if 0 < seconds <= self._length_seconds else 0.0

    def start(self, failure: ProxyError | None = None, delay: Delay = CALL_DELAY) -> None:
        """Start the back-off; it doubles with each consecutive failure.

        While one runs this only replaces the failure: calls that ran together count as one.
        """
        self.failure = failure or self.failure
        if self.remaining_seconds:
            return
        wanted = 0.0 if failure is None else failure.retry_after_seconds
        now = self._clock()
        self._until = now + delay.seconds(self._failures, self._jitter(), wanted)
        # As the clock's numbers have it: rounded, or the clock may seem to have been set back.
        self._length_seconds = self._until - now
        self._failures += 1

    def reset(self) -> None:
        """End the back-off: a call succeeded."""
        self._failures, self._until, self.failure = 0, 0.0, None

    async def wait(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Wait until the call may be made. Raises its failure at once if that is permanent.

        The caller bounds the time.
        """
        while seconds := self.remaining_seconds:
            if self.failure is not None and not is_transient(self.failure):
                raise self.failure.with_traceback(None)
            await sleep(seconds)


def is_transient(failure: ProxyError) -> bool:
    """Return whether the same call may succeed a little later."""
    return failure.kind.value.disposition is not Disposition.FAIL


class PendingCalls:
    """The calls of one owner that are under way. `close` cancels them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a call in a task of its own."""
        task = asyncio.get_running_loop().create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> None:
        """Wait until none is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel the calls that are under way, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class SingleFlight(Generic[T]):
    """One call, which is under way at most once."""

    def __init__(self, call: Callable[[], Awaitable[T]], pending: PendingCalls) -> None:
        """`pending` is the owner's, who closes it."""
        self._call = call
        self._pending = pending
        self._under_way: asyncio.Task[T | ProxyError] | None = None

    def start(self) -> "asyncio.Task[T | ProxyError]":
        """Start the call unless it is under way. The caller need not wait for it."""
        if self._under_way is None or self._under_way.done():
            self._under_way = self._pending.start(self._outcome())
        return self._under_way

    async def result(self) -> T:
        """Return the call's result. Raises ProxyError."""
        outcome = await asyncio.shield(self.start())
        if isinstance(outcome, ProxyError):
            # Shared by all callers: each starts its traceback anew.
            raise outcome.with_traceback(None)
        return outcome

    async def _outcome(self) -> T | ProxyError:
        """Return a failure as a value: perhaps no caller is left to raise it for."""
        try:
            return await self._call()
        except ProxyError as error:
            return error
        except Exception as error:
            # A bug of ours fails the callers that wait, not the process.
            _log.exception("a shared call failed")
            return ProxyError(ErrorKind.INTERNAL, type(error).__name__)
