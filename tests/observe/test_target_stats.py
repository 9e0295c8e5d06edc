"""Numbers that change during sessions: totals never fall, and targets are a closed set."""

import sys
from contextlib import ExitStack
from types import FrameType

import pytest

from proxy.observe.target_stats import (
    CONNECTS_MAX,
    OTHER,
    TARGETS_MAX,
    TargetRow,
    TargetStats,
)


def reading(stats: TargetStats, target: str) -> TargetRow:
    (found,) = [one for one in stats.rows() if one.name == target]
    return found


def test_a_session_is_counted_while_open_and_its_bytes_remain() -> None:
    stats = TargetStats(["eu"])
    with stats.session("eu"), stats.session("eu"):
        for client_bytes, upstream_bytes in ((3, 4), (30, 40)):
            totals = stats.byte_totals("eu")
            totals.client_bytes[0] += client_bytes
            totals.upstream_bytes[0] += upstream_bytes
        during = reading(stats, "eu")
    after = reading(stats, "eu")
    assert (during.sessions, during.client_bytes, during.upstream_bytes) == (2, 33, 44)
    assert (after.sessions, after.client_bytes, after.upstream_bytes) == (0, 33, 44)
    assert after.sessions_started == 2


def test_a_session_that_fails_is_no_longer_open() -> None:
    stats = TargetStats(["eu"])
    with pytest.raises(ConnectionError), stats.session("eu"):
        raise ConnectionError
    assert (reading(stats, "eu").sessions, reading(stats, "eu").sessions_started) == (0, 1)


def test_a_reading_costs_the_same_for_any_number_of_sessions() -> None:
    # It called a function for each open session, on the event loop: 80 ms for 10,000 of them.
    stats, calls = TargetStats(["eu"]), [0]

    def count_call(frame: FrameType, event: str, argument: object) -> None:
        calls[-1] += 1

    with ExitStack() as opened:
        for _ in range(2):
            profiler = sys.getprofile()
            sys.setprofile(count_call)
            try:
                stats.rows()
            finally:
                sys.setprofile(profiler)
            calls.append(0)
            for _ in range(10_000):
                opened.enter_context(stats.session("eu"))
    few, many, _ = calls
    assert few == many > 0


def test_the_last_connect_is_shown_by_phase() -> None:
    stats = TargetStats(["eu"])
    stats.connect_phase_took("eu", "tls", 1.0)
    stats.connect_phase_took("eu", "tls", 0.5)
    stats.connect_phase_took("eu", "tcp", 0.1)
    assert reading(stats, "eu").connect_seconds == {}, "it may still fail"
    stats.connected("eu", 0.7)
    assert reading(stats, "eu").connect_seconds == {"tls": 0.5, "tcp": 0.1}
    assert reading(stats, OTHER).connect_seconds == {}


def test_a_connect_that_failed_is_never_a_fast_one() -> None:
    # The page showed the phases that a refused connect had got to as the last connect: a target
    # that refused all looked faster than ever.
    stats = TargetStats(["eu"])
    stats.connect_phase_took("eu", "login", 0.4)
    stats.connected("eu", 0.5)
    stats.connect_phase_took("eu", "tcp", 0.001)  # and TLS fails
    row = reading(stats, "eu")
    assert (row.connect_seconds, row.connects) == ({"login": 0.4}, (0.5,))
    assert sum(stats.connects) == 1


def test_the_median_is_that_of_the_last_connects() -> None:
    stats = TargetStats(["eu"])
    assert reading(stats, "eu").connect_p50_seconds is None
    for _ in range(CONNECTS_MAX):
        stats.connected("eu", 9.0)
    for number in range(CONNECTS_MAX):
        stats.connected("eu", 0.1 * number)
    assert reading(stats, "eu").connect_p50_seconds == pytest.approx(0.1 * (CONNECTS_MAX // 2))


def test_a_name_that_is_not_configured_is_other() -> None:
    stats = TargetStats(["eu"])
    assert [stats.label(name) for name in ("eu", "hacked", OTHER)] == ["eu", OTHER, OTHER]


def test_a_reload_adds_names_and_keeps_what_was_counted() -> None:
    stats = TargetStats(["eu"])
    totals = stats.byte_totals("eu")
    with stats.session("eu"):
        stats.configure(["us", "eu"])
        totals.client_bytes[0] += 1
    assert [one.name for one in stats.rows()] == ["eu", "us", OTHER]
    assert reading(stats, "eu").client_bytes == 1


@pytest.mark.parametrize("names", [TARGETS_MAX - 1, TARGETS_MAX, TARGETS_MAX + 1])
def test_the_number_of_names_is_bounded(names: int) -> None:
    stats = TargetStats([])
    stats.configure(str(number) for number in range(names))
    assert len(stats.rows()) == min(names, TARGETS_MAX) + 1


def test_a_removed_target_is_dropped_with_its_last_session() -> None:
    stats = TargetStats(["eu", "us"])
    with stats.session("eu"), stats.session("eu"):
        stats.configure(["us"])
        assert [one.name for one in stats.rows()] == ["eu", "us", OTHER]
        assert reading(stats, "eu").sessions == 2
    assert [one.name for one in stats.rows()] == ["us", OTHER]
    assert stats.label("eu") == OTHER


def test_a_target_that_is_configured_again_keeps_counting() -> None:
    stats = TargetStats(["eu"])
    totals = stats.byte_totals("eu")
    with stats.session("eu"):
        stats.configure([])
        stats.configure(["eu"])
        totals.client_bytes[0] += 1
        assert stats.byte_totals("eu") is totals
    assert reading(stats, "eu").client_bytes == 1


def test_old_names_do_not_accumulate() -> None:
    stats = TargetStats([])
    for number in range(3 * TARGETS_MAX):
        stats.configure([f"t{number}"])
    assert [one.name for one in stats.rows()] == [f"t{3 * TARGETS_MAX - 1}", OTHER]
