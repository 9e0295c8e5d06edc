"""The proxy as a process: signals, drain, exit codes, and what is left of it.

0 after a clean drain, 3 when sessions were cut; a second signal ends it at once.
"""

import asyncio
import os
import re
import signal
import socket
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import psycopg
import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProcess
from tests.support.client import plain_client, query, startup
from tests.support.proxy_process import (
    START_SECONDS_MAX,
    ProxyProcess,
    descendants,
    handles,
    started_process,
)
from tests.support.running import Sections, eventually, libpq, proxy_values, toml

pytestmark = pytest.mark.slow  # the process starts in about a second

START_SECONDS = 3.0
REST_BYTES_MAX = 120_000_000

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)


def is_listening(proxy: ProxyProcess) -> bool:
    try:
        with socket.create_connection((proxy.listen_host, proxy.listen_port), 1):
            return True
    except OSError:
        return False


def file_of(pid: int, descriptor: str) -> str:
    return str(Path(f"/proc/{pid}/fd/{descriptor}").readlink())


def is_accepting(socket_file: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(socket_file)) == 0


@BOTH
async def test_an_idle_proxy_stops_at_once_with_exit_code_0(
    proxy_process: ProxyProcess, number: signal.Signals
) -> None:
    proxy_process.send(number)
    assert await proxy_process.ended(3) == 0
    assert not is_listening(proxy_process)
    assert [line["signal"] for line in proxy_process.events("draining")] == [number.name]
    assert "Traceback" not in proxy_process.err


async def test_a_drain_lets_a_transaction_finish_and_exits_with_0(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 30})
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("BEGIN")
        assert b"BEGIN" in await client.receive()
        proxy.send(signal.SIGTERM)
        await eventually(lambda: proxy.events("draining"), "it drains")
        await eventually(lambda: not is_listening(proxy), "it takes no more connections")
        for _ in range(3):
            await client.query("SELECT 'still served'")
            assert b"still served" in await client.receive()
        assert proxy.running
    assert await proxy.ended() == 0
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [0]


async def test_a_drain_that_times_out_cuts_the_rest_and_exits_with_3(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 0.2})
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("BEGIN")
        assert b"BEGIN" in await client.receive()
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 3
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [1]
    assert "Traceback" not in proxy.err


@BOTH
async def test_a_second_signal_ends_it_at_once_with_3(
    start_process: StartProcess, lakebase: Lakebase, number: signal.Signals
) -> None:
    proxy = await start_process(shutdown={"drain_seconds": 60})
    async with plain_client(proxy) as client, plain_client(proxy) as waiting:
        await client.start_up()
        await client.query("SELECT pg_sleep(60)")
        lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
        await waiting.send(startup())
        proxy.send(signal.SIGTERM)
        await eventually(lambda: proxy.events("draining"), "it drains")
        began = time.monotonic()
        proxy.send(number)
        assert await proxy.ended() == 3
        assert time.monotonic() - began < 4
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")
    assert "Traceback" not in proxy.err


@pytest.mark.parametrize("seconds", [0, 60])
async def test_idle_sessions_are_told_however_short_the_drain_is(
    start_process: StartProcess, seconds: int
) -> None:
    # They were cut without a word, and counted as if a client had lost something.
    proxy = await start_process(shutdown={"drain_seconds": seconds})
    async with plain_client(proxy) as idle, plain_client(proxy) as busy:
        for client in (idle, busy):
            await client.start_up()
        await busy.query("BEGIN")
        assert b"BEGIN" in await busy.receive()
        proxy.send(signal.SIGTERM)
        if seconds:
            await eventually(lambda: proxy.events("draining"), "it drains")
            proxy.send(signal.SIGTERM)
        assert (await idle.error()).sqlstate == "57P01"
        assert await proxy.ended() == 3
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [1]


async def test_a_hangup_before_it_serves_is_nothing(lakebase: Lakebase, tmp_path: Path) -> None:
    # Until the event loop had its handler, SIGHUP ended the process.
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, {})))
    async with started_process("run", "--config", str(file)) as proxy:
        await eventually(lambda: handles(proxy.pid, signal.SIGHUP), "it handles SIGHUP")
        while not proxy.events("serving"):
            assert proxy.running, proxy.err
            proxy.send(signal.SIGHUP)
            await asyncio.sleep(0.02)
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0, proxy.err


