"""An outage of the workspace API: loud in the log, and no wait for what cannot be served."""

from collections.abc import Iterator

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.workspace.outage import OUTAGE_SECONDS, STALE_SECONDS, ApiCall, Outage
from tests.support.fake_clock import FakeClock
from tests.support.running import LogLines, captured_log

FAILS = "the workspace API fails"
WORKS = "the workspace API works again"


@pytest.fixture
def log() -> Iterator[LogLines]:
    with captured_log() as lines:
        yield lines


def failing(detail: str = "HTTP 500 request 1") -> ProxyError:
    return ProxyError(ErrorKind.API_ERROR, detail)


def test_the_first_failure_and_each_other_one_is_a_warning_and_the_end_one_info(
    log: LogLines,
) -> None:
    # A client with a connect timeout of 5 s was gone before anything was logged.
    clock = FakeClock()
    outage = Outage("shop", clock)
    outage.record_failure(ApiCall.MINT, failing(), 0.5)
    for number in range(2, 5):
        clock.move(1)
        outage.record_failure(ApiCall.MINT, failing(f"HTTP 500 request {number}"), 1)
    outage.record_failure(ApiCall.MINT, failing("HTTP 503 Try again"), 4)
    outage.record_failure(ApiCall.MINT, ProxyError(ErrorKind.API_UNREACHABLE, "no answer"), 8)
    outage.record_success(ApiCall.MINT)
    outage.record_success(ApiCall.MINT)
    lines = log.events(FAILS)
    assert [line["level"] for line in lines] == ["warning"] * 3
    assert [(line["tries"], line["backoff_seconds"]) for line in lines] == [
        (1, 0.5),
        (5, 4),
        (6, 8),
    ]
    assert lines[0]["detail"] == "HTTP 500 request 1"
    (end,) = log.events(WORKS)
    assert (end["level"], end["failed_seconds"], end["tries"]) == ("info", 3, 6)


def test_clients_wait_for_some_seconds_and_are_refused_after_them() -> None:
    clock = FakeClock()
    outage = Outage("shop", clock)
    outage.record_failure(ApiCall.MINT, failing(), 1)
    clock.move(OUTAGE_SECONDS)
    outage.record_failure(ApiCall.MINT, failing("HTTP 502"), 1)
    assert outage.refusal() is None
    clock.move(0.1)
    refusal = outage.refusal()
    assert refusal is not None
    assert refusal.detail == "HTTP 502"
    outage.record_success(ApiCall.MINT)
    assert outage.refusal() is None


def test_an_outage_of_which_nothing_was_heard_for_long_may_be_over() -> None:
    clock = FakeClock()
    outage = Outage("shop", clock)
    outage.record_failure(ApiCall.MINT, failing(), 1)
    clock.move(STALE_SECONDS + 1)
    assert outage.refusal() is None


@pytest.mark.parametrize("kind", [ErrorKind.API_THROTTLED, ErrorKind.WORKSPACE_LOGIN_FAILED])
def test_a_limit_of_the_rate_and_a_permanent_failure_are_no_outage(kind: ErrorKind) -> None:
    clock = FakeClock()
    outage = Outage("shop", clock)
    for _ in range(10):
        outage.record_failure(ApiCall.MINT, ProxyError(kind), 1)
        clock.move(2)
    assert outage.refusal() is None


def test_a_look_up_that_works_does_not_end_an_outage_of_mints(log: LogLines) -> None:
    clock = FakeClock()
    outage = Outage("shop", clock)
    outage.record_failure(ApiCall.LOOK_UP, failing(), 1)
    outage.record_failure(ApiCall.MINT, failing(), 1)
    clock.move(1)
    outage.record_success(ApiCall.LOOK_UP)
    assert outage.failing_seconds
    outage.record_success(ApiCall.MINT)
    assert not outage.failing_seconds
    outage.record_failure(ApiCall.LOOK_UP, ProxyError(ErrorKind.ENDPOINT_NOT_FOUND), 1)
    assert not outage.failing_seconds
    outage.record_failure(ApiCall.LOOK_UP, failing(), 1)
    outage.record_success(ApiCall.LOOK_UP)
    assert not outage.failing_seconds
    assert len(log.events(WORKS)) == 2


def test_a_mint_that_works_does_not_end_an_outage_of_look_ups(log: LogLines) -> None:
    # Each mint logged that the API worked again, and the next look-up warned again.
    clock = FakeClock()
    outage = Outage("shop", clock)
    for _ in range(5):
        outage.record_failure(ApiCall.LOOK_UP, failing(), 1)
        clock.move(8)
        outage.record_success(ApiCall.MINT)
        assert outage.failing_seconds
    outage.record_success(ApiCall.LOOK_UP)
    assert not outage.failing_seconds
    assert len(log.events(FAILS)) == len(log.events(WORKS)) == 1


def test_a_look_up_that_is_not_made_any_more_does_not_keep_an_outage_going() -> None:
    clock = FakeClock()
    outage = Outage("shop", clock)
    outage.record_failure(ApiCall.IDENTITY, failing(), 1)
    clock.move(STALE_SECONDS + 1)
    outage.record_success(ApiCall.MINT)
    assert not outage.failing_seconds


def test_a_look_up_that_is_refused_for_its_login_is_an_outage() -> None:
    # With a wrong secret, and before any mint, only the alert of refused sessions fired.
    outage = Outage("shop", FakeClock())
    outage.record_failure(ApiCall.LOOK_UP, ProxyError(ErrorKind.WORKSPACE_LOGIN_FAILED), 1)
    assert outage.since is not None
