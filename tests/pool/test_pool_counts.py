"""What one pool counts: plain numbers by closed lists of words."""

from proxy.observe.pool_stats import DURATION_BOUNDS, PoolPresent
from proxy.pool.pool_counts import PoolCounts, RetireReason, SpareResult, TakeSource


def test_p50_each_word_is_counted_by_itself_and_is_there_from_the_start() -> None:
    counts = PoolCounts(lambda: 7.0)
    before = counts.row("eu", PoolPresent())
    assert (before.takes, before.retired, before.spares) == (
        dict.fromkeys(TakeSource, 0),
        dict.fromkeys(RetireReason, 0),
        dict.fromkeys(SpareResult, 0),
    )
    counts.taken(TakeSource.REUSED)
    counts.taken(TakeSource.REUSED)
    counts.retired(RetireReason.LIFETIME)
    counts.retired(RetireReason.BUSY)
    counts.spare_ended(SpareResult.FAILED)
    after = counts.row("eu", PoolPresent(mode="session", idle=1))
    assert after.takes == {"reused": 2, "dialled": 0, "waited": 0}
    assert {word: n for word, n in after.retired.items() if n} == {"lifetime": 1, "busy": 1}
    assert after.spares["failed"] == 1
    assert (after.target, after.present.idle) == ("eu", 1)
    assert before.takes["reused"] == 0, "a row does not change"


def test_p50_the_last_reason_is_kept_with_its_time() -> None:
    now = 7.0
    counts = PoolCounts(lambda: now)
    fresh = counts.row("eu", PoolPresent())
    assert (fresh.last_retired, fresh.last_retired_at) == ("", None)
    counts.retired(RetireReason.IDLE)
    now = 9.0
    counts.retired(RetireReason.DRAIN)
    row = counts.row("eu", PoolPresent())
    assert (row.last_retired, row.last_retired_at) == ("drain", 9.0)


def test_p50_durations_fall_between_the_bounds_as_prometheus_means_it() -> None:
    counts = PoolCounts()
    first, last = DURATION_BOUNDS[0], DURATION_BOUNDS[-1]
    for seconds in (0.0, first, first * 1.01, last, last + 1):
        counts.waited(seconds)
    counts.reset_took(0.5)
    row = counts.row("eu", PoolPresent())
    assert (row.waits.counts[0], row.waits.counts[1]) == (2, 1), "a bound is part of its bucket"
    assert row.waits.counts[-2:] == (1, 1)
    assert sum(row.waits.counts) == 5
    assert row.resets.seconds == 0.5
