"""The numbers of all pools by target, as metrics and status show them.

For: their shape, adding them up, and keeping the counts of pools that a reload has closed. Not for:
counting (`pool.pool_counts`): a pool is asked for its row only when somebody reads them, so that a
session costs nothing here.

Invariant: a target's totals never fall while it is configured, because the counts of a closed pool
move to the target's other ones in one step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

# From a reset on this machine to the longest wait that is usual: 0.25 ms to 60 s.
DURATION_BOUNDS: Final = (
    *(0.00025, 0.001, 0.0025, 0.01, 0.025, 0.1, 0.25),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


@dataclass(frozen=True, slots=True)
class Durations:
    """How many durations fell between the bounds of `DURATION_BOUNDS`, and their sum."""

    counts: Sequence[int] = (0,) * (len(DURATION_BOUNDS) + 1)
    seconds: float = 0.0

    def plus(self, other: "Durations") -> "Durations":
        """Return the sum of both."""
        counts = tuple(map(sum, zip(self.counts, other.counts, strict=True)))
        return Durations(counts, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPresent:
    """A pool as it is now; without a mode there is none.

    `keys` are the different startup messages of which it has sessions. `size_max` is 0 without a
    bound. `oldest_seconds` is the time since the login of its oldest session, in use or idle.
    `login_triggers` are the databases whose sessions are not kept because of such triggers.
    """

    mode: str = ""
    keys: int = 0
    in_use: int = 0
    idle: int = 0
    resetting: int = 0
    dialling: int = 0
    waiting: int = 0
    size_max: int = 0
    oldest_seconds: float = 0.0
    login_triggers: int = 0

    def plus(self, other: "PoolPresent") -> "PoolPresent":
        """Return both as one: numbers are added, of the ages the higher one stays."""
        return PoolPresent(
            mode=self.mode or other.mode,
            keys=self.keys + other.keys,
            in_use=self.in_use + other.in_use,
            idle=self.idle + other.idle,
            resetting=self.resetting + other.resetting,
            dialling=self.dialling + other.dialling,
            waiting=self.waiting + other.waiting,
            size_max=self.size_max + other.size_max,
            oldest_seconds=max(self.oldest_seconds, other.oldest_seconds),
            login_triggers=self.login_triggers + other.login_triggers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRow:
    """The pools of one target. `last_retired_at` is in seconds since 1970."""

    target: str
    present: PoolPresent
    takes: Mapping[str, int]
    retired: Mapping[str, int]
    spares: Mapping[str, int]
    waits: Durations
    resets: Durations
    last_retired: str = ""
    last_retired_at: float | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PoolRow":
        """Return the row that `dataclasses.asdict` returned as a dict."""
        parts = {
            "present": PoolPresent(**content["present"]),
            "waits": Durations(**content["waits"]),
            "resets": Durations(**content["resets"]),
        }
        return cls(**{**content, **parts})

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON has."""
        return asdict(self)

    def closed(self) -> "PoolRow":
        """Return what remains of it when its pools or its process have ended."""
        return replace(self, present=PoolPresent())

    def plus(self, other: "PoolRow") -> "PoolRow":
        """Return the sum of two rows of one target."""
        last = max(self, other, key=lambda row: row.last_retired_at or 0.0)
        return PoolRow(
            target=self.target,
            present=self.present.plus(other.present),
            takes=_added(self.takes, other.takes),
            retired=_added(self.retired, other.retired),
            spares=_added(self.spares, other.spares),
            waits=self.waits.plus(other.waits),
            resets=self.resets.plus(other.resets),
            last_retired=last.last_retired,
            last_retired_at=last.last_retired_at,
        )


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    # Not the operator of Counter, which drops words at 0.
    both = Counter(one)
    both.update(other)
    return dict(both)


def add_pools(rows: Iterable[PoolRow]) -> list[PoolRow]:
    """Return one row for each target."""
    found: dict[str, PoolRow] = {}
    for row in rows:
        before = found.get(row.target)
        found[row.target] = row if before is None else before.plus(row)
    return list(found.values())


class PoolStats:
    """The pools of one process: those that are open, and the counts of those that were."""

    def __init__(self) -> None:
        self._open: dict[object, tuple[str, Callable[[], PoolRow]]] = {}
        self._closed: dict[str, PoolRow] = {}
        self._configured: frozenset[str] = frozenset()

    def configure(self, targets: Iterable[str]) -> None:
        """Keep the counts of closed pools for these targets alone."""
        self._configured = frozenset(targets)
        self._closed = {name: row for name, row in self._closed.items() if self._is_kept(name)}

    def register(self, target: str, row: Callable[[], PoolRow]) -> Callable[[], None]:
        """Show a pool from now on. Return what is to be called when its last session has gone."""
        key = object()
        self._open[key] = (target, row)

        def unregister() -> None:
            if self._open.pop(key, None) is not None:
                self._close(row().closed())

        return unregister

    def rows(self) -> list[PoolRow]:
        """Return a row for each target that has a pool, or had one."""
        return add_pools([*(row() for _, row in self._open.values()), *self._closed.values()])

    def _close(self, row: PoolRow) -> None:
        before = self._closed.pop(row.target, None)
        if self._is_kept(row.target):
            self._closed[row.target] = row if before is None else before.plus(row)

    def _is_kept(self, target: str) -> bool:
        return target in self._configured or any(name == target for name, _ in self._open.values())
