"""Several workers that serve as one proxy: real processes, real drivers, real signals.

What one process does is tested elsewhere; here is what several could do differently.
"""

import asyncio
import errno
import os
import re
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.endpoints import neon_error
from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import CancelRequest
from proxy.workers.shared_counters import SILENT_SECONDS_MAX
from proxy.workers.worker_handle import END_SECONDS_MAX
from tests.e2e.conftest import StartProcess
from tests.support.admin_address import ask
from tests.support.client import Client, plain_client, startup
from tests.support.proxy_process import (
    ProxyProcess,
    alive,
    descendants,
    run_to_end,
    started_process,
)
from tests.support.running import (
    WAIT_SECONDS_MAX,
    asyncpg_arguments,
    eventually,
    first_lines,
    libpq,
    proxy_values,
    toml,
)
from tests.support.sharding import TABLE, Section, shard_by_psycopg, sharded

pytestmark = pytest.mark.slow  # each starts several processes

TWO = {"port": 0, "workers": 2}
SLEEP = "SELECT pg_sleep(60)"
READY_TO_SERVE = "worker serves"


def by_worker(proxy: ProxyProcess) -> Counter[int]:
    """Count the sessions by their worker."""
    return Counter(line["worker"] for line in first_lines(proxy))


def lines_by_worker(proxy: ProxyProcess, event: str) -> Counter[int]:
    """Count the log lines of an event by the worker that wrote them."""
    return Counter(line["worker"] for line in proxy.events(event))


def worker_pids(proxy: ProxyProcess) -> set[int]:
    """Return the workers: the descendants without children."""
    return {pid for pid in alive(descendants(proxy.pid)) if not descendants(pid)}


def fork_server_pid(proxy: ProxyProcess) -> int:
    """Return the process that forks them."""
    (pid,) = descendants(proxy.pid) - worker_pids(proxy)
    return pid


@asynccontextmanager
async def served(proxy: ProxyProcess, count: int) -> AsyncIterator[Sequence[Client]]:
    """Yield so many clients that are served."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(plain_client(proxy)) for _ in range(count)]
        await asyncio.gather(*(client.start_up() for client in clients))
        yield clients


async def answers(client: Client) -> bool:
    """Ask a session whether it lives; False when it has ended."""
    with suppress(ConnectionError):
        await client.query("SELECT 'it lives'")
        return b"it lives" in await client.receive()
    return False


async def metrics(port: int) -> dict[str, float]:
    """Return the sum of each sample name's values."""
    sums: defaultdict[str, float] = defaultdict(float)
    text = (await ask(port, "/metrics")).body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name.removeprefix("lakebase_proxy_")] += sample.value
    return dict(sums)


async def until_connected(port: int, count: int) -> None:
    """Wait until so many connections are open in all processes together.

    A line of the log says that a session is over a moment before its worker counts it so.
    """
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while (await metrics(port))["connections"] != count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


def shown_of(pid: int) -> bytes:
    """Return a process's arguments and environment."""
    of = Path(f"/proc/{pid}")
    return (of / "cmdline").read_bytes() + (of / "environ").read_bytes()


async def status(port: int) -> dict[str, Any]:
    """Return what /status shows."""
    content: dict[str, Any] = (await ask(port, "/status")).json
    return content


def errors(proxy: ProxyProcess) -> list[dict[str, Any]]:
    """Return the lines above info."""
    return [line for line in proxy.lines if line["level"] not in ("debug", "info")]


# -- who gets what -------------------------------------------------------------------------------


async def test_of_200_sessions_each_worker_has_half_to_within_20_percent(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen=TWO)
    async with served(proxy, 100):  # at once
        for _ in range(100):  # and one after another
            async with served(proxy, 1):
                pass
    await eventually(lambda: by_worker(proxy).total() == 200, "all were served")
    shares = by_worker(proxy)
    assert set(shares) == {1, 2}
    assert all(80 <= share <= 120 for share in shares.values())
    connections = [line["connection"] for line in first_lines(proxy)]
    assert len(set(connections)) == 200, "each has a number of its own in the log"
    assert errors(proxy) == []


