"""`demo` as a person sees it: what it prints works, and nothing is left when it stops.

A real process each time, which starts real PostgreSQL servers; its children are found by parent,
its directories by where these children live.
"""

import os
import re
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.emulator.cluster import CLIENT_ID
from tests.support.closed_checkout import ClosedCheckout
from tests.support.proxy_process import (
    ROOT,
    START_SECONDS_MAX,
    ProxyProcess,
    alive,
    descendants,
    run_to_end,
    started_process,
)
from tests.support.running import eventually, psql_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc"),
]

FREE_PORTS = ("--listen.port", "0", "--admin.port", "0")
POOL = ("--upstream.pool", "session")
# The guide's own kind of program, with asyncpg.
OWN_TOKENS = """
import asyncio, os
import asyncpg
from databricks.sdk import WorkspaceClient

workspace = WorkspaceClient()


def new_token():
    endpoint = os.environ["ENDPOINT_NAME"]
    return workspace.postgres.generate_database_credential(endpoint=endpoint).token


async def main():
    host = workspace.postgres.get_endpoint(os.environ["ENDPOINT_NAME"]).status.hosts.host
    for where in ({}, {"host": host}):
        connection = await asyncpg.connect(password=new_token, **where)
        print(await connection.fetchval("SELECT current_user"))
        await connection.close()


asyncio.run(main())
"""
LAST_LINE = "Ctrl-C stops everything"


class Leavings:
    """What a running demo has made: processes, and directories outside its TMPDIR."""

    def __init__(self, pid: int, temporary: Path) -> None:
        self.pids = descendants(pid)
        self.temporary = temporary
        self.directories = set(filter(None, map(home_of, self.pids)))

    async def are_gone(self) -> None:
        await eventually(lambda: not alive(self.pids), "every child has ended")
        assert list(filter(Path.exists, self.directories)) == []
        assert content(self.temporary) == []


def home_of(pid: int) -> Path | None:
    """Return the directory that a server of the demo lives in; None for any other process."""
    try:
        directory = Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None  # it ended meanwhile
    return next(
        (p for p in (directory, *directory.parents) if p.name.startswith("lakebase-")), None
    )


def content(directory: Path) -> list[Path]:
    return list(directory.iterdir())


@asynccontextmanager
async def demo(
    temporary: Path, *flags: str, environment: dict[str, str] | None = None
) -> AsyncIterator[ProxyProcess]:
    private = {"TMPDIR": str(temporary), **(environment or {})}
    async with started_process("demo", *flags, environment=private) as proxy:
        yield proxy


def printed_commands(proxy: ProxyProcess) -> list[list[str]]:
    """Return the psql commands that a person would paste."""
    commands = [line.strip() for line in proxy.out.splitlines() if line.startswith("  psql ")]
    return [shlex.split(command) for command in commands]


def printed_exports(proxy: ProxyProcess) -> str:
    """Return the environment for programs that get their own tokens."""
    lines = proxy.out.splitlines()
    guide = lines.index(next(line for line in lines if line.startswith("Programs that get")))
    return "\n".join(line for line in lines[guide:] if line.startswith("  export "))


async def paste(command: list[str]) -> str:
    assert command[0] == "psql"
    code, out, err = await run_to_end(psql_path(), "-X", "-At", *command[1:])
    assert (code, err) == (0, "")
    return out.strip()


