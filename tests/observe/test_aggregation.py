"""Adding up the counts of several processes, and what remains of one that has ended."""

import json
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.aggregation import Reading, total
from proxy.observe.metrics import Metrics
from proxy.observe.recent_errors import RECENT_ERRORS_MAX, RecentError


def a_process() -> Metrics:
    return Metrics(
        version="1",
        session_end_outcomes={"client_closed": "completed"},
        cancel_results=["forwarded"],
        connect_phases=["tls"],
        route_results=["routed"],
        startup_failure_reasons=["probe"],
        target_names=["eu"],
        clock=lambda: 5.0,
    )


def count(metrics: Metrics, client_bytes: int, upstream_bytes: int) -> None:
    totals = metrics.byte_totals("eu")
    totals.client_bytes[0] += client_bytes
    totals.upstream_bytes[0] += upstream_bytes


def reading(metrics: Metrics, **hosts: str) -> Reading:
    """Return a reading as another process receives it."""
    rows = metrics.targets.rows(hosts)
    own = Reading(metrics.samples(), rows, metrics.recent_errors.latest())
    return Reading.from_dict(json.loads(json.dumps(own.as_dict())))


def shown(exposition: bytes) -> Mapping[tuple[str, ...], float]:
    """Return the values by name and label values, in the order of the labels' names."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(exposition.decode()):
        for sample in family.samples:
            key = (
                sample.name.removeprefix("lakebase_proxy_"),
                *(sample.labels[name] for name in sorted(sample.labels)),
            )
            assert key not in found
            found[key] = sample.value
    return found


def test_counters_gauges_and_histograms_are_added_and_the_build_is_not() -> None:
    first, *others = (a_process() for _ in range(3))
    for metrics in (first, *others):
        metrics.configure(["eu"], "tenants", 7)
        metrics.client_routed("tenants", "routed", "eu")
        metrics.cancel_requested("forwarded")
        metrics.connect_phase_took("tls", 0.03, "eu")
    with others[0].connection(), others[0].session("eu"):
        count(others[0], 10, 20)
        values = shown(first.exposition(total(list(map(reading, others))).samples))
    assert values["cancel_requests_total", "forwarded"] == 3
    assert values["upstream_connect_seconds_count", "tls"] == 3
    assert values["upstream_connect_seconds_bucket", "0.025", "tls"] == 0
    assert values["upstream_connect_seconds_bucket", "0.05", "tls"] == 3
    assert values["connections",] == values["sessions_active", "eu"] == 1
    assert values["relayed_bytes_total", "to_client", "eu"] == 20
    assert values["build_info", "", "1"] == 1
    assert values["shard_map_mappings", "tenants"] == 7, "each has the same map"
    assert values["route_total", "tenants", "routed", "eu"] == 3
    alone = shown(first.exposition())
    assert values.keys() == alone.keys(), "nothing comes and goes with the number of processes"
    assert values["process_start_time_seconds",] == alone["process_start_time_seconds",]
    assert values["process_resident_memory_bytes",] > alone["process_resident_memory_bytes",] * 2


def test_a_target_that_only_another_process_knows_is_shown() -> None:
    first, other = a_process(), a_process()
    other.targets.configure(["us"])
    with other.session("us"):
        assert shown(first.exposition(reading(other).samples))["sessions_active", "us"] == 1


def test_the_counts_of_an_ended_process_stay_and_its_present_does_not() -> None:
    first, other = a_process(), a_process()
    with other.connection(), other.session("eu"):
        count(other, 10, 20)
        other.session_ended("client_closed", "eu")
        left = reading(other, eu="host").after_exit()
    values = shown(first.exposition(left.samples))
    assert values["sessions_started_total", "eu"] == 1
    assert values["relayed_bytes_total", "to_upstream", "eu"] == 10
    assert values["sessions_ended_total", "completed", "client_closed"] == 1
    assert values["connections",] == values["sessions_active", "eu"] == 0
    (target, _) = left.targets
    assert (target.sessions, target.sessions_started, target.client_bytes) == (0, 1, 10)
    assert target.host == ""


def test_targets_and_hosts_are_joined_by_name() -> None:
    first, other = a_process(), a_process()
    with first.session("eu"), other.session("eu"):
        count(first, 1, 2)
        count(other, 3, 4)
        whole = total([reading(first, eu=""), reading(other, eu="host"), reading(first, eu="")])
    (target, _other) = whole.targets
    assert (target.sessions, target.client_bytes, target.upstream_bytes) == (3, 5, 8)
    assert target.host == "host"


def test_equal_errors_are_added_and_the_newest_are_kept() -> None:
    def error(reason: str, at: float, count: int) -> RecentError:
        return RecentError(at, reason, "08006", "eu", count, "it failed", "")

    many = [error(f"r{at}", at, 1) for at in range(RECENT_ERRORS_MAX)]
    whole = total([Reading(errors=many), Reading(errors=[error("r0", 99, 2)])])
    assert whole.errors[0] == error("r0", 99, 3)
    assert [one.at for one in whole.errors] == [99, *range(RECENT_ERRORS_MAX - 1, 0, -1)]