async def test_a_worker_whose_sessions_end_gets_the_next_ones(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin)
    async with served(proxy, 8) as clients:
        await eventually(lambda: by_worker(proxy) == {1: 4, 2: 4}, "they are spread")
        mine = {line["connection"] for line in first_lines(proxy) if line["worker"] == 1}
        # Clients connect one after another, so that their numbers are those of the log.
        for number, client in enumerate(clients, 1):
            if number in mine:
                client.close()
        await eventually(lambda: lines_by_worker(proxy, "session ended") == {1: 4}, "one has none")
        await until_connected(unused_tcp_port, 4)
        async with served(proxy, 4):
            await eventually(lambda: by_worker(proxy) == {1: 8, 2: 4}, "it gets all four")


async def test_max_connections_is_a_bound_of_all_workers_together(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen={**TWO, "max_connections": 5}, admin=admin)
    async with served(proxy, 5):
        shown = await status(unused_tcp_port)
        assert (shown["sessions"], shown["sessions_max"], shown["sessions_opening"]) == (5, 5, 0)
        for _ in range(4):  # whichever worker it comes to
            async with plain_client(proxy) as one_more:
                await one_more.send(startup())
                assert (await one_more.error()).sqlstate == "53300"
        # The page is the supervisor's, and shows what all of them have counted.
        shown = await status(unused_tcp_port)
        text = "Serving 5 sessions. 4 refusals in the last minute: too_many_connections."
        assert (shown["health"]["text"], shown["facts"]["workers_serving"]) == (text, 2)
        assert (shown["last_minute"]["started"], shown["facts"]["roles"]) == (5, [CLIENT_ID])
        (target,) = shown["targets"]
        assert target["connect_p50_seconds"] > 0
    await eventually(lambda: lines_by_worker(proxy, "session ended").total() == 5, "slots are free")
    async with served(proxy, 5):
        pass
    counted = await metrics(unused_tcp_port)
    assert counted["sessions_max"] == 5


