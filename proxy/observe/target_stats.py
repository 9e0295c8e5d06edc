"""Sessions, bytes and connect times by target.

For: numbers that change during a session. A session's relay counts its bytes anyway, and they are
added up here only when somebody reads them, so that a relayed chunk costs nothing. Not for: what is
only counted (`metrics`), or facts about one session.

Invariants: a target's totals never fall, because the bytes of a session move from the open sessions
to the ended ones in one step. Targets are the configured ones; any other name is `other`. A target
that a reload removed is dropped when its last session ends, so that old names do not accumulate.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from proxy.observe.connect_times import NO_CONNECTS, Counts, index_of

# The name under which everything outside the configured targets is counted.
OTHER: Final = "other"

# Configured targets, and removed ones that still have sessions.
TARGETS_MAX: Final = 1000

# Connects of which a target's median is shown.
CONNECTS_MAX: Final = 15


@dataclass(frozen=True, slots=True)
class Carried:
    """Bytes received from a client and from its upstream."""

    client_bytes: int
    upstream_bytes: int


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
    started: int = 0
    client_bytes: int = 0  # of the sessions that have ended
    upstream_bytes: int = 0
    # By a number of their own, because the functions of two sessions may compare equal.
    open_sessions: dict[int, Callable[[], Carried]] = field(default_factory=dict)
    connect_seconds: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)  # of a connect under way
    connects: deque[float] = field(default_factory=lambda: deque(maxlen=CONNECTS_MAX))

    def row(self, name: str, host: str) -> TargetRow:
        carried = [session() for session in self.open_sessions.values()]
        return TargetRow(
            name=name,
            host=host,
            sessions=len(carried),
            sessions_started=self.started,
            client_bytes=self.client_bytes + sum(one.client_bytes for one in carried),
            upstream_bytes=self.upstream_bytes + sum(one.upstream_bytes for one in carried),
            connect_seconds=dict(self.connect_seconds),
            connects=tuple(self.connects),
        )


class CountedSession:
    """Counts one session while a `with` block runs."""

    __slots__ = ("_carried", "_name", "_number", "_stats")

    def __init__(self, stats: "TargetStats", name: str, carried: Callable[[], Carried]) -> None:
        self._stats = stats
        self._name = name
        self._carried = carried
        self._number = 0

    def __enter__(self) -> None:
        """Count it as open."""
        self._number = self._stats.start(self._name, self._carried)

    def __exit__(self, *_: object) -> None:
        """Count it as ended."""
        self._stats.end(self._name, self._number)


class TargetStats:
    """The numbers of all targets in one process."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._counts_by_name = {OTHER: _Counts()}
        self._connects = list(NO_CONNECTS)
        self.refused = 0
        """Clients that got an ErrorResponse in place of a session, whatever the target."""
        self._configured: frozenset[str] = frozenset()
        self.configure(targets)

    def configure(self, targets: Iterable[str]) -> None:
        """Add a row for each of these targets, up to `TARGETS_MAX`.

        Any other target loses its row as soon as it has no open session.
        """
        names = tuple(targets)
        self._configured = frozenset((*names, OTHER))
        for name in tuple(self._counts_by_name):
            self._drop_if_unused(name)
        for name in names:
            if len(self._counts_by_name) <= TARGETS_MAX:
                self._counts_by_name.setdefault(name, _Counts())

    def label(self, target: str) -> str:
        """Return the name under which a target is counted: its own, or `other`."""
        return target if target in self._counts_by_name else OTHER

    def session(self, target: str, carried: Callable[[], Carried]) -> CountedSession:
        """Return a context that counts a session; `carried` returns its bytes so far."""
        return CountedSession(self, self.label(target), carried)

    def start(self, name: str, carried: Callable[[], Carried]) -> int:
        """Count a session of a target that has a row. Return the session's number there."""
        counts = self._counts_by_name[name]
        counts.started += 1
        counts.open_sessions[counts.started] = carried
        return counts.started

    def end(self, name: str, number: int) -> None:
        """Move the bytes of a session to those of the ended sessions."""
        counts = self._counts_by_name[name]
        last = counts.open_sessions.pop(number)()
        counts.client_bytes += last.client_bytes
        counts.upstream_bytes += last.upstream_bytes
        self._drop_if_unused(name)

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
