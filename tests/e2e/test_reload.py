"""SIGHUP: the whole new configuration for new sessions, or none of it; the others go on.

A real process each time, told by a real signal. What a configuration may say is tested in
`tests/config`, tokens across a reload also in `test_workspaces`.
"""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme

from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import Terminate
from tests.e2e.conftest import StartProcess
from tests.support.client import plain_client, startup
from tests.support.proxy_process import ROOT, START_SECONDS_MAX, ProxyProcess, started_process
from tests.support.running import (
    WAIT_SECONDS_MAX,
    eventually,
    libpq,
    proxy_values,
    toml,
    without_own_account,
)
from tests.support.sharding import TABLE, range_map, shard_by_psycopg, sharded, targets

pytestmark = pytest.mark.slow

Sections = Mapping[str, Mapping[str, object]]
RELOADED, KEPT = "reloaded", "not reloaded; the configuration stays as it was"
RESTART = "restart to let these take effect"
LOAD_SESSIONS = 200  # opened while the configuration is exchanged again and again


class Reloading:
    """A proxy process and its file."""

    def __init__(self, proxy: ProxyProcess, lakebase: Lakebase, file: Path) -> None:
        self.proxy = proxy
        self.lakebase = lakebase
        self.file = file

    def write(self, sections: Sections) -> None:
        self.file.write_text(toml(proxy_values(self.lakebase, sections)))

    async def hang_up(self, event: str = RELOADED) -> dict[str, Any]:
        """Send SIGHUP and return the next line with this event."""
        before = len(self.proxy.events(event))
        self.proxy.send(signal.SIGHUP)
        happened = partial(self._more_than, before, event)
        await eventually(happened, event, START_SECONDS_MAX)
        return self.proxy.events(event)[-1]

    def _more_than(self, before: int, event: str) -> bool:
        assert self.proxy.running, self.proxy.err
        return len(self.proxy.events(event)) > before

    async def take(self, sections: Sections) -> dict[str, Any]:
        self.write(sections)
        return await self.hang_up()


@pytest.fixture
def start(start_process: StartProcess, lakebase: Lakebase, tmp_path: Path) -> Any:
    """Return a function that starts a process whose file can be written anew."""

    async def started(sections: Sections) -> Reloading:
        proxy = await start_process(**sections)
        return Reloading(proxy, lakebase, tmp_path / "proxy.toml")

    return started


def turned(lakebase: Lakebase) -> dict[str, dict[str, object]]:
    """Return sections in which each shard has the other's keys."""
    return sharded(lakebase, range_map(["two", "one"]))


async def test_a_changed_map_counts_for_new_sessions_and_running_ones_stay(
    start: Any, lakebase: Lakebase
) -> None:
    reloading = await start(sharded(lakebase))
    proxy = reloading.proxy
    async with await psycopg.AsyncConnection.connect(**libpq(proxy, dbname="app@7")) as staying:
        line = await reloading.take(turned(lakebase))
        assert line["changed"] == ["shard_maps.tenants.mappings"]
        assert line["mappings"] == 2
        assert await shard_by_psycopg(proxy, dbname="app@7") == "two"
        assert await shard_by_psycopg(proxy, dbname="app@1500") == "one"
        row = await (await staying.execute(TABLE)).fetchone()
        assert row == ("one",)
    # The same account: what was minted before it still serves.
    assert len(lakebase.workspace.mints) == 1


OVERLAPPING = """
[shard_maps.m]
kind = "range"
key_type = "int4"
mappings = [
  { low = 1, high = 9, target = "upstream" },
  { low = 5, target = "upstream" },
  { low = 9, target = "eu" },
]
"""
BROKEN: Mapping[str, tuple[str, list[str]]] = {
    "no TOML": ("[routing\n", ["proxy.toml"]),
    "several keys": (
        '[listen]\nport = 99999\n[routing]\nshard_map = "none"\n[upstream]\nsslmod = "x"\n',
        ["listen.port", "routing.shard_map", "upstream.sslmod"],
    ),
    "an overlap and an unknown target": (
        OVERLAPPING,
        ["mapping 1 (on upstream) and mapping 2", "'eu'"],
    ),
    "a file of mappings that is not there": (
        '[shard_maps.m]\nkind = "list"\nkey_type = "text"\nmappings_file = "/nonexistent/m.csv"\n',
        ["shard_maps.m.mappings_file"],
    ),
    "a certificate that is not there": (
        '[upstream]\nendpoint = "projects/p/branches/b/endpoints/e"\nssl_root_cert = "/nowhere"\n',
        ["upstream.ssl_root_cert"],
    ),
}


