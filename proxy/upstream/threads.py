"""Calls that block, kept off the event loop and under a deadline.

databricks-sdk blocks, and its token request has no timeout of its own. A thread cannot be stopped,
so one that hangs is left behind: it is a daemon, it holds no lock of ours, and at most
`THREADS_MAX` are alive at once. More calls than that wait their turn.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, TypeVar

from proxy.errors import ErrorKind, ProxyError

# One mint is under way for an identity at a time, unless every connection has its own; the rest is
# room for calls that hang.
THREADS_MAX: Final = 8

T = TypeVar("T")


class Threads:
    """Runs blocking calls. `name` shows in stack dumps."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._free = asyncio.Semaphore(THREADS_MAX)

    async def run(self, call: Callable[[], T], timeout_seconds: float) -> T:
        """Return what the call returns, or raise what it raises.

        Raises TimeoutError at the deadline (the call goes on unheard), and ProxyError
        API_UNREACHABLE when no thread has become free by then.
        """
        ends_at = asyncio.get_running_loop().time() + timeout_seconds
        try:
            async with asyncio.timeout_at(ends_at):
                await self._free.acquire()
        except TimeoutError:
            detail = f"{THREADS_MAX} earlier calls still hang"
            raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from None
        future = self._start(call)
        async with asyncio.timeout_at(ends_at):
            return await asyncio.wrap_future(future)

    def _start(self, call: Callable[[], T]) -> Future[T]:
        loop = asyncio.get_running_loop()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it under the call

        def work() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # it is raised where the result is awaited
                future.set_exception(error)
            finally:
                with suppress(RuntimeError):  # the loop has closed meanwhile
                    loop.call_soon_threadsafe(self._free.release)

        try:
            threading.Thread(target=work, name=self._name, daemon=True).start()
        except RuntimeError:  # the machine has no more threads to give
            self._free.release()
            raise
        return future
