"""The lines of a session: one that ends at once has one line, with the fields of both."""

import asyncio
from typing import Any

import pytest

from proxy.observe.logs import connection_log
from proxy.observe.metrics import Metrics
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.session_log import SessionLog, StartupAdvice
from tests.support.running import LogLines, captured_log, eventually

HOST = "db.example.com"
END = RelayEnd(EndReason.CLIENT_CLOSED, 14, 66)


def new_session() -> SessionLog:
    """Return the lines of a session of its own."""
    metrics = Metrics(
        version="1",
        session_end_outcomes={EndReason.CLIENT_CLOSED: "completed"},
        startup_failure_reasons=[],
    )
    return SessionLog(metrics, StartupAdvice(), 0.0)


def shown(log: LogLines) -> list[tuple[str, Any, Any]]:
    """Return event, host and `reused` of each line."""
    return [(line["event"], line.get("host"), line.get("reused")) for line in log.lines]


@pytest.mark.parametrize("reused", [None, False, True])
async def test_a_session_that_ends_at_once_has_one_line(reused: bool | None) -> None:
    session = new_session()
    with captured_log() as log:
        session.started(HOST, reused=reused)
        session.ended(END)
        assert shown(log) == [("session ended", HOST, reused)]
        assert ("reused" in log.lines[0]) == (reused is not None)
        later = new_session()
        later.started(HOST)  # when its line is there, that of the first would be there, too
        await eventually(lambda: len(log.lines) > 1, "the later one's line")
        assert shown(log)[1:] == [("session started", HOST, None)]


@pytest.mark.parametrize("reused", [None, False, True])
async def test_a_session_that_lasts_has_a_line_for_its_start_and_one_for_its_end(
    reused: bool | None,
) -> None:
    session = new_session()
    with captured_log() as log:
        with connection_log(7):
            session.started(HOST, reused=reused)
        await eventually(lambda: log.lines, "its first line")
        session.ended(END)
        assert shown(log) == [("session started", HOST, reused), ("session ended", None, None)]
        assert log.lines[0]["connection"] == 7
        assert (log.lines[1]["client_bytes"], log.lines[1]["upstream_bytes"]) == (14, 66)


async def test_a_session_that_is_over_and_whose_cause_follows_has_one_line() -> None:
    session = new_session()
    with captured_log() as log:
        session.started(HOST)
        session.over()
        later = new_session()
        later.started(HOST)
        await eventually(lambda: log.lines, "the later one's line")
        session.failed(END)
        assert shown(log) == [("session started", HOST, None), ("session ended", HOST, None)]


async def test_a_session_that_ends_before_its_start_was_logged_has_no_host() -> None:
    session, loop = new_session(), asyncio.get_running_loop()
    with captured_log() as log:
        before = loop.time()
        session.failed(END)
        after = loop.time()
    assert shown(log) == [("session ended", None, None)]
    # The clock may go on by a millisecond between the end and here.
    assert round(before, 3) <= log.lines[0]["duration_seconds"] <= round(after, 3)