async def test_workers_share_one_token_one_look_up_and_a_new_token_when_one_is_refused(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    proxy = await start_process(listen=TWO)
    async with served(proxy, 6):
        assert len(lakebase.workspace.mints) == 1
    # The front end has another idea of the time than we have.
    lakebase["one"].endpoint.refuse(neon_error("JWT token has expired"), 1)
    async with served(proxy, 6):
        assert len(lakebase.workspace.mints) == 2
    await eventually(lambda: by_worker(proxy).total() == 12, "all were served")
    assert set(by_worker(proxy)) == {1, 2}
    assert errors(proxy) == []


async def test_each_target_keeps_its_way_in_every_worker(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    # One in a workspace section of its own, and so with tokens of its own.
    two = lakebase["two"].endpoint
    workspace = {
        "host": lakebase.workspace_url,
        "client_id": lakebase.client_id,
        "client_secret": lakebase.client_secret,
        "auth_type": "oauth-m2m",
    }
    proxy = await start_process(
        listen=TWO,
        **{
            "workspaces.other": workspace,
            "targets.second": {
                "endpoint": two.name,
                "hostaddr": lakebase.host_address,
                "workspace": "other",
            },
            "databases": {"first": "upstream", "second": "second"},
        },
    )
    found = []
    async with AsyncExitStack() as stack:
        for name in ("first", "second") * 2 + ("second", "first") * 2:
            where = libpq(proxy) | {"dbname": name}
            connecting = psycopg.AsyncConnection.connect(**where)
            connection = await stack.enter_async_context(await connecting)
            row = await (await connection.execute("TABLE shard_identity")).fetchone()
            assert row is not None
            found.append((name, *row))
    await eventually(lambda: by_worker(proxy) == {1: 4, 2: 4}, "they are spread")
    assert len(set(found)) == 2, found
    assert len(lakebase.workspace.mints) == 2


async def test_a_refusal_of_the_workspace_reaches_the_client_of_a_worker_as_it_is(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    lakebase.workspace.api.clients.clear()
    proxy = await start_process(listen=TWO)
    for _ in range(2):
        async with plain_client(proxy) as client:
            await client.send(startup())
            error = await client.error()
            assert (error.sqlstate, error.text(b"D").split()[0]) == (
                "28000",
                "reason=workspace_login_failed",
            )


async def test_the_unix_socket_leads_to_all_workers_and_is_gone_after_them(
    start_process: StartProcess, tmp_path: Path
) -> None:
    proxy = await start_process(listen={**TWO, "unix_socket_directory": str(tmp_path)})
    where = libpq(proxy) | {"host": str(tmp_path)}
    async with AsyncExitStack() as stack:
        for _ in range(4):
            connecting = psycopg.AsyncConnection.connect(**where)
            await stack.enter_async_context(await connecting)
        await eventually(lambda: by_worker(proxy) == {1: 2, 2: 2}, "they are spread")
    socket_file = tmp_path / f".s.PGSQL.{proxy.listen_port}"
    assert socket_file.exists()
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() == 0
    assert not socket_file.exists()


async def test_without_tcp_the_unix_socket_alone_leads_to_all_workers(
    start_process: StartProcess, tmp_path: Path
) -> None:
    directory = {"host": "", "port": 6000, "unix_socket_directory": str(tmp_path)}
    proxy = await start_process(listen={**TWO, **directory})
    assert (proxy.listen_host, proxy.listen_port) == (str(tmp_path), 6000)
    async with AsyncExitStack() as stack:
        for _ in range(4):
            connecting = psycopg.AsyncConnection.connect(**libpq(proxy))
            await stack.enter_async_context(await connecting)
        await eventually(lambda: by_worker(proxy) == {1: 2, 2: 2}, "they are spread")


async def test_tokens_are_in_no_processs_arguments_or_environment(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    proxy = await start_process(listen=TWO)
    async with served(proxy, 4):
        processes = {proxy.pid, *descendants(proxy.pid)}
        assert len(processes) == 4
        for pid in processes:
            shown = shown_of(pid)
            assert b"proxy" in shown
            assert b"eyJ" not in shown, "a token of the emulator begins so"
            assert lakebase.client_secret.encode() not in shown


# -- cancel --------------------------------------------------------------------------------------


async def test_w43_a_driver_cancels_its_query_in_whichever_worker_it_is(
    start_process: StartProcess, lakebase: Lakebase, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin)
    activity = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"

    async def runs() -> None:
        cluster = lakebase["one"].cluster
        await eventually(lambda: cluster.execute(activity) == "1", "the query runs")

    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(**libpq(proxy), autocommit=True)
            )
            for _ in range(6)
        ]
        await eventually(lambda: by_worker(proxy) == {1: 3, 2: 3}, "they are spread")
        for connection in connections:
            running = asyncio.create_task(connection.execute(SLEEP))
            await runs()
            await connection.cancel_safe(timeout=10)
            with pytest.raises(psycopg.errors.QueryCanceled):
                await running
        for _ in range(4):
            other = await asyncpg.connect(**asyncpg_arguments(proxy))
            given_up = asyncio.create_task(other.fetch(SLEEP))
            await runs()
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up  # asyncpg cancels what it does not wait for
            assert await other.fetchval("SELECT 1") == 1
            await other.close()
    counted = await metrics(unused_tcp_port)
    assert counted["cancel_requests_total"] == 10


async def test_w43_a_key_is_found_from_every_worker_and_an_unknown_one_is_counted_once(
    start_process: StartProcess, lakebase: Lakebase, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin)

    async def cancel(key: BackendKeyData) -> None:
        async with plain_client(proxy) as canceller:
            await canceller.send(CancelRequest(key.pid, key.key).encode())
            assert await canceller.receive_rest() == b""

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(plain_client(proxy)) for _ in range(4)]
        keys = [await client.start_up() for client in clients]
        for key in keys:
            assert key is not None
            for _ in range(2):  # while all have the same load they come to the two in turn
                await cancel(key)
        assert [record.cancel_known for record in lakebase.gateway.cancels] == [True] * 8
        await cancel(BackendKeyData(12345, Secret(b"none")))
    assert len(lakebase.gateway.cancels) == 8
    text = (await ask(unused_tcp_port, "/metrics")).body.decode()
    results = {
        sample.labels["result"]: sample.value
        for family in text_string_to_metric_families(text)
        if family.name == "lakebase_proxy_cancel_requests"
        for sample in family.samples
    }
    assert (results["forwarded"], results["unknown_key"]) == (8, 1)
    assert sum(results.values()) == 9


# -- what is seen --------------------------------------------------------------------------------


async def test_metrics_and_status_are_the_sums_of_all_processes(
    start_process: StartProcess, lakebase: Lakebase, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin)
    for _ in range(7):
        async with served(proxy, 1):
            pass
        await until_connected(unused_tcp_port, 0)
    async with served(proxy, 5):
        counted = await metrics(unused_tcp_port)
        shown = await status(unused_tcp_port)
    await eventually(lambda: by_worker(proxy).total() == 12, "all were served")
    assert set(by_worker(proxy)) == {1, 2}
    assert counted["sessions_started_total"] == 12
    assert counted["connections_accepted_total"] == 12
    assert counted["sessions_ended_total"] == 7
    assert (
        counted["sessions_active"] == counted["connections"] == counted["session_slots_used"] == 5
    )
    assert counted["tokens_minted_total"] == len(lakebase.workspace.mints) == 1
    assert counted["build_info"] == 1
    assert counted["worker_deaths_total"] == 0
    (target,) = shown["targets"]
    assert (shown["sessions"], target["sessions"], target["sessions_started"]) == (5, 5, 12)
    assert target["host"] == lakebase.shards[0].endpoint.host
    assert len(shown["tokens"]) == 1
    page = (await ask(unused_tcp_port, "/metrics")).body.decode()
    names = [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]
    assert len(set(names)) == len(names), "each series is there once"


async def test_a_worker_that_is_stuck_delays_a_scrape_by_a_second_and_is_killed_by_a_drain(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin, shutdown={"drain_seconds": 0.2})
    async with served(proxy, 4):
        before = await metrics(unused_tcp_port)
        os.kill(min(worker_pids(proxy)), signal.SIGSTOP)
        began = time.monotonic()
        assert (await metrics(unused_tcp_port))["sessions_started_total"] == 4
        assert time.monotonic() - began < 3
        assert before["sessions_started_total"] == 4
        proxy.send(signal.SIGTERM)
        assert await proxy.ended(END_SECONDS_MAX + 10) == 3
    # The other one's sessions were idle: they were ended, not cut.
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [2]


async def test_a_reload_reaches_all_workers_and_one_that_is_wrong_reaches_none(
    start_process: StartProcess, tmp_path: Path
) -> None:
    proxy = await start_process(listen=TWO)
    config = tmp_path / "proxy.toml"
    written = config.read_text()

    async def databases() -> set[str]:
        found = set()
        async with AsyncExitStack() as stack:
            for _ in range(4):
                where = libpq(proxy) | {"dbname": ""}
                connecting = psycopg.AsyncConnection.connect(**where)
                connection = await stack.enter_async_context(await connecting)
                row = await (await connection.execute("SELECT current_database()")).fetchone()
                assert row is not None
                found.add(row[0])
        return found

    assert await databases() == {"databricks_postgres"}
    config.write_text(written + 'database = "nowhere"\nsslmode = "wrong"\n')
    proxy.send(signal.SIGHUP)
    refusal = "not reloaded; the configuration stays as it was"
    await eventually(lambda: proxy.events(refusal), "it is refused")
    assert await databases() == {"databricks_postgres"}
    config.write_text(written + 'database = "postgres"\n')
    proxy.send(signal.SIGHUP)
    await eventually(lambda: proxy.events("reloaded"), "it is taken")
    assert proxy.events("reloaded")[0]["changed"] == ["upstream.database"]
    assert await databases() == {"postgres"}
    # A worker that comes later serves by it, too.
    os.kill(min(worker_pids(proxy)), signal.SIGKILL)
    await eventually(lambda: proxy.events("worker died"), "it is dead")
    await eventually(lambda: len(worker_pids(proxy)) == 2, "another has come")
    assert await databases() == {"postgres"}


async def test_mappings_that_a_reload_brings_are_those_of_all_workers_and_of_new_sessions(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.csv"
    shard_map: Section = {"kind": "list", "key_type": "text", "mappings_file": str(file)}
    file.write_text("key,target\na,one\n")
    proxy = await start_process(listen=TWO, **sharded(lakebase, shard_map))
    async with AsyncExitStack() as stack:
        staying = []
        for _ in range(2):
            connecting = psycopg.AsyncConnection.connect(**libpq(proxy, dbname="x@a"))
            staying.append(await stack.enter_async_context(await connecting))
        await eventually(lambda: by_worker(proxy) == {1: 1, 2: 1}, "one in each")
        file.write_text("key,target\na,two\n")
        proxy.send(signal.SIGHUP)
        await eventually(lambda: proxy.events("reloaded"), "it is taken")
        assert [await shard_by_psycopg(proxy, dbname="x@a") for _ in range(4)] == ["two"] * 4
        await eventually(
            lambda: set(lines_by_worker(proxy, "session ended")) == {1, 2}, "from both"
        )
        for connection in staying:
            row = await (await connection.execute(TABLE)).fetchone()
            assert row == ("one",), "a session is routed once"
    assert errors(proxy) == []


async def test_a_log_level_that_a_reload_brings_is_that_of_workers_and_their_successors(
    start_process: StartProcess, tmp_path: Path
) -> None:
    event = "cancel request with an unknown key"
    proxy = await start_process(listen=TWO)

    async def cancel() -> None:
        """Send one to each worker: of two that are idle the one that has waited longer gets it."""
        for _ in range(2):
            async with plain_client(proxy) as client:
                await client.send(CancelRequest(12345, Secret(b"none")).encode())
                assert await client.receive_rest() == b""

    await cancel()
    config = tmp_path / "proxy.toml"
    config.write_text(config.read_text() + '[log]\nlevel = "debug"\n')
    proxy.send(signal.SIGHUP)
    await eventually(lambda: proxy.events("reloaded"), "it is taken")
    await cancel()
    await eventually(lambda: lines_by_worker(proxy, event) == {1: 1, 2: 1}, "both log it")
    os.kill(min(worker_pids(proxy)), signal.SIGKILL)
    await eventually(lambda: proxy.events("worker died"), "it is dead")
    await eventually(lambda: len(worker_pids(proxy)) == 2, "another has come")
    await eventually(lambda: len(proxy.events(READY_TO_SERVE)) == 3, "it serves")
    await cancel()
    await eventually(lambda: lines_by_worker(proxy, event) == {1: 2, 2: 2}, "both log it again")


async def test_systemd_hears_of_the_supervisor_alone(lakebase: Lakebase, tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, {"listen": TWO})))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)

        async def hear() -> str:
            async with asyncio.timeout(30):
                return (await asyncio.get_running_loop().sock_recv(systemd, 4096)).decode()

        run = ("run", "--config", str(file))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        async with started_process(*run, environment=environment) as proxy:
            assert await hear() == "READY=1"
            await proxy.serving()
            async with served(proxy, 2):  # at once, by both
                await eventually(lambda: by_worker(proxy) == {1: 1, 2: 1}, "they are spread")
            proxy.send(signal.SIGHUP)
            assert (await hear()).startswith("RELOADING=1")
            assert await hear() == "READY=1"
            proxy.send(signal.SIGTERM)
            assert await hear() == "STOPPING=1"
            assert await proxy.ended() == 0
        with pytest.raises(BlockingIOError):
            systemd.recv(4096)


