"""Logs: one format for all, the connection's id in each line, and no secret in any."""

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import structlog

from proxy.observe.logs import (
    configure_logging,
    connection_log,
    flush_log,
    get_logger,
    mask,
    worker_log,
)
from proxy.wire.secret import MASK

# Three parts as in a JWT, none of which means anything.
FAKE_JWT = "eyJub3QiOiJyZWFsIn0.bm90LWEtcmVhbC1zZWNyZXQ.bm90LWEtc2lnbmF0dXJl"
FAKE_JWT_HEADER = FAKE_JWT.partition(".")[0]
FAKE_SECRET = "not-a-real-secret"

WAIT_SECONDS_MAX = 20.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("proxy")
    before = root.handlers, root.level, ours.level
    yield
    root.handlers, level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)
    structlog.reset_defaults()


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    configure_logging(format="json", level="debug", stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_event_level_logger_and_utc_time(
    stream: io.StringIO,
) -> None:
    get_logger("proxy.session").info("session_ended", reason="client_closed", seconds=1.5)
    (line,) = lines(stream)
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {
        "event": "session_ended",
        "level": "info",
        "logger": "proxy.session",
        "reason": "client_closed",
        "seconds": 1.5,
    }


def test_auto_is_console_on_a_terminal_and_json_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        configure_logging(stream=stream)
        get_logger("proxy").info("ready")
    assert "ready" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    assert lines(file)[0]["event"] == "ready"


def test_a_logger_that_was_used_before_follows_what_is_configured_later() -> None:
    logger, files = get_logger("proxy"), [io.StringIO(), io.StringIO()]
    configure_logging(format="json", stream=files[0])
    logger.info("ready")
    configure_logging(format="json", level="warning", stream=files[1])
    logger.info("ready")
    assert [len(lines(file)) for file in files] == [1, 0]


def test_a_mapping_that_a_library_logs_is_a_line_like_any_other(stream: io.StringIO) -> None:
    logging.getLogger("library").warning({"said": FAKE_JWT})
    (line,) = lines(stream)
    assert (line["event"], line["level"]) == (f"{{'said': '{MASK}'}}", "warning")


def test_the_console_format_can_be_chosen_without_a_terminal() -> None:
    stream = io.StringIO()
    configure_logging(format="console", stream=stream)
    get_logger("proxy").info("ready", port=5432)
    assert "port=5432" in stream.getvalue()
    assert "\x1b" not in stream.getvalue(), "no colours into a file"


def test_a_line_for_people_is_short_and_in_the_order_of_reading() -> None:
    stream = io.StringIO()
    configure_logging(format="console", stream=stream)
    with connection_log(7):
        get_logger("proxy.session").warning("refused", hint="wait", target="eu", reason="full", a=1)
    (line,) = stream.getvalue().splitlines()
    time, _, rest = line.partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", time)
    assert rest.split() == [
        *("[warning]", "refused", "connection=7", "target=eu", "a=1", "reason=full", "hint=wait")
    ]


@pytest.mark.parametrize(
    ("environment", "terminal", "colors"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_a_variable_decides_whether_there_are_colours(
    environment: dict[str, str],
    terminal: bool,
    colors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    configure_logging(format="console", stream=stream)
    get_logger("proxy").info("ready")
    assert ("\x1b" in stream.getvalue()) == colors


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    configure_logging(format="json", level="warning", stream=stream)
    logger = get_logger("proxy.server.app")
    logger.info("quiet")
    logger.warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_libraries_log_from_warning_upwards_in_the_same_format(stream: io.StringIO) -> None:
    for name in ("urllib3.connectionpool", "uvicorn.error", "asyncio"):
        logging.getLogger(name).debug("whole request")
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("retry %d", 3)
    assert {line["event"] for line in lines(stream)} == {"retry 3"}
    assert len(lines(stream)) == 3


def test_configuring_again_replaces_the_first_stream(stream: io.StringIO) -> None:
    other = io.StringIO()
    configure_logging(format="json", stream=other)
    get_logger("proxy").info("once")
    assert stream.getvalue() == ""
    assert len(lines(other)) == 1


def test_every_line_of_a_connection_has_its_id_and_others_have_none(stream: io.StringIO) -> None:
    logger = get_logger("proxy.session")
    with connection_log(7):
        logger.info("inside")
        logging.getLogger("urllib3.connectionpool").warning("inside, too")
    logger.info("outside")
    assert [line.get("connection") for line in lines(stream)] == [7, 7, None]


def test_every_line_of_a_worker_has_its_number(stream: io.StringIO) -> None:
    with worker_log(0), connection_log(7):
        get_logger("proxy.session").info("inside")
    get_logger("proxy.session").info("outside")
    numbers = [(line.get("worker"), line.get("connection")) for line in lines(stream)]
    assert numbers == [(0, 7), (None, None)]


async def test_concurrent_connections_keep_their_ids_apart(stream: io.StringIO) -> None:
    both_inside = asyncio.Barrier(2)

    async def connection(number: int) -> None:
        with connection_log(number):
            await both_inside.wait()
            get_logger("proxy.session").info("said", number=number)

    await asyncio.gather(connection(1), connection(2))
    assert len(lines(stream)) == 2
    assert all(line["connection"] == line["number"] for line in lines(stream))


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_token_is_masked_wherever_it_comes_from(format: str) -> None:
    stream = io.StringIO()
    configure_logging(format="json" if format == "json" else "console", stream=stream)
    logger = get_logger("proxy.upstream")
    logger.info(f"got {FAKE_JWT}")
    logger.info("nested", answer={"items": [{"body": f"x={FAKE_JWT}&y"}]}, raw=FAKE_JWT.encode())
    logging.getLogger("databricks.sdk").error("Authorization: Bearer %s", FAKE_JWT)
    try:
        raise ValueError(f"rejected {FAKE_JWT}")
    except ValueError:
        logger.exception("failed")
        logging.getLogger("urllib3").exception("failed")
    assert FAKE_JWT_HEADER not in stream.getvalue()
    assert stream.getvalue().count(MASK) >= 6


def log_of_every_kind() -> None:
    logger = get_logger("proxy.session")
    with connection_log(7):
        logger.info("session started", target="default", reused=True, host=None, share=0.5)
        logger.warning(f"got {FAKE_JWT}", detail=f"x={FAKE_JWT}", token=FAKE_SECRET, number=3)
        logger.info("nested", answer={"items": [FAKE_JWT]}, raw=FAKE_JWT.encode())
        logging.getLogger("urllib3").warning("a library's %s", FAKE_JWT)
        try:
            raise ValueError(FAKE_JWT)
        except ValueError:
            logger.exception("failed", event_number=4)
    with worker_log(2), connection_log(8):
        logger.info("of a worker")
    logger.info("text", value='a "quoted" \u00e9\n\udc80')
    logger.debug("quiet")


@pytest.mark.parametrize("format", ["json", "console"])
def test_standard_error_gets_the_lines_that_any_stream_gets(
    format: Literal["json", "console"], tmp_path: Path
) -> None:
    # Lines of plain values are made later there, together.
    stream, path = io.StringIO(), tmp_path / "log"
    configure_logging(format=format, stream=stream, event_key="message")
    for _ in range(3):
        log_of_every_kind()
    before = os.dup(2)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
        with open(2, "w", closefd=False) as standard_error:
            configure_logging(format=format, stream=standard_error, event_key="message")
            for _ in range(3):
                log_of_every_kind()
            flush_log()
    finally:
        os.dup2(before, 2)
        os.close(before)
    whole, expected = (
        re.sub(r"(?m)\d{4}-\d\d-\d\dT[\d:.]+Z|^\d\d:\d\d:\d\d", "TIME", text)
        for text in (path.read_text(errors="strict"), stream.getvalue())
    )
    expected = expected.encode(errors="backslashreplace").decode()
    assert whole == expected
    assert whole.count("TIME") == 3 * 7
    assert FAKE_SECRET not in whole
    assert FAKE_JWT_HEADER not in whole


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_traceback_shows_no_local_variable(format: str) -> None:
    stream = io.StringIO()
    configure_logging(format="json" if format == "json" else "console", stream=stream)
    # Taken apart, because a traceback does show the lines of the source.
    password = FAKE_SECRET[:5] + "canary"
    try:
        raise ConnectionError(len(password))
    except ConnectionError:
        get_logger("proxy.upstream").exception("failed")
    assert password not in stream.getvalue()
    assert "ConnectionError" in stream.getvalue()


@pytest.mark.parametrize(
    "name",
    ["token", "password", "secret", "client_secret", "access_token", "Authorization", "PASSWORD"],
)
def test_the_value_under_a_secrets_name_is_masked(stream: io.StringIO, name: str) -> None:
    logger = get_logger("proxy")
    logger.info("flat", **{name: FAKE_SECRET})
    logger.info("deep", body={"list": [{name: FAKE_SECRET}]}, other=({name: [FAKE_SECRET]},))
    assert FAKE_SECRET not in stream.getvalue()
    assert stream.getvalue().count(MASK) == 3


def test_a_value_that_contains_itself_is_written(stream: io.StringIO) -> None:
    nested: object = FAKE_JWT
    for _ in range(50):
        nested = [nested]
    get_logger("proxy").info("deep", nested=nested)
    assert MASK in stream.getvalue()
    assert FAKE_JWT_HEADER not in stream.getvalue()


def test_counts_and_times_about_tokens_stay_readable(stream: io.StringIO) -> None:
    get_logger("proxy").info("minted", tokens=3, token_age_seconds=1.5, token_kind="oauth")
    (line,) = lines(stream)
    assert (line["tokens"], line["token_age_seconds"], line["token_kind"]) == (3, 1.5, "oauth")


@pytest.mark.parametrize(
    "secret",
    [
        FAKE_JWT,
        FAKE_JWT[:40],
        FAKE_JWT_HEADER,
        "dapi" + "0" * 32,
        "dapi" + "0" * 32 + "-2",
        "dose" + "0" * 32,
    ],
)
def test_what_looks_like_a_secret_is_masked_amid_text(secret: str) -> None:
    assert mask(f'before "{secret}", after') == f'before "{MASK}", after'


@pytest.mark.parametrize(
    "text", ["eye", "they say", "projects/p/branches/b/endpoints/e", "dapier", "57P01", "key"]
)
def test_ordinary_text_is_not_masked(text: str) -> None:
    assert mask(text) == text


def test_the_text_after_an_authorization_scheme_is_masked() -> None:
    assert mask(f"Authorization: Bearer {FAKE_SECRET}") == f"Authorization: Bearer {MASK}"
    assert mask("Authorization: Basic bm90OnJlYWw=") == f"Authorization: Basic {MASK}"


def test_a_library_that_logs_its_retries_is_logged_only_at_error() -> None:
    # Seven lines in 25 s without a connection's id, while the workspace was away.
    configure_logging(level="info")
    assert not logging.getLogger("databricks.sdk.config").isEnabledFor(logging.WARNING)
    assert logging.getLogger("databricks.sdk.config").isEnabledFor(logging.ERROR)


def test_a_json_line_begins_with_time_level_and_event(stream: io.StringIO) -> None:
    get_logger("proxy.session").info("session ended", reason="client_closed")
    assert list(lines(stream)[0])[:3] == ["timestamp", "level", "event"]


def test_event_and_level_have_the_names_that_a_service_wants() -> None:
    stream = io.StringIO()
    configure_logging(format="json", event_key="message", level_key="severity", stream=stream)
    get_logger("proxy.session").warning("session refused", reason="upstream_full")
    logging.getLogger("urllib3").warning("a library's line")
    first, second = lines(stream)
    assert list(first)[:3] == list(second)[:3] == ["timestamp", "severity", "message"]
    assert first["message"] == "session refused"
    assert first["severity"] == second["severity"] == "warning"
    assert second["message"] == "a library's line"
    assert "event" not in first | second


def test_a_line_is_logged_while_another_thread_has_the_handlers_lock() -> None:
    # A finalizer logged while the writer made lines, for a thread that had this lock and waited for
    # the writer's: both waited for ever.
    script = """
import logging, os, threading
from proxy.observe.logs import configure_logging, flush_log
configure_logging(format="json")
held = threading.Event()
def hold():
    logging.root.handlers[0].acquire()
    held.set()
    threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
logging.getLogger("library").warning("said")
flush_log()
os._exit(0)  # the interpreter's own end waits for the lock
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, timeout=WAIT_SECONDS_MAX
    )
    assert json.loads(done.stderr)["event"] == "said"
