"""Sessions, bytes and connect times by target.

For: numbers that change during a session. A session's relay adds the bytes of each read to its
target's totals, so that a reading costs the same for any number of sessions: it runs on the event
loop. Not for: what is only counted (`metrics`), or facts about one session.

Invariants: a row's totals never fall; one that was dropped and made again begins at 0. Targets are
the configured ones; any other name is `other`. A target that a reload removed is dropped when its
last session ends, so that old names do not accumulate; until then its totals stay the same object,
also if it is configured again.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Final

from proxy.observe.connect_times import NO_CONNECTS, Counts, index_of

# The name under which everything outside the configured targets is counted.
OTHER: Final = "other"

# Configured targets, and removed ones that still have sessions.
TARGETS_MAX: Final = 1000

# Connects of which a target's median is shown.
CONNECTS_MAX: Final = 15


class ByteTotals:
    """Bytes received from the clients of a target, and from their upstreams.

    Each is an array of one number, which a compiled lane increments in C.
    """

    def __init__(self) -> None:
        self.client_bytes = array("Q", (0,))
        self.upstream_bytes = array("Q", (0,))


@dataclass(frozen=True, slots=True)
class TargetRow:
    """The numbers of one target.

    `host` is empty while it is unknown. `sessions` are open now; `sessions_started` and the bytes
    include ended sessions. `connect_seconds` has each phase of the last connect that succeeded,
    `connects` the whole time of the last ones.
    """

    name: str
    host: str
    sessions: int
    sessions_started: int
    client_bytes: int
    upstream_bytes: int
    connect_seconds: Mapping[str, float]
    connects: Sequence[float] = ()

    @property
    def connect_p50_seconds(self) -> float | None:
        """The median time of the last connects that succeeded; None before the first."""
        return median(self.connects) if self.connects else None


@dataclass(slots=True)
class _Counts:
    """The counts of one target; a `with` block counts a session."""

    session_ended: Callable[[], None]
    started: int = 0
    open_sessions: int = 0
    totals: ByteTotals = field(default_factory=ByteTotals)
    connect_seconds: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)  # of a connect under way
    connects: deque[float] = field(default_factory=lambda: deque(maxlen=CONNECTS_MAX))

    def __enter__(self) -> None:
        self.started += 1
        self.open_sessions += 1

    def __exit__(self, *_: object) -> None:
        self.open_sessions -= 1
        self.session_ended()

    def row(self, name: str, host: str) -> TargetRow:
        return TargetRow(
            name=name,
            host=host,
            sessions=self.open_sessions,
            sessions_started=self.started,
            client_bytes=self.totals.client_bytes[0],
            upstream_bytes=self.totals.upstream_bytes[0],
            connect_seconds=dict(self.connect_seconds),
            connects=tuple(self.connects),
        )


class TargetStats:
    """The numbers of all targets in one process."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._counts_by_name: dict[str, _Counts] = {}
        self._connects = list(NO_CONNECTS)
        self.refused = 0
        """Clients that got an ErrorResponse in place of a session, whatever the target."""
        self._configured: frozenset[str] = frozenset()
        self.configure(targets)

    def configure(self, targets: Iterable[str]) -> None:
        """Add a row for each of these targets, up to `TARGETS_MAX`.

        Any other target loses its row as soon as it has no open session.
        """
        names = (OTHER, *targets)
        self._configured = frozenset(names)
        for name in tuple(self._counts_by_name):
            self._drop_if_unused(name)
        for name in names:
            if name not in self._counts_by_name and len(self._counts_by_name) <= TARGETS_MAX:
                self._counts_by_name[name] = _Counts(partial(self._drop_if_unused, name))

    def label(self, target: str) -> str:
        """Return the name under which a target is counted: its own, or `other`."""
        return target if target in self._counts_by_name else OTHER

    def byte_totals(self, target: str) -> ByteTotals:
        """Return what a session of this target adds its bytes to, while it is counted."""
        return self._counts_by_name[self.label(target)].totals

    def session(self, target: str) -> AbstractContextManager[None]:
        """Return a context that counts a session."""
        return self._counts_by_name[self.label(target)]

    def connect_phase_took(self, target: str, phase: str, seconds: float) -> None:
        """Record the duration of a phase. It is shown when a connect of the target succeeds."""
        self._counts_by_name[self.label(target)].phase_seconds[phase] = seconds

    def connected(self, target: str, seconds: float) -> None:
        """Record a connect that succeeded, and how long its client waited for it."""
        counts = self._counts_by_name[self.label(target)]
        counts.connect_seconds.update(counts.phase_seconds)
        counts.phase_seconds.clear()
        counts.connects.append(seconds)
        self._connects[index_of(seconds)] += 1

    @property
    def connects(self) -> Counts:
        """The connects to all targets that succeeded, by their time."""
        return tuple(self._connects)

    def rows(self, hosts: Mapping[str, str] | None = None) -> list[TargetRow]:
        """Return a row for each target, `other` last; `hosts` are the known hosts by target."""
        hosts = hosts or {}
        other, *named = self._counts_by_name.items()
        return [counts.row(name, hosts.get(name, "")) for name, counts in (*named, other)]

    def _drop_if_unused(self, name: str) -> None:
        if name not in self._configured and not self._counts_by_name[name].open_sessions:
            del self._counts_by_name[name]
