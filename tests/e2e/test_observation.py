"""What operators see of a proxy that really serves: `/status`, metrics, and its log."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.observe.logs import configure_logging
from proxy.server.app import App
from proxy.upstream.phases import ConnectPhase
from proxy.wire.messages import ReadyForQuery
from tests.e2e.conftest import StartProxy
from tests.support.admin_address import Answer, ask
from tests.support.client import plain_client, startup
from tests.support.running import LogLines, eventually


@pytest_asyncio.fixture
async def shown(start_proxy: StartProxy) -> AsyncIterator[App]:
    """Return a proxy with an admin address."""
    yield await start_proxy(admin={"enabled": True})


async def get(proxy: App, path: str) -> Answer:
    assert proxy.admin is not None
    return await ask(proxy.admin.port, path)


# -- status --------------------------------------------------------------------------------------


async def test_an_idle_proxy_says_that_it_serves_and_nothing_of_targets_it_has_not_seen(
    shown: App,
) -> None:
    status = (await get(shown, "/status")).json
    assert status["state"] == "serving"
    assert status["listen"].split(", ")[0] == f"127.0.0.1:{shown.listen_port}"
    assert status["uptime_seconds"] >= 0
    assert (status["sessions"], status["sessions_max"]) == (0, 1000)
    assert (status["tokens"], status["errors"], status["warnings"]) == ([], [], [])
    assert status["drain"] == {"draining": False, "seconds_left": None, "sessions_left": 0}
    (target,) = status["targets"]
    assert (target["name"], target["host"], target["connect_seconds"]) == ("upstream", "", {})


async def test_a_session_is_seen_with_its_target_its_connect_and_the_tokens_times(
    shown: App, lakebase: Lakebase
) -> None:
    async with plain_client(shown) as client:
        await client.start_up()
        answer = await get(shown, "/status")
    status = answer.json
    (target,) = status["targets"]
    assert (status["sessions"], target["sessions"]) == (1, 1)
    assert target["host"] == lakebase.shards[0].endpoint.host
    assert target["connect_seconds"].keys() == set(ConnectPhase)
    assert all(0 <= seconds < 60 for seconds in target["connect_seconds"].values())
    (token,) = status["tokens"]
    assert token["workspace"] == "workspace"
    assert 0 <= token["age_seconds"] < 60
    assert 3000 < token["expires_in_seconds"] <= 3600
    assert token["accepted_age_seconds"] == 60


async def test_a_refusal_is_said_first_and_its_connect_is_no_fast_one(shown: App) -> None:
    async with plain_client(shown) as client:
        await client.start_up()
    before = (await get(shown, "/status")).json
    assert before["health"]["level"] == "well"
    async with plain_client(shown) as client:
        await client.send(startup(database="missing"))
        assert (await client.error()).sqlstate == "3D000"
    status = (await get(shown, "/status")).json
    assert status["health"]["text"].endswith("1 refusal in the last minute: database_missing.")
    assert status["health"]["level"] == "warning", "the session before has started"
    (target,), (known,) = status["targets"], before["targets"]
    assert target["connect_p50_seconds"] == known["connect_p50_seconds"] > 0
    assert target["connect_seconds"] == known["connect_seconds"]
    assert sum(shown.whole_reading().totals.connects) == 1
    assert status["facts"]["roles"] == [CLIENT_ID]


async def test_a_session_that_waits_for_its_upstream_is_shown_as_opening(
    shown: App, lakebase: Lakebase
) -> None:
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG, times=1)
    async with plain_client(shown) as client:
        await client.send(startup())
        await eventually(lambda: shown.metrics.value("session_slots_used") == 1, "it has its slot")
        status = (await get(shown, "/status")).json
        assert (status["sessions"], status["sessions_opening"]) == (0, 1)
    await eventually(lambda: shown.metrics.value("session_slots_used") == 0, "it gave it back")


async def test_the_loops_lag_is_sampled_while_the_proxy_runs(proxy: App) -> None:
    await eventually(lambda: proxy.metrics.value("event_loop_lag_seconds_count") > 0, "a sample")


async def test_no_token_is_in_anything_that_the_admin_address_shows(
    shown: App, lakebase: Lakebase
) -> None:
    async with plain_client(shown) as client:
        await client.start_up()
        bodies = [(await get(shown, path)).body for path in ("/status", "/metrics", "/")]
    assert lakebase.workspace.mints
    for body in bodies:
        assert b"eyJ" not in body
        assert lakebase.client_secret.encode() not in body


async def test_bytes_move_while_the_session_lives(shown: App) -> None:
    to_client = {"target": "upstream", "direction": "to_client"}
    async with plain_client(shown) as client:
        await client.start_up()
        before = shown.metrics.value("relayed_bytes_total", **to_client)
        await client.query("SELECT repeat('x', 100000)")
        await eventually(
            lambda: shown.metrics.value("relayed_bytes_total", **to_client) > before + 100_000,
            "it moves during the session",
        )
        during = shown.metrics.value("relayed_bytes_total", **to_client)
        assert shown.metrics.value("sessions_active", target="upstream") == 1
    await eventually(lambda: shown.metrics.value("sessions_active") == 0, "it has ended")
    assert shown.metrics.value("relayed_bytes_total", **to_client) >= during


async def test_what_went_wrong_last_is_shown_with_a_hint_and_without_the_clients_words(
    shown: App, lakebase: Lakebase
) -> None:
    quoted = "password=what-only-a-client-knows"
    for _ in range(2):
        async with plain_client(shown) as client:
            await client.send(startup(database=quoted))
            assert (await client.error()).sqlstate == "3D000"
    answer = await get(shown, "/status")
    (error,) = answer.json["errors"]
    assert (error["reason"], error["sqlstate"]) == ("database_missing", "3D000")
    assert (error["target"], error["count"]) == ("upstream", 2)
    assert "databricks_postgres" in error["hint"]
    assert b"what-only-a-client-knows" not in answer.body


async def test_a_failed_mint_is_among_the_last_errors(shown: App, lakebase: Lakebase) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, faults.PERMISSION_DENIED)
    async with plain_client(shown) as client:
        await client.send(startup())
        await client.error()
    errors = (await get(shown, "/status")).json["errors"]
    assert [error["target"] for error in errors] == ["upstream", ""]


async def test_a_drain_is_shown_while_it_goes_on(shown: App) -> None:
    async with plain_client(shown) as client:
        await client.start_up()
        await client.query("BEGIN")
        await client.messages_until(ReadyForQuery)
        draining = asyncio.create_task(shown.drain(20))
        await asyncio.sleep(0)
        status = (await get(shown, "/status")).json
        assert status["state"] == "draining"
        assert 10 < status["drain"]["seconds_left"] <= 20
        assert status["drain"]["sessions_left"] == 1
        assert shown.metrics.value("draining") == 1
    assert await draining == 0


async def test_a_weak_configuration_is_said_where_people_look(start_proxy: StartProxy) -> None:
    weak = await start_proxy(
        admin={"enabled": True},
        upstream={"sslmode": "require"},
    )
    warnings = (await get(weak, "/status")).json["warnings"]
    assert [text.split()[0] for text in warnings] == ["upstream.sslmode"]


# -- the log -------------------------------------------------------------------------------------


async def test_a_session_has_one_opening_and_one_closing_line(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("SELECT 1")
        await client.receive()
        await eventually(lambda: log.events("session started"), "its opening line")
    await eventually(lambda: log.events("session ended"), "its closing line")
    lines = [line for line in log.lines if line["level"] == "info" and "connection" in line]
    assert [line["event"] for line in lines] == ["session started", "session ended"]
    opening, closing = lines
    assert opening["connection"] == closing["connection"]
    assert opening["host"] == lakebase["one"].endpoint.host
    assert "host" not in closing
    assert opening["target"] == closing["target"] == "upstream"
    assert 0 < closing["duration_seconds"] < 60
    assert closing["client_bytes"] == len(b"Q\0\0\0\rSELECT 1\0")
    assert closing["upstream_bytes"] > 0
    assert closing["reason"] in ("client_closed", "client_lost")


async def test_a_refused_client_has_one_line(proxy: App, lakebase: Lakebase, log: LogLines) -> None:
    async with plain_client(proxy) as client:
        await client.send(startup(database="absent"))
        await client.error()
    await eventually(lambda: log.events("session refused"), "its line")
    (line,) = [line for line in log.lines if line["level"] == "info" and "connection" in line]
    assert (line["event"], line["reason"]) == ("session refused", "database_missing")
    assert (line["target"], line["sqlstate"]) == ("upstream", "3D000")
    assert line["duration_seconds"] >= 0


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0"], ids=repr)
async def test_probes_and_port_scans_are_told_of_at_debug_only(
    proxy: App, log: LogLines, said: bytes
) -> None:
    async with plain_client(proxy) as client:
        await client.send(said)
        client.sock.shutdown(socket.SHUT_WR)
        await client.receive_rest()
    await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone")
    lines = [line for line in log.lines if "connection" in line]
    assert lines
    assert {line["level"] for line in lines} == {"debug"}


async def test_at_level_warning_nothing_is_said_whatever_becomes_of_connections(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    proxy = await start_proxy()
    configure_logging(format="json", level="warning", stream=log)
    assert not logging.getLogger("proxy").isEnabledFor(logging.INFO)
    async with plain_client(proxy) as client:
        await client.start_up()
        client.sock.shutdown(socket.SHUT_WR)
    async with plain_client(proxy) as client:
        await client.send(b"GET / HTTP/1.1\r\n\r\n")
    async with plain_client(proxy) as client:
        await client.send(startup(database="absent"))
        await client.error()
    lakebase.gateway.inject(Stage.STARTUP, Injection.RESET)
    async with plain_client(proxy) as client:
        await client.send(startup())
    await eventually(lambda: proxy.metrics.value("connections") == 0, "all are gone")
    assert [json.dumps(line) for line in log.lines if "connection" in line] == []