# -- ends ----------------------------------------------------------------------------------------


async def test_a_drain_lets_busy_sessions_of_all_workers_finish_and_exits_with_0(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen=TWO)
    below = descendants(proxy.pid)
    assert len(below) == 3
    async with served(proxy, 4) as clients:
        for client in clients:
            await client.query("SELECT pg_sleep(1), 'finished'")
        proxy.send(signal.SIGTERM)
        for client in clients:
            assert b"finished" in await client.receive_rest()
    assert await proxy.ended() == 0
    assert set(lines_by_worker(proxy, "session ended")) == {1, 2}
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [0]
    assert alive(below) == set()
    assert errors(proxy) == []


async def test_a_drain_goes_on_accepting_as_it_is_told_and_only_readiness_says_so(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin, shutdown={"accept_seconds": 2})
    async with served(proxy, 1):  # so that the token is there
        assert (await ask(unused_tcp_port, "/readiness")).status == 200
    proxy.send(signal.SIGTERM)
    await eventually(lambda: proxy.events("draining"), "it drains")
    assert (await ask(unused_tcp_port, "/readiness")).status == 503
    async with served(proxy, 2) as clients:
        assert [await answers(client) for client in clients] == [True, True]
    assert await proxy.ended() == 0
    assert set(by_worker(proxy)) == {1, 2}


