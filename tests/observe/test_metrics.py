"""Metrics: every one declared once, with closed labels, counted per instance."""

import re

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.metrics import CancelResult, ConnectPhase, Metrics


def new_metrics() -> Metrics:
    return Metrics(
        version="1.2.3",
        session_end_reasons=["client_closed", "drained"],
        startup_failure_reasons=["token_rejected"],
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


def test_reasons_are_counted_each_for_itself() -> None:
    metrics = new_metrics()
    metrics.session_ended("drained")
    metrics.session_ended("drained")
    metrics.startup_failed("token_rejected")
    assert metrics.value("sessions_ended_total", reason="drained") == 2
    assert metrics.value("sessions_ended_total", reason="client_closed") == 0
    assert metrics.value("startup_failures_total", reason="token_rejected") == 1


def test_a_word_outside_the_closed_set_makes_no_new_series() -> None:
    metrics = new_metrics()
    for number in range(100):
        metrics.session_ended(f"user-{number}")
        metrics.startup_failed(f"user-{number}")
    assert metrics.value("sessions_ended_total", reason="other") == 100
    assert metrics.value("startup_failures_total", reason="other") == 100
    assert b"user-" not in metrics.exposition()


def test_every_series_is_there_before_its_first_event() -> None:
    exposition = new_metrics().exposition().decode()
    for series in (
        'lakebase_proxy_sessions_ended_total{reason="client_closed"} 0.0',
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


@pytest.mark.parametrize("result", CancelResult)
def test_cancel_requests_are_counted_by_result(result: CancelResult) -> None:
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


def test_names_have_the_prefix_and_labels_are_from_the_short_list() -> None:
    for family in text_string_to_metric_families(new_metrics().exposition().decode()):
        assert re.fullmatch(r"lakebase_proxy_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert set(sample.labels) <= {"reason", "result", "phase", "version", "le"}


def test_two_proxies_in_one_process_count_apart() -> None:
    first, second = new_metrics(), new_metrics()
    first.token_minted()
    assert second.value("tokens_minted_total") == 0
    assert not [family for family in REGISTRY.collect() if "lakebase" in family.name]
