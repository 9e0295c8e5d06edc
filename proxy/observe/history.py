"""The last fifteen minutes of a proxy as series of numbers, and what happened in its last minute.

For: the strips of the page and its first sentence. Not for: monitoring, which scrapes the metrics;
a proxy that restarts has no history.

Invariants: a reading every `SAMPLE_SECONDS`, and nothing on behalf of a session. It stays below
`HISTORY_BYTES_MAX`, whatever the number of targets: only sums are kept.
"""

import asyncio
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from proxy.observe.connect_times import NO_CONNECTS, Counts, percentile, since
from proxy.observe.recent_errors import RecentError
from proxy.observe.target_stats import TargetRow

SAMPLE_SECONDS: Final = 10.0
SAMPLES_MAX: Final = 90
HISTORY_BYTES_MAX: Final = 100_000
_MINUTE_SAMPLES: Final = round(60 / SAMPLE_SECONDS)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a proxy has counted since its start, with the sessions that are open now.

    `errors` are the recent ones by reason.
    """

    sessions: int = 0
    started: int = 0
    refused: int = 0
    client_bytes: int = 0
    upstream_bytes: int = 0
    connects: Counts = NO_CONNECTS
    errors: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Iterable[TargetRow],
        errors: Iterable[RecentError],
        refused: int,
        connects: Counts,
    ) -> "Totals":
        """Return the sums over targets and errors."""
        sessions = started = client_bytes = upstream_bytes = 0
        for row in rows:
            sessions += row.sessions
            started += row.sessions_started
            client_bytes += row.client_bytes
            upstream_bytes += row.upstream_bytes
        by_reason = Counter[str]()
        for error in errors:
            by_reason[sys.intern(error.reason)] += error.count
        counts = (sessions, started, refused, client_bytes, upstream_bytes)
        return cls(*counts, connects, dict(by_reason))


@dataclass(frozen=True, slots=True)
class LastMinute:
    """What has happened in about the last minute: sessions that started, refusals, all errors."""

    started: int = 0
    refused: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    """How many of each reason, the most frequent first."""


class _Sample(NamedTuple):
    """One point of every series; counts are per minute, bytes per second."""

    sessions: float
    connects: float
    refusals: float
    connect_p50_seconds: float | None
    connect_p99_seconds: float | None
    token_age_seconds: float | None
    client_bytes: float
    upstream_bytes: float


class History:
    """The samples of one proxy, all of its processes together."""

    def __init__(self) -> None:
        self._samples = deque[_Sample](maxlen=SAMPLES_MAX)
        self._minute = deque[Totals](maxlen=_MINUTE_SAMPLES)
        self._last = Totals()

    def add(
        self, totals: Totals, token_age_seconds: float | None, seconds: float = SAMPLE_SECONDS
    ) -> None:
        """Add a sample, `seconds` after the last one."""
        before, self._last = self._last, totals
        connects = since(before.connects, totals.connects)
        self._samples.append(
            _Sample(
                totals.sessions,
                _grown(before.started, totals.started) * 60 / seconds,
                _grown(before.refused, totals.refused) * 60 / seconds,
                percentile(connects, 0.5),
                percentile(connects, 0.99),
                token_age_seconds,
                _grown(before.client_bytes, totals.client_bytes) / seconds,
                _grown(before.upstream_bytes, totals.upstream_bytes) / seconds,
            )
        )
        self._minute.append(totals)

    def last_minute(self, now: Totals) -> LastMinute:
        """Return what has happened in the last 50 to 60 seconds, or since the start."""
        is_full = len(self._minute) == _MINUTE_SAMPLES
        before = self._minute[0] if is_full else Totals()
        grown = {
            reason: _grown(before.errors.get(reason, 0), count)
            for reason, count in now.errors.items()
        }
        frequent = sorted(grown.items(), key=lambda item: -item[1])
        return LastMinute(
            _grown(before.started, now.started),
            _grown(before.refused, now.refused),
            {reason: count for reason, count in frequent if count},
        )

    def as_dict(self) -> dict[str, object]:
        """Return the series, the oldest number first, as values that JSON has."""
        series = {name: [_short(one[at]) for one in self._samples] for at, name in _NAMES}
        return {"sample_seconds": SAMPLE_SECONDS, "samples_max": SAMPLES_MAX, **series}


_NAMES: Final = tuple(enumerate(_Sample._fields))


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def _grown(before: int, now: int) -> int:
    """Return how much a total has grown. It is smaller where a target or an error was dropped."""
    return now - before if now >= before else now


@asynccontextmanager
async def sampling(sample: Callable[[], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Take a sample every `SAMPLE_SECONDS` while the block runs."""

    async def run() -> None:
        while True:  # ends with the block
            await asyncio.sleep(SAMPLE_SECONDS)
            await sample()

    task = asyncio.create_task(run(), name="history")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
