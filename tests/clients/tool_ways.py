"""The two ways that a tool takes to a database: directly, and through the proxy.

A way is an environment, as libpq reads it. For: tests of tools (`test_tools*.py`), each of which
does the same both ways and compares. Not for: drivers (`harness`).
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proxy.emulator.cluster import SUPERUSER, Cluster
from tests.clients.registry import ROOT
from tests.clients.stage import Stage
from tests.support.proxy_process import run_to_end

# Far more than any tool takes, on a busy machine.
TOOL_SECONDS_MAX: Final = 120.0
_POLL_SECONDS: Final = 0.05
PYTHON_TOOLS: Final = ROOT / ".tools" / "clients" / "bin"

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ways:
    """Both ways to one server, each to a database of its own; the user's name is the same."""

    place: Stage
    direct: Environment
    proxied: Environment

    @property
    def both(self) -> tuple[Environment, Environment]:
        """The direct one first."""
        return self.direct, self.proxied

    def program(self, name: str) -> Path:
        """Return the path of one of PostgreSQL's own programs."""
        return self.place.server.binaries / name

    async def psql(self, way: Environment, sql: str) -> str:
        """Return the rows of a script, unaligned. Fails with psql's errors."""
        return await run(way, self.program("psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", "-c", sql)

    async def prints_the_same(self, name: str, *arguments: str) -> str:
        """Return what one of PostgreSQL's programs prints both ways. Fails if they differ."""
        direct, proxied = [
            await run_to_end(self.program(name), *arguments, environment=way) for way in self.both
        ]
        assert proxied == direct
        return direct[1]


async def run(
    way: Environment, program: Path | str, *arguments: str, seconds_max: float = TOOL_SECONDS_MAX
) -> str:
    """Return what a program prints that must succeed."""
    code, out, err = await run_to_end(program, *arguments, environment=way, seconds_max=seconds_max)
    assert code == 0, (out, err)
    return out


async def execute(cluster: Cluster, sql: str, **where: str) -> str:
    """Return what a script prints at a server. The loop, which the emulator needs, goes on."""
    return await asyncio.to_thread(cluster.execute, sql, **where)


async def drop(place: Stage, database: str) -> None:
    """Drop a database of the server, which takes long when it is large and the disk is busy."""
    as_superuser = {**place.direct, "PGUSER": SUPERUSER}
    sql = f"DROP DATABASE {database} WITH (FORCE)"
    await run(as_superuser, place.server.binaries / "psql", "-Xqc", sql)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Return as soon as the condition is true; fail with `what` when that takes too long."""
    deadline = time.monotonic() + TOOL_SECONDS_MAX
    while not await condition():
        assert time.monotonic() < deadline, f"not within {TOOL_SECONDS_MAX:g} s: {what}"
        await asyncio.sleep(_POLL_SECONDS)


async def version_of(program: Path | str, *arguments: str) -> str:
    """Return the version that a program says it has."""
    _, out, err = await run_to_end(program, *(arguments or ("--version",)))
    found = re.search(r"\d+(\.\d+)+", out + err)
    assert found is not None, out + err
    return found[0]
