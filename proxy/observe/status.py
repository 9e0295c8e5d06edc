"""The status of a proxy as one value: what `/status` and the page show.

For: the shape, and putting it together from what the parts tell. Not for: finding anything out:
`StatusSource` is a set of callables that answer at once, from memory.

Invariant: no secret has a place in it: of a token there are only its times, and of a failure only
words of closed lists (`failures`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum, unique

from proxy.observe.recent_errors import RecentError
from proxy.observe.target_stats import OTHER, TargetRow


@unique
class State(StrEnum):
    """How far the proxy is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Token:
    """The newest token of a workspace; below zero, `expires_in_seconds` says since when it is
    of no use. `workspace` is the name of its section."""

    workspace: str
    age_seconds: float
    expires_in_seconds: float


@dataclass(frozen=True, slots=True)
class Drain:
    """`seconds_left` until what still runs is cut; None where no drain runs."""

    draining: bool
    seconds_left: float | None
    sessions_left: int


@dataclass(frozen=True, slots=True)
class StatusSource:
    """What the parts of a proxy tell of themselves. Each callable answers at once.

    `session_slots_used` counts what `sessions_max` bounds: sessions that are served and those whose
    upstream is being opened. `hosts` gives each configured target's host, empty while it is not
    known; `acceleration` is a word of `native.Acceleration`; `warnings` are sentences about the
    configuration; `drain_seconds_left` is None while nothing is drained.
    """

    version: str
    acceleration: Callable[[], str]
    state: Callable[[], State]
    uptime_seconds: Callable[[], float]
    listen: Callable[[], str]
    sessions_max: Callable[[], int]
    session_slots_used: Callable[[], int]
    hosts: Callable[[], Mapping[str, str]]
    tokens: Callable[[], Sequence[Token]]
    drain_seconds_left: Callable[[], float | None]
    warnings: Callable[[], Sequence[str]]


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """One target; `connect_seconds` by phase, of the last connect."""

    name: str
    host: str
    sessions: int
    sessions_started: int
    client_bytes: int
    upstream_bytes: int
    connect_seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LastError:
    """A failure as it is shown: `at` is a time of day in UTC, ISO 8601."""

    at: str
    age_seconds: float
    reason: str
    sqlstate: str
    target: str
    count: int
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Status:
    """All that `/status` shows."""

    state: State
    version: str
    acceleration: str
    at: str
    uptime_seconds: float
    listen: str
    sessions: int
    sessions_opening: int
    sessions_max: int
    targets: Sequence[TargetStatus]
    tokens: Sequence[Token]
    errors: Sequence[LastError]
    drain: Drain
    warnings: Sequence[str]

    def as_dict(self) -> dict[str, object]:
        """Return it as what JSON is made of."""
        return asdict(self)


def report(
    source: StatusSource,
    rows: Sequence[TargetRow],
    errors: Sequence[RecentError],
    now: float,
) -> Status:
    """Return the status at `now` (wall clock, seconds since 1970)."""
    sessions = sum(row.sessions for row in rows)
    state = source.state()
    return Status(
        state=state,
        version=source.version,
        acceleration=source.acceleration(),
        at=_time_of(now),
        uptime_seconds=source.uptime_seconds(),
        listen=source.listen(),
        sessions=sessions,
        # One that has ended gives its slot back a moment after its relay.
        sessions_opening=max(0, source.session_slots_used() - sessions),
        sessions_max=source.sessions_max(),
        targets=_targets(source.hosts(), rows),
        tokens=source.tokens(),
        errors=[_shown_error(error, now) for error in errors],
        drain=Drain(state is State.DRAINING, source.drain_seconds_left(), sessions),
        warnings=source.warnings(),
    )


def _targets(hosts: Mapping[str, str], rows: Sequence[TargetRow]) -> Sequence[TargetStatus]:
    """Show the configured targets, and those of before a reload that still have sessions."""
    return [
        TargetStatus(
            row.target,
            hosts.get(row.target, ""),
            row.sessions,
            row.sessions_started,
            row.client_bytes,
            row.upstream_bytes,
            row.connect_seconds,
        )
        for row in rows
        if row.target in hosts or row.sessions or (row.target == OTHER and row.sessions_started)
    ]


def _shown_error(error: RecentError, now: float) -> LastError:
    return LastError(
        at=_time_of(error.at),
        age_seconds=max(0.0, now - error.at),
        reason=error.reason,
        sqlstate=error.sqlstate,
        target=error.target,
        count=error.count,
        message=error.message,
        hint=error.hint,
    )


def _time_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
