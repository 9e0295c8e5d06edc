"""Metrics: every one declared once, with closed labels, counted per instance."""

import re

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.metrics import Metrics
from proxy.observe.status import Token
from proxy.server.lifecycle import State
from proxy.upstream.phases import ConnectPhase
from tests.support.admin_address import NOW, ScriptedAdminState


def new_metrics() -> Metrics:
    return Metrics(
        version="1.2.3",
        session_end_outcomes={"client_closed": "completed", "drained": "cut", "broken": "failed"},
        session_end_errors=["broken"],
        startup_failure_reasons=["token_rejected"],
        cancel_results=["forwarded", "unknown_key"],
        connect_phases=list(ConnectPhase),
        lookup_results=["hit", "miss"],
        route_results=["routed", "refused"],
        target_names=["upstream", "eu"],
        clock=lambda: NOW,
    )


def test_a_connection_is_counted_in_total_and_while_it_is_open() -> None:
    metrics = new_metrics()
    with metrics.connection():
        with metrics.connection():
            assert metrics.value("connections") == 2
        assert metrics.value("connections") == 1
    assert metrics.value("connections") == 0
    assert metrics.value("connections_accepted_total") == 2


def test_a_connection_that_fails_is_no_longer_open() -> None:
    metrics = new_metrics()
    with pytest.raises(ConnectionResetError), metrics.connection():
        raise ConnectionResetError
    assert metrics.value("connections") == 0


def test_each_reason_is_counted_separately() -> None:
    metrics = new_metrics()
    metrics.session_ended("drained")
    metrics.session_ended("drained")
    metrics.startup_failed("token_rejected")
    assert metrics.value("sessions_ended_total", reason="drained") == 2
    assert metrics.value("sessions_ended_total", reason="client_closed") == 0
    assert metrics.value("startup_failures_total", reason="token_rejected") == 1


def test_clients_of_a_shard_map_are_counted_by_look_up_and_shard() -> None:
    metrics = new_metrics()
    metrics.configure(["upstream", "eu"], "tenants", 7)
    assert metrics.value("lookup_total", map="tenants", result="miss") == 0
    assert 'lookup_total{map="tenants",result="miss"} 0.0' in metrics.exposition().decode()
    metrics.key_looked_up("tenants", "hit")
    metrics.client_routed("tenants", "routed", "eu")
    metrics.client_routed("tenants", "refused")
    assert metrics.value("lookup_total", map="tenants", result="hit") == 1
    assert metrics.value("route_total", map="tenants", shard="eu", result="routed") == 1
    assert metrics.value("route_total", map="tenants", shard="", result="refused") == 1


def test_a_word_outside_the_closed_set_makes_no_new_series() -> None:
    metrics = new_metrics()
    for number in range(100):
        metrics.session_ended(f"user-{number}")
        metrics.startup_failed(f"user-{number}")
        metrics.key_looked_up("tenants", f"user-{number}")
        metrics.client_routed("tenants", f"user-{number}", f"user-{number}")
    assert metrics.value("sessions_ended_total", reason="other") == 100
    assert metrics.value("startup_failures_total", reason="other") == 100
    assert metrics.value("lookup_total", result="other") == 100
    assert metrics.value("route_total", shard="other", result="other") == 100
    assert b"user-" not in metrics.exposition()


def test_every_series_is_there_before_its_first_event() -> None:
    exposition = new_metrics().exposition().decode()
    for series in (
        'lakebase_proxy_sessions_ended_total{outcome="completed",reason="client_closed"} 0.0',
        'lakebase_proxy_sessions_active{target="eu"} 0.0',
        'lakebase_proxy_sessions_started_total{target="eu"} 0.0',
        'lakebase_proxy_relayed_bytes_total{direction="to_client",target="eu"} 0.0',
        "lakebase_proxy_admin_errors_total 0.0",
        'lakebase_proxy_startup_failures_total{reason="token_rejected"} 0.0',
        'lakebase_proxy_cancel_requests_total{result="unknown_key"} 0.0',
        'lakebase_proxy_upstream_connect_seconds_count{phase="tls"} 0.0',
        "lakebase_proxy_tokens_minted_total 0.0",
        "lakebase_proxy_token_mint_failures_total 0.0",
    ):
        assert series in exposition


def test_tokens_are_counted_by_success() -> None:
    metrics = new_metrics()
    metrics.token_minted()
    metrics.token_mint_failed()
    metrics.token_mint_failed()
    assert metrics.value("tokens_minted_total") == 1
    assert metrics.value("token_mint_failures_total") == 2


@pytest.mark.parametrize("result", ["forwarded", "unknown_key"])
def test_cancel_requests_are_counted_by_result(result: str) -> None:
    metrics = new_metrics()
    metrics.cancel_requested(result)
    assert metrics.value("cancel_requests_total", result=result) == 1


@pytest.mark.parametrize("phase", ConnectPhase)
def test_phases_of_connecting_are_timed_in_seconds(phase: ConnectPhase) -> None:
    metrics = new_metrics()
    metrics.connect_phase_took(phase, 0.004)
    metrics.connect_phase_took(phase, 59.0)
    seconds = "upstream_connect_seconds"
    assert metrics.value(f"{seconds}_sum", phase=phase) == pytest.approx(59.004)
    assert metrics.value(f"{seconds}_bucket", phase=phase, le="0.005") == 1
    assert metrics.value(f"{seconds}_bucket", phase=phase, le="60.0") == 2


