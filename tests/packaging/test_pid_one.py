"""SIGTERM to a PID 1 that is just starting.

The kernel drops a signal for which PID 1 has no handler. The proxy set its own when its event loop
ran, most of a second after the start: a container stopped meanwhile served on, until SIGKILL came
at the end of the grace period.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.proxy_process import ROOT, START_SECONDS_MAX, alive, descendants, handles
from tests.support.running import eventually, without_own_account
from tests.support.tools import need

ENDPOINT = ("--upstream.endpoint", "projects/p/branches/b/endpoints/e")
PORTS = ("--listen.port", "0", "--admin.port", "0")


def has_loaded(pid: int, library: str) -> bool:
    """Return whether a process has a library in its memory."""
    return library in Path(f"/proc/{pid}/maps").read_text()


@asynccontextmanager
async def pid_one(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Run `python -m proxy` as PID 1 of a namespace; give what waits for it, and its real PID."""
    outside = await asyncio.create_subprocess_exec(
        *("unshare", "--pid", "--fork", "--kill-child"),
        *(sys.executable, "-m", "proxy", *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**without_own_account(os.environ), "DATABRICKS_HOST": "https://127.0.0.1:1"},
    )
    try:
        await eventually(lambda: descendants(outside.pid), "it started")
        (inside,) = descendants(outside.pid)
        yield outside, inside
    finally:
        if outside.returncode is None:
            outside.kill()
        await outside.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "code"), [("run", 0), ("check", 128 + signal.SIGTERM)])
async def test_sigterm_ends_it_before_the_program_is_imported(verb: str, code: int) -> None:
    need("SIGTERM to a PID 1 that starts", "unshare", root=True)
    async with pid_one(verb, *ENDPOINT, *PORTS) as (outside, inside):
        await eventually(lambda: handles(inside, signal.SIGTERM), "it handles SIGTERM")
        assert not has_loaded(inside, "uvloop")
        os.kill(inside, signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await outside.wait() == code


@pytest.mark.slow
async def test_sigterm_ends_several_workers_and_leaves_no_process() -> None:
    need("SIGTERM to a PID 1 with workers", "unshare", root=True)
    async with pid_one("run", *ENDPOINT, *PORTS, "--listen.workers", "2") as (outside, inside):
        await eventually(
            lambda: len(descendants(inside)) == 3, "its workers are there", START_SECONDS_MAX
        )
        below = descendants(inside)
        os.kill(inside, signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await outside.wait() == 0
        assert alive(below) == set()
