"""Calls that block, kept off the event loop and under a deadline.

databricks-sdk blocks, and a thread cannot be stopped: one that hangs is left behind. It is a daemon
and holds no lock of ours. At most `THREADS_MAX` calls run at once, and more than that wait their
turn; a call that is past its deadline does not count among them, so that calls which hang cost the
others nothing. Of those there are `OVERDUE_MAX` and some before nothing is called any more.

For: where a call runs, and for how long. Not for: which call, or what its failure means.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, TypeVar

from proxy.errors import ErrorKind, ProxyError

# One mint is under way for an identity at a time, unless every connection has its own.
THREADS_MAX: Final = 8
# Each is some kilobytes and a socket. Calls have time limits of their own; this is for the call
# whose limit does not work, and it must not end in a thread for each client.
OVERDUE_MAX: Final = 64

T = TypeVar("T")


class BlockingCalls:
    """Runs blocking calls. `name` shows in stack dumps."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads = asyncio.Semaphore(THREADS_MAX)
        self._overdue: set[object] = set()

    async def run(self, call: Callable[[], T], timeout_seconds: float) -> T:
        """Return what the call returns, or raise what it raises.

        Raises TimeoutError at the deadline (the call goes on unheard), and ProxyError
        API_UNREACHABLE when no thread has become free by then, or too many are overdue.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_seconds
        try:
            async with asyncio.timeout_at(ends_at):
                await self._threads.acquire()
        except TimeoutError:
            detail = f"{THREADS_MAX} earlier calls have not ended"
            raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from None
        if len(self._overdue) >= OVERDUE_MAX:
            self._threads.release()
            detail = f"{len(self._overdue)} earlier calls still hang"
            raise ProxyError(ErrorKind.API_UNREACHABLE, detail)
        future = self._start(call)
        # Whoever asked may leave before. The mark stands for the future, which shall hold no ring
        # of references to itself: its result may be a secret.
        mark = object()
        timer = loop.call_at(ends_at, self._give_up, mark)
        future.add_done_callback(lambda _: _call_soon(loop, lambda: self._end(mark, timer)))
        async with asyncio.timeout_at(ends_at):
            return await asyncio.wrap_future(future)

    def _start(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it under the call

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # it is raised where the result is awaited
                future.set_exception(error)

        try:
            threading.Thread(target=work, name=self._name, daemon=True).start()
        except RuntimeError:  # the machine has no more threads to give
            self._threads.release()
            raise
        return future

    def _give_up(self, mark: object) -> None:
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
    with suppress(RuntimeError):  # the loop has closed meanwhile
        loop.call_soon_threadsafe(callback)