@pytest.mark.parametrize(
    ("number", "flags"), [(signal.SIGINT, ()), (signal.SIGTERM, POOL)], ids=["SIGINT", "pool"]
)
async def test_the_printed_commands_work_and_a_signal_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals, flags: tuple[str, ...]
) -> None:
    async with demo(tmp_path, *FREE_PORTS, *flags) as proxy:
        await proxy.printed(LAST_LINE)
        first, by_name, by_options, uncovered, *pooled = printed_commands(proxy)
        assert await paste(first) == f"{CLIENT_ID}|databricks_postgres"
        assert await paste(by_name) == "one"
        assert await paste(by_options) == "two"
        code, out, err = await run_to_end(psql_path(), "-X", "-At", *uncovered[1:])
        assert (code, out) == (2, "")
        assert "no shard has this shard key" in err
        assert "reason=mapping_not_found" in err
        assert "HINT: " in err
        program = f"{printed_exports(proxy)}\nexec {shlex.join((sys.executable, '-c', OWN_TOKENS))}"
        code, out, err = await run_to_end("bash", "-c", program)
        assert (code, out.split()) == (0, [CLIENT_ID, CLIENT_ID]), err
        if flags:
            one, other = [await paste(command) for command in pooled]
            assert one == other, "both clients had one session"
        else:
            assert f"With {' '.join(POOL)} " in proxy.out
        bundled = re.search(r"No psql here\? There is one in (\S+)", proxy.out)
        assert bundled is not None
        assert (ROOT / bundled[1] / "psql").exists()
        leavings = Leavings(proxy.pid, tmp_path)
        assert leavings.pids
        assert leavings.directories
        proxy.send(number)
        assert await proxy.ended() == 0
        await leavings.are_gone()
    assert proxy.err == ""


async def test_the_printed_loop_of_a_tenant_goes_on_when_its_shard_changes(tmp_path: Path) -> None:
    async with demo(tmp_path, *FREE_PORTS) as proxy:
        await proxy.printed(LAST_LINE)
        lines = [line.strip() for line in proxy.out.splitlines()]
        (loop,) = [line for line in lines if line.startswith("while ")]
        at = next(at for at, line in enumerate(lines) if line.startswith("export "))
        export, move, ops, verify = lines[at : at + 4]
        here = f"cd {shlex.quote(str(ROOT))}; PATH={psql_path().parent}:$PATH; {export}; "
        bash = started_process(python=("bash",), program=("-c", here + loop))
        async with bash as looping:
            seconds = START_SECONDS_MAX
            await eventually(lambda: looping.out.count("one") > 1, "it reaches one", seconds)
            moved, pending, verified = [
                await run_to_end("bash", "-c", here + command) for command in (move, ops, verify)
            ]
            # Their progress is on standard error.
            assert moved[0] == 0, moved
            assert pending[:2] == (0, "no operation is pending\n")
            assert verified[0] == 0, verified
            await eventually(lambda: looping.out.count("two") > 1, "it reaches two", seconds)
            for pid in descendants(looping.pid):
                os.kill(pid, signal.SIGTERM)
        names = [line for line in looping.out.splitlines() if line]
        assert names == sorted(names)  # of "one" and "two"
        assert looping.err.count("terminating connection") == 1
        proxy.send(signal.SIGINT)
        assert await proxy.ended() == 0
    assert proxy.err == ""


async def test_from_a_closed_folder_the_printed_commands_work(
    closed_checkout: ClosedCheckout,
) -> None:
    """`make demo` failed as root in a folder such as root's home."""
    private = {"TMPDIR": str(closed_checkout.temporary), "HOME": str(closed_checkout.temporary)}
    python, folder = (*closed_checkout.user, closed_checkout.python), closed_checkout.folder
    async with started_process(
        "demo", *FREE_PORTS, environment=private, python=python, cwd=folder
    ) as proxy:
        await proxy.printed(LAST_LINE)
        bundled = re.search(r"No psql here\? There is one in (\S+)", proxy.out)
        assert bundled is not None
        psql = (*closed_checkout.user, str(folder / bundled[1] / "psql"))
        code, out, err = await run_to_end(*psql, "-X", "-At", *printed_commands(proxy)[0][1:])
        assert (code, out.strip(), err) == (0, f"{CLIENT_ID}|databricks_postgres", "")
        leavings = Leavings(proxy.pid, closed_checkout.temporary)
        assert leavings.directories
        proxy.send(signal.SIGINT)
        assert await proxy.ended() == 0
        await leavings.are_gone()