async def test_a_person_is_told_where_to_connect_as_whom_and_to_which_host(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    admin = {"enabled": True, "port": 0}
    sections: Sections = {"log": {"format": "console"}, "admin": admin}
    file.write_text(toml(proxy_values(lakebase, sections)))
    async with started_process("--config", str(file), "run") as proxy:
        told = re.compile(
            r"Listening on 127\.0\.0\.1:\d+( and \[::1\]:\d+)?"
            rf" as {lakebase.client_id} to {lakebase.shards[0].endpoint.host}"
            r" \(page: http://127\.0\.0\.1:\d+/\)"
        )
        await eventually(
            lambda: "Listening" in proxy.err or not proxy.running, "it greets", START_SECONDS_MAX
        )
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0, proxy.err
    assert told.search(proxy.err), proxy.err


async def test_it_serves_within_three_seconds_and_takes_little_memory(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, {})))
    took_seconds = []
    for _ in range(3):
        began = time.monotonic()
        async with started_process("run", "--config", str(file)) as proxy:
            await proxy.serving()
            elapsed = time.monotonic() - began
            took_seconds.append(elapsed - proxy.waited_for_cpu_seconds())
            async with plain_client(proxy) as client:
                await client.start_up()
            ended = partial(proxy.events, "session ended")
            await eventually(ended, "it is at rest")
            assert proxy.memory_bytes() <= REST_BYTES_MAX
    assert statistics.median(took_seconds) < START_SECONDS


async def test_no_session_of_many_leaves_a_file_or_a_task_in_the_process(
    proxy_process: ProxyProcess, lakebase: Lakebase
) -> None:
    async def sessions(count: int) -> None:
        for n in range(count):
            async with plain_client(proxy_process) as client:
                await client.start_up()
                if n % 3 == 0:
                    await client.send(query("SELECT 1"))
                if n % 3 == 1:
                    client.reset()
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "all are over")

    await sessions(10)
    before = proxy_process.open_files()
    await sessions(100)
    await eventually(lambda: proxy_process.open_files() <= before, "its files are closed")
    assert [line for line in proxy_process.lines if line["level"] not in ("info", "debug")] == []


async def test_three_signals_in_a_row_are_one_stop(
    lakebase: Lakebase, start_process: StartProcess
) -> None:
    proxy = await start_process()
    proxy.send(signal.SIGINT)
    proxy.send(signal.SIGINT)
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() in (0, 3)
    assert "Traceback" not in proxy.err


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_address_is_served_and_logged(
    start_process: StartProcess, workers: int
) -> None:
    hosts = ["localhost", "127.0.0.2"]
    proxy = await start_process(listen={"host": hosts, "port": 0, "workers": workers})
    port = proxy.listen_port
    addresses = proxy.events("serving")[0]["addresses"]
    assert addresses[0] == f"127.0.0.1:{port}"
    assert addresses[-1] == f"127.0.0.2:{port}"
    assert set(addresses[1:-1]) <= {f"[::1]:{port}"}  # where there is IPv6
    for address in addresses:
        host = address.rpartition(":")[0].strip("[]")
        async with await psycopg.AsyncConnection.connect(**libpq(proxy, host=host)) as connection:
            assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&-", "0<&- 1>&- 2>&-"])
async def test_a_start_with_a_standard_descriptor_closed_works(
    lakebase: Lakebase, tmp_path: Path, closed: str, workers: int
) -> None:
    # The first socket took the number, and what was logged would have gone to its peer.
    config = tmp_path / "proxy.toml"
    directory = str(tmp_path)  # a socket there: without a log no free port could be told
    listen = {"host": "", "port": 5432, "unix_socket_directory": directory, "workers": workers}
    config.write_text(toml(proxy_values(lakebase, {"listen": listen})))
    command = f'exec "$0" -m proxy run --config "$1" {closed}'
    program = ("-c", command, sys.executable)
    async with started_process(str(config), python=("/bin/sh",), program=program) as proxy:
        socket_file = tmp_path / ".s.PGSQL.5432"
        await eventually(lambda: is_accepting(socket_file), "it listens", START_SECONDS_MAX)
        where = f"host={directory} port=5432 user=anyone dbname={lakebase.database}"
        async with await psycopg.AsyncConnection.connect(where) as connection:
            row = await (await connection.execute("SELECT 42")).fetchone()
            assert row == (42,)
        # Of each process: with workers all went well by chance.
        for pid in (proxy.pid, *descendants(proxy.pid)):
            for number in re.findall(r"([012])[<>]", closed):
                assert file_of(pid, number) == os.devnull
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_log_lines_begin_with_the_keys_that_a_service_wants(
    lakebase: Lakebase, tmp_path: Path, workers: int
) -> None:
    sections: dict[str, dict[str, object]] = {
        "listen": {"port": 0, "workers": workers},
        "log": {"event_key": "message", "level_key": "severity", "format": "json"},
    }
    config = tmp_path / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, sections)))
    async with started_process("run", "--config", str(config)) as proxy:
        await eventually(lambda: '"serving"' in proxy.err, "it serves", START_SECONDS_MAX)
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0
    assert len(proxy.lines) > 1
    for line in proxy.lines:
        assert list(line)[:3] == ["timestamp", "severity", "message"]
