"""What operators see of pools that serve, and `reconnect`: with one process and with several."""

import sys
from typing import Any

import psycopg
import pytest

from proxy.server.app import App
from tests.e2e.conftest import StartProcess, StartProxy
from tests.e2e.test_workers import TWO, by_worker, metrics, status
from tests.support.admin_address import ask
from tests.support.client import plain_client
from tests.support.proxy_process import ProxyProcess, run_to_end
from tests.support.running import Listening, LogLines, eventually, first_lines, libpq

SESSION = {"upstream": {"pool": "session", "pool_spare_min": 0}}
ADMIN = {"admin": {"enabled": True, "port": 0}}
PID = "SELECT pg_backend_pid()"


async def connect(proxy: Listening, **more: Any) -> psycopg.AsyncConnection[tuple[Any, ...]]:
    return await psycopg.AsyncConnection.connect(**libpq(proxy, **more), autocommit=True)


async def backend_of(proxy: Listening, **more: Any) -> int:
    """Return the backend of a client that connects, asks for it and leaves."""
    async with await connect(proxy, **more) as client:
        return await asked(client)


async def asked(client: psycopg.AsyncConnection[tuple[Any, ...]]) -> int:
    row = await (await client.execute(PID)).fetchone()
    assert row is not None
    return int(row[0])


def sessions(proxy: App, state: str) -> float:
    return proxy.metrics.value("pool_sessions", state=state)


async def is_idle(proxy: App, count: int = 1) -> None:
    await eventually(lambda: sessions(proxy, "idle") == count, f"{count} idle")


async def test_p50_takes_resets_and_retirements_are_shown(
    start_proxy: StartProxy, log: LogLines
) -> None:
    proxy = await start_proxy(**SESSION, **ADMIN)
    assert proxy.admin is not None
    (row,) = (await ask(proxy.admin.port, "/status")).json["pools"]
    assert (row["mode"], row["keys"], row["dialled"]) == ("session", 0, 0), "before its first event"
    first = await backend_of(proxy)
    await is_idle(proxy)
    assert await backend_of(proxy) == first
    await is_idle(proxy)
    client = await connect(proxy)
    await client.execute("BEGIN")
    (row,) = (await ask(proxy.admin.port, "/status")).json["pools"]
    assert (row["target"], row["mode"]) == ("upstream", "session")
    assert (row["in_use"], row["idle"], row["keys"]) == (1, 0, 1)
    assert row["oldest_seconds"] > 0
    assert (row["reused"], row["dialled"], row["last_retired"]) == (2, 1, "")
    await client.close()  # in its transaction
    await eventually(lambda: sessions(proxy, "in_use") == 0, "it is closed")
    value = proxy.metrics.value
    assert value("pool_retired_total", reason="busy") == value("pool_retired_total") == 1
    assert (value("pool_takes_total", source="reused"), value("pool_takes_total")) == (2, 3)
    assert value("pool_reset_seconds_count") == 2
    assert value("upstream_connect_seconds_count", phase="login") == 1
    assert value("sessions_started_total") == 3
    await eventually(lambda: len(log.events("session ended")) == 3, "all lines are there")
    assert [line["reused"] for line in first_lines(log)] == [False, True, True]
    assert not log.above_info()


async def test_p50_without_a_pool_nothing_is_said_of_pools(
    start_proxy: StartProxy, log: LogLines
) -> None:
    proxy = await start_proxy(**ADMIN)
    assert proxy.admin is not None
    await backend_of(proxy)
    await eventually(lambda: log.events("session ended"), "it is over")
    assert (await ask(proxy.admin.port, "/status")).json["pools"] == []
    assert "reused" not in first_lines(log)[0]


