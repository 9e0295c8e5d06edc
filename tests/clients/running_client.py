"""One client's program while it runs: it is asked on standard input and answers on its output."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from tests.clients.registry import Client, Language
from tests.support.running import without_own_account
from tests.support.secret_canaries import look

# For one command: twice what a program may try again after a restart, on a busy machine.
ANSWER_SECONDS_MAX: Final = 120.0
_LINE_BYTES_MAX: Final = 1 << 20
_END: Final = "."


class RunningClient:
    """A program that answers commands; made by `started`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, command: str) -> list[str]:
        """Return the lines of an answer; `error: ...` if there is none in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n".encode())
        lines: list[str] = []
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                while line := await self._process.stdout.readline():
                    if (text := line.decode(errors="replace").rstrip("\r\n")) == _END:
                        return lines
                    lines.append(text)
        except TimeoutError:
            return [*lines, f"error: no answer to {command}"]
        return [*lines, f"error: it ended at {command}"]

    async def end(self) -> int:
        """Close its input; return its exit code. Raises TimeoutError."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return await self._process.wait()


@asynccontextmanager
async def started(
    client: Client, language: Language, environment: Mapping[str, str]
) -> AsyncIterator[RunningClient]:
    """Run a client's program for the block; what it wrote as errors is searched for secrets."""
    # lib/pq panics where PGSERVICEFILE is set.
    inherited = without_own_account(os.environ)
    inherited.pop("PGSERVICEFILE")
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *client.run,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=_LINE_BYTES_MAX,
            env={**inherited, **language.environment, **environment},
        )
        try:
            yield RunningClient(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            errors.seek(0)
            look("the errors of a client", errors.read())
