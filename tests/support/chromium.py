"""A real browser to look at a page with: headless Chromium, driven through two pipes.

For: loading a page, asking it with JavaScript, changing its size and colours.
Not for: a driver of every browser; Chromium's own protocol (`--remote-debugging-pipe`: JSON with a
NUL after it) needs no package beside it and no port.

Every wait is bounded. The browser's profile is a directory of the test's, and its process group is
ended with the block.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")

# A cold start on a machine that is busy with other tests.
START_SECONDS_MAX: Final = 60.0
ANSWER_SECONDS_MAX: Final = 20.0
_POLL_SECONDS: Final = 0.02
_MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024

_FLAGS: Final = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # in a container there is often no other way; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
)
# Chromium reads commands from descriptor 3 and answers on 4.
_TAKE_PIPES: Final = """
import fcntl, os, sys
apart = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for from_, to in zip(apart, (3, 4)):
    os.dup2(from_, to)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium_path() -> str | None:
    """Return the installed browser, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """The connection to one browser: commands by number, each with its answer."""

    def __init__(self, commands: asyncio.StreamWriter, answers: asyncio.StreamReader) -> None:
        self._commands = commands
        self._answers = answers
        self._number = 0

    async def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Run a command of the DevTools protocol and return its result."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        self._commands.write(json.dumps(command).encode() + b"\0")
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            while True:  # past the events, to the answer
                answer = json.loads((await self._answers.readuntil(b"\0"))[:-1])
                if answer.get("id") == self._number:
                    assert "error" not in answer, answer["error"]
                    result: dict[str, Any] = answer["result"]
                    return result

    async def open(self, url: str) -> "Page":
        """Open a page in a tab of its own."""
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        await page.call("Page.enable")
        await page.call("Page.navigate", url=url)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command on this tab."""
        return await self._browser.call(method, self._session, **parameters)

    async def value(self, expression: str) -> Any:
        """Return what a JavaScript expression is now."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def text(self, selector: str) -> str:
        """Return the text of the first element that fits, as a person sees it."""
        return str(await self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def until(
        self, expression: str, good: Callable[[Any], bool] = bool, seconds_max: float = 10.0
    ) -> Any:
        """Return an expression's value as soon as it is good; fail with the last one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds_max
        while not good(value := await self.value(expression)):
            assert loop.time() < deadline, f"{expression} is still {value!r}"
            await asyncio.sleep(_POLL_SECONDS)
        return value

    async def resize(self, width: int, height: int) -> None:
        """Set the size of the screen."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=width < 600,
        )

    async def prefer(self, scheme: str) -> None:
        """Set the preferred colour scheme: `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)


@asynccontextmanager
async def started_browser(path: str, profile: Path) -> AsyncIterator[Browser]:
    """Yield a running browser while the block runs."""
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _TAKE_PIPES, str(their_read), str(their_write), path),
        *(*_FLAGS, f"--user-data-dir={profile}"),
        pass_fds=(their_read, their_write),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
        start_new_session=True,
    )
    os.close(their_read)
    os.close(their_write)
    loop = asyncio.get_running_loop()
    answers = asyncio.StreamReader(limit=_MESSAGE_BYTES_MAX)
    reading, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(answers), os.fdopen(our_read, "rb")
    )
    transport, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(our_write, "wb")
    )
    commands = asyncio.StreamWriter(transport, protocol, None, loop)
    try:
        browser = Browser(commands, answers)
        async with asyncio.timeout(START_SECONDS_MAX):
            await browser.call("Browser.getVersion")
        yield browser
    finally:
        # The browser's helpers are of its group: it was started as a session of its own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        reading.close()
        transport.close()
