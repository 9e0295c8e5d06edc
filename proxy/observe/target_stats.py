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
class TargetReading:
    """What a target has now: sessions open and ever started, bytes of all of them, and the seconds
    that each phase of the last connect took."""

    target: str
    sessions: int
    sessions_started: int
    client_bytes: int
    upstream_bytes: int
    connect_seconds: Mapping[str, float]


@dataclass(slots=True)
class _Tally:
    started: int = 0
    client_bytes: int = 0  # of the sessions that have ended
    upstream_bytes: int = 0
    # By a number of their own: two sessions' functions could compare equal.
    living: dict[int, Callable[[], Carried]] = field(default_factory=dict)
    connect_seconds: dict[str, float] = field(default_factory=dict)


class CountedSession:
    """One session, counted while a `with` block runs."""

    __slots__ = ("_carried", "_live", "_name", "_number")

    def __init__(self, live: "Live", name: str, carried: Callable[[], Carried]) -> None:
        self._live = live
        self._name = name
        self._carried = carried
        self._number = 0

    def __enter__(self) -> None:
        """Count it among the living."""
        self._number = self._live.begin(self._name, self._carried)

    def __exit__(self, *_: object) -> None:
        """Move its bytes to the ended."""
        self._live.end(self._name, self._number)


class Live:
    """The sessions of one proxy, by target."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._tallies = {OTHER: _Tally()}
        self._configured: frozenset[str] = frozenset()
        self.know(targets)

    def know(self, targets: Iterable[str]) -> None:
        """Give each of these targets a reading of its own from now on, up to `TARGETS_MAX`.

        Any other loses its own, as soon as it has no session any more.
        """
        names = tuple(targets)
        self._configured = frozenset((*names, OTHER))
        for name in tuple(self._tallies):
            self._forget_if_gone(name)
        for name in names:
            if len(self._tallies) <= TARGETS_MAX:
                self._tallies.setdefault(name, _Tally())

    def named(self, target: str) -> str:
        """Return the name under which a target is shown: its own, or `other`."""
        return target if target in self._tallies else OTHER

    def session(self, target: str, carried: Callable[[], Carried]) -> CountedSession:
        """Count a session while the block runs; `carried` tells its bytes so far, from memory."""
        return CountedSession(self, self.named(target), carried)

    def begin(self, name: str, carried: Callable[[], Carried]) -> int:
        """Count a session of a target that has a reading; return its number there."""
        tally = self._tallies[name]
        tally.started += 1
        tally.living[tally.started] = carried
        return tally.started

    def end(self, name: str, number: int) -> None:
        """Move a session's bytes to those of the ended."""
        tally = self._tallies[name]
        last = tally.living.pop(number)()
        tally.client_bytes += last.client_bytes
        tally.upstream_bytes += last.upstream_bytes
        self._forget_if_gone(name)

    def _forget_if_gone(self, name: str) -> None:
        if name not in self._configured and not self._tallies[name].living:
            del self._tallies[name]

    def connect_phase_took(self, target: str, phase: str, seconds: float) -> None:
        """Remember how long a phase of a connect took, in place of what was known before."""
        self._tallies[self.named(target)].connect_seconds[phase] = seconds

    def readings(self) -> list[TargetReading]:
        """Return a reading of each target, `other` last."""
        other, *named = self._tallies.items()
        return [_reading(name, tally) for name, tally in (*named, other)]


def _reading(name: str, tally: _Tally) -> TargetReading:
    living = [carried() for carried in tally.living.values()]
    return TargetReading(
        target=name,
        sessions=len(living),
        sessions_started=tally.started,
        client_bytes=tally.client_bytes + sum(one.client_bytes for one in living),
        upstream_bytes=tally.upstream_bytes + sum(one.upstream_bytes for one in living),
        connect_seconds=dict(tally.connect_seconds),
    )