async def test_a_configuration_that_is_wrong_changes_nothing_and_every_problem_is_logged(
    start: Any, lakebase: Lakebase
) -> None:
    reloading = await start(sharded(lakebase))
    good = reloading.file.read_text()
    for text, problems in BROKEN.values():
        reloading.file.write_text(text)
        line = await reloading.hang_up(KEPT)
        assert line["level"] == "error"
        for problem in problems:
            assert problem in "\n".join(line["problems"])
        assert await shard_by_psycopg(reloading.proxy, dbname="app@7") == "one"
    reloading.file.unlink()
    line = await reloading.hang_up(KEPT)
    assert str(reloading.file) in "\n".join(line["problems"])
    reloading.file.write_text(good)
    assert (await reloading.hang_up())["changed"] == []
    assert "Traceback" not in reloading.proxy.err


async def test_what_needs_a_restart_is_named_and_stays_as_it_was(
    start: Any, lakebase: Lakebase
) -> None:
    reloading = await start(sharded(lakebase))
    port = reloading.proxy.listen_port
    with socket.create_server(("127.0.0.1", 0)) as free:
        other = free.getsockname()[1]
    listen = {"port": other, "max_connections": 7}
    given = {**turned(lakebase), "listen": listen, "log": {"format": "console"}}
    line = await reloading.take(given)
    assert line["changed"] == ["shard_maps.tenants.mappings"]
    await eventually(lambda: reloading.proxy.events(RESTART), RESTART)
    (warned,) = reloading.proxy.events(RESTART)
    assert warned["keys"] == ["listen.max_connections", "listen.port", "log.format"]
    assert reloading.proxy.listen_port == port
    assert await shard_by_psycopg(reloading.proxy, dbname="app@7") == "two"


async def test_the_log_level_and_the_time_to_drain_change(start: Any, lakebase: Lakebase) -> None:
    reloading = await start({**sharded(lakebase), "shutdown": {"drain_seconds": 60}})
    proxy = reloading.proxy
    quiet = {"log": {"level": "warning"}, "shutdown": {"drain_seconds": 0}}
    reloading.write({**turned(lakebase), **quiet})
    proxy.send(signal.SIGHUP)  # it is too quiet to say so
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while await shard_by_psycopg(proxy, dbname="app@7") == "one":
            pass
    since = datetime.now(UTC)
    async with plain_client(proxy) as client:
        await client.send(startup(database="app@7") + Terminate().encode())
        await client.receive_rest()
    talkative = {"log": {"level": "debug"}, "shutdown": {"drain_seconds": 0}}
    line = await reloading.take({**sharded(lakebase), **talkative})
    assert line["changed"] == ["log.level", "shard_maps.tenants.mappings"]
    events = [
        one["event"] for one in proxy.lines if datetime.fromisoformat(one["timestamp"]) > since
    ]
    assert RELOADED in events
    assert not {"session started", "session ended"} & {*events}
    busy = await psycopg.AsyncConnection.connect(**libpq(proxy, dbname="app@7"))
    await busy.execute(TABLE)  # begins a transaction: it is not idle
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() == 3  # at once, not after a minute
    await busy.close()
    assert proxy.events("draining")[0]["drain_seconds"] == 0


async def test_targets_come_and_go(start: Any, lakebase: Lakebase) -> None:
    both = targets(lakebase)
    admin = {"admin": {"enabled": True, "port": 0}}
    reloading = await start({**admin, "targets": {"one": both["one"]}})
    proxy = reloading.proxy
    line = await reloading.take({**admin, **sharded(lakebase)})
    assert line["changed"] == [
        *("routing.require_key", "routing.shard_map", "shard_maps.tenants", "targets.two"),
    ]
    async with await psycopg.AsyncConnection.connect(**libpq(proxy, dbname="x@1500")) as staying:
        line = await reloading.take({**admin, "targets": {"one": both["one"]}})
        assert "targets.two" in line["changed"]
        row = await (await staying.execute(TABLE)).fetchone()
        assert row == ("two",)  # on a target that is configured no more
    assert await shard_by_psycopg(proxy) == "one"
    assert len(lakebase.workspace.mints) == 1


def written_csv(file: Path, rows: Mapping[str, str]) -> None:
    """Exchange a file of mappings in one step, as a careful deployment does."""
    new = file.with_suffix(".new")
    new.write_text("key,target\n" + "".join(f"{key},{name}\n" for key, name in rows.items()))
    new.replace(file)


