"""Fifteen minutes of numbers: their units, their bound, and the last minute."""

import asyncio
import tracemalloc
from enum import StrEnum
from typing import Any

import pytest

from proxy.observe import history
from proxy.observe.connect_times import BOUNDS, NO_CONNECTS, index_of
from proxy.observe.history import HISTORY_BYTES_MAX, SAMPLES_MAX, History, Totals, sampling
from proxy.observe.recent_errors import RECENT_ERRORS_MAX, RecentErrors


def connects(seconds: float, times: int) -> tuple[int, ...]:
    found = list(NO_CONNECTS)
    found[index_of(seconds)] = times
    return tuple(found)


def series(of: History) -> dict[str, Any]:
    return dict(of.as_dict())


def test_a_sample_has_rates_of_what_has_grown_since_the_one_before() -> None:
    kept = History()
    kept.add(Totals(7, 10, 1, 1000, 5000, connects(0.1, 10)), 23.0)
    kept.add(Totals(5, 12, 4, 3000, 5000, connects(0.1, 10)), None)
    assert series(kept) == {
        "sample_seconds": 10.0,
        "samples_max": SAMPLES_MAX,
        "sessions": [7, 5],
        "connects": [60, 12],
        "refusals": [6, 18],
        "connect_p50_seconds": [pytest.approx(BOUNDS[index_of(0.1)], rel=1e-3), None],
        "connect_p99_seconds": [pytest.approx(BOUNDS[index_of(0.1)], rel=1e-3), None],
        "token_age_seconds": [23.0, None],
        "client_bytes": [100, 200],
        "upstream_bytes": [500, 0],
    }


def test_a_total_that_has_fallen_has_grown_from_nothing() -> None:
    # A reload has removed a target with what it had counted.
    kept = History()
    kept.add(Totals(started=100), None)
    kept.add(Totals(started=3), None)
    assert series(kept)["connects"] == [600, 18]


def test_totals_count_reasons_that_are_of_an_enum() -> None:
    # /status answered 500 once a client had left at the proxy's answer to its SSLRequest.
    class Failure(StrEnum):
        WANTS_TLS = "client_wants_tls"

    errors = RecentErrors(lambda: 0.0)
    errors.record(Failure.WANTS_TLS)
    errors.record("role_missing")
    totals = Totals.of([], errors.latest(), 0, NO_CONNECTS)
    assert totals.errors == {"client_wants_tls": 1, "role_missing": 1}


def test_the_last_minute_has_what_was_not_there_a_minute_ago() -> None:
    kept = History()
    now = Totals(started=9, refused=5, errors={"role_missing": 2, "upstream_dns": 3})
    last = kept.last_minute(now)
    assert (last.started, last.refused) == (9, 5), "since the start, which is less long ago"
    assert list(last.errors.items()) == [("upstream_dns", 3), ("role_missing", 2)]
    kept.add(Totals(started=4, refused=3, errors={"upstream_dns": 3}), None)
    for _ in range(4):
        kept.add(now, None)
    assert kept.last_minute(now).refused == 5
    kept.add(now, None)
    last = kept.last_minute(now)
    assert (last.started, last.refused, last.errors) == (5, 2, {"role_missing": 2})
    kept.add(now, None)
    assert kept.last_minute(now).errors == {}


def test_it_is_bounded() -> None:
    kept = History()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for at in range(2 * SAMPLES_MAX):
            errors = {f"reason_{number}": 1000 * at for number in range(RECENT_ERRORS_MAX)}
            numbers = connects(0.1 + at / 1000, 10**6 * at)
            many = 10**9 * at
            kept.add(Totals(at + 300, many, many, many, many, numbers, errors), at * 1.5)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {len(each) for each in series(kept).values() if isinstance(each, list)} == {SAMPLES_MAX}
    assert after - before < HISTORY_BYTES_MAX


async def test_samples_are_taken_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SAMPLE_SECONDS", 0.001)
    taken = asyncio.Semaphore(0)

    async def sample() -> None:
        taken.release()

    async with asyncio.timeout(10), sampling(sample):
        for _ in range(3):
            await taken.acquire()
    assert len(asyncio.all_tasks()) == 1