async def test_a_client_that_may_ask_over_http_ends_all_workers(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port, "quit": True}
    proxy = await start_process(listen=TWO, admin=admin)
    below = descendants(proxy.pid)
    async with served(proxy, 2) as clients:
        assert (await ask(unused_tcp_port, "/quitquitquit", "POST")).status == 202
        for client in clients:
            assert (await client.error()).sqlstate == "57P01"
    assert await proxy.ended() == 0
    assert alive(below) == set()


async def test_a_session_that_is_idle_for_too_long_ends_in_every_worker(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen={**TWO, "idle_timeout_seconds": 0.2})
    async with served(proxy, 4) as clients:
        assert [(await client.error()).sqlstate for client in clients] == ["57P05"] * 4
    await eventually(lambda: lines_by_worker(proxy, "session ended") == {1: 2, 2: 2}, "of both")


@pytest.mark.parametrize("signalled_twice", [False, True])
async def test_what_a_drain_cuts_is_counted_over_all_workers(
    start_process: StartProcess, lakebase: Lakebase, signalled_twice: bool
) -> None:
    seconds = 60 if signalled_twice else 0.3
    proxy = await start_process(listen=TWO, shutdown={"drain_seconds": seconds})
    async with served(proxy, 5) as clients:
        for client in clients:
            await client.query(SLEEP)
        proxy.send(signal.SIGTERM)
        await eventually(lambda: proxy.events("draining"), "it drains")
        if signalled_twice:
            proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 3
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")
    assert [line["sessions_cut"] for line in proxy.events("stopped")] == [5]


