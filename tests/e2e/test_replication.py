"""Replication connections through the proxy: they go to a server of their own, so they work.

PostgreSQL documentation, "Streaming Replication Protocol". The role needs the attribute, which
Lakebase gives on request and the tests give here. pg_basebackup, pg_recvlogical and a subscription
are among the tools (`tests/clients`).
"""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from proxy.emulator.cluster import CLIENT_ID, DATABASE, Cluster, quoted
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import ReadyForQuery
from tests.e2e.conftest import StartProcess
from tests.support.client import plain_client, query, startup
from tests.support.proxy_process import run_to_end
from tests.support.running import USER, Listening, libpq

SLOT: Final = "proxied"


@pytest.fixture(autouse=True)
def replication_role(lakebase: Lakebase) -> Iterator[Cluster]:
    """Allow the client's role to replicate during the test; no slot stays."""
    cluster = lakebase["one"].cluster
    cluster.execute(f"ALTER ROLE {quoted(CLIENT_ID)} REPLICATION")
    yield cluster
    cluster.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    cluster.execute(f"ALTER ROLE {quoted(CLIENT_ID)} NOREPLICATION")


def where(proxy: Listening) -> tuple[str, ...]:
    return ("-h", proxy.listen_host, "-p", str(proxy.listen_port), "-U", USER, "-w")


async def run(program: Path, *arguments: str) -> str:
    code, out, err = await run_to_end(program, *arguments)
    assert code == 0, err
    return out


def identity(cluster: Cluster) -> str:
    return cluster.execute("SELECT system_identifier FROM pg_control_system()")


def answer(arguments: dict[str, Any], command: bytes) -> list[bytes | None]:
    """Return the only row of a command's answer; blocks, as all of libpq's simple calls do."""
    with psycopg.connect(**arguments, autocommit=True) as connection:
        result = connection.pgconn.exec_(command)
        return [result.get_value(0, column) for column in range(result.nfields)]


async def test_pg_receivewal_makes_and_drops_a_physical_slot(
    proxy: App, replication_role: Cluster
) -> None:
    program = replication_role.binaries / "pg_receivewal"
    slots = "SELECT slot_type FROM pg_replication_slots"
    await run(program, *where(proxy), "-S", SLOT, "--create-slot")
    assert replication_role.execute(slots) == "physical"
    await run(program, *where(proxy), "-S", SLOT, "--drop-slot")
    assert replication_role.execute(slots) == ""


@pytest.mark.parametrize("replication", ["database", "true", "on", "1"])
async def test_w17_psycopg_identifies_the_system(
    proxy: App, replication_role: Cluster, replication: str
) -> None:
    arguments = libpq(proxy, replication=replication)
    system, _, _, database = await asyncio.to_thread(answer, arguments, b"IDENTIFY_SYSTEM")
    assert system == identity(replication_role).encode()
    assert database == (DATABASE.encode() if replication == "database" else None)


@pytest.mark.parametrize("replication", ["database", "true"])
async def test_w17_psql_identifies_the_system(
    proxy: App, replication_role: Cluster, replication: str
) -> None:
    conninfo = psycopg.conninfo.make_conninfo(**libpq(proxy, replication=replication))
    options = ("-X", "-At", "-d", conninfo, "-c", "IDENTIFY_SYSTEM")
    out = await run(replication_role.binaries / "psql", *options)
    assert out.split("|")[0] == identity(replication_role)


async def test_w17_replication_without_the_attribute_is_refused_as_by_postgres(
    proxy: App, replication_role: Cluster
) -> None:
    replication_role.execute(f"ALTER ROLE {quoted(CLIENT_ID)} NOREPLICATION")
    with pytest.raises(psycopg.OperationalError, match="permission denied to start WAL sender"):
        await psycopg.AsyncConnection.connect(**libpq(proxy, replication="true"))


async def test_w17_settings_of_a_subscription_reach_the_walsender(
    proxy: App, replication_role: Cluster
) -> None:
    # What CREATE SUBSCRIPTION sends in its options.
    options = "-c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3"
    arguments = libpq(proxy, replication="database", options=options)
    shown = await asyncio.to_thread(answer, arguments, b"SHOW extra_float_digits")
    assert shown == [b"3"]


async def test_w47_a_drain_ends_an_idle_replication_stream_at_once(
    start_process: StartProcess, replication_role: Cluster
) -> None:
    # The stream held the drain to its last second, and the exit code was 3. PostgreSQL's own fast
    # shutdown ends it within a moment.
    proxy = await start_process(shutdown={"drain_seconds": 60})
    async with plain_client(proxy) as client:
        await client.send(startup(replication="database"))
        await client.messages_until(ReadyForQuery)
        await client.send(query(f"CREATE_REPLICATION_SLOT {SLOT} TEMPORARY LOGICAL pgoutput"))
        await client.messages_until(ReadyForQuery)
        start = f"START_REPLICATION SLOT {SLOT} LOGICAL 0/0 (proto_version '1', "
        await client.send(query(start + "publication_names 'none')"))
        while (await client.receive_exactly(1)) != b"W":
            pass
        began = asyncio.get_running_loop().time()
        proxy.send(signal.SIGTERM)
        rest = await client.receive_rest()
        assert b"57P01" in rest
        assert b"reason=shutting_down" in rest
        client.close()
        assert await proxy.ended() == 0
        assert asyncio.get_running_loop().time() - began < 10
