"""Whether a proxy is well, in a sentence."""

from dataclasses import replace

import pytest

from proxy.observe.facts import Facts
from proxy.observe.health import Level, health_of
from proxy.observe.history import History, LastMinute
from proxy.observe.recent_errors import RecentErrors
from proxy.observe.status import ShardMapStatus, Status, WorkspaceApi
from proxy.server.lifecycle import State
from tests.support.admin_address import NOW, ScriptedAdminState


def words(status: Status) -> tuple[str, str]:
    health = health_of(status)
    return health.level, health.text


def test_a_proxy_that_serves_is_well() -> None:
    shown = ScriptedAdminState()
    with shown.metrics.session("upstream"):
        assert words(shown.status()) == (Level.WELL, "Serving 1 session.")


def test_refusals_are_counted_with_their_reasons_and_since_when() -> None:
    shown = ScriptedAdminState()
    with shown.metrics.session("upstream"):
        for _ in range(8):
            shown.metrics.session_refused("database_missing", "3D000", "upstream")
        health = health_of(shown.status())
    assert health.as_dict() == {
        "level": "warning",
        "text": "Serving 1 session. 8 refusals in the last minute: database_missing.",
        "since": "2026-09-21T14:13:20+00:00",
        "reason": "database_missing",
        "documented": True,
    }


def test_it_is_bad_if_every_client_was_refused() -> None:
    shown = ScriptedAdminState()
    reasons = {"upstream_dns": 3, "role_missing": 4, "api_error": 2, "pat_scope": 1}
    for reason in [reason for reason, times in reasons.items() for _ in range(times)]:
        shown.metrics.session_refused(reason, target="upstream")
    text = (
        "Serving 0 sessions. 10 refusals in the last minute: role_missing, upstream_dns, api_error "
        "and 1 more. No session has started meanwhile."
    )
    assert words(shown.status()) == (Level.BAD, text)


def test_what_was_more_than_a_minute_ago_is_over() -> None:
    shown = ScriptedAdminState(history=History())
    shown.metrics.session_refused("database_missing", "3D000", "upstream")
    for _ in range(7):
        shown.history.add(shown.totals(), None)
    status = shown.status()
    assert words(status) == (Level.WELL, "Serving 0 sessions.")
    assert [error.reason for error in status.errors] == ["database_missing"], "it is still listed"


def test_it_is_not_well_since_the_failure_that_is_going_on() -> None:
    """An error of the same reason at another target, hours ago, made it hours."""
    now = [NOW]
    errors = RecentErrors(lambda: now[0])
    errors.record("database_missing", "3D000", "us")
    now[0] = NOW + 7200
    errors.record("database_missing", "3D000", "eu")
    status = replace(
        ScriptedAdminState().status(),
        at=now[0],
        errors=errors.latest(),
        last_minute=LastMinute(refused=1, errors={"database_missing": 1}),
    )
    assert health_of(status).since == NOW + 7200


def test_an_error_that_refused_no_client_is_a_failure() -> None:
    shown = ScriptedAdminState()
    shown.metrics.record_error("client_wants_tls", message="set sslmode=disable")
    health = health_of(shown.status())
    text = "Serving 0 sessions. 1 failure in the last minute: client_wants_tls."
    assert (health.level, health.text) == (Level.WARNING, text)
    assert health.as_dict()["documented"] is False


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("workspace", "The API of workspace fails: api_error."),
        ("credentials.password_file", "The password file fails: api_error."),
    ],
)
def test_an_outage_of_the_api_is_bad_before_any_client_is_refused(name: str, text: str) -> None:
    shown = ScriptedAdminState(shown_apis=[WorkspaceApi(name, NOW - 10, 10.0, "api_error")])
    health = health_of(shown.status())
    assert (health.level, health.text) == (Level.BAD, f"Serving 0 sessions. {text}")
    assert (health.since, health.reason) == (NOW - 10, "api_error")


def test_a_drain_says_what_is_left() -> None:
    shown = ScriptedAdminState(state=State.DRAINING, drain_seconds_left=12.0)
    text = "Draining: 0 sessions left, to be cut in 12 s."
    assert words(shown.status()) == (Level.WARNING, text)


def test_what_limits_it_is_a_warning() -> None:
    status = ScriptedAdminState().status()
    shard_map = ShardMapStatus(
        name="shop",
        source="catalogue",
        kind="list",
        key_type="int",
        mappings=1,
        shards=1,
        state="ready",
        feed="listening",
    )
    limited = {
        "Starting.": replace(status, state="starting"),
        "Serving 0 sessions. No more are possible: listen.max_connections.": replace(
            status, sessions_opening=status.sessions_max
        ),
        "Serving 0 sessions. 1 of 2 workers serve.": replace(status, facts=Facts(2, 1)),
        "Serving 0 sessions. The shard map shop is not current.": replace(
            status, shard_map=replace(shard_map, feed="down")
        ),
    }
    for text, shown in limited.items():
        assert words(shown) == (Level.WARNING, text)
    assert words(replace(status, shard_map=shard_map))[0] == Level.WELL
