"""The phases of reaching an upstream, and how long each of them takes in one dial.

For: metrics, `check`, and the error that says in which phase a dial's time ended. Not for: doing
any of it (`connector`, `login`, `dialer`).
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum, unique
from typing import Final

from proxy.errors import ProxyError


@unique
class ConnectPhase(StrEnum):
    """What the time until an upstream is ready is spent on, in this order."""

    DNS = "dns"
    MINT = "mint"
    TCP = "tcp"
    TLS = "tls"
    LOGIN = "login"


@unique
class StartStep(StrEnum):
    """What else a session's start is spent on. Only a trace records it."""

    STARTUP = "startup"
    ROUTE = "route"
    TAKE = "take"
    ADMIT = "admit"
    PARK = "park"


RecordPhase = Callable[[ConnectPhase | None, float], None]
"""Records a phase that succeeded, and its seconds; None: the whole connect has."""

RecordTargetPhase = Callable[[str, ConnectPhase | None, float], None]
"""The same, with the target's name first."""


class DialPhases:
    """The phases of one dial: which one it is in, and how long each of them took.

    The session that waits for the dial owns it, so that a client that leaves is recorded with what
    it waited for. What was measured is recorded by `flush`, which is called when the upstream has
    to answer next or the dial is over: no client waits for a measurement.
    """

    __slots__ = (
        *("_began_at", "_measured", "_started_at"),
        *("current", "is_parked", "parked_seconds", "record", "waits_for_slot"),
    )

    def __init__(self) -> None:
        self.current: ConnectPhase | None = None
        """The phase that was started last; None before the first and while a slot is waited for."""
        self.waits_for_slot = False
        """Whether all of `upstream.connects_max` are in use: nothing is done for this client."""
        self.is_parked = False
        """Whether the client waits because its shard key is offline."""
        self.parked_seconds = 0.0
        """How long it has waited for that, all waits before this one together."""
        self.record: RecordPhase = _discard
        """Records what is flushed; the dialer sets that of its target."""
        self._began_at = self._started_at = 0.0
        # Empty, it takes no memory.
        self._measured: tuple[tuple[ConnectPhase | None, float], ...] = ()

    def start(self, phase: ConnectPhase) -> None:
        """Start a phase. After a failure `current` still says which one it was."""
        self.current, self.waits_for_slot = phase, False
        self._started_at = time.perf_counter()
        self._began_at = self._began_at or self._started_at

    def step(self, _step: StartStep) -> AbstractContextManager[None]:
        """Return the context for what is no phase of a dial."""
        return _UNTRACED

    def failed(self, error: ProxyError) -> None:
        """End the current phase, which failed. Another try of the dial may follow."""

    def over(
        self, target: str, host: str = "", port: int = 0, error: str = "", sqlstate: str = ""
    ) -> None:
        """End the session's start. `error` is why its client is refused."""

    def wait_for_slot(self) -> None:
        """Leave the phase: other dials are waited for."""
        self.current, self.waits_for_slot = None, True

    def finish(self) -> None:
        """Measure the current phase, which succeeded. The time until the next start is no phase's.

        `current` stays: a failure that comes before the next start is still this phase's.
        """
        assert self.current is not None
        self._measured += ((self.current, time.perf_counter() - self._started_at),)

    def succeed(self) -> None:
        """Measure the whole dial, which succeeded: its waits and failed tries included."""
        self._measured += ((None, time.perf_counter() - self._began_at),)

    def flush(self) -> None:
        """Record what was measured since the last flush. The last one is when the dial is over."""
        for phase, seconds in self._measured:
            self.record(phase, seconds)
        self._measured = ()


_UNTRACED: Final = nullcontext()


def _discard(_phase: ConnectPhase | None, _seconds: float) -> None:
    pass
