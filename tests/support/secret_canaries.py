"""A pytest plugin: no secret of the emulator or of a test shows anywhere in the whole run.

Every secret that a test uses has a recognizable form (`not-a-real-...`, `canary-...`), and a token
of the emulator carries a watermark, so that a part of one is recognized as well. Searched are: each
log record when it is made, before any masking; what a test prints; and what the support modules
pass to `look` (output of processes, bytes that a client receives, metrics, reprs). A test during
which a secret is found fails.

Not searched: what `pytest.raises` catches, for which there is no hook; a refusal's text is in the
log line of its session. The failure names the place and does not repeat the secret.
"""

import asyncio
import base64
import logging
import re
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.emulator.tokens import watermarks
from proxy.server.app import App
from proxy.wire.secret import MASK

# These show secrets on purpose, to test that they are masked or found.
ON_PURPOSE: Final = ("tests/observe/test_logs.py",)

# A longer read is a bulk of rows that a test made up itself; a refusal is shorter.
RECEIVED_BYTES_MAX: Final = 8 * 1024

# The pages of the admin address; a path that it does not serve shows nothing.
ADMIN_PATHS: Final = ("/", "/status", "/sessions", "/metrics")
PAGE_SECONDS_MAX: Final = 10.0


def _in_base64(word: str) -> Iterator[str]:
    """Yield the encoded word at each of the three offsets, without the neighbours' part."""
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + word.encode()).decode().rstrip("=")
        yield encoded[-(-before * 8 // 6) : -1]


# The log had to mask something: a mask other than those of --print-config and of a repr.
MASKED: Final = rf"(?m:^(?!# ).*(?<![*'(]){re.escape(MASK)}(?!\*))"

_SECRET: Final = re.compile(
    "|".join(
        (
            r"eyJ[\w-]{10,}",  # a JWT
            r"not-(?:a-)?real",
            r"canary-[a-z]",
            MASKED,
            *map(re.escape, watermarks()),
            *map(re.escape, _in_base64(CLIENT_SECRET)),
        )
    )
)

_found: Final[list[str]] = []  # where, in the test that runs


def look(where: str, text: str | bytes) -> None:
    """Search a text for secrets; `where` is what the failure names."""
    shown = text.decode("latin-1") if isinstance(text, bytes) else text
    if _SECRET.search(shown):
        _found.append(where)


def look_at_answer(received: bytes) -> None:
    """Search what a client received in one read, unless it is a bulk."""
    if len(received) <= RECEIVED_BYTES_MAX:
        look("what a client received", received)


@asynccontextmanager
async def watching(app: App) -> AsyncIterator[App]:
    """Search metrics, repr and admin pages of a proxy at the end of the block."""
    try:
        yield app
    finally:
        look("the metrics", app.metrics.exposition())
        look("the repr of a proxy", repr(app))
        if app.admin is not None:
            for path in ADMIN_PATHS:
                look(f"the page {path}", await _page(app.admin.host, app.admin.port, path))


async def _page(host: str, port: int, path: str) -> bytes:
    """Return a whole HTTP answer; nothing where the port is closed."""
    async with asyncio.timeout(PAGE_SECONDS_MAX):
        try:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                return await reader.read()
            finally:
                writer.close()
                await writer.wait_closed()
        except OSError:
            return b""


class LogRecord(logging.LogRecord):
    """A record of any library, searched when it is made, whatever its handlers are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        where = f"a log record of {self.name}"
        look(where, f"{self.msg!r} {self.args!r}")
        error = self.exc_info[1] if self.exc_info else None
        while error is not None:
            look(where, repr(error))
            error = error.__cause__ or error.__context__


def pytest_configure() -> None:
    """Search log records from now on."""
    logging.setLogRecordFactory(LogRecord)


def pytest_unconfigure() -> None:
    """Restore the log record factory."""
    logging.setLogRecordFactory(logging.LogRecord)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test during which a secret showed, after its fixtures are torn down."""
    report = yield
    if report.when != "teardown":
        return report
    for name, text in report.sections:
        look(name, text)
    if _found and not item.nodeid.startswith(ON_PURPOSE):
        report.outcome = "failed"
        report.longrepr = "a secret showed in: " + ", ".join(dict.fromkeys(_found))
    _found.clear()
    return report
