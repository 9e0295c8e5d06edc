"""Runs `shards VERB` in processes that end themselves by SIGKILL at a point of the operation.

For: tests of what a verb leaves that was killed. A process of its own is started once, imports all
that the command line does, and forks for each call: `KilledVerbs` is the test's side, `main` the
process. The hook is passed to the command line's own function.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import asyncpg

from proxy.catalogue.operation import Reach
from tests.support.direct_verbs import Servers, run_directly
from tests.support.proxy_process import ROOT, START_SECONDS_MAX
from tests.support.running import without_own_account

VERB_SECONDS_MAX: Final = 90.0  # on a busy machine, with servers that restart
_READY: Final = "ready"


class KilledVerbs:
    """The process that forks; made by `killed_verbs`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(
        self,
        point: str | int,
        *arguments: str,
        failing: str | int = "",
        servers: Servers | None = None,
        killed_after: float = 0.0,
    ) -> int:
        """Run a verb that is killed at `point`. Return its exit code, negative for a signal.

        Before that, the point `failing` fails if it is passed, so that the operation is undone.
        A point is a name, or how many others are passed before it. With `servers` the verb
        connects to them directly. It is killed after `killed_after` seconds as well, if not 0.
        """
        assert self._process.stdin is not None
        call = {
            "point": point,
            "failing": failing,
            "arguments": arguments,
            "killed_after": killed_after,
            "servers": None if servers is None else servers.to_json(),
        }
        self._process.stdin.write(json.dumps(call).encode() + b"\n")
        return int(await self._line(VERB_SECONDS_MAX))

    async def _line(self, seconds_max: float) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(seconds_max):
            line = await self._process.stdout.readline()
        assert line, "the process has ended"
        return line.decode().strip()

    async def ready(self) -> None:
        """Wait until it has imported everything."""
        assert await self._line(START_SECONDS_MAX) == _READY


@asynccontextmanager
async def killed_verbs() -> AsyncIterator[KilledVerbs]:
    """Start the process; end it after the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.killed_verb",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=without_own_account(os.environ),
    )
    try:
        verbs = KilledVerbs(process)
        await verbs.ready()
        yield verbs
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


# -- the process ---------------------------------------------------------------------------------


def reaching(call: dict[str, Any]) -> Reach:
    """Return the hook that ends this process at a point, and fails at another one."""
    passed = 0

    async def reach(point: str) -> None:
        nonlocal passed
        here = (point, passed)
        passed += 1
        if call["point"] in here:
            os.kill(os.getpid(), signal.SIGKILL)
        if call["failing"] in here:
            raise asyncpg.InternalServerError("failed by the test")

    return reach


def _child(call: dict[str, Any]) -> int:
    from proxy.verbs.shards import run

    os.dup2(2, 1)  # the answer of the verb is not ours
    if call["killed_after"]:
        kill = partial(os.kill, os.getpid(), signal.SIGKILL)
        threading.Timer(call["killed_after"], kill).start()
    arguments, reach = call["arguments"], reaching(call)
    if call["servers"] is None:
        return run(arguments, reach)
    servers = Servers(**call["servers"])
    return asyncio.run(run_directly(servers, tuple(arguments), reach))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Fork for each line of standard input, and print how the child has ended."""
    import databricks.sdk  # noqa: F401 - once, not in each child

    import proxy.verbs.shards  # noqa: F401

    _say(_READY)
    for line in sys.stdin:
        call = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(call))
        _, status = os.waitpid(pid, 0)
        _say(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
