"""A log that nothing reads, or that cannot be written: sessions, probes and signals go on.

Story: standard error was a pipe without a reader. After 144 connections everything stopped: running
sessions, liveness and SIGTERM included. Where the reader had gone or the disk was full, a clean
drain exited with 120.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.exit_codes import EXIT_OK
from proxy.observe.log_writer import QUEUE_BYTES_MAX
from tests.support.client import startup
from tests.support.running import (
    WAIT_SECONDS_MAX,
    eventually,
    libpq,
    proxy_values,
    toml,
    without_own_account,
)

pytestmark = pytest.mark.slow

DROPPED = b"log lines were dropped"
CONNECTIONS = 200  # some 600 bytes of log each, and the pipe is full from the start
START_SECONDS_MAX = 60.0


class SilentProxy:
    """A proxy whose log the test has taken as its own matter."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.process = process
        self.listen_host = str(directory)
        self.listen_port = 5432

    async def stopped(self) -> int:
        """Ask it to drain and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2 * WAIT_SECONDS_MAX):
            return await self.process.wait()


@asynccontextmanager
async def proxy_logging_to(
    stderr: int,
    lakebase: Lakebase,
    directory: Path,
    *,
    workers: int = 1,
    admin_port: int | None = None,
) -> AsyncIterator[SilentProxy]:
    """Run a proxy that clients reach by a unix socket: no log says its port."""
    listen = {"host": "", "unix_socket_directory": str(directory), "workers": workers}
    sections: dict[str, dict[str, object]] = {
        "listen": {**listen, "port": 5432},
        "admin": {"enabled": admin_port is not None, "port": admin_port or 0},
        "log": {"level": "debug"},
    }
    config = directory / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, sections)))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "run", "--config", str(config)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=stderr,
        # Where it is set, lines are lost at once, and nothing is left to fail at the exit.
        env={**without_own_account(os.environ), "PYTHONUNBUFFERED": ""},
    )
    try:
        path = directory / ".s.PGSQL.5432"
        await eventually(lambda: listens(path), "it listens", START_SECONDS_MAX)
        yield SilentProxy(process, directory)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def listens(path: Path) -> bool:
    """Return whether a process listens at a path; the file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


async def use(proxy: SilentProxy) -> None:
    """Connect and run a query."""
    async with (
        asyncio.timeout(WAIT_SECONDS_MAX),
        await psycopg.AsyncConnection.connect(**libpq(proxy)) as connection,
    ):
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


async def be_refused(proxy: SilentProxy) -> None:
    """Connect with a name that makes a long line in the log."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        reader, writer = await asyncio.open_unix_connection(
            f"{proxy.listen_host}/.s.PGSQL.{proxy.listen_port}"
        )
        writer.write(startup(options="-c " + "x" * 5000))
        assert await reader.read()
        writer.close()
        await writer.wait_closed()


def full_pipe() -> tuple[int, int]:
    """Return a pipe that takes nothing more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:  # until it is full
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_log_that_is_not_read_stops_nothing(
    lakebase: Lakebase, tmp_path: Path, workers: int
) -> None:
    reader, writer = full_pipe()
    try:
        async with proxy_logging_to(writer, lakebase, tmp_path, workers=workers) as proxy:
            await use(proxy)
            for _ in range(CONNECTIONS // 10):
                await asyncio.gather(*(use(proxy) for _ in range(10)))
            assert await proxy.stopped() == EXIT_OK
    finally:
        os.close(reader)
        os.close(writer)


async def test_lines_that_were_dropped_are_counted_and_told_when_it_flows_again(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    received = bytearray()

    def read_until(text: bytes) -> None:
        while text not in received and (block := os.read(reader, 65536)):
            received.extend(block)

    async with proxy_logging_to(writer, lakebase, tmp_path, admin_port=0) as proxy:
        os.close(writer)
        await asyncio.to_thread(read_until, b'"serving"')
        port = admin_port(bytes(received))
        async with asyncio.timeout(START_SECONDS_MAX):
            while not await asyncio.to_thread(lines_dropped, port):
                await asyncio.gather(*(be_refused(proxy) for _ in range(100)))
        await asyncio.to_thread(read_until, DROPPED)
        assert len(received) > QUEUE_BYTES_MAX // 2
        rest = asyncio.create_task(asyncio.to_thread(read_until, b"never written"))
        assert await proxy.stopped() == EXIT_OK
        await rest
    os.close(reader)
    assert received.count(DROPPED) == 1
    assert b'"stopped"' in received


def admin_port(log: bytes) -> int:
    lines = [json.loads(line) for line in log.splitlines(keepends=True) if line.endswith(b"\n")]
    return next(int(line["admin_port"]) for line in lines if line["event"] == "serving")


def lines_dropped(port: int) -> float:
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=WAIT_SECONDS_MAX) as response:
        lines = response.read().decode().splitlines()
    (value,) = [line for line in lines if line.startswith("lakebase_proxy_log_lines_dropped")]
    return float(value.split()[1])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["reader_gone", "disk_full"])
async def test_a_log_that_cannot_be_written_changes_no_exit_code(
    lakebase: Lakebase, tmp_path: Path, how: str, workers: int
) -> None:
    if how == "reader_gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    try:
        async with proxy_logging_to(writer, lakebase, tmp_path, workers=workers) as proxy:
            await use(proxy)
            assert await proxy.stopped() == EXIT_OK
    finally:
        os.close(writer)