async def test_a_signal_to_every_process_as_a_terminal_sends_it_is_one_drain(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen=TWO)
    async with served(proxy, 2) as clients:
        for client in clients:
            await client.query("SELECT pg_sleep(0.5), 'finished'")
        for pid in (*descendants(proxy.pid), proxy.pid):
            os.kill(pid, signal.SIGINT)
        for client in clients:
            assert b"finished" in await client.receive_rest()
    assert await proxy.ended() == 0
    assert errors(proxy) == []


async def test_a_worker_that_dies_costs_its_own_sessions_and_is_replaced(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    admin = {"enabled": True, "port": unused_tcp_port}
    proxy = await start_process(listen=TWO, admin=admin)
    async with served(proxy, 6) as clients:
        before = await metrics(unused_tcp_port)
        await eventually(lambda: by_worker(proxy).total() == 6, "their starts are logged")
        pids = worker_pids(proxy)
        os.kill(min(pids), signal.SIGKILL)
        await eventually(lambda: proxy.events("worker died"), "it is noticed")
        lives = [await answers(client) for client in clients]
        assert lives.count(True) == 3
        (died,) = proxy.events("worker died")
        assert (died["signal"], died["sessions_lost"]) == ("SIGKILL", 3)
        assert (await ask(unused_tcp_port, "/readiness")).status == 200
        await eventually(lambda: len(proxy.events("worker serves")) == 3, "a new one has come")
        assert len(worker_pids(proxy) & pids) == 1
        async with served(proxy, 3):  # the new one has none yet and gets them all
            await eventually(lambda: by_worker(proxy)[died["worker"]] == 6, "they are its")
            after = await metrics(unused_tcp_port)
    assert after["worker_deaths_total"] == 1
    assert before["sessions_started_total"] == 6
    assert after["sessions_started_total"] == 9, "what the dead one had counted is not lost"
    assert after["sessions_active"] == after["session_slots_used"] == 6
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() == 0


WATCHES_OFTEN = """
import sys
from proxy.workers import worker_handle
worker_handle.WATCH_SECONDS, worker_handle.STUCK_SECONDS_MAX = 0.2, 2
from proxy.__main__ import main
sys.exit(main())
"""


async def test_a_worker_that_is_stuck_is_replaced_and_what_it_had_counted_stays(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int
) -> None:
    # No probe sees its liveness: the admin address is another process's.
    admin = {"enabled": True, "port": unused_tcp_port}
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, {"listen": TWO, "admin": admin})))
    run = ("run", "--config", str(file))
    async with started_process(*run, program=("-c", WATCHES_OFTEN)) as proxy:
        await proxy.serving()
        async with served(proxy, 4) as clients:
            served_before = proxy.events(READY_TO_SERVE)
            await asyncio.sleep(1)  # no scrape asks, and it is read all the same
            os.kill(min(worker_pids(proxy)), signal.SIGSTOP)
            await eventually(lambda: proxy.events("worker died"), "it is ended")
            (died,) = proxy.events("worker died")
            assert (died["signal"], died["sessions_lost"]) == ("SIGKILL", 2)
            assert [line["worker"] for line in proxy.events("worker is stuck and is killed")] == [
                died["worker"]
            ]
            await eventually(
                lambda: len(proxy.events(READY_TO_SERVE)) == len(served_before) + 1, "another"
            )
            assert [await answers(client) for client in clients].count(True) == 2
            counted = await metrics(unused_tcp_port)
            assert counted["sessions_started_total"] == 4
            assert counted["sessions_active"] == 2
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


