"""`exec -- COMMAND`: the command's exit code, its streams, its signals, and what refuses it."""

import asyncio
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from tests.support.operator import Operator
from tests.support.proxy_process import START_SECONDS_MAX, ProxyProcess, started_process
from tests.support.running import eventually, proxy_values, psql_path, toml, without_own_account
from tests.support.sharding import TABLE, sharded

pytestmark = pytest.mark.slow

SECRET = "not-a-real-secret"
PSQL = str(psql_path())

# Says that it runs, then counts a signal and goes on until it has had the last one.
COUNTING = """
import signal, sys
counted = []
signal.signal(signal.{first}, lambda number, _frame: (counted.append(number), print("one")))
signal.signal(signal.{last}, lambda number, _frame: sys.exit(len(counted)))
print("runs", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def config(lakebase: Lakebase, tmp_path: Path) -> str:
    """Return the file of a proxy that may run here: exec must not take its ports."""
    own = {"listen": {"port": 5432, "workers": 4}, "admin": {"enabled": True, "port": 9090}}
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, own)))
    return str(file)


def beside(
    config: str, *arguments: str, **environment: str
) -> AbstractAsyncContextManager[ProxyProcess]:
    return started_process("exec", "--config", config, *arguments, environment=environment)


async def result(config: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run it to its end; return exit code, output and errors."""
    async with beside(config, *arguments, **environment) as proxy:
        code = await proxy.ended(START_SECONDS_MAX)
    return code, proxy.out, proxy.err


def files_in(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


@pytest.mark.parametrize("flags", [(), ("--socket",)], ids=["port", "socket"])
async def test_a_command_is_logged_in_by_its_variables_and_by_the_url(
    config: str, lakebase: Lakebase, flags: tuple[str, ...], tmp_path: Path
) -> None:
    script = f"""
        {PSQL} -AtXc 'SELECT current_user' && {PSQL} "$DATABASE_URL" -AtXc 'SELECT 2'
        {PSQL.replace("/psql", "/pg_dump")} --schema-only | grep -c 'dump complete'
        env | grep -c {SECRET}; ulimit -Sn; echo "$PGHOST" >&2"""
    environment = {"DATABRICKS_CLIENT_SECRET": SECRET, "PGSERVICE": "none", "TMPDIR": str(tmp_path)}
    limited = ("sh", "-c", 'ulimit -Sn 700 && exec "$@"', "sh", sys.executable, "-m", "proxy")
    exec_ = ("exec", "--config", config, *flags, "--", "sh", "-c", script)
    async with started_process(*exec_, environment=environment, python=limited, program=()) as run:
        assert await run.ended(START_SECONDS_MAX) == 0
    assert run.out == f"{lakebase.client_id}\n2\n1\n0\n700\n"
    place = run.err.strip()  # nothing else is there
    assert place.startswith(f"{tmp_path}/") if flags else place == "127.0.0.1"
    assert files_in(tmp_path) == {"proxy.toml"}


async def test_a_command_that_cannot_run_has_a_shells_exit_code(
    config: str, tmp_path: Path
) -> None:
    file = tmp_path / "not-executable"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o600)
    cases = {
        (str(tmp_path / "none"),): (127, "No such file or directory"),
        ("",): (127, "'': No such file or directory"),  # it was 126: a folder of PATH
        (str(file),): (126, "Permission denied"),
    }
    results = await asyncio.gather(*(result(config, "--", *command) for command in cases))
    for (code, out, err), (expected, text) in zip(results, cases.values(), strict=True):
        assert (code, out) == (expected, "")
        assert text in err
        assert len(err.splitlines()) == 1


async def test_nothing_runs_where_the_workspace_refuses_or_the_settings_are_wrong(
    config: str,
) -> None:
    command = ("--", "echo", "it ran")
    refused, wrong, keyless = await asyncio.gather(
        result(config, "--workspace.client_secret", "another-secret", *command),
        result(config, "--listen.port", "none", *command, LAKEBASE_PROXY_LOG__LEVEL="loud"),
        result(config, "--shard-key", "42", *command),
    )
    assert refused[:2] == (1, "")
    said = refused[2].partition("no client can log in: ")[2]
    assert said.count("workspace_login_failed") == 1
    assert "Traceback" not in refused[2]
    assert wrong[:2] == (2, "")
    assert "listen.port" in wrong[2]
    assert "log.level" in wrong[2]
    assert keyless[:2] == (2, "")
    assert "--shard-key: needs a shard map" in keyless[2]


