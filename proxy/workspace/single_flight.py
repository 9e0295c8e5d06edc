"""A call that many want at once, made once: whoever asks while it is under way shares its outcome.

A failure is an outcome too: it is raised for each who waited. One who gives up does not end the
call for the others. After a failure nobody makes the call for a while: that is kept in a `Backoff`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.observe.logs import get_logger

# After a failed call nobody calls again for a while; the while doubles from first to last.
BACKOFF_SECONDS_MIN: Final = 0.5
BACKOFF_SECONDS_MAX: Final = 8.0
# What a Retry-After may make of it: a limit of calls a minute is the longest that is plausible.
RETRY_AFTER_SECONDS_MAX: Final = 60.0
_DOUBLINGS_MAX: Final = 10  # beyond the last; a float ends at 1023

_log = get_logger(__name__)

T = TypeVar("T")


class Backoff:
    """How long nobody makes a call that failed, and with what it failed last."""

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float]) -> None:
        """`clock` returns seconds since the epoch, `jitter` a number from 0 to 1."""
        self._clock = clock
        self._jitter = jitter
        self._in_a_row = 0
        self._until = 0.0
        self._length_seconds = 0.0
        self.failure: ProxyError | None = None

    @property
    def remaining_seconds(self) -> float:
        """How long nobody calls yet; not at all, should the clock be set back."""
        seconds = self._until - self._clock()
        return seconds if 0 < seconds <= self._length_seconds else 0.0

    def start(self, failure: ProxyError | None = None) -> None:
        """Have nobody call for a while, which doubles with each failure in a row."""
        self.failure = failure or self.failure
        if self.remaining_seconds:
            return  # failures of calls that were under way together are one
        ceiling = BACKOFF_SECONDS_MIN * 2.0 ** min(self._in_a_row, _DOUBLINGS_MAX)
        # Half of it for sure: a jitter near 0 would let the next call follow at once.
        part = 0.5 + 0.5 * self._jitter()
        wanted = 0.0 if failure is None else failure.retry_after_seconds
        backoff = min(BACKOFF_SECONDS_MAX, ceiling) * part
        self._length_seconds = max(backoff, min(wanted, RETRY_AFTER_SECONDS_MAX))
        self._until = self._clock() + self._length_seconds
        self._in_a_row += 1

    def reset(self) -> None:
        """Let everybody call: it works."""
        self._in_a_row, self._until, self.failure = 0, 0.0, None

    async def wait(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Wait until the call may be made. Raises its failure at once where that is for good.

        It has no bound of its own: whoever waits has one.
        """
        while seconds := self.remaining_seconds:
            if self.failure is not None and not is_transient(self.failure):
                raise self.failure.with_traceback(None)  # nothing new is to be heard so soon
            await sleep(seconds)


def is_transient(failure: ProxyError) -> bool:
    """Whether the same call may succeed a little later."""
    return failure.kind.value.disposition is not Disposition.FAIL


class SingleFlight(Generic[T]):
    """One call. `close` it when nobody will ask any more."""

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._under_way: asyncio.Task[T | ProxyError] | None = None

    def start(self) -> "asyncio.Task[T | ProxyError]":
        """Make the call unless it is under way; nobody needs to wait for it."""
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.get_running_loop().create_task(self._outcome())
        return self._under_way

    async def result(self) -> T:
        """Return the call's result. Raises ProxyError."""
        outcome = await asyncio.shield(self.start())
        if isinstance(outcome, ProxyError):
            # Shared by all who wait: each starts its traceback anew.
            raise outcome.with_traceback(None)
        return outcome

    async def close(self) -> None:
        """End a call that is under way."""
        if self._under_way is not None:
            self._under_way.cancel()
            await asyncio.wait((self._under_way,))

    async def _outcome(self) -> T | ProxyError:
        """A failure is a value here: there may be nobody to raise it for."""
        try:
            return await self._call()
        except ProxyError as error:
            return error
        except Exception as error:
            # A bug of ours must cost those who wait, not the process.
            _log.exception("a shared call failed")
            return ProxyError(ErrorKind.INTERNAL, type(error).__name__)