async def test_a_worker_that_does_not_answer_gets_no_connections_until_it_does(
    start_process: StartProcess,
) -> None:
    # It was noticed after 38 seconds, and 23 logins that it was given meanwhile timed out.
    proxy = await start_process(listen=TWO)
    stopped = min(worker_pids(proxy))
    os.kill(stopped, signal.SIGSTOP)
    stopped_at = time.monotonic()
    await eventually(lambda: proxy.events("worker does not answer and gets no connections"), "seen")
    assert time.monotonic() - stopped_at < SILENT_SECONDS_MAX + 2
    async with served(proxy, 10):
        await eventually(lambda: by_worker(proxy).total() == 10, "all are served")
        assert len(by_worker(proxy)) == 1
    os.kill(stopped, signal.SIGCONT)
    await eventually(lambda: proxy.events("worker answers again"), "it is used again")
    async with served(proxy, 4):
        await eventually(lambda: len(by_worker(proxy)) == 2, "both are used")
    assert proxy.events("worker died") == []


async def test_a_worker_that_dies_again_and_again_is_replaced_more_and_more_slowly(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen=TWO)
    for deaths in range(1, 4):
        await eventually(lambda: len(worker_pids(proxy)) == 2, "both are there")
        os.kill(max(worker_pids(proxy)), signal.SIGKILL)
        await eventually(
            lambda n=deaths: len(proxy.events("worker died")) == n,  # type: ignore[misc]
            "it is noticed",
        )
        async with served(proxy, 2):  # by the other one, if need be
            pass
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() == 0


@pytest.mark.parametrize("stuck", [False, True])
async def test_no_process_outlives_the_supervisor(
    start_process: StartProcess, lakebase: Lakebase, stuck: bool
) -> None:
    proxy = await start_process(listen=TWO)
    below = descendants(proxy.pid)
    async with served(proxy, 4) as clients:
        if stuck:
            os.kill(min(worker_pids(proxy)), signal.SIGSTOP)
        proxy.send(signal.SIGKILL)
        assert await proxy.ended() == -signal.SIGKILL
        await eventually(lambda: alive(below) == set(), "all have gone")
        assert [await answers(client) for client in clients] == [False] * 4
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")


async def test_without_the_process_that_forks_workers_the_proxy_drains_and_ends_with_1(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen=TWO)
    below = descendants(proxy.pid)
    async with served(proxy, 2) as clients:
        for client in clients:
            await client.query("SELECT pg_sleep(0.5), 'finished'")
        os.kill(fork_server_pid(proxy), signal.SIGKILL)
        for client in clients:
            assert b"finished" in await client.receive_rest()
    assert await proxy.ended() == 1
    await eventually(lambda: alive(below) == set(), "all have gone")


