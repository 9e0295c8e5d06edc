"""What ended sessions leave in memory, given back to the system once many have ended.

For: a proxy that is as small after a storm as before. Two things keep it large. Some of what a
session held knows itself again (the traceback of how its TLS ended, say) and waits for the garbage
collector, which does not come for a few thousand objects. And glibc gives back only the end of its
heap by itself, while what is freed lies between what lives. Not for: what living sessions hold.

Invariant: where fewer than `SESSIONS_MIN` ended nothing is done. It is done when no session has
ended for a moment, and where sessions always end, once in `STORM_SECONDS`: it takes milliseconds in
which all others wait.
"""

import asyncio
import ctypes
import gc
from collections.abc import Callable
from typing import Final

# Some megabytes: less is not worth the time.
SESSIONS_MIN: Final = 100
QUIET_SECONDS: Final = 0.25
STORM_SECONDS: Final = 10.0


def _no_trim(_keep_bytes: int) -> int:
    """Take the place of malloc_trim(3) where the C library is another than glibc."""
    return 0


_malloc_trim: Final[Callable[[int], int]] = getattr(ctypes.CDLL(None), "malloc_trim", _no_trim)


def release_memory() -> None:
    """Free what nothing refers to, and give the system what is free."""
    gc.collect()
    _malloc_trim(0)


class MemoryTrim:
    """Counts the sessions that end, and calls `release_memory` once many have ended."""

    def __init__(
        self,
        release_memory: Callable[[], object] = release_memory,
        *,
        storm_seconds: float = STORM_SECONDS,
    ) -> None:
        self._release_memory = release_memory
        self._storm_seconds = storm_seconds
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
        """Do nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _schedule_poll(self) -> None:
        self._ended_before = self._ended
        self._timer = asyncio.get_running_loop().call_later(QUIET_SECONDS, self._poll)

    def _poll(self) -> None:
        self._polls += 1
        if self._ended != self._ended_before and self._polls * QUIET_SECONDS < self._storm_seconds:
            self._schedule_poll()
            return
        self._timer = None
        self._ended = 0
        self._release_memory()
