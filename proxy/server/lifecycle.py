"""How far a proxy is in its life: starting, serving, draining.

For: what health, status and signals ask. Not for: ending anything (`app`).

Invariant: it only goes on, never back.
"""

import asyncio
import time
from enum import StrEnum, unique


@unique
class State(StrEnum):
    """How far the proxy is in its life, in the words of `/status`."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Lifecycle:
    """The state of one proxy, and who wants it to end."""

    def __init__(self) -> None:
        self.quit_asked = asyncio.Event()
        """Set when the admin address was asked to end the proxy."""
        self.failed = False
        """Whether it ends because it cannot go on."""
        self._begun_at = time.monotonic()
        self._cut_at = 0.0
        self._state = State.STARTING
        self._started = False

    @property
    def state(self) -> State:
        """How far it is."""
        return self._state

    @property
    def started(self) -> bool:
        """Whether it has served, be it that it drains by now."""
        return self._started

    @property
    def draining(self) -> bool:
        """Whether it drains."""
        return self._state is State.DRAINING

    @property
    def uptime_seconds(self) -> float:
        """The time since the program began to start."""
        return time.monotonic() - self._begun_at

    @property
    def drain_seconds_left(self) -> float | None:
        """The time until what still runs is cut; None while nothing is drained."""
        if self._state is not State.DRAINING:
            return None
        return max(0.0, self._cut_at - time.monotonic())

    def serve(self) -> None:
        """Begin to serve."""
        self._started = True
        if self._state is State.STARTING:
            self._state = State.SERVING

    def fail(self) -> None:
        """Ask the proxy to end because it cannot go on."""
        self.failed = True
        self.quit_asked.set()

    def drain(self, seconds: float) -> None:
        """Begin to drain, or hasten it: what still runs is cut after so long."""
        self._state = State.DRAINING
        self._cut_at = time.monotonic() + seconds
