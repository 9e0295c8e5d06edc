"""`wait`, `shutdown`, `reconnect`: asking the admin address of a proxy in another process."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from proxy.config import AdminSettings, ConfigurationError
from proxy.verbs.admin_client import (
    AdminError,
    ask_to_drain,
    ask_to_reconnect,
    ask_to_reload,
    fetch_sessions,
    fetch_status,
    wait_until_ready,
)
from tests.support.fake_clock import FakeClock

ANSWER = b'{"it": "what it says"}\n'


@contextmanager
def answering(*statuses: int, host: str = "127.0.0.1") -> Iterator[tuple[AdminSettings, list[str]]]:
    """Serve HTTP with these statuses, the last one for ever; give where, and what was asked."""
    asked: list[str] = []
    left = list(statuses)

    class Answer(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER)

        do_GET = do_POST = answer  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with http.server.ThreadingHTTPServer((host, 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield AdminSettings(host=host, port=server.server_port), asked
        finally:
            server.shutdown()
            thread.join()


def unused_address() -> AdminSettings:
    """Return an address on which nothing listens any more."""
    with answering(200) as (settings, _):
        return settings


def test_wait_returns_at_once_when_the_proxy_is_ready() -> None:
    with answering(200) as (settings, asked):
        wait_until_ready(settings, 0)
    assert asked == ["GET /readiness", "GET /startup"]


def test_wait_asks_again_until_the_proxy_has_a_token() -> None:
    # It returned as soon as the proxy listened: a wrong secret was found by the first client.
    with answering(200, 503, 200) as (settings, asked):
        wait_until_ready(settings, 30)
    assert asked == ["GET /readiness", "GET /startup"] * 2


def test_wait_asks_again_until_the_proxy_is_ready() -> None:
    with answering(503, 503, 200) as (settings, asked):
        wait_until_ready(settings, 30)
    assert asked == ["GET /readiness"] * 3 + ["GET /startup"]


@pytest.mark.parametrize("timeout_seconds", [0, 3])
def test_wait_gives_up_after_its_time_and_says_what_was_answered(timeout_seconds: int) -> None:
    clock = FakeClock()

    def sleep(seconds: float) -> None:
        clock.move(seconds)

    expected = rf"within {timeout_seconds} seconds: .* answers 503"
    with answering(503) as (settings, asked), pytest.raises(AdminError, match=expected):
        wait_until_ready(settings, timeout_seconds, clock=clock, sleep=sleep)
    assert len(asked) in range(timeout_seconds * 10, timeout_seconds * 10 + 3)


def test_wait_says_that_nothing_answers() -> None:
    with pytest.raises(AdminError, match=r"nothing answers on http://127\.0\.0\.1:\d+ \("):
        wait_until_ready(unused_address(), 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_proxy_on_all_addresses_is_asked_on_loopback(host: str) -> None:
    loopback = "127.0.0.1" if host == "0.0.0.0" else "::1"
    with pytest.raises(AdminError, match=r"http://(127\.0\.0\.1|\[::1\]):1 "):
        wait_until_ready(AdminSettings(host=host, port=1), 0)
    if loopback == "127.0.0.1":
        with answering(200) as (settings, asked):
            wait_until_ready(AdminSettings(host=host, port=settings.port), 0)
        assert asked == ["GET /readiness", "GET /startup"]


@pytest.mark.parametrize("wrong", [{"enabled": False}, {"port": 0}], ids=str)
def test_without_an_address_to_ask_the_configuration_is_at_fault(wrong: dict[str, object]) -> None:
    settings = AdminSettings.model_validate(wrong)
    with pytest.raises(ConfigurationError, match="admin"):
        wait_until_ready(settings, 0)
    with pytest.raises(ConfigurationError, match="admin"):
        ask_to_drain(settings)
    with pytest.raises(ConfigurationError, match="admin"):
        ask_to_reconnect(settings)


def test_shutdown_posts_to_quitquitquit() -> None:
    with answering(202) as (settings, asked):
        ask_to_drain(settings)
    assert asked == ["POST /quitquitquit"]


@pytest.mark.parametrize("status", [403, 404])
def test_shutdown_says_which_setting_allows_it(status: int) -> None:
    with answering(status) as (settings, _), pytest.raises(AdminError, match=r"--admin\.quit true"):
        ask_to_drain(settings)


def test_shutdown_of_something_else_says_what_it_answers() -> None:
    with answering(500) as (settings, _), pytest.raises(AdminError, match="answers 500"):
        ask_to_drain(settings)


def test_shutdown_without_a_proxy_says_so() -> None:
    with pytest.raises(AdminError, match="no proxy answers"):
        ask_to_drain(unused_address())


def test_p46_reconnect_posts_and_says_what_is_wrong() -> None:
    with answering(200) as (settings, asked):
        ask_to_reconnect(settings)
    assert asked == ["POST /reconnect"]
    for status, text in ((403, "from loopback"), (404, "answers 404"), (503, "what it says")):
        with answering(status) as (settings, _), pytest.raises(AdminError, match=text):
            ask_to_reconnect(settings)
    with pytest.raises(AdminError, match="no proxy answers"):
        ask_to_reconnect(unused_address())


@pytest.mark.parametrize(
    "ask",
    [ask_to_reload, fetch_status, lambda settings: list(fetch_sessions(settings, processes=False))],
    ids=["reload", "status", "sessions"],
)
def test_json_of_another_program_is_no_answer(ask: Callable[[AdminSettings], object]) -> None:
    with answering(200) as (settings, _), pytest.raises(AdminError, match="is that the proxy"):
        ask(settings)