async def test_a_file_of_mappings_that_changed_under_its_name_is_read_and_said(
    start: Any, lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.csv"
    written_csv(file, {"a": "one", "b": "two"})
    by_file: dict[str, object] = {"kind": "list", "key_type": "text", "mappings_file": str(file)}
    reloading = await start(sharded(lakebase, by_file))
    proxy = reloading.proxy
    assert await shard_by_psycopg(proxy, dbname="x@a") == "one"
    line = await reloading.hang_up()
    assert (line["changed"], line["mappings"]) == ([], 2)
    written_csv(file, {"a": "two", "b": "two", "c": "one"})
    line = await reloading.hang_up()
    assert (line["changed"], line["mappings"]) == (
        ["shard_maps.tenants.mappings_file (contents)"],
        3,
    )
    assert [await shard_by_psycopg(proxy, dbname=f"x@{key}") for key in "abc"] == [
        *("two", "two", "one"),
    ]
    # The same mappings in another order are no change.
    written_csv(file, {"c": "one", "b": "two", "a": "two"})
    assert (await reloading.hang_up())["changed"] == []
    written_csv(file, {"a": "nowhere", "": "one"})
    line = await reloading.hang_up(KEPT)
    said = "\n".join(line["problems"])
    assert "line 2: there is no target 'nowhere'" in said
    assert "line 3: the key is empty" in said
    assert await shard_by_psycopg(proxy, dbname="x@c") == "one"


def issue(authority: trustme.CA, certificate: Path, key: Path) -> None:
    """Write a new pair over what is there."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(str(key))
    issued.cert_chain_pems[0].write_to_path(str(certificate))


async def served_certificate(proxy: ProxyProcess) -> bytes:
    """Return the certificate that a client is shown, whatever authority signed it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(proxy.listen_host, proxy.listen_port)
    writer.write(bytes.fromhex("00000008 04d2162f"))
    assert await reader.readexactly(1) == b"S"
    await writer.start_tls(context)
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return shown


async def test_a_renewed_listener_certificate_is_served_without_a_restart(
    start: Any, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate, key = tmp_path / "listener.pem", tmp_path / "listener.key"
    issue(authority, certificate, key)
    pair = {"tls_certificate": str(certificate), "tls_key": str(key)}
    reloading = await start({"listen": pair})
    proxy = reloading.proxy
    first = await served_certificate(proxy)
    async with await psycopg.AsyncConnection.connect(**libpq(proxy, sslmode="require")) as staying:
        issue(authority, certificate, key)
        line = await reloading.hang_up()
        assert line["changed"] == [f"listen.{name} (contents)" for name in sorted(pair)]
        second = await served_certificate(proxy)
        assert second == ssl.PEM_cert_to_DER_cert(certificate.read_text()) != first
        await staying.execute("SELECT 1")
    # A pair that does not belong together: half of a renewal.
    authority.issue_cert("localhost").private_key_pem.write_to_path(str(key))
    line = await reloading.hang_up(KEPT)
    assert "listen.tls_certificate: cannot be used with its key" in "\n".join(line["problems"])
    assert await served_certificate(proxy) == second
    # Under another name.
    moved = {"tls_certificate": str(tmp_path / "b.pem"), "tls_key": str(tmp_path / "b.key")}
    issue(authority, Path(moved["tls_certificate"]), Path(moved["tls_key"]))
    line = await reloading.take({"listen": moved})
    assert line["changed"] == ["listen.tls_certificate", "listen.tls_key"]
    assert await served_certificate(proxy) not in (first, second)
    assert proxy.events(RESTART) == []


async def test_a_reload_while_the_workspace_is_away_costs_no_session(
    start: Any, lakebase: Lakebase
) -> None:
    # What is configured as before keeps its token, its host and its identity: a proxy that served
    # through an outage serves on after a reload.
    reloading = await start(sharded(lakebase))
    for key in ("7", "1500"):
        await shard_by_psycopg(reloading.proxy, dbname=f"app@{key}")
    await lakebase.workspace.refuse_connections()
    await reloading.take(turned(lakebase))
    assert await shard_by_psycopg(reloading.proxy, dbname="app@7") == "two"
    assert await shard_by_psycopg(reloading.proxy, dbname="app@1500") == "one"
    await lakebase.workspace.accept_connections()


async def test_sessions_that_are_opened_all_the_while_never_fail(
    start: Any, lakebase: Lakebase
) -> None:
    reloading = await start(sharded(lakebase))
    proxy = reloading.proxy
    seen: list[tuple[str, str]] = []
    lanes = 8

    async def lane(key: str) -> None:
        for _ in range(LOAD_SESSIONS // lanes):
            shard = await shard_by_psycopg(proxy, dbname=f"app@{key}")
            seen.append((key, shard))

    async with asyncio.TaskGroup() as tasks:
        work = [tasks.create_task(lane(("7", "1500")[n % 2])) for n in range(lanes)]
        reloads = 0
        while not all(task.done() for task in work):
            reloads += 1
            await reloading.take((sharded, turned)[reloads % 2](lakebase))
    assert len(seen) == LOAD_SESSIONS
    assert reloads >= 3
    assert set(seen) == {(key, shard) for key in ("7", "1500") for shard in ("one", "two")}
    for key in ("7", "1500"):
        await reloading.take(turned(lakebase))
        assert await shard_by_psycopg(proxy, dbname=f"app@{key}") == {"7": "two"}.get(key, "one")
    assert [line for line in proxy.lines if line["level"] not in ("debug", "info")] == []
    assert proxy.events("session refused") == []
    assert len(lakebase.workspace.mints) == 1


async def test_systemd_hears_of_readiness_each_reload_and_the_end(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(toml(proxy_values(lakebase, sharded(lakebase))))
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.setblocking(False)

        async def hear() -> str:
            async with asyncio.timeout(30):
                message = await asyncio.get_running_loop().sock_recv(supervisor, 4096)
            heard.append(message.decode())
            return heard[-1]

        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        run = ("run", "--config", str(file))
        async with started_process(*run, environment=environment) as proxy:
            assert await hear() == "READY=1"
            await proxy.serving()
            for text in (file.read_text(), "[routing\n"):  # a good one, and a bad one
                file.write_text(text)
                proxy.send(signal.SIGHUP)
                assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", await hear())
                assert await hear() == "READY=1"
            proxy.send(signal.SIGTERM)
            assert await hear() == "STOPPING=1"
            assert await proxy.ended() == 0
    assert len(heard) == 6


# A configuration that cannot be read in an unforeseen way, and then one that hangs.
STRANGE_REREAD = """
import json, sys, threading
import uvloop
from proxy.config import Settings
from proxy.server.process import run_proxy

asked = []

def reread():
    asked.append(True)
    print("asked", len(asked), flush=True)
    if len(asked) == 1:
        raise ZeroDivisionError("a bug")
    threading.Event().wait()

settings = Settings.model_validate(json.loads(sys.argv[1]))
print("begins", flush=True)
sys.exit(uvloop.run(run_proxy(settings, reread)))
"""


async def test_a_reload_that_fails_or_hangs_ends_nothing_and_does_not_keep_it_from_ending(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # A file that was never read to its end kept the process from ending, whatever it was sent.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.setblocking(False)

        async def hear(expected: str) -> None:
            async with asyncio.timeout(START_SECONDS_MAX):
                heard = await asyncio.get_running_loop().sock_recv(supervisor, 4096)
            assert heard.decode().startswith(expected)

        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", STRANGE_REREAD, json.dumps(proxy_values(lakebase, {}))),
            cwd=ROOT,
            env={**without_own_account(os.environ), "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            await hear("READY")
            for expected in (("RELOADING", "READY"), ("RELOADING",)):
                process.send_signal(signal.SIGHUP)
                for state in expected:
                    await hear(state)
            assert process.stdout is not None
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                await process.stdout.readuntil(b"asked 2\n")
            process.send_signal(signal.SIGTERM)
            await hear("STOPPING")
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_hangup_during_a_drain_is_not_served(
    start: Any, lakebase: Lakebase, tmp_path: Path
) -> None:
    reloading = await start({**sharded(lakebase), "shutdown": {"drain_seconds": 60}})
    proxy = reloading.proxy
    busy = await psycopg.AsyncConnection.connect(**libpq(proxy, dbname="app@7"))
    await busy.execute(TABLE)
    proxy.send(signal.SIGTERM)
    await eventually(lambda: proxy.events("draining"), "it drains")
    reloading.write(turned(lakebase))
    proxy.send(signal.SIGHUP)
    await busy.execute(TABLE)
    await busy.commit()
    await busy.close()
    assert await proxy.ended() == 0
    assert proxy.events(RELOADED) == []


async def test_a_warning_that_is_new_is_logged_once(start: Any, lakebase: Lakebase) -> None:
    reloading = await start({})
    weak = {"upstream": {"sslmode": "require"}}
    await reloading.take(weak)
    await reloading.take(weak)
    (line,) = reloading.proxy.events("configuration warning")
    assert line["level"] == "warning"
    assert "sslmode" in line["warning"]
