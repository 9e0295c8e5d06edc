"""Which session of a pool a client gets, which one goes, and when one is dialled ahead.

For: the decisions of one pool, which is that of a target: idle sessions by key, bounds, lifetimes,
suspects, keys that cannot be pooled, spares. Not for: doing any of it (`pool`). Nothing here waits,
sends or reads a clock: `now` is an argument, in seconds of any clock that does not go back.

The invariants: a session is idle under one key or not at all; the idle ones are never more than
`idle_max`; jitter only shortens a lifetime.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from proxy.pool.pool_counts import RetireReason

# Sessions of a pool are made together in a storm, and must not end together.
JITTER_MAX: Final = 0.1
# Resets of a key that fail in a row before it is not pooled, and for how long it is not.
RESET_FAILURES_MAX: Final = 3
UNPOOLABLE_SECONDS: Final = 60.0
# A spare that failed is not dialled again for this time, which doubles.
SPARE_BACKOFF_SECONDS: Final = (10.0, 300.0)
# Keys whose failures are known. Clients choose the keys: the oldest makes room.
KEYS_MAX: Final = 1000

_DOUBLINGS_MAX: Final = 10


class Kept(Hashable, Protocol):
    """What the policy knows of a session. It is compared by identity."""

    born_at: float
    ends_at: float
    idle_since: float
    used: bool


Key = TypeVar("Key", bound=Hashable)
Session = TypeVar("Session", bound=Kept)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The settings of one target's pool; `size_max` is 0 without a bound."""

    idle_max: int
    size_max: int
    spare_min: int
    lifetime_seconds: float
    idle_seconds: float
    check_seconds: float


@dataclass(slots=True)
class _Idle(Generic[Key]):
    key: Key
    expires_at: float
    reason: RetireReason


class IdleSessions(Generic[Key, Session]):
    """The idle sessions of a target: within a key the last used is taken first, spares at last."""

    def __init__(self, bounds: Bounds, jitter: Callable[[], float]) -> None:
        """`jitter` returns a number from 0 to 1."""
        self._bounds = bounds
        self._jitter = jitter
        # In the order in which they became idle: the first is the least recently used.
        self._all: dict[Session, _Idle[Key]] = {}
        self._by_key: dict[Key, dict[Session, None]] = {}
        self._suspects_until = float("-inf")

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Session]:
        """Yield all of them; the list may change meanwhile."""
        return iter(list(self._all))

    def count(self, key: Key) -> int:
        """Return how many of this key there are."""
        return len(self._by_key.get(key, ()))

    def lifetime_ends_at(self, born_at: float) -> float:
        """Return when a new session is too old for another client, its `ends_at`."""
        return born_at + self._shortened(self._bounds.lifetime_seconds)

    def add(self, session: Session, key: Key) -> list[Session]:
        """Keep a session that is idle since `idle_since`. Return those that make room for it."""
        by_idleness = session.idle_since + self._shortened(self._bounds.idle_seconds)
        reason = RetireReason.IDLE if by_idleness < session.ends_at else RetireReason.LIFETIME
        self._all[session] = _Idle(key, min(session.ends_at, by_idleness), reason)
        of_key = self._by_key.setdefault(key, {})
        if session.used:
            of_key[session] = None
        else:  # a spare, whose caches are cold: it is taken when no other is left
            self._by_key[key] = {session: None} | of_key
        surplus = []
        while len(self._all) > self._bounds.idle_max:
            oldest = next(iter(self._all))
            self.remove(oldest)
            surplus.append(oldest)
        return surplus

    def take(self, key: Key, now: float) -> Session | None:
        """Remove and return the session of this key that was used last; None without one (P28)."""
        for session in reversed(self._by_key.get(key, {})):
            if self._all[session].expires_at > now:
                self.remove(session)
                return session
        return None

    def least_recent(self) -> Session | None:
        """Return the session that has been idle for longest."""
        return next(iter(self._all), None)

    def remove(self, session: Session) -> bool:
        """Remove a session. Return whether it was there."""
        idle = self._all.pop(session, None)
        if idle is None:
            return False
        of_key = self._by_key[idle.key]
        del of_key[session]
        if not of_key:
            del self._by_key[idle.key]
        return True

    def expires_at(self, session: Session) -> float:
        """Return when an idle session expires; infinity for one that made room at once."""
        idle = self._all.get(session)
        return float("inf") if idle is None else idle.expires_at

    def next_expiry(self) -> float | None:
        """Return when the first session expires."""
        return min((idle.expires_at for idle in self._all.values()), default=None)

    def expire(self, now: float) -> list[tuple[Session, RetireReason]]:
        """Remove and return the sessions whose time is over, each with the reason."""
        over = [
            (session, idle.reason) for session, idle in self._all.items() if idle.expires_at <= now
        ]
        for session, _ in over:
            self.remove(session)
        return over

    def _shortened(self, seconds: float) -> float:
        return seconds * (1.0 - JITTER_MAX * self._jitter())

    # -- signs of life ---------------------------------------------------------------------------

    def suspect_all(self, now: float) -> None:
        """Check each session that is idle now at its next take, whatever its age (P34)."""
        self._suspects_until = now

    def needs_check(self, session: Session, now: float) -> bool:
        """Return whether a session that is taken is asked for a sign of life first (P23)."""
        idle_seconds = now - session.idle_since
        return session.idle_since <= self._suspects_until or (
            idle_seconds >= self._bounds.check_seconds
        )

    def remove_not_younger(self, than: Session) -> list[Session]:
        """Remove and return the sessions that are not younger than one that gave no sign."""
        found = [one for one in self._all if one.born_at <= than.born_at]
        for one in found:
            self.remove(one)
        return found


