"""The first token of each workspace: real processes, the real SDK, the admin address over HTTP.

A proxy with a wrong secret started, was ready, and refused its first client: a rollout replaced
every pod that worked.
"""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProcess
from tests.support.admin_address import ask
from tests.support.proxy_process import (
    START_SECONDS_MAX,
    ProxyProcess,
    run_to_end,
    started_process,
)
from tests.support.running import WAIT_SECONDS_MAX, eventually, proxy_values, toml

pytestmark = pytest.mark.slow

ADMIN = {"enabled": True, "port": 0}
NO_TOKEN = "no token yet; /startup fails until there is one"


def admin_port(proxy: ProxyProcess) -> int:
    return int(proxy.events("serving")[0]["admin_port"])


async def probes(proxy: ProxyProcess) -> tuple[int, int, int]:
    """Return what the three probes answer: startup, readiness, liveness."""
    paths = ("/startup", "/readiness", "/liveness")
    startup, readiness, liveness = [(await ask(admin_port(proxy), path)).status for path in paths]
    return startup, readiness, liveness


async def started(proxy: ProxyProcess) -> None:
    """Wait until `/startup` succeeds."""
    arguments = ("wait", "--admin.port", str(admin_port(proxy)), "--timeout", "60")
    code, _, err = await run_to_end(sys.executable, "-m", "proxy", *arguments)
    assert code == 0, err


@pytest.mark.parametrize("workers", [1, 2])
async def test_startup_succeeds_after_one_mint_that_wakes_no_database(
    start_process: StartProcess, lakebase: Lakebase, workers: int
) -> None:
    accepted = lakebase.gateway.accepted
    minted = lakebase.workspace.calls[Call.CREDENTIAL]
    proxy = await start_process(admin=ADMIN, listen={"port": 0, "workers": workers})
    await started(proxy)
    assert await probes(proxy) == (200, 200, 200)
    assert lakebase.workspace.calls[Call.CREDENTIAL] == minted + 1
    assert lakebase.gateway.accepted == accepted
    assert proxy.events(NO_TOKEN) == []


async def test_with_a_wrong_secret_startup_fails_and_says_why_until_the_secret_is_right(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not-the-secret")
    workspace = {"client_secret": "", "client_secret_file": str(secret)}
    proxy = await start_process(admin=ADMIN, workspace=workspace)
    await eventually(lambda: proxy.events(NO_TOKEN), "it warns", WAIT_SECONDS_MAX)
    (line,) = proxy.events(NO_TOKEN)
    assert (line["level"], line["workspace"]) == ("warning", "workspace")
    assert line["reason"] == "workspace_login_failed"
    assert "secret" in line["hint"]
    # Readiness never depends on the workspace's API: an outage must not take pods out.
    assert await probes(proxy) == (503, 200, 200)
    (error,) = json.loads((await ask(admin_port(proxy), "/status")).body)["errors"]
    assert error["reason"] == "workspace_login_failed"
    arguments = ("wait", "--admin.port", str(admin_port(proxy)), "--timeout", "0.3")
    code, _, err = await run_to_end(sys.executable, "-m", "proxy", *arguments)
    assert (code, "/startup answers 503" in err) == (1, True)
    secret.write_text(lakebase.client_secret)
    await started(proxy)
    assert len(proxy.events(NO_TOKEN)) == 1


async def test_an_outage_after_the_start_changes_no_probe(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    proxy = await start_process(admin=ADMIN, credentials={"token_max_age_seconds": 0})
    await started(proxy)
    lakebase.workspace.fail(Call.CREDENTIAL, faults.UNAVAILABLE)
    assert await probes(proxy) == (200, 200, 200)


async def test_startup_that_requires_nothing_succeeds_without_a_token(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    minted = lakebase.workspace.calls[Call.CREDENTIAL]
    proxy = await start_process(admin=ADMIN, startup={"require": "none"})
    assert await probes(proxy) == (200, 200, 200)
    assert lakebase.workspace.calls[Call.CREDENTIAL] == minted


async def test_with_a_password_nothing_is_minted(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text("not-a-real-password")
    minted = lakebase.workspace.calls[Call.CREDENTIAL]
    proxy = await start_process(
        admin=ADMIN, credentials={"password_file": str(password)}, upstream={"user": "native"}
    )
    await started(proxy)
    assert lakebase.workspace.calls[Call.CREDENTIAL] == minted


# -- systemd -------------------------------------------------------------------------------------


def start_options(
    lakebase: Lakebase, tmp_path: Path, **sections: Mapping[str, object]
) -> tuple[str, str]:
    """Return the flags of a proxy with these sections."""
    config = tmp_path / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, {"admin": ADMIN, **sections})))
    return ("--config", str(config))


async def test_systemd_hears_ready_only_after_the_first_token(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # It heard it when the listener was open: units ordered after this one could not log in, and
    # `systemctl start` succeeded with a wrong secret.
    secret = tmp_path / "secret"
    secret.write_text("not-the-secret")
    workspace = {"client_secret": "", "client_secret_file": str(secret)}
    options = start_options(lakebase, tmp_path, workspace=workspace)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        async with started_process("run", *options, environment=environment) as proxy:
            await proxy.serving()
            await eventually(lambda: proxy.events(NO_TOKEN), "it warns", WAIT_SECONDS_MAX)
            proxy.send(signal.SIGHUP)
            await eventually(lambda: proxy.events("reloaded"), "it reloads", WAIT_SECONDS_MAX)
            with pytest.raises(BlockingIOError):
                systemd.recv(4096)
            secret.write_text(lakebase.client_secret)
            async with asyncio.timeout(START_SECONDS_MAX):
                heard = await asyncio.get_running_loop().sock_recv(systemd, 4096)
            assert heard == b"READY=1"
            assert await probes(proxy) == (200, 200, 200)


async def test_systemd_hears_ready_at_once_where_no_token_is_required(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase.workspace.fail(Call.TOKEN, faults.HANG)
    options = start_options(lakebase, tmp_path, startup={"require": "none"})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        async with started_process("run", *options, environment=environment):
            async with asyncio.timeout(START_SECONDS_MAX):
                heard = await asyncio.get_running_loop().sock_recv(systemd, 4096)
            assert heard == b"READY=1"
