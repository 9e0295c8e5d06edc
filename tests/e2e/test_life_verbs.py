"""`wait`, `shutdown` and POST /quitquitquit against a real proxy: each a process of its own."""

import signal
import sys
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProcess
from tests.support.admin_address import ask
from tests.support.client import plain_client
from tests.support.proxy_process import ProxyProcess, run_to_end, started_process
from tests.support.running import eventually, proxy_values, toml

pytestmark = pytest.mark.slow


def admin(port: int, **more: object) -> dict[str, object]:
    return {"enabled": True, "port": port, **more}


async def verb(*arguments: str, port: int) -> tuple[int, str, str]:
    """Run a verb with what the proxy is configured with, as in the same container."""
    environment = {"LAKEBASE_PROXY_ADMIN__PORT": str(port)}
    command = (sys.executable, "-m", "proxy", *arguments)
    return await run_to_end(*command, environment=environment)


def stopped_well(proxy: ProxyProcess) -> bool:
    (line,) = proxy.events("draining")
    return line["signal"] == "quitquitquit" and "Traceback" not in proxy.err


async def test_wait_returns_as_soon_as_a_proxy_that_starts_later_is_ready(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, {"admin": admin(unused_tcp_port)})))
    async with (
        started_process("wait", "--config", str(file), "--timeout", "60") as waiting,
        started_process("run", "--config", str(file)) as proxy,
    ):
        assert await waiting.ended(60) == 0
        await proxy.serving()
        assert (waiting.out, waiting.err) == ("", "")
        assert await verb("wait", "--timeout=5", port=unused_tcp_port) == (0, "", "")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


async def test_wait_ends_with_1_when_no_proxy_is_there_and_names_the_address(
    unused_tcp_port: int,
) -> None:
    code, out, err = await verb("wait", "--timeout", "0.3", port=unused_tcp_port)
    assert (code, out) == (1, "")
    assert "not ready within 0.3 seconds" in err
    assert f"127.0.0.1:{unused_tcp_port}" in err
    assert len(err.splitlines()) == 1


async def test_wait_ends_with_1_while_a_proxy_drains(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    proxy = await start_process(
        admin=admin(unused_tcp_port), shutdown={"accept_seconds": 60, "drain_seconds": 60}
    )
    proxy.send(signal.SIGTERM)
    await eventually(lambda: proxy.events("draining"), "it drains")
    code, _, err = await verb("wait", "--timeout", "0.2", port=unused_tcp_port)
    assert code == 1
    assert "answers 503" in err
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() == 0


async def test_shutdown_drains_a_proxy_that_takes_it_and_that_exits_with_0(
    start_process: StartProcess, lakebase: Lakebase, unused_tcp_port: int
) -> None:
    proxy = await start_process(admin=admin(unused_tcp_port, quit=True))
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("BEGIN")
        await eventually(lambda: lakebase.gateway.open_sessions == 1, "it is served")
        assert b"BEGIN" in await client.receive()
        assert await verb("shutdown", port=unused_tcp_port) == (0, "", "")
        await eventually(lambda: proxy.events("draining"), "it drains")
        await client.query("COMMIT")  # what had begun is finished
        assert b"COMMIT" in await client.receive()
    assert await proxy.ended() == 0
    assert stopped_well(proxy)


async def test_shutdown_without_admin_quit_changes_nothing_and_says_what_to_set(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    proxy = await start_process(admin=admin(unused_tcp_port))
    code, out, err = await verb("shutdown", port=unused_tcp_port)
    assert (code, out) == (1, "")
    assert "--admin.quit true" in err
    assert (await ask(unused_tcp_port, "/quitquitquit", "POST")).status in (403, 404)
    assert (await ask(unused_tcp_port, "/readiness")).status == 200
    assert proxy.running
    assert proxy.events("draining") == []


async def test_shutdown_without_a_proxy_ends_with_1(unused_tcp_port: int) -> None:
    code, out, err = await verb("shutdown", port=unused_tcp_port)
    assert (code, out) == (1, "")
    assert f"no proxy answers on http://127.0.0.1:{unused_tcp_port}" in err


@pytest.mark.parametrize("verb_of", ["wait", "shutdown"])
async def test_without_an_admin_address_there_is_no_proxy_to_ask(verb_of: str) -> None:
    arguments = (verb_of, "--admin.enabled", "false")
    code, out, err = await run_to_end(sys.executable, "-m", "proxy", *arguments)
    assert (code, out) == (2, "")
    assert "admin.enabled" in err


async def test_quitquitquit_is_post_and_ends_an_idle_proxy_with_0(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    proxy = await start_process(admin=admin(unused_tcp_port, quit=True))
    assert (await ask(unused_tcp_port, "/quitquitquit")).status == 405
    assert proxy.running
    assert (await ask(unused_tcp_port, "/quitquitquit", "POST")).status == 202
    assert await proxy.ended() == 0
    assert stopped_well(proxy)


async def test_quitquitquit_cuts_what_does_not_end_in_time_and_exits_with_3(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    proxy = await start_process(
        admin=admin(unused_tcp_port, quit=True), shutdown={"drain_seconds": 0.2}
    )
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("SELECT pg_sleep(60)")
        assert (await ask(unused_tcp_port, "/quitquitquit", "POST")).status == 202
        assert await proxy.ended() == 3
    assert stopped_well(proxy)


async def test_the_signal_after_a_pre_stop_hook_that_asks_to_quit_cuts_nothing(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    # The hook asks, and the kubelet sends its one SIGTERM after it: that was taken for the second
    # signal, and every transaction was cut.
    shutdown = {"drain_seconds": 60}
    proxy = await start_process(admin=admin(unused_tcp_port, quit=True), shutdown=shutdown)
    async with plain_client(proxy) as client, plain_client(proxy) as stuck:
        for one in (client, stuck):
            await one.start_up()
            await one.query("BEGIN")
            assert b"BEGIN" in await one.receive()
        assert (await ask(unused_tcp_port, "/quitquitquit", "POST")).status == 202
        await eventually(lambda: proxy.events("draining"), "it drains")
        proxy.send(signal.SIGTERM)
        absorbed = "draining already; one more signal cuts what is left"
        await eventually(lambda: proxy.events(absorbed), "it says so")
        await client.query("COMMIT")
        assert b"COMMIT" in await client.receive()
        assert proxy.running
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 3
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [1]
    assert stopped_well(proxy)


async def test_quitquitquit_during_a_drain_hastens_nothing(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    shutdown = {"accept_seconds": 60, "drain_seconds": 60}
    proxy = await start_process(admin=admin(unused_tcp_port, quit=True), shutdown=shutdown)
    async with plain_client(proxy) as client:
        await client.start_up()
        proxy.send(signal.SIGTERM)
        await eventually(lambda: proxy.events("draining"), "it drains")
        assert (await ask(unused_tcp_port, "/quitquitquit", "POST")).status == 202
        await client.query("SELECT 'still served'")
        assert b"still served" in await client.receive()
        proxy.send(signal.SIGTERM)
        assert (await client.error()).sqlstate == "57P01"  # it was idle
    assert await proxy.ended() == 0
    assert len(proxy.events("draining")) == 1