async def test_p50_no_count_falls_when_a_reload_replaces_a_pool_or_removes_it(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(**SESSION, **ADMIN)
    assert proxy.admin is not None
    port = proxy.admin.port

    def reload(**changed: object) -> None:
        upstream = proxy.settings.upstream.model_copy(update=changed)
        proxy.reload(proxy.settings.model_copy(update={"upstream": upstream}))

    await backend_of(proxy)
    await is_idle(proxy)
    reload(pool_idle_seconds=7)
    await is_idle(proxy, 0)
    assert (await pool_row(port))["dialled"] == 1
    await backend_of(proxy)
    await is_idle(proxy)
    row = await pool_row(port)
    assert (row["dialled"], row["last_retired"]) == (2, "reconfigured")
    reload(pool="off")
    await is_idle(proxy, 0)
    await backend_of(proxy)
    await eventually(lambda: not proxy.status().pools, "it is shown no more")
    assert proxy.metrics.value("pool_takes_total", source="dialled") == 2


async def test_p46_reconnect_closes_idle_sessions_and_retires_those_in_use(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(**SESSION, **ADMIN)
    assert proxy.admin is not None
    async with await connect(proxy) as client:
        in_use, idle = await asked(client), await backend_of(proxy)
        await is_idle(proxy)
        logins = proxy.metrics.value("upstream_connect_seconds_count", phase="login")
        assert (await ask(proxy.admin.port, "/reconnect", "POST")).status == 200
        await is_idle(proxy, 0)
        assert await asked(client) == in_use, "no client's session ends"
        assert proxy.metrics.value("upstream_connect_seconds_count", phase="login") == logins
        assert proxy.metrics.value("pool_retired_total", reason="reconnect") == 1
    await eventually(
        lambda: proxy.metrics.value("pool_retired_total", reason="reconnect") == 2, "retired"
    )
    fresh = await backend_of(proxy)
    assert fresh not in (in_use, idle)
    await is_idle(proxy)
    assert await backend_of(proxy) == fresh, "later sessions are kept"


async def pool_row(port: int) -> dict[str, Any]:
    (row,) = (await status(port))["pools"]
    assert isinstance(row, dict)
    return row


async def until(port: int, **numbers: object) -> dict[str, Any]:
    """Return the pool's row once it has these numbers."""
    row: dict[str, Any] = {}

    async def has_come() -> bool:
        row.update(await pool_row(port))
        return {name: row[name] for name in numbers} == numbers

    for _ in range(1000):
        if await has_come():
            return row
    raise AssertionError(f"{row} never has {numbers}")


async def two_idle(proxy: ProxyProcess, port: int) -> None:
    """Leave an idle session in each of two workers."""
    async with plain_client(proxy) as one, plain_client(proxy) as other:
        await one.start_up()
        await other.start_up()
        await eventually(lambda: set(by_worker(proxy)) == {1, 2}, "both serve")
    await until(port, in_use=0, resetting=0, idle=2)


@pytest.mark.slow
async def test_p46_p50_the_verb_reaches_every_worker_and_numbers_are_added_up(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    port = unused_tcp_port
    upstream = {**SESSION["upstream"], "pool_size_max": 7}
    proxy = await start_process(
        listen=TWO, upstream=upstream, admin={"enabled": True, "port": port}
    )
    await two_idle(proxy, port)
    row = await until(port, idle=2)
    assert (row["keys"], row["size_max"], row["dialled"], row["reused"]) == (2, 8, 2, 0)
    before = await metrics(port)
    assert (before["pool_takes_total"], before["pool_reset_seconds_count"]) == (2, 2)
    environment = {"LAKEBASE_PROXY_ADMIN__PORT": str(port)}
    command = (sys.executable, "-m", "proxy", "reconnect")
    assert await run_to_end(*command, environment=environment) == (0, "", "")
    row = await until(port, idle=0, in_use=0)
    assert (row["last_retired"], (await metrics(port))["pool_retired_total"]) == ("reconnect", 2)
    await two_idle(proxy, port)
    assert (await pool_row(port))["dialled"] == 4
    assert [line["level"] for line in proxy.events("asked to reconnect")] == ["info"]


async def test_p46_the_verb_without_a_proxy_ends_with_1(unused_tcp_port: int) -> None:
    environment = {"LAKEBASE_PROXY_ADMIN__PORT": str(unused_tcp_port)}
    command = (sys.executable, "-m", "proxy", "reconnect")
    code, out, err = await run_to_end(*command, environment=environment)
    assert (code, out) == (1, "")
    assert f"no proxy answers on http://127.0.0.1:{unused_tcp_port}" in err
