"""Numbers that move while sessions live: sums that never fall, targets that stay a closed set."""

import pytest

from proxy.observe.target_stats import OTHER, TARGETS_MAX, Carried, Live, TargetReading


def reading(live: Live, target: str) -> TargetReading:
    (found,) = [one for one in live.readings() if one.target == target]
    return found


def test_a_session_is_seen_while_it_lives_and_its_bytes_stay_after_it() -> None:
    live = Live(["eu"])
    with live.session("eu", lambda: Carried(3, 4)), live.session("eu", lambda: Carried(30, 40)):
        during = reading(live, "eu")
    after = reading(live, "eu")
    assert (during.sessions, during.client_bytes, during.upstream_bytes) == (2, 33, 44)
    assert (after.sessions, after.client_bytes, after.upstream_bytes) == (0, 33, 44)
    assert after.sessions_started == 2


def test_a_session_that_fails_is_no_longer_there() -> None:
    live = Live(["eu"])
    with pytest.raises(ConnectionError), live.session("eu", lambda: Carried(1, 1)):
        raise ConnectionError
    assert (reading(live, "eu").sessions, reading(live, "eu").client_bytes) == (0, 1)


def test_the_last_connect_is_shown_by_phase() -> None:
    live = Live(["eu"])
    live.connect_phase_took("eu", "tls", 1.0)
    live.connect_phase_took("eu", "tls", 0.5)
    live.connect_phase_took("eu", "tcp", 0.1)
    assert reading(live, "eu").connect_seconds == {"tls": 0.5, "tcp": 0.1}
    assert reading(live, OTHER).connect_seconds == {}


def test_a_name_that_nobody_configured_is_other() -> None:
    live = Live(["eu"])
    assert [live.named(name) for name in ("eu", "hacked", OTHER)] == ["eu", OTHER, OTHER]


def test_a_reload_adds_names_and_keeps_what_was_counted() -> None:
    live = Live(["eu"])
    with live.session("eu", lambda: Carried(1, 1)):
        live.know(["us", "eu"])
    assert [one.target for one in live.readings()] == ["eu", "us", OTHER]
    assert reading(live, "eu").client_bytes == 1


@pytest.mark.parametrize("names", [TARGETS_MAX - 1, TARGETS_MAX, TARGETS_MAX + 1])
def test_names_are_bounded_however_often_one_reloads(names: int) -> None:
    live = Live([])
    live.know(str(number) for number in range(names))
    assert len(live.readings()) == min(names, TARGETS_MAX) + 1


def test_a_target_that_is_gone_is_forgotten_with_its_last_session() -> None:
    live = Live(["eu", "us"])
    with live.session("eu", lambda: Carried(1, 1)), live.session("eu", lambda: Carried(1, 1)):
        live.know(["us"])
        assert [one.target for one in live.readings()] == ["eu", "us", OTHER]
        assert reading(live, "eu").sessions == 2
    assert [one.target for one in live.readings()] == ["us", OTHER]
    assert live.named("eu") == OTHER


def test_a_target_that_comes_back_meanwhile_goes_on_counting() -> None:
    live = Live(["eu"])
    with live.session("eu", lambda: Carried(1, 1)):
        live.know([])
        live.know(["eu"])
    assert reading(live, "eu").client_bytes == 1


def test_names_of_the_past_do_not_pile_up() -> None:
    live = Live([])
    for number in range(3 * TARGETS_MAX):
        live.know([f"t{number}"])
    assert [one.target for one in live.readings()] == [f"t{3 * TARGETS_MAX - 1}", OTHER]
