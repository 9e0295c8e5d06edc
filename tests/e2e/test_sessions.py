"""Who is connected, and the end of one of them: `/sessions` of a whole proxy, and `status`."""

import asyncio
import json
import os
import pty
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.admin_address import ask
from tests.support.client import Client, connected, plain_client, query, startup
from tests.support.pooling import SESSION_MODE
from tests.support.proxy_process import run_to_end, started_process
from tests.support.running import USER, WAIT_SECONDS_MAX, all_over, eventually, libpq
from tests.support.sharding import list_map, sharded

ADMIN = {"enabled": True, "port": 0, "quit": True}
ENDED = b"reason=ended_by_operator"
OWN_COMMAND = Path("/proc/self/comm").read_text().strip()
KEY = "tenant-zebra"
SLEEP = "SELECT pg_sleep(60)"
MODES = pytest.mark.parametrize("upstream", [{}, SESSION_MODE], ids=["off", "session"])

Row = dict[str, Any]


def port_of(proxy: App) -> int:
    assert proxy.admin is not None
    return proxy.admin.port


async def rows(port: int, query: str = "") -> list[Row]:
    answer = await ask(port, f"/sessions{query}")
    assert answer.status == 200
    assert answer.json["complete"]
    assert b"not-a-real" not in answer.body
    found: list[Row] = answer.json["sessions"]
    return found


async def row_with_process(port: int) -> Row:
    """Return the only session, as soon as its process is found: a search has a second."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            (row,) = await rows(port, "?processes")
            if row["pid"] is not None:
                return row


async def row_in_state(port: int, state: str) -> Row:
    """Return the only session, as soon as it is in this state."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while True:
            (row,) = await rows(port)
            if row["state"] == state:
                return row


async def end(port: int, number: int) -> int:
    return (await ask(port, f"/sessions/{number}", "DELETE")).status


@MODES
async def test_a_session_is_shown_with_what_is_known_of_it_and_its_state(
    start_proxy: StartProxy, upstream: Mapping[str, object], log: Any
) -> None:
    proxy = await start_proxy(admin=ADMIN, upstream=upstream)
    port = port_of(proxy)
    assert await rows(port) == []
    async with plain_client(proxy) as client:
        (row,) = await rows(port)
        assert (row["state"], row["user"], row["target"]) == ("starting", "", "")
        await client.send(startup(database="databricks_postgres", application_name="billing\x1b"))
        row = await row_in_state(port, "idle")
        host, at = client.sock.getsockname()
        assert row["client"] == f"{host}:{at}"
        assert (row["user"], row["database"]) == (USER, "databricks_postgres")
        assert (row["application_name"], row["target"]) == ("billing\x1b", "upstream")
        assert (row["shard"], row["shard_key"], row["waits_for"]) == ("", None, None)
        assert (row["pid"], row["command"]) == (None, None)
        row = await row_with_process(port)
        assert row["pid"] == os.getpid()
        assert row["command"] == OWN_COMMAND
        await eventually(lambda: log.events("session started"), "its line is written")
        assert row["id"] == log.events("session started")[0]["connection"]
        assert 0 <= row["state_seconds"] <= row["age_seconds"]

        await client.query("BEGIN")
        row = await row_in_state(port, "in transaction")
        assert row["client_bytes"] == len(query("BEGIN"))
        assert row["upstream_bytes"] > 0
        await client.query(SLEEP)
        row = await row_in_state(port, "busy")
        assert row["state_seconds"] <= row["age_seconds"]


@MODES
async def test_a_session_is_ended_with_57p01_where_no_answer_is_under_way(
    start_proxy: StartProxy, lakebase: Lakebase, upstream: Mapping[str, object], log: Any
) -> None:
    proxy = await start_proxy(admin=ADMIN, upstream=upstream)
    port = port_of(proxy)
    for sql, state in (("SELECT 1", "idle"), ("BEGIN", "in transaction")):
        async with plain_client(proxy) as client:
            await client.start_up()
            await client.query(sql)
            row = await row_in_state(port, state)
            assert await end(port, row["id"]) == 202
            said = await client.receive_rest()
            assert b"C57P01\0" in said
            assert ENDED in said
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it has ended")
        assert log.events("session ended")[-1]["reason"] == "ended_by_operator"
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query(SLEEP)
        row = await row_in_state(port, "busy")
        assert await end(port, row["id"]) == 202
        assert ENDED not in await rest_or_reset(client)
    await all_over(proxy, lakebase)
    # The upstream sessions are gone, too: none is kept for another client.
    assert [row.present.idle for row in proxy.metrics.pools.rows()] in ([], [0])
    assert await end(port, row["id"]) == 404
    assert await end(port, 10**17) == 404
    assert (await ask(port, "/sessions/x", "DELETE")).status == 404


async def rest_or_reset(client: Client) -> bytes:
    try:
        return await client.receive_rest()
    except ConnectionResetError:
        return b""


