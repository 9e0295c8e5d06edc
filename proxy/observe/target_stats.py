"""What goes on at each target now: its sessions, the bytes they carry, its last connect.

For: numbers that move while a session lives. A session's relay counts its bytes anyway; here they
are summed up when somebody asks, so that a chunk costs nothing. Not for: what is only counted
(`metrics`), or anything about one session.

Invariants: a target's sums never fall, since a session's bytes move from the living to the ended in
one step; and targets are those of the configuration, any other name is `other`. A target that a
reload took away is forgotten with its last session: names of the past must not pile up.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

OTHER: Final = "other"

# Configured, or with sessions that outlived their configuration.
TARGETS_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Carried:
    """Bytes received from a client and from its upstream."""

    client_bytes: int
    upstream_bytes: int


@dataclass(frozen=True, slots=True)
class TargetRow:
    """What a target has now: sessions open and ever started, bytes of all of them, and the seconds
    that each phase of the last connect took."""

    target: str
    sessions: int
    sessions_started: int
    client_bytes: int
    upstream_bytes: int
    connect_seconds: Mapping[str, float]


@dataclass(slots=True)
class _Counts:
    started: int = 0
    client_bytes: int = 0  # of the sessions that have ended
    upstream_bytes: int = 0
    # By a number of their own: two sessions' functions could compare equal.
    open_sessions: dict[int, Callable[[], Carried]] = field(default_factory=dict)
    connect_seconds: dict[str, float] = field(default_factory=dict)


class CountedSession:
    """One session, counted while a `with` block runs."""

    __slots__ = ("_carried", "_name", "_number", "_stats")

    def __init__(self, stats: "TargetStats", name: str, carried: Callable[[], Carried]) -> None:
        self._stats = stats
        self._name = name
        self._carried = carried
        self._number = 0

    def __enter__(self) -> None:
        """Count it among the living."""
        self._number = self._stats.start(self._name, self._carried)

    def __exit__(self, *_: object) -> None:
        """Move its bytes to the ended."""
        self._stats.end(self._name, self._number)


class TargetStats:
    """The sessions of one proxy, by target."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._counts_by_label = {OTHER: _Counts()}
        self._configured: frozenset[str] = frozenset()
        self.configure(targets)

    def configure(self, targets: Iterable[str]) -> None:
        """Give each of these targets a reading of its own from now on, up to `TARGETS_MAX`.

        Any other loses its own, as soon as it has no session any more.
        """
        names = tuple(targets)
        self._configured = frozenset((*names, OTHER))
        for name in tuple(self._counts_by_label):
            self._drop_if_unused(name)
        for name in names:
            if len(self._counts_by_label) <= TARGETS_MAX:
                self._counts_by_label.setdefault(name, _Counts())

    def label(self, target: str) -> str:
        """Return the name under which a target is shown: its own, or `other`."""
        return target if target in self._counts_by_label else OTHER

    def session(self, target: str, carried: Callable[[], Carried]) -> CountedSession:
        """Count a session while the block runs; `carried` tells its bytes so far, from memory."""
        return CountedSession(self, self.label(target), carried)

    def start(self, name: str, carried: Callable[[], Carried]) -> int:
        """Count a session of a target that has a reading; return its number there."""
        counts = self._counts_by_label[name]
        counts.started += 1
        counts.open_sessions[counts.started] = carried
        return counts.started

    def end(self, name: str, number: int) -> None:
        """Move a session's bytes to those of the ended."""
        counts = self._counts_by_label[name]
        last = counts.open_sessions.pop(number)()
        counts.client_bytes += last.client_bytes
        counts.upstream_bytes += last.upstream_bytes
        self._drop_if_unused(name)

    def _drop_if_unused(self, name: str) -> None:
        if name not in self._configured and not self._counts_by_label[name].open_sessions:
            del self._counts_by_label[name]

    def connect_phase_took(self, target: str, phase: str, seconds: float) -> None:
        """Remember how long a phase of a connect took, in place of what was known before."""
        self._counts_by_label[self.label(target)].connect_seconds[phase] = seconds

    def rows(self) -> list[TargetRow]:
        """Return a reading of each target, `other` last."""
        other, *named = self._counts_by_label.items()
        return [_row(name, counts) for name, counts in (*named, other)]


def _row(name: str, counts: _Counts) -> TargetRow:
    open_sessions = [carried() for carried in counts.open_sessions.values()]
    return TargetRow(
        target=name,
        sessions=len(open_sessions),
        sessions_started=counts.started,
        client_bytes=counts.client_bytes + sum(one.client_bytes for one in open_sessions),
        upstream_bytes=counts.upstream_bytes + sum(one.upstream_bytes for one in open_sessions),
        connect_seconds=dict(counts.connect_seconds),
    )
