"""The status of a proxy as one value, which `/status` and the status page show.

For: its shape, and building it from what the proxy's parts report. Not for: finding anything out.

Invariant: no secret has a place in it. Of a token it has only the times, and of an error only words
from closed lists (`recent_errors`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Protocol

from proxy.observe.facts import Facts
from proxy.observe.history import LastMinute
from proxy.observe.pool_stats import PoolRow
from proxy.observe.recent_errors import RecentError, iso_time
from proxy.observe.target_stats import OTHER, TargetRow

NOTHING: Final = LastMinute()


@dataclass(frozen=True, slots=True)
class Token:
    """The times of a workspace's newest token.

    `expires_in_seconds` is negative after the expiry. `workspace` is the name of its section.
    `accepted_age_seconds` is longer than credentials.token_max_age_seconds while the API limits
    the rate of tokens.
    """

    workspace: str
    age_seconds: float
    expires_in_seconds: float
    accepted_age_seconds: float


@dataclass(frozen=True, slots=True)
class WorkspaceApi:
    """Whether tokens can be minted: since when not (seconds since 1970), and the last reason.

    With a password in place of tokens, whether its file can be read; `workspace` is its key.
    """

    workspace: str
    failing_since: float | None = None
    failing_seconds: float = 0.0
    reason: str = ""

    def as_dict(self) -> Mapping[str, object]:
        """Return it as values that JSON has, with times in UTC."""
        since = None if self.failing_since is None else iso_time(self.failing_since)
        return asdict(self) | {"failing_since": since}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMapStatus:
    """The shard map that sessions are routed by. What has a default is None for a static map."""

    name: str
    source: str  # static, catalogue, snapshot
    kind: str
    key_type: str
    version: int | None = None
    mappings: int
    shards: int
    state: str  # loading, ready, stale
    feed: str | None = None  # listening, polling, off, down
    age_seconds: float | None = None
    validate: bool | None = None
    parked: int | None = None


@dataclass(frozen=True, slots=True)
class CatalogueFacts:
    """Of a map in a catalogue: operations under way, and the longest back-off of failed dials.

    In a back-off, failed dials to a shard ask the catalogue nothing.
    """

    operations: int = 0
    dial_backoff_seconds: float = 0.0


class LifecycleStatus(Protocol):
    """Whether the proxy starts, serves or drains."""

    @property
    def state(self) -> str:
        """The word that `/status` shows."""

    @property
    def started(self) -> bool:
        """Whether the listener has been opened. It stays true while the proxy drains."""

    @property
    def draining(self) -> bool:
        """Whether the proxy drains."""

    @property
    def uptime_seconds(self) -> float:
        """The time since the process started."""

    @property
    def drain_seconds_left(self) -> float | None:
        """The time until remaining sessions are closed; None unless the proxy drains."""


class StatusSource(Protocol):
    """What a proxy reports of itself. Every member answers at once, from memory."""

    @property
    def version(self) -> str:
        """The proxy's version."""

    @property
    def lifecycle(self) -> LifecycleStatus:
        """Whether the proxy starts, serves or drains."""

    @property
    def acceleration(self) -> str:
        """Whether new sessions get the compiled relay: a word of `native.Acceleration`."""

    @property
    def listen_address(self) -> str:
        """The addresses where clients connect; empty before the listener is open."""

    @property
    def sessions_max(self) -> int:
        """The bound of `session_slots_used`."""

    @property
    def session_slots_used(self) -> int:
        """The sessions that are served, and those whose upstream is being opened."""

    def facts(self) -> Facts:
        """Return what is the same for a long time."""

    def target_names(self) -> Collection[str]:
        """Return the names of the configured targets."""

    def tokens(self) -> Sequence[Token]:
        """Return the times of each workspace's newest token."""

    def workspace_apis(self) -> Sequence[WorkspaceApi]:
        """Return whether tokens can be minted, for each workspace."""

    def warnings(self) -> Sequence[str]:
        """Return a sentence for each risk in the configuration."""

    def shard_map(self) -> ShardMapStatus | None:
        """Return the state of the shard map, None without one."""

    def catalogue_facts(self) -> CatalogueFacts:
        """Return what else metrics show of a map in a catalogue."""


@dataclass(frozen=True, slots=True)
class Drain:
    """The progress of a drain. `seconds_left` is None unless the proxy drains."""

    draining: bool
    seconds_left: float | None
    sessions_left: int


@dataclass(frozen=True, slots=True)
class Status:
    """Everything that `/status` shows. `at` is in seconds since 1970."""

    state: str
    version: str
    acceleration: str
    at: float
    uptime_seconds: float
    listen: str
    sessions: int
    sessions_opening: int
    sessions_max: int
    targets: Sequence[TargetRow]
    tokens: Sequence[Token]
    workspace_apis: Sequence[WorkspaceApi]
    errors: Sequence[RecentError]
    drain: Drain
    warnings: Sequence[str]
    facts: Facts
    last_minute: LastMinute
    shard_map: ShardMapStatus | None = None
    pools: Sequence[PoolRow] = ()

    def as_dict(self) -> Mapping[str, object]:
        """Return it as values that JSON has, with times in UTC."""
        return asdict(self) | {
            "at": iso_time(self.at),
            "workspace_apis": [api.as_dict() for api in self.workspace_apis],
            "targets": list(map(_shown_target, self.targets)),
            "errors": [error.as_dict(self.at) for error in self.errors],
            "facts": self.facts.as_dict(),
            "pools": list(map(_shown_pool, self.pools)),
        }


def report(
    source: StatusSource,
    targets: Sequence[TargetRow],
    errors: Sequence[RecentError],
    now: float,
    *,
    pools: Sequence[PoolRow] = (),
    last_minute: LastMinute = NOTHING,
) -> Status:
    """Return the status at `now` (wall clock, seconds since 1970)."""
    sessions = sum(row.sessions for row in targets)
    lifecycle = source.lifecycle
    return Status(
        state=lifecycle.state,
        version=source.version,
        acceleration=source.acceleration,
        at=now,
        uptime_seconds=lifecycle.uptime_seconds,
        listen=source.listen_address,
        sessions=sessions,
        # A session that has ended returns its slot a moment after its relay has stopped.
        sessions_opening=max(0, source.session_slots_used - sessions),
        sessions_max=source.sessions_max,
        targets=_shown_targets(targets, source.target_names()),
        tokens=source.tokens(),
        workspace_apis=source.workspace_apis(),
        errors=errors,
        drain=Drain(lifecycle.draining, lifecycle.drain_seconds_left, sessions),
        warnings=source.warnings(),
        facts=source.facts(),
        last_minute=last_minute,
        shard_map=source.shard_map(),
        pools=[row for row in pools if row.present.mode],  # not the counts of those that were
    )


def _shown_pool(row: PoolRow) -> Mapping[str, object]:
    """Return what `/status` shows of a target's pools: no user, database or setting."""
    at = row.last_retired_at
    return {
        "target": row.target,
        **asdict(row.present),
        **row.takes,
        "last_retired": row.last_retired,
        "last_retired_at": None if at is None else iso_time(at),
    }


def _shown_target(row: TargetRow) -> Mapping[str, object]:
    shown = {name: value for name, value in asdict(row).items() if name != "connects"}
    return {**shown, "connect_p50_seconds": row.connect_p50_seconds}


def _shown_targets(rows: Sequence[TargetRow], configured: Collection[str]) -> Sequence[TargetRow]:
    """Return the configured targets, and those that a reload removed while they have sessions."""
    return [
        row
        for row in rows
        if row.name in configured or row.sessions or (row.name == OTHER and row.sessions_started)
    ]