def test_the_build_is_shown() -> None:
    assert new_metrics().value("build_info", version="1.2.3") == 1


def test_the_build_is_one_series_after_a_reload_changes_it() -> None:
    metrics = new_metrics()
    metrics.set_acceleration("used")
    metrics.set_acceleration("off")
    assert metrics.value("build_info", version="1.2.3", acceleration="off") == 1
    assert metrics.value("build_info") == 1


LABELS = {
    *("reason", "outcome", "result", "phase", "direction"),
    *("target", "workspace", "version", "acceleration", "le"),
}


def test_names_have_the_prefix_and_labels_are_from_the_short_list() -> None:
    for family in text_string_to_metric_families(new_metrics().exposition().decode()):
        assert re.fullmatch(r"lakebase_proxy_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS


def test_two_proxies_in_one_process_count_separately() -> None:
    first, second = new_metrics(), new_metrics()
    first.token_minted()
    assert second.value("tokens_minted_total") == 0
    assert not [family for family in REGISTRY.collect() if "lakebase" in family.name]


def test_an_end_is_counted_by_its_reason_and_the_outcome_that_it_has() -> None:
    metrics = new_metrics()
    metrics.session_ended("client_closed")
    metrics.session_ended("drained")
    metrics.session_ended("never-heard-of")
    words = ("completed", "cut", "failed", "other")
    counts = {word: metrics.value("sessions_ended_total", outcome=word) for word in words}
    assert counts == {"completed": 1, "cut": 1, "failed": 0, "other": 1}


def test_an_end_is_an_error_if_its_owner_says_so() -> None:
    metrics = new_metrics()
    for reason in ("client_closed", "drained", "broken"):
        metrics.session_ended(reason, "eu")
    (error,) = metrics.recent_errors.latest()
    assert (error.reason, error.target, error.count) == ("broken", "eu", 1)


def test_a_phase_outside_the_closed_set_makes_no_new_series() -> None:
    metrics = new_metrics()
    metrics.connect_phase_took("never-heard-of", 0.1, "eu")
    assert metrics.value("upstream_connect_seconds_count", phase="other") == 1
    assert b"never-heard-of" not in metrics.exposition()


def test_bytes_are_counted_during_a_session_and_never_fall() -> None:
    metrics = new_metrics()
    to_upstream = {"target": "eu", "direction": "to_upstream"}
    to_client = {"target": "eu", "direction": "to_client"}
    seen = []
    totals = metrics.byte_totals("eu")
    with metrics.session("eu"):
        assert metrics.value("sessions_active", target="eu") == 1
        for received in (10, 20):
            totals.client_bytes[0] += 1
            totals.upstream_bytes[0] += 10
            seen.append(metrics.value("relayed_bytes_total", **to_upstream))
            assert metrics.value("relayed_bytes_total", **to_client) == received
    seen.append(metrics.value("relayed_bytes_total", **to_upstream))
    assert seen == [1, 2, 2]
    assert metrics.value("sessions_active") == 0
    assert metrics.value("sessions_started_total", target="eu") == 1
    assert metrics.value("sessions_started_total", target="upstream") == 0


def test_a_target_that_is_not_configured_makes_no_series() -> None:
    metrics = new_metrics()
    for number in range(50):
        with metrics.session(f"client-{number}"):
            pass
        metrics.session_refused("token_rejected", "28000", f"client-{number}")
    assert metrics.value("sessions_started_total", target="other") == 50
    assert b"client-" not in metrics.exposition()
    assert [error.target for error in metrics.recent_errors.latest()] == ["other"]


def test_a_refusal_is_counted_and_recorded() -> None:
    metrics = new_metrics()
    metrics.session_refused("token_rejected", "28000", "eu")
    metrics.startup_failed("token_rejected")
    assert metrics.value("startup_failures_total", reason="token_rejected") == 2
    (error,) = metrics.recent_errors.latest()
    assert (error.reason, error.target, error.count) == ("token_rejected", "eu", 1)


def test_tokens_and_drain_are_read_at_the_scrape() -> None:
    metrics, shown = new_metrics(), ScriptedAdminState()
    metrics.set_source(shown)
    assert metrics.value("draining") == 0
    assert "lakebase_proxy_token_age_seconds{" not in metrics.exposition().decode()
    shown.state = State.DRAINING
    shown.shown_tokens = [Token("workspace", 12.5, -3.0, 240.0)]
    assert metrics.value("draining") == 1
    assert metrics.value("sessions_max") == 1000
    shown.session_slots_used = 7
    assert metrics.value("session_slots_used") == 7
    assert metrics.value("token_age_seconds", workspace="workspace") == 12.5
    assert metrics.value("token_expires_in_seconds", workspace="workspace") == -3
    assert metrics.value("token_accepted_age_seconds", workspace="workspace") == 240


def test_lag_is_a_histogram_of_seconds() -> None:
    metrics = new_metrics()
    metrics.loop_lagged(0.002)
    metrics.loop_lagged(0.7)
    assert metrics.value("event_loop_lag_seconds_sum") == pytest.approx(0.702)
    assert metrics.value("event_loop_lag_seconds_bucket", le="0.5") == 1


def test_a_counter_is_one_series_and_not_two() -> None:
    assert b"_created" not in new_metrics().exposition()