class Unpoolable(Generic[Key]):
    """The keys whose sessions are not kept for a while, since their resets failed.

    And the databases with login triggers: DISCARD ALL undoes what these set (P21).
    """

    def __init__(self) -> None:
        self._failures: dict[Key, tuple[int, float]] = {}  # in a row, and when the last one was
        self._until: dict[Key, float] = {}
        self.databases: set[bytes] = set()

    def reason(self, key: Key, database: bytes, now: float) -> RetireReason | None:
        """Return why sessions of this key and database are not kept now; None if they are."""
        if database in self.databases:
            return RetireReason.LOGIN_TRIGGER
        until = self._until.get(key) if self._until else None
        if until is None:
            return None
        if until <= now:
            del self._until[key]
            return None
        return RetireReason.RESET_FAILED

    def reset_succeeded(self, key: Key) -> None:
        """Record a reset: failures in a row begin anew."""
        self._failures.pop(key, None)

    def reset_failed(self, key: Key, born_at: float, now: float) -> bool:
        """Record a reset that failed. Return whether the key is not pooled because of it.

        That is so after RESET_FAILURES_MAX in a row, each of a session that was younger than the
        failure before: a failover or a changed default fails those that are there, and no others.
        """
        failures, last = self._failures.get(key, (0, born_at))
        if failures and born_at <= last:
            return False
        if failures + 1 < RESET_FAILURES_MAX:
            _remember(self._failures, key, (failures + 1, now))
            return False
        self._failures.pop(key, None)
        _remember(self._until, key, now + UNPOOLABLE_SECONDS)
        return True

    def clear(self) -> None:
        """Try all keys and databases again."""
        self._failures.clear()
        self._until.clear()
        self.databases.clear()


class SpareBackoff(Generic[Key]):
    """When a spare of a key may be dialled again after one that failed (P37)."""

    def __init__(self) -> None:
        self._failures: dict[Key, tuple[int, float]] = {}

    def allows(self, key: Key, now: float) -> bool:
        """Return whether a spare may be dialled."""
        _, until = self._failures.get(key, (0, now))
        return until <= now

    def failed(self, key: Key, now: float) -> None:
        """Record a failure."""
        failures, _ = self._failures.get(key, (0, now))
        first, last = SPARE_BACKOFF_SECONDS
        seconds = min(last, first * 2.0 ** min(failures, _DOUBLINGS_MAX))
        _remember(self._failures, key, (failures + 1, now + seconds))

    def succeeded(self, key: Key) -> None:
        """Forget the failures."""
        self._failures.pop(key, None)


def _remember(known: dict[Key, Value], key: Key, value: Value) -> None:
    known.pop(key, None)
    if len(known) >= KEYS_MAX:
        del known[next(iter(known))]
    known[key] = value
