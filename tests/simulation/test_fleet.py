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
    assert mean(outcome.calls, first_tokens_at, HALF_HOUR) <= 1.2 * scenario.limit


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