async def test_without_tcp_the_printed_commands_name_the_socket(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lap-") as directory:
        flags = ("--listen.host=", f"--listen.unix_socket_directory={directory}", "--admin.port=0")
        async with demo(tmp_path, *flags) as proxy:
            await proxy.printed(LAST_LINE)
            assert await paste(printed_commands(proxy)[0]) == f"{CLIENT_ID}|databricks_postgres"
            proxy.send(signal.SIGINT)
            assert await proxy.ended() == 0


async def test_ctrl_c_with_a_client_connected_is_a_clean_stop_too(tmp_path: Path) -> None:
    drain = ("--shutdown.drain_seconds", "0")
    async with demo(tmp_path, *FREE_PORTS, *drain) as proxy:
        await proxy.printed(LAST_LINE)
        leavings = Leavings(proxy.pid, tmp_path)
        command = printed_commands(proxy)[0]
        host, port = command[command.index("-h") + 1], command[command.index("-p") + 1]
        with socket.create_connection((host, int(port)), 5):
            proxy.send(signal.SIGINT)
            assert await proxy.ended() in (0, 3)
        await leavings.are_gone()
    assert "Traceback" not in proxy.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
async def test_a_signal_while_it_starts_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with demo(tmp_path, *FREE_PORTS) as proxy:
        await eventually(lambda: descendants(proxy.pid), "its first child", START_SECONDS_MAX)
        leavings = Leavings(proxy.pid, tmp_path)
        proxy.send(number)
        assert await proxy.ended(30) == 0
        await leavings.are_gone()
    assert "Traceback" not in proxy.err


async def test_a_chosen_port_of_the_gateway_is_taken_or_the_refusal_names_its_flag(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        async with demo(tmp_path, *FREE_PORTS, "--gateway-port", port) as proxy:
            assert await proxy.ended(30) == 1
    assert f"--gateway-port {port}: " in proxy.err
    assert content(tmp_path) == []
    async with demo(tmp_path, *FREE_PORTS, "--gateway-port", port) as proxy:
        await proxy.printed(LAST_LINE)
        assert f"PGPORT={port} " in printed_exports(proxy)
        proxy.send(signal.SIGINT)
        assert await proxy.ended() == 0


@pytest.mark.parametrize("section", ["listen", "admin"])
async def test_a_busy_port_says_which_flag_to_use_and_leaves_nothing_behind(
    tmp_path: Path, section: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        flags = [*FREE_PORTS, f"--{section}.port", str(busy.getsockname()[1])]
        async with demo(tmp_path, *flags) as proxy:
            assert await proxy.ended(30) == 1
    assert f"--{section}.port" in proxy.err
    assert "Traceback" not in proxy.err
    assert len(proxy.err.splitlines()) == 1
    assert proxy.out == ""
    assert content(tmp_path) == []


async def test_a_users_own_databricks_account_is_not_touched(tmp_path: Path) -> None:
    environment = {
        "DATABRICKS_HOST": "https://not-a-real-workspace.invalid",
        "DATABRICKS_TOKEN": "not-a-real-secret",
        "PGHOST": "not-a-real-host.invalid",
        "ENDPOINT_NAME": "projects/p/branches/b/endpoints/e",
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    async with demo(tmp_path, *FREE_PORTS, environment=environment) as proxy:
        await proxy.printed(LAST_LINE)
        assert await paste(printed_commands(proxy)[0]) == f"{CLIENT_ID}|databricks_postgres"
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


async def test_a_users_own_configuration_does_not_reach_the_emulator(tmp_path: Path) -> None:
    """Settings that lead to a Lakebase do not lead to the emulator."""
    file = tmp_path / "own.toml"
    file.write_text(
        '[workspaces.b]\nhost = "https://b.example.com"\ntoken = "not-a-real-token"\n'
        '[credentials]\npassword_file = "/nonexistent/password"\n'
        '[upstream]\nworkspace = "b"\ndatabase = "mine"\nuser = "me"\nread_only = true\n'
        'endpoint = "projects/p/branches/b/endpoints/e"\nsslmode = "require"\n'
    )
    async with demo(tmp_path, *FREE_PORTS, "--config", str(file)) as proxy:
        await proxy.printed(LAST_LINE)
        assert await paste(printed_commands(proxy)[0]) == f"{CLIENT_ID}|databricks_postgres"
        assert await paste(printed_commands(proxy)[2]) == "two"
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


async def test_a_configuration_error_exits_with_2_before_anything_is_started(
    tmp_path: Path,
) -> None:
    async with demo(tmp_path, "--listen.port", "none") as proxy:
        assert await proxy.ended(30) == 2
    assert "listen.port" in proxy.err
