"""Releases the memory of ended sessions to the system, once many have ended.

For: a proxy that is as small after many sessions as before. Two things keep it large. Some objects
of a session are in reference cycles (the traceback of how its TLS ended, for example) and wait for
the garbage collector, which does not run for a few thousand objects. And glibc releases only the
end of its heap by itself, while freed memory lies between memory in use. Not for: what open
sessions hold.

Invariant: nothing is done for fewer than `SESSIONS_MIN` ended sessions. Memory is released when no
session has ended for a moment or, where sessions end all the time, once in `RELEASE_SECONDS_MAX`:
it takes milliseconds, in which all other sessions wait.
"""

import asyncio
import ctypes
import gc
from collections.abc import Callable
from typing import Final

# They hold some megabytes; less is not worth the time.
SESSIONS_MIN: Final = 100
QUIET_SECONDS: Final = 0.25
RELEASE_SECONDS_MAX: Final = 10.0


def _no_trim(_keep_bytes: int) -> int:
    """Do nothing, where the C library has no malloc_trim(3)."""
    return 0


_malloc_trim: Final[Callable[[int], int]] = getattr(ctypes.CDLL(None), "malloc_trim", _no_trim)


def release_memory() -> None:
    """Collect garbage, and release free memory to the system."""
    gc.collect()
    _malloc_trim(0)


class MemoryTrim:
    """Counts the sessions that end, and calls `release_memory` once many have ended."""

    def __init__(
        self,
        release_memory: Callable[[], object] = release_memory,
        *,
        release_seconds_max: float = RELEASE_SECONDS_MAX,
    ) -> None:
        self._release_memory = release_memory
        self._release_seconds_max = release_seconds_max
        self._ended = 0
        self._ended_before = 0
        self._polls = 0
        self._timer: asyncio.TimerHandle | None = None

    def session_ended(self) -> None:
        """Count one. Call it on the event loop."""
        self._ended += 1
        if self._ended >= SESSIONS_MIN and self._timer is None:
            self._polls = 0
            self._schedule_poll()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _schedule_poll(self) -> None:
        self._ended_before = self._ended
        self._timer = asyncio.get_running_loop().call_later(QUIET_SECONDS, self._poll)

    def _poll(self) -> None:
        self._polls += 1
        if (
            self._ended != self._ended_before
            and self._polls * QUIET_SECONDS < self._release_seconds_max
        ):
            self._schedule_poll()
            return
        self._timer = None
        self._ended = 0
        self._release_memory()
