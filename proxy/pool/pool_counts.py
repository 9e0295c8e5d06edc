"""What one pool has counted, and the closed lists of words that its metrics have.

For: plain numbers that a pool adds to, and that are read at a scrape. Not for: how many sessions
there are now, which the pool knows, or adding up several pools (`observe.pool_stats`).
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from enum import StrEnum, unique

from proxy.observe.pool_stats import DURATION_BOUNDS, Durations, PoolPresent, PoolRow


@unique
class TakeSource(StrEnum):
    """Where the session of a client came from."""

    REUSED = "reused"  # it was idle, or in its reset
    DIALLED = "dialled"
    WAITED = "waited"  # the client waited because of pool_size_max, for either of both


@unique
class RetireReason(StrEnum):
    """Why a session was closed in place of being kept."""

    LIFETIME = "lifetime"
    IDLE = "idle"
    SURPLUS = "surplus"  # no room: pool_idle_max, or pool_size_max and a client with another key
    BUSY = "busy"  # its client left in a transaction, in COPY, or with answers owed
    CANCELLED = "cancelled"
    RESET_FAILED = "reset_failed"
    PARAMETER_CHANGED = "parameter_changed"
    LOGIN_TRIGGER = "login_trigger"
    CHECK_FAILED = "check_failed"
    UPSTREAM_ENDED = "upstream_ended"
    RECONFIGURED = "reconfigured"  # by a reload, or a host that was looked up anew
    RECONNECT = "reconnect"
    ENDED_BY_OPERATOR = "ended_by_operator"
    DRAIN = "drain"
    UNUSED_SPARE = "unused_spare"  # dialled ahead, and no client came


@unique
class SpareResult(StrEnum):
    """How the dial of a spare session ended."""

    OPENED = "opened"
    FAILED = "failed"
    NO_SLOT = "no_slot"  # connects_max: no dial was tried


class DurationCounts:
    """Counts durations by the bounds of a histogram."""

    __slots__ = ("_counts", "_seconds")

    def __init__(self) -> None:
        self._counts = [0] * (len(DURATION_BOUNDS) + 1)
        self._seconds = 0.0

    def record(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(DURATION_BOUNDS, seconds)] += 1
        self._seconds += seconds

    def read(self) -> Durations:
        """Return what was counted."""
        return Durations(tuple(self._counts), self._seconds)


class PoolCounts:
    """The numbers of one pool since it was made. Nothing here is ever reset."""

    __slots__ = ("_clock", "_last", "_resets", "_retired", "_spares", "_takes", "_waits")

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` is the wall clock, in seconds since 1970."""
        self._clock = clock
        self._takes: dict[str, int] = dict.fromkeys(TakeSource, 0)
        self._retired: dict[str, int] = dict.fromkeys(RetireReason, 0)
        self._spares: dict[str, int] = dict.fromkeys(SpareResult, 0)
        self._waits = DurationCounts()
        self._resets = DurationCounts()
        self._last: tuple[str, float | None] = ("", None)

    def taken(self, source: TakeSource) -> None:
        """Count a client that was given a session."""
        self._takes[source] += 1

    def retired(self, reason: RetireReason) -> None:
        """Count a session that is closed."""
        self._retired[reason] += 1
        self._last = (reason, self._clock())

    def spare_ended(self, result: SpareResult) -> None:
        """Count the dial of a spare session."""
        self._spares[result] += 1

    def waited(self, seconds: float) -> None:
        """Count a client that waited for a session, whether or not it got one."""
        self._waits.record(seconds)

    def reset_took(self, seconds: float) -> None:
        """Count a reset that succeeded."""
        self._resets.record(seconds)

    def row(self, target: str, present: PoolPresent) -> PoolRow:
        """Return everything that operators see of a pool; `present` is as it is now."""
        reason, at = self._last
        return PoolRow(
            target=target,
            present=present,
            takes=dict(self._takes),
            retired=dict(self._retired),
            spares=dict(self._spares),
            waits=self._waits.read(),
            resets=self._resets.read(),
            last_retired=reason,
            last_retired_at=at,
        )
