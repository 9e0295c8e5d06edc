"""The phases of reaching an upstream, and how long each of them takes in one dial.

For: metrics, `check`, and the error that says in which phase a dial's time ended. Not for: doing
any of it (`connector`, `login`, `dialer`).
"""

import time
from collections.abc import Callable
from enum import StrEnum, unique


@unique
class ConnectPhase(StrEnum):
    """What the time until an upstream is ready is spent on, in this order."""

    DNS = "dns"
    MINT = "mint"
    TCP = "tcp"
    TLS = "tls"
    LOGIN = "login"


RecordPhase = Callable[[ConnectPhase, float], None]
"""Records a phase that succeeded, and its seconds."""

RecordTargetPhase = Callable[[str, ConnectPhase, float], None]
"""The same, with the target's name first."""


class DialProgress:
    """What one dial waits for now: a phase, or one of `upstream.connects_max` slots.

    The session that waits for the dial owns it, so that a client that leaves is recorded with what
    it waited for.
    """

    __slots__ = ("phase", "waits_for_slot")

    def __init__(self) -> None:
        self.phase: ConnectPhase | None = None
        """None before the first phase and while the dial waits for a slot."""
        self.waits_for_slot = False


class PhaseTimer:
    """Times the phases of one dial.

    `current` is None while the dial waits for other dials and does nothing for its own client.
    What was measured is recorded by `flush`, which is called when the upstream has to answer next
    or the dial is over: no client waits for a measurement.
    """

    def __init__(self, record: RecordPhase, progress: DialProgress | None = None) -> None:
        self._progress = progress or DialProgress()
        self._record = record
        self._started_at = 0.0
        self._measured: list[tuple[ConnectPhase, float]] = []

    @property
    def current(self) -> ConnectPhase | None:
        """The phase that was started last."""
        return self._progress.phase

    def start(self, phase: ConnectPhase) -> None:
        """Start a phase. After a failure `current` still says which one it was."""
        self._progress.phase, self._progress.waits_for_slot = phase, False
        self._started_at = time.perf_counter()

    def pause(self) -> None:
        """Leave the phase: other dials are waited for."""
        self._progress.phase, self._progress.waits_for_slot = None, True

    def finish(self) -> None:
        """Measure the current phase, which succeeded. The time until the next start is no phase's.

        `current` stays: a failure that comes before the next start is still this phase's.
        """
        assert self.current is not None
        self._measured.append((self.current, time.perf_counter() - self._started_at))

    def flush(self) -> None:
        """Record what was measured since the last flush. The last one is when the dial is over."""
        for phase, seconds in self._measured:
            self._record(phase, seconds)
        self._measured.clear()
