"""`status` as text: what it says of a proxy and of its sessions, whatever a client has sent."""

from typing import Any

import pytest

from proxy.verbs.status_report import (
    CELL_CHARACTERS_MAX,
    duration,
    session_lines,
    size,
    status_lines,
)

SESSION: dict[str, Any] = {
    "id": 7,
    "client": "127.0.0.1:50000",
    "pid": None,
    "command": None,
    "application_name": "billing",
    "user": "app",
    "database": "",
    "target": "eu",
    "shard": "",
    "shard_key": None,
    "age_seconds": 3725.0,
    "state": "busy",
    "waits_for": None,
    "state_seconds": 12.0,
    "client_bytes": 12,
    "upstream_bytes": 3_400_000,
}
STATUS: dict[str, Any] = {
    "health": {"level": "warning", "text": "Draining: 2 sessions left, to be cut in 12 s."},
    "state": "draining",
    "uptime_seconds": 90_061,
    "version": "1.2.3",
    "listen": "127.0.0.1:5432",
    "sessions": 2,
    "sessions_opening": 1,
    "sessions_max": 100,
    "workspace_apis": [
        {
            "workspace": "main",
            "failing_since": "2026-01-01T00:00:00+00:00",
            "failing_seconds": 61,
            "reason": "api_error",
        },
        {"workspace": "eu", "failing_since": None, "failing_seconds": 0, "reason": ""},
    ],
    "warnings": ["upstream.sslmod require verifies no certificate"],
    "targets": [
        {
            "name": "eu",
            "host": "",
            "sessions": 2,
            "sessions_started": 10,
            "client_bytes": 1500,
            "upstream_bytes": 0,
        }
    ],
    "errors": [{"reason": "database_missing", "count": 8, "at": "2026-01-01T00:00:00+00:00"}],
}


def test_a_session_is_a_line_and_empty_columns_are_left_out() -> None:
    assert list(session_lines([SESSION])) == [
        "ID  STATE       AGE        CLIENT           APPLICATION  TARGET  USER  SENT  RECEIVED",
        "7   busy, 12 s  1 h 2 min  127.0.0.1:50000  billing      eu      app   12 B  3.4 MB",
    ]
    assert list(session_lines([])) == ["no client is connected"]


def test_a_process_and_what_is_waited_for_are_shown() -> None:
    waiting = {"state": "waiting", "waits_for": "mint", "state_seconds": 0.25}
    lines = list(session_lines([{**SESSION, "client": "", "pid": 9, "command": "psql", **waiting}]))
    assert "unix socket  psql 9 " in lines[1]
    assert "waiting for mint, 0.2 s" in lines[1]
    (_, line) = session_lines([{**SESSION, "state": "closing", "state_seconds": None}])
    assert "  closing  " in line


def test_what_a_client_sent_neither_controls_the_terminal_nor_fills_the_line() -> None:
    session = {**SESSION, "application_name": "\x1b[2J\nx" + "y" * 100}
    (_, whole) = session_lines([session])
    (_, cut) = session_lines([session], 8 * CELL_CHARACTERS_MAX)
    for line in (whole, cut):
        assert "?[2J?xy" in line
        assert line.isprintable()
    assert f"{'y' * 100}  eu" in whole
    assert f"{'y' * 19}...  eu" in cut


def test_a_terminals_width_is_kept_by_the_columns_that_matter_and_nothing_else_is_cut() -> None:
    # It was 125 columns wide.
    keyed = {"shard_key": "cc6ac2e2", "database": "app", "user": "a" * 36}
    sessions = [{**SESSION, **keyed, "id": 123_456, "state": "in transaction"}]
    (names, row) = session_lines(sessions, 80)
    assert names.split() == ["ID", "STATE", "AGE", "CLIENT", "APPLICATION", "TARGET"]
    assert len(row) <= 80
    (names, row) = session_lines([{**SESSION, **keyed}], 80)
    assert names.split()[-2:] == ["KEY", "USER"]
    assert row.endswith("  aaaaa")
    assert len(row) == 80
    (names, row) = session_lines([{**SESSION, **keyed}])
    assert names.split()[-3:] == ["DATABASE", "SENT", "RECEIVED"]
    assert "a" * 36 in row
    host = "ep-long-name-of-an-endpoint.database.eu-central-1.cloud.databricks.example"
    targets = [{**STATUS["targets"][0], "host": host}]
    assert max(map(len, status_lines({**STATUS, "targets": targets}, 80))) <= 80
    assert any(line.endswith(host) for line in status_lines({**STATUS, "targets": targets}))


def test_what_a_proxy_of_another_version_does_not_say_is_left_out() -> None:
    # It ended with KeyError.
    for field in STATUS:
        others = {name: value for name, value in STATUS.items() if name != field}
        assert set(status_lines(others)) < set(status_lines(STATUS))
    assert list(status_lines({"state": "serving"})) == []
    assert list(session_lines([{"id": 7, "user": "app"}])) == ["ID  USER", "7   app"]


def test_a_proxy_is_shown_with_its_health_first() -> None:
    assert list(status_lines(STATUS)) == [
        "Draining: 2 sessions left, to be cut in 12 s.",
        "draining, up for 1 d 1 h, 1.2.3",
        "listens on 127.0.0.1:5432",
        "2 of 100 sessions, 1 waiting",
        "no token from main for 1 min: api_error",
        "warning: upstream.sslmod require verifies no certificate",
        "",
        "TARGET  SESSIONS  STARTED  SENT    RECEIVED",
        "eu      2         10       1.5 kB  0 B",
        "",
        "FAILURE           TIMES  LAST",
        "database_missing  8      2026-01-01T00:00:00+00:00",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (90_061, "1 d 1 h"),
    ],
)
def test_a_duration_has_one_or_two_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e15, "2500.0 TB")]
)
def test_bytes_are_shown_in_a_unit_of_which_there_are_few(count: float, shown: str) -> None:
    assert size(count) == shown
