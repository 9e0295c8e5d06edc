"""The status as a value: its content and form, and what it never contains."""

import json
from dataclasses import fields

import pytest

from proxy.observe.status import Token, WorkspaceApi
from proxy.server.lifecycle import State
from tests.support.admin_address import NOW, ScriptedAdminState


def test_it_is_json_with_units_in_its_names() -> None:
    shown = ScriptedAdminState(
        shown_tokens=[Token("workspace", 5.0, 3595.0, 60.0)],
        shown_apis=[WorkspaceApi("workspace", NOW - 10, 10.0, "api_error")],
        shown_warnings=["careful"],
    )
    assert json.loads(json.dumps(shown.status().as_dict())) == {
        "state": "serving",
        "version": "1.2.3",
        "acceleration": "used",
        "at": "2026-09-21T14:13:20+00:00",
        "uptime_seconds": 3.5,
        "listen": "127.0.0.1:5432",
        "sessions": 0,
        "sessions_opening": 0,
        "sessions_max": 1000,
        "targets": [
            {
                "name": "upstream",
                "host": "ep-a.example.com",
                "sessions": 0,
                "sessions_started": 0,
                "client_bytes": 0,
                "upstream_bytes": 0,
                "connect_seconds": {},
                "connect_p50_seconds": None,
            }
        ],
        "tokens": [
            {
                "workspace": "workspace",
                "age_seconds": 5.0,
                "expires_in_seconds": 3595.0,
                "accepted_age_seconds": 60.0,
            }
        ],
        "workspace_apis": [
            {
                "workspace": "workspace",
                "failing_since": "2026-09-21T14:13:10+00:00",
                "failing_seconds": 10.0,
                "reason": "api_error",
            }
        ],
        "errors": [],
        "drain": {"draining": False, "seconds_left": None, "sessions_left": 0},
        "warnings": ["careful"],
        "facts": {
            "workers": 1,
            "workers_serving": 1,
            "roles": [],
            "configuration": {"file": "", "reloaded_at": None, "result": ""},
        },
        "last_minute": {"started": 0, "refused": 0, "errors": {}},
        "shard_map": None,
        "pools": [],
    }


def test_a_token_has_no_field_for_the_token() -> None:
    names = [field.name for field in fields(Token)]
    assert names == ["workspace", "age_seconds", "expires_in_seconds", "accepted_age_seconds"]


def test_a_drain_shows_the_time_and_sessions_left() -> None:
    shown = ScriptedAdminState(state=State.DRAINING, drain_seconds_left=12.0)
    with shown.metrics.session("upstream"):
        status = shown.status()
    assert (status.drain.draining, status.drain.seconds_left) == (True, 12.0)
    assert status.drain.sessions_left == status.sessions == 1


@pytest.mark.parametrize(("session_slots_used", "opening"), [(0, 0), (1, 0), (4, 3)])
def test_a_session_whose_upstream_is_being_opened_is_counted_separately(
    session_slots_used: int, opening: int
) -> None:
    shown = ScriptedAdminState(session_slots_used=session_slots_used)
    with shown.metrics.session("upstream"):
        status = shown.status()
    assert (status.sessions, status.sessions_opening) == (1, opening)


def test_a_removed_target_is_shown_while_it_has_sessions() -> None:
    shown = ScriptedAdminState()
    with shown.metrics.session("upstream"):
        shown.metrics.targets.configure(["us"])
        shown.hosts = {"us": "us.example.com"}
        during = shown.status()
    assert [target.name for target in during.targets] == ["upstream", "us"]
    assert [target.name for target in shown.status().targets] == ["us"]


def test_an_error_is_shown_with_its_time_and_age() -> None:
    shown = ScriptedAdminState()
    shown.metrics.session_refused("token_rejected", "28000", "upstream")
    (error,) = json.loads(json.dumps(shown.status().as_dict()))["errors"]
    assert error.pop("message")
    assert error.pop("hint")
    assert error == {
        "at": "2026-09-21T14:13:20+00:00",
        "since": "2026-09-21T14:13:20+00:00",
        "age_seconds": 0,
        "reason": "token_rejected",
        "sqlstate": "28000",
        "target": "upstream",
        "count": 1,
    }
