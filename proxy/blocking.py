"""Blocking calls, run in daemon threads under a deadline.

A thread cannot be stopped: a call that hangs is abandoned at its deadline and holds no lock of
ours. At most `threads_max` calls run at once, and further calls wait. A call that is past its
deadline does not count among them, so that calls which hang do not delay the others. Once
`overdue_max` of these have not ended, no new call is started.

For: where a call runs, and how long its caller waits. Not for: what a failure means.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, TypeVar

# Enough for bursts; a thread is about a stack's memory and what its call holds.
THREADS_MAX: Final = 8
# Each is some kilobytes and perhaps a socket. Calls have time limits of their own; this bound is
# for a call whose limit does not work, and which must not cost a thread for each client.
OVERDUE_MAX: Final = 64

T = TypeVar("T")


class NoThreadFree(TimeoutError):
    """A call was not started, because earlier calls have not ended."""


class NoThreadStarted(RuntimeError):
    """A call was not started, because the machine has no more threads."""


class BlockingCalls:
    """Runs blocking calls. `name` is the threads' name in stack dumps."""

    def __init__(
        self, name: str, *, threads_max: int = THREADS_MAX, overdue_max: int = OVERDUE_MAX
    ) -> None:
        self._name = name
        self._threads_max = threads_max
        self._overdue_max = overdue_max
        self._threads = asyncio.Semaphore(threads_max)
        self._overdue: set[object] = set()

    async def run(self, call: Callable[[], T], timeout_seconds: float) -> T:
        """Return what the call returns, or raise what it raises.

        Raises NoThreadFree when no thread is free by the deadline or too many calls are overdue,
        TimeoutError when the call has not ended by then, whose result is dropped, and
        NoThreadStarted.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_seconds
        await self._wait_for_thread(ends_at)
        future = self._start(call)
        # The caller may be cancelled before the call ends. The mark stands for the future, because
        # a reference cycle would keep its result, which may be a secret.
        mark = object()
        timer = loop.call_at(ends_at, self._abandon, mark)
        future.add_done_callback(lambda _: _call_soon(loop, lambda: self._end(mark, timer)))
        async with asyncio.timeout_at(ends_at):
            return await asyncio.wrap_future(future)

    async def _wait_for_thread(self, ends_at: float) -> None:
        try:
            async with asyncio.timeout_at(ends_at):
                await self._threads.acquire()
        except TimeoutError:
            raise NoThreadFree(f"{self._threads_max} earlier calls have not ended") from None
        if len(self._overdue) >= self._overdue_max:
            self._threads.release()
            raise NoThreadFree(f"{len(self._overdue)} earlier calls still hang")

    def _start(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from now on it cannot be cancelled

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # it is raised where the result is awaited
                future.set_exception(error)

        try:
            threading.Thread(target=work, name=self._name, daemon=True).start()
        except RuntimeError as error:  # the machine has no more threads
            self._threads.release()
            raise NoThreadStarted(*error.args) from error
        return future

    def _abandon(self, mark: object) -> None:
        self._overdue.add(mark)
        self._threads.release()

    def _end(self, mark: object, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        if mark in self._overdue:
            self._overdue.remove(mark)
        else:
            self._threads.release()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call it on the loop, from any thread."""
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(callback)