async def test_a_shard_key_is_the_commands_only_way_to_a_shard(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "sharded.toml"
    file.write_text(toml_of(lakebase))
    script = f"""
        {PSQL} -AtXc '{TABLE}'; {PSQL} "$DATABASE_URL" -AtXc '{TABLE}'; {PSQL} app -AtXc '{TABLE}'
        PGOPTIONS= {PSQL} -AtXc '{TABLE}'"""
    command = ("--shard-key", "1500", "--", "sh", "-c", script)
    other, second = "-c shard_key=7", lakebase.shards[1].name
    kept, conflict = await asyncio.gather(
        result(str(file), *command), result(str(file), *command, PGOPTIONS=other)
    )
    assert kept[:2] == (2, f"{second}\n" * 3)  # psql's code for a connection that is refused
    assert "key_missing" in kept[2]
    assert conflict[:2] == (1, "")
    assert "key_conflict" in conflict[2]


async def test_a_refused_credential_is_told_at_once_where_the_catalogues_map_is_not_loaded(
    operator: Operator, tmp_path: Path
) -> None:
    # It waited for the map as long as a dial may take: 30 s.
    secret = {"workspace": {"client_secret": "another-secret"}}
    file = operator.stores.file(tmp_path, operator.stores.roles.session, **secret)
    long = "--upstream.connect_timeout_seconds=600"
    code, out, err = await result(str(file), long, "--", "echo", "it ran")
    assert (code, out) == (1, "")
    assert "no client can log in" in err
    assert "the Databricks workspace refused the login" in err


def toml_of(lakebase: Lakebase) -> str:
    return toml(proxy_values(lakebase, sharded(lakebase)))


async def test_a_command_that_ignores_sigterm_is_served_until_it_ends(config: str) -> None:
    script = (
        f"trap 'echo ignored' TERM; echo runs; sleep 60 & wait; kill $!;"
        f" {PSQL} -AtXc 'SELECT 1'; exit 5"
    )
    async with beside(config, "--", "sh", "-c", script) as proxy:
        await proxy.printed("runs\n")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended(START_SECONDS_MAX) == 5
    assert (proxy.out, proxy.err) == ("runs\nignored\n1\n", "")


async def test_a_signal_that_ends_the_command_is_in_the_exit_code(config: str) -> None:
    async with beside(config, "--", "sh", "-c", "echo runs; exec sleep 60") as proxy:
        await proxy.printed("runs\n")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 128 + signal.SIGTERM


async def test_sessions_that_the_command_leaves_are_drained_until_a_signal(config: str) -> None:
    script = f"""
        {PSQL} -AtXc 'SELECT pg_sleep(60)' >&2 &
        sleeping="SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"
        until {PSQL} -AtXc "$sleeping" | grep -q 1; do :; done
        echo done $$; exit 4"""
    async with beside(config, "--", "sh", "-c", script) as proxy:
        await eventually(lambda: re.search(r"done \d+\n", proxy.out), "it ends", START_SECONDS_MAX)

        command = int(proxy.out.split()[1])
        await eventually(lambda: not Path(f"/proc/{command}").exists(), "the command has ended")
        assert proxy.running
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 4
    assert "connection to server was lost" in proxy.err


async def test_a_signal_while_it_waits_for_the_login_ends_it(config: str) -> None:
    connected = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with beside(config, f"--upstream.port={port}", "--", "echo", "it ran") as proxy:
            async with asyncio.timeout(START_SECONDS_MAX):
                await connected.wait()
            proxy.send(signal.SIGTERM)
            assert await proxy.ended() == 128 + signal.SIGTERM
    assert proxy.out == ""


@asynccontextmanager
async def in_terminal(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Run it in a session with a terminal of its own; yield it and the terminal's other side."""
    start = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        " os.execv(sys.executable, [sys.executable, '-m', 'proxy', *sys.argv[1:]])"
    )
    ours, its = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", start, *arguments),
        stdin=its,
        stdout=its,
        stderr=its,
        env=without_own_account(os.environ),
    )
    os.close(its)
    try:
        yield process, ours
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


async def test_ctrl_c_reaches_the_command_once_as_from_a_shell(config: str) -> None:
    code = COUNTING.format(first="SIGINT", last="SIGTERM")
    os_read = b""
    command = ("exec", "--config", config, "--", sys.executable, "-uc", code)
    async with in_terminal(*command) as (process, terminal):
        os.set_blocking(terminal, False)

        def printed(text: bytes) -> bool:
            nonlocal os_read
            with suppress(BlockingIOError):
                os_read += os.read(terminal, 65536)
            return text in os_read

        await eventually(lambda: printed(b"runs"), "it runs", START_SECONDS_MAX)
        os.write(terminal, b"\x03")
        await eventually(lambda: printed(b"one"), "it is interrupted")
        process.send_signal(signal.SIGTERM)  # passed on after anything that was sent before
        async with asyncio.timeout(START_SECONDS_MAX):
            assert await process.wait() == 1
    assert b"Traceback" not in os_read