async def test_workers_end_with_the_supervisor_even_if_it_had_not_heard_of_a_death(
    start_process: StartProcess,
) -> None:
    # The fork server then reads a reset, not an end of file.
    proxy = await start_process(listen=TWO)
    below, fork_server = descendants(proxy.pid), fork_server_pid(proxy)
    stuck, dies = worker_pids(proxy)
    os.kill(proxy.pid, signal.SIGSTOP)
    os.kill(stuck, signal.SIGSTOP)
    os.kill(dies, signal.SIGKILL)
    await eventually(lambda: descendants(fork_server) == {stuck}, "it is reaped")
    proxy.send(signal.SIGKILL)
    try:
        await eventually(lambda: alive(below) == set(), "all have gone")
    finally:
        for pid in alive(below):
            os.kill(pid, signal.SIGKILL)


FORKS_SELDOM = """
import errno, os, sys
fork, calls = os.fork, 0
def fork_but_once():
    global calls
    calls += 1
    if calls == 4:  # the fork server, two workers, and the first successor
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = fork_but_once
from proxy.__main__ import main
sys.exit(main())
"""


async def test_a_worker_that_cannot_be_forked_is_tried_again_and_the_others_serve_on(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, {"listen": TWO})))
    async with started_process("run", "--config", str(file), program=("-c", FORKS_SELDOM)) as proxy:
        await proxy.serving()
        async with served(proxy, 2) as clients:
            os.kill(min(worker_pids(proxy)), signal.SIGKILL)
            await eventually(lambda: len(proxy.events(READY_TO_SERVE)) == 3, "another has come")
            assert [await answers(client) for client in clients].count(True) == 1
        assert [line["error"] for line in proxy.events("cannot fork a worker")] == [
            os.strerror(errno.EAGAIN)
        ]
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


async def test_a_process_that_forks_workers_and_is_stuck_does_not_keep_the_proxy_from_ending(
    start_process: StartProcess,
) -> None:
    proxy = await start_process(listen=TWO)
    below, fork_server = descendants(proxy.pid), fork_server_pid(proxy)
    os.kill(fork_server, signal.SIGSTOP)
    try:
        proxy.send(signal.SIGTERM)
        assert await proxy.ended(5 * END_SECONDS_MAX) == 0
        assert alive(below) == set()
    finally:
        if proxy.running:
            os.kill(fork_server, signal.SIGCONT)


async def test_a_port_that_is_taken_is_said_and_leaves_no_process(
    start_process: StartProcess, tmp_path: Path
) -> None:
    proxy = await start_process(listen=TWO)
    code, _, err = await run_to_end(
        Path(sys.executable),
        *("-m", "proxy", "run", "--config", str(tmp_path / "proxy.toml")),
        *("--listen.port", str(proxy.listen_port)),
    )
    assert code == 1
    assert "Is another Postgres or proxy there?" in err
    assert "Traceback" not in err


# -- cost ----------------------------------------------------------------------------------------


def proportional_bytes(pids: Iterable[int]) -> int:
    """Return the memory of processes, each shared page counted once in all."""
    found = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        line = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
        assert line is not None
        found += int(line[1]) * 1024
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measured in /proc")
async def test_a_second_worker_costs_little_memory(start_process: StartProcess) -> None:
    found = {}
    for workers in (1, 2, 4):
        proxy = await start_process(listen={**TWO, "workers": workers})
        async with served(proxy, 4):
            found[workers] = proportional_bytes({proxy.pid, *descendants(proxy.pid)})
    sys.stderr.write(f"memory by number of workers: {found}\n")  # shown by pytest -rP
    # Of its own a worker has what it writes to, 15 to 16 MB; a new interpreter would have 30.
    assert (found[4] - found[2]) / 2 < 20_000_000


async def test_one_worker_is_one_process(start_process: StartProcess) -> None:
    proxy = await start_process(listen={"port": 0, "workers": 1})
    assert descendants(proxy.pid) == set()
    async with served(proxy, 1):
        await eventually(lambda: first_lines(proxy), "it is served")
    assert "worker" not in first_lines(proxy)[0]