async def test_a_client_that_waits_is_shown_with_what_it_waits_for_and_refused(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(admin=ADMIN)
    port = port_of(proxy)
    lakebase.gateway.inject(Stage.READY, Injection.HANG)
    async with plain_client(proxy) as client:
        await client.send(startup())
        row = await row_in_state(port, "waiting")
        while row["waits_for"] != "login":
            row = await row_in_state(port, "waiting")
        assert row["user"] == USER
        assert await end(port, row["id"]) == 202
        said = await client.receive_rest()
        assert b"C57P01\0" in said
        assert ENDED in said
    async with plain_client(proxy) as client:
        row = await row_in_state(port, "starting")
        assert await end(port, row["id"]) == 202
        assert await rest_or_reset(client) == b""


async def test_no_session_is_ended_unless_that_is_allowed(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(admin={"enabled": True, "port": 0})
    port = port_of(proxy)
    async with plain_client(proxy) as client:
        await client.start_up()
        (row,) = await rows(port)
        assert await end(port, row["id"]) == 404
        foreign = "Host: localhost\r\nOrigin: https://example.com\r\n"
        assert (await ask(port, "/sessions", headers=foreign)).status == 403
        assert (await row_in_state(port, "idle"))["id"] == row["id"]


async def test_of_a_shard_key_the_fingerprint_is_shown(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(admin=ADMIN, **sharded(lakebase, list_map({KEY: "two"})))
    for asked in ({"dbname": f"app@{KEY}"}, {"options": f"-c shard_key={KEY}"}):
        async with await psycopg.AsyncConnection.connect(**libpq(proxy, **asked)):
            answer = await ask(port_of(proxy), "/sessions?processes")
            (row,) = answer.json["sessions"]
            assert (row["target"], row["shard"]) == ("two", "two")
            assert row["shard_key"] is not None
            assert KEY not in answer.body.decode()
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it has ended")


async def test_a_client_of_a_unix_socket_is_named_by_its_process(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    listen = {"port": 5432, "host": "", "unix_socket_directory": str(tmp_path)}
    proxy = await start_proxy(admin=ADMIN, listen=listen)
    address = f"{tmp_path}/.s.PGSQL.5432"
    async with connected(Client, address) as client:
        await client.start_up()
        (row,) = await rows(port_of(proxy))
        assert (row["client"], row["pid"], row["command"]) == ("", os.getpid(), None)
        (row,) = await rows(port_of(proxy), "?processes")
        assert row["command"] == OWN_COMMAND


async def in_terminal(columns: int, *arguments: str) -> list[str]:
    """Run it with a terminal as its output; return the lines."""
    ours, its = pty.openpty()
    try:
        command = (sys.executable, "-m", "proxy", *arguments)
        environment = {**os.environ, "COLUMNS": str(columns)}
        process = await asyncio.create_subprocess_exec(*command, stdout=its, env=environment)
        assert await process.wait() == 0
        return os.read(ours, 65536).decode().splitlines()
    finally:
        os.close(its)
        os.close(ours)


async def test_status_shows_and_ends_the_sessions_of_all_workers(
    start_process: StartProcess, unused_tcp_port: int
) -> None:
    port = unused_tcp_port
    admin = {"enabled": True, "port": port, "quit": True}
    proxy = await start_process(admin=admin, listen={"port": 0, "workers": 2})

    async def status(*arguments: str) -> tuple[int, str, str]:
        command = (sys.executable, "-m", "proxy", "status", f"--admin.port={port}", *arguments)
        return await run_to_end(*command)

    watch = ("status", "--watch", "--json", f"--admin.port={port}")
    async with (
        plain_client(proxy) as one,
        plain_client(proxy) as other,
        started_process(*watch) as watching,
    ):
        await watching.printed('"state": "serving"')
        # It must not take the CPU of the sessions that it lists.
        assert os.getpriority(os.PRIO_PROCESS, watching.pid) == 19
        for client in (one, other):
            await client.start_up()
        code, out, err = await status("--sessions", "--json", "--processes")
        assert (code, err) == (0, "")
        first, second = json.loads(out)["open_sessions"]
        assert (first["id"], second["id"]) == (1, 2)
        assert {first["worker"], second["worker"]} == {1, 2}
        assert first["pid"] == second["pid"] == os.getpid()

        code, out, err = await status("--sessions")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == "Serving 2 sessions."
        assert lines[1].startswith("serving, up for ")
        assert lines[3] == "2 of 1000 sessions"
        assert re.match(r"TARGET +SESSIONS +STARTED", lines[5])
        header, *shown = lines[-3:]
        assert header.split()[:4] == ["ID", "STATE", "AGE", "CLIENT"]
        assert all(USER in line and "idle, " in line for line in shown)

        lines = await in_terminal(60, "status", f"--admin.port={port}", "--sessions")
        assert lines[-3].split()[:4] == header.split()[:4]
        assert lines[-1].startswith("2   idle, ")
        assert max(map(len, lines)) <= 60 < len(header)

        ended = json.dumps({"ok": True, "id": second["id"]}) + "\n"
        assert await status("--end", str(second["id"]), "--json") == (0, ended, "")
        assert ENDED in await other.receive_rest()
        await one.query("SELECT 'it lives'")
        assert b"it lives" in await one.receive()
        code, _, err = await status("--end", "99")
        assert code == 1
        assert "there is no session 99" in err
        assert await status("--end", str(first["id"])) == (0, "session 1 is being ended\n", "")

        await watching.printed('"sessions": 2')  # it is asked again
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0
        await watching.printed("no proxy answers on")  # which may start again
        watching.send(signal.SIGINT)
        assert await watching.ended() == 128 + signal.SIGINT
        assert watching.err == ""
