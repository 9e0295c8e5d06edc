"""A fleet of proxies shares the workspace API's limit, in virtual time.

Larger ones are `make fleet`; these are scaled down, with the same ratios.
"""

import pytest

from tests.simulation.fleet import Scenario, mean, peak, simulate

PROXIES = 400
HALF_HOUR = 1800.0


@pytest.mark.slow
def test_a_fleet_loses_no_connection_as_soon_as_all_could_have_had_a_first_token() -> None:
    # Each busy proxy renews a token every 30 seconds: seven times what the API grants. Renewals by
    # those that held a valid token starved those that needed a first one: 3 % of all connections
    # were refused for half an hour, and the API was called 28 times as often as it granted.
    scenario = Scenario(1000, limit=5, until=HALF_HOUR, connections_per_second=0.3)
    first_tokens_at = scenario.proxies / scenario.limit
    outcome = simulate(scenario)
    assert outcome.lost
    assert outcome.lost_after(first_tokens_at) == 0
    assert mean(outcome.granted, 0, first_tokens_at) > 0.95 * scenario.limit
    assert mean(outcome.calls, 0, HALF_HOUR) <= 1.5 * scenario.limit
    # Not in each window from the start on: while (200 - t) seconds' worth of proxies wait at t, and
    # each calls at least every 32 s because clients wait for 30 s, the calls of the first 200 s are
    # 4 times the limit or more. From their end on, no minute may need that allowance.
    assert peak(outcome.calls, first_tokens_at, HALF_HOUR, 60) <= 1.5 * scenario.limit
    assert peak(outcome.calls, 120, HALF_HOUR, 300) <= 1.5 * scenario.limit


@pytest.mark.slow
def test_a_throttled_fleet_that_holds_tokens_loses_next_to_none_in_an_outage_of_55_minutes() -> (
    None
):
    # Renewals in 40 s are all that the limit allows, 30 s is what the proxies want. An outage of 55
    # minutes leaves tokens 180 s: an hour less the margin of two minutes. At ten minutes 56 of a
    # thousand were older, up to 583 s, and lost one connection in 300. To lose none at all, no
    # renewal may be refused twice, a minute and more apart. In the first five minutes tokens are
    # older: a proxy whose first renewal was refused leaves the limit to those that start.
    begin, end = 600.0, 600.0 + 55 * 60
    scenario = Scenario(1000, limit=25, until=end + 300, outage=(begin, end))
    outcome = simulate(scenario)
    assert outcome.lost_after(begin) < 1e-4 * outcome.served
    assert mean(outcome.renewals, begin, end) * 60 <= scenario.proxies
    assert peak(outcome.calls, end, end + 300) <= 1.2 * scenario.limit


@pytest.mark.slow
def test_an_outage_of_55_minutes_loses_no_connection_and_is_not_hammered() -> None:
    # 2,000 proxies that all held valid tokens called 225 times a second.
    begin, end = 300.0, 300.0 + 55 * 60
    scenario = Scenario(
        PROXIES, limit=20, until=end + 600, connections_per_second=0.1, outage=(begin, end)
    )
    outcome = simulate(scenario)
    assert outcome.lost == []
    assert mean(outcome.calls, begin, end) * 60 <= PROXIES
    assert peak(outcome.calls, begin + 60, end, 60) * 60 <= PROXIES
    assert peak(outcome.calls, end, end + 600) <= 1.2 * scenario.limit
    assert mean(outcome.granted, end, end + 120) > 0


@pytest.mark.slow
def test_proxies_that_start_in_an_outage_take_nothing_from_those_that_hold_tokens() -> None:
    begin, end = 300.0, 900.0
    late = PROXIES // 4
    scenario = Scenario(
        PROXIES, limit=20, until=end + 600, connections_per_second=0.1, outage=(begin, end),
        late_proxies=late,
    )  # fmt: skip
    outcome = simulate(scenario)
    assert outcome.lost
    assert outcome.lost_after(end + 30) == 0
    assert mean(outcome.renewals, begin, end) * 60 <= PROXIES - late
    assert peak(outcome.calls, end + 30, end + 600) <= 1.2 * scenario.limit
