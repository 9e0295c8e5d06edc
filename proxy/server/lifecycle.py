"""How far a proxy has come: starting, serving, draining.

For: what health checks, status and signals need to know. Not for: ending anything (`app`).

Invariant: a proxy never goes back to an earlier state.
"""

import asyncio
import time
from enum import StrEnum, unique


@unique
class State(StrEnum):
    """The state of a proxy, in the words of `/status`."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Lifecycle:
    """The state of one proxy, and whether it was asked to end."""

    def __init__(self) -> None:
        self.quit_asked = asyncio.Event()
        """Set when the admin address was asked to end the proxy, or it cannot go on."""
        self.failed = False
        """Whether it ends because it cannot go on."""
        self._started_at = time.monotonic()
        self._cut_at = 0.0
        self._state = State.STARTING
        self._has_served = False

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    @property
    def started(self) -> bool:
        """Whether it has served; it may be draining now."""
        return self._has_served

    @property
    def draining(self) -> bool:
        """Whether it drains."""
        return self._state is State.DRAINING

    @property
    def uptime_seconds(self) -> float:
        """The time since the program started."""
        return time.monotonic() - self._started_at

    @property
    def drain_seconds_left(self) -> float | None:
        """The time until open sessions are cut. None unless it drains."""
        if self._state is not State.DRAINING:
            return None
        return max(0.0, self._cut_at - time.monotonic())

    def serve(self) -> None:
        """Enter the state SERVING, unless a drain has started."""
        self._has_served = True
        if self._state is State.STARTING:
            self._state = State.SERVING

    def fail(self) -> None:
        """Ask the proxy to end because it cannot go on."""
        self.failed = True
        self.quit_asked.set()

    def drain(self, seconds: float) -> None:
        """Enter the state DRAINING, or shorten it: open sessions are cut after this time."""
        self._state = State.DRAINING
        self._cut_at = time.monotonic() + seconds
