"""The proxy as a process of its own: for signals, exit codes, memory, and what it prints.

A process that still runs when its block ends is killed and fails the test's own assertions, never
another process: it is ended by the number that was started here.
"""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tests.support.running import WAIT_SECONDS_MAX, eventually, without_own_account
from tests.support.secret_canaries import look

# Importing the SDK and starting Postgres clusters on a machine that is busy with something else.
START_SECONDS_MAX: Final = 60.0
ROOT: Final = Path(__file__).parents[2]


class ProxyProcess:
    """One `python -m proxy ...`; made by `started_process`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.out = ""
        self.err = ""
        assert process.stdout is not None
        assert process.stderr is not None
        self._reading = [
            asyncio.ensure_future(self._read(process.stdout, "out")),
            asyncio.ensure_future(self._read(process.stderr, "err")),
        ]

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of its log so far."""
        whole = self.err[: self.err.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        return [line for line in self.lines if line["event"] == name]

    @property
    def listen_host(self) -> str:
        """The host where it listens; known once it serves."""
        return str(self._served["host"])

    @property
    def listen_port(self) -> int:
        """The port that it chose; known once it serves."""
        return int(self._served["port"])

    @cached_property
    def _served(self) -> dict[str, Any]:
        """The line that says where it serves. A log that grows is not read for each session."""
        return self.events("serving")[0]

    async def serving(self) -> None:
        """Wait until it says that it serves."""
        await eventually(
            lambda: self.events("serving") or not self.running, "serving", START_SECONDS_MAX
        )
        assert self.running, self.err

    async def printed(self, text: str) -> None:
        """Wait until it has printed something on standard output."""
        await eventually(lambda: text in self.out or not self.running, text, START_SECONDS_MAX)
        assert text in self.out, self.err

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def ended(self, seconds_max: float = WAIT_SECONDS_MAX) -> int:
        """Return its exit code. Fails when it does not end in time."""
        async with asyncio.timeout(seconds_max):
            code = await self._process.wait()
            await asyncio.wait(self._reading)  # all that it said
            return code

    def memory_bytes(self, name: str = "VmRSS") -> int:
        """Return a line of /proc/PID/status: VmRSS is now, VmHWM the highest since reset."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def waited_for_cpu_seconds(self) -> float:
        """Return how long its threads were ready to run while other processes had the CPUs."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[1]) for thread in threads) / 1e9

    def reset_peak(self) -> None:
        """Reset VmHWM."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def open_files(self) -> int:
        """Return how many files and sockets it has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    async def _read(self, stream: asyncio.StreamReader, name: str) -> None:
        while received := await stream.read(65536):
            setattr(self, name, getattr(self, name) + received.decode(errors="replace"))


@asynccontextmanager
async def started_process(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    python: Sequence[str] = (sys.executable,),
    program: Sequence[str] = ("-m", "proxy"),
    cwd: Path = ROOT,
) -> AsyncIterator[ProxyProcess]:
    """Run `python -m proxy` with these arguments; when the block ends it is killed if need be."""
    process = await asyncio.create_subprocess_exec(
        *python,
        *program,
        *arguments,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**without_own_account(os.environ), **(environment or {})},
    )
    proxy = ProxyProcess(process)
    try:
        yield proxy
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # Its workers, which hold the pipes, too, end a moment later.
        await asyncio.wait(proxy._reading, timeout=WAIT_SECONDS_MAX)
        for reader in proxy._reading:
            reader.cancel()  # a child that outlived it may hold the pipes
        await asyncio.wait(proxy._reading)
        look("the output of a process", proxy.out + proxy.err)


async def run_to_end(
    program: Path | str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    seconds_max: float = START_SECONDS_MAX,
) -> tuple[int, str, str]:
    """Run any program and return its exit code, its output and its errors."""
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**without_own_account(os.environ), **(environment or {})},
    )
    try:
        async with asyncio.timeout(seconds_max):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    look("the output of a process", (out + err).decode())
    return process.returncode, out.decode(), err.decode()


def descendants(pid: int) -> set[int]:
    """Return the processes below one, from /proc: children, their children, and so on."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    below = {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below} - found
        found |= below
    return found


def alive(pids: Sequence[int] | set[int]) -> set[int]:
    """Return which of these processes still run; zombies do not."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.add(pid)
    return running


def handles(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal, as the kernel sees it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s+([0-9a-f]+)$", status, re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) & 1 << (number - 1))
