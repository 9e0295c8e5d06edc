"""How clients of a pool leave, and what becomes of their sessions: kept, or closed.

Each way of leaving is a row: what is sent, how the connection ends, and whether the same backend
serves the next client. Whatever happened, the next client is served and finds its session as new.
"""

# ruff: noqa: E501 - a way of leaving is a row of a table, and a row is a line

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psycopg
import pytest
import pytest_asyncio

from proxy.emulator.cluster import Cluster
from proxy.emulator.faults import Injection, Stage
from proxy.wire.messages import BackendKeyData, Frame, ReadyForQuery
from proxy.wire.startup import CancelRequest
from tests.differential.frontend import (
    COPY_DONE,
    FLUSH,
    SYNC,
    TERMINATE,
    bind,
    copy_data,
    execute,
    extended,
    parse,
    query,
)
from tests.support.client import Client, plain_client, startup
from tests.support.cuts import Cut, byte_by_byte, whole
from tests.support.pooling import Pooled, backend_pid, pooled_for_module, states, value
from tests.support.running import eventually, libpq

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLEEP: Final = query("SELECT pg_sleep(20)")
BEGIN: Final = query("BEGIN")
COPY_IN: Final = query("CREATE TEMP TABLE t (s text)") + query("COPY t FROM STDIN")
COPY_BINARY: Final = query("CREATE TEMP TABLE t (s bytea)") + query("COPY t FROM STDIN BINARY")
TERMINATE_AS_DATA: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"\0\1\0\0\0\5" + TERMINATE
ROWS_OUT: Final = query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 30000)) TO STDOUT")


def closes(client: Client) -> None:
    client.close()


def ends(client: Client) -> None:
    client.end()


def resets(client: Client) -> None:
    client.reset()


@dataclass(frozen=True, slots=True)
class Leaving:
    """One way of leaving. `answers` are the messages that the client waits for before its end."""

    name: str
    before: bytes  # sent and answered
    answers: bytes
    last: bytes  # sent in one write, directly before the end
    end: Callable[[Client], None]
    kept: bool


LEAVINGS: Final = (
    Leaving("with Terminate", query("SELECT 1"), b"Z", TERMINATE, closes, kept=True),
    Leaving("with Terminate at once", b"", b"", TERMINATE, closes, kept=True),
    Leaving("with Terminate and a RST", query("SELECT 1"), b"Z", TERMINATE, resets, kept=True),
    Leaving("with two Terminates", b"", b"", 2 * TERMINATE, closes, kept=True),
    Leaving("with Terminate and a Query after it", b"", b"", TERMINATE + SLEEP, closes, kept=True),
    Leaving("with EOF while idle", query("SELECT 1"), b"Z", b"", ends, kept=True),
    Leaving("with RST while idle", query("SELECT 1"), b"Z", b"", resets, kept=True),
    Leaving("after an error", query("SELECT 1/0"), b"Z", TERMINATE, closes, kept=True),
    Leaving("after a transaction", BEGIN + query("COMMIT"), b"ZZ", TERMINATE, closes, kept=True),
    Leaving("after a COPY", COPY_IN + copy_data("x\n") + COPY_DONE, b"ZGZ", TERMINATE, closes, kept=True),
    Leaving("with Terminate's bytes in a parameter", parse("SELECT $1::bytea", types=[17]) + bind([TERMINATE], formats=[1]) + execute() + SYNC, b"Z", b"", ends, kept=True),
    Leaving("in a transaction", BEGIN, b"Z", TERMINATE, closes, kept=False),
    Leaving("in a failed transaction", BEGIN + query("SELECT 1/0"), b"ZZ", TERMINATE, closes, kept=False),
    Leaving("in COPY in", COPY_IN, b"ZG", TERMINATE, closes, kept=False),
    Leaving("in COPY in with Terminate's bytes as data", COPY_BINARY + copy_data(TERMINATE_AS_DATA), b"ZG", b"", closes, kept=False),
    Leaving("in COPY out", ROWS_OUT, b"H", TERMINATE, closes, kept=False),
    Leaving("in COPY out with RST", ROWS_OUT, b"H", b"", resets, kept=False),
    Leaving("after Parse and Flush without Sync", parse("SELECT 1") + FLUSH, b"1", TERMINATE, closes, kept=False),
    Leaving("after an error without Sync", parse("SELEC") + FLUSH, b"E", TERMINATE, closes, kept=False),
    Leaving("after an extended query without Sync", extended("SELECT 1"), b"", TERMINATE, closes, kept=False),
    Leaving("with Query and Terminate in one write", b"", b"", query("SELECT pg_sleep(0.5)") + TERMINATE, closes, kept=False),
    Leaving("with RST while busy", SLEEP, b"", b"", resets, kept=False),
    Leaving("with EOF while busy", SLEEP, b"", b"", closes, kept=False),
    *(Leaving(f"with {n} bytes of a Query", b"", b"", query("SELECT 1")[:n], closes, kept=False) for n in range(1, 7)),
    *(Leaving(f"with {n} bytes of Terminate", b"", b"", TERMINATE[:n], closes, kept=False) for n in range(1, 5)),
    Leaving("with a bare X and a RST", b"", b"", b"X", resets, kept=False),
    Leaving("with an X of another length", b"", b"", b"X\0\0\0\5\0", closes, kept=False),
    Leaving("with an unknown message", b"", b"", Frame(b"!", b"").encode(), closes, kept=False),
)  # fmt: skip

# Settings that would spoil a reset that trusts its session, and what else the issue names.
SPOILERS: Final = (
    "SET statement_timeout = 1",
    "SET default_transaction_read_only = on",
    "SET client_encoding = SQL_ASCII",
    "SET search_path = pg_temp; CREATE FUNCTION pg_temp.count() RETURNS bigint LANGUAGE sql AS 'SELECT 0::bigint'",
    "SET idle_session_timeout = 1",
    "SET client_min_messages = debug5",
    "SET standard_conforming_strings = off",
    "DO $$ BEGIN FOR n IN 1..1000 LOOP EXECUTE 'CREATE TEMP TABLE t' || n || ' (n int)'; END LOOP; END $$",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(clusters: Mapping[str, Cluster]) -> AsyncIterator[Pooled]:
    """Return a proxy with a pool, for all tests of this file."""
    async with pooled_for_module(clusters) as served:
        yield served


async def next_pid(served: Pooled) -> int:
    """Return the backend of a client that finds its session as new."""
    async with served.client() as client:
        assert await value(client, "SHOW statement_timeout") == "0"
        assert await value(client, "SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0
        return await backend_pid(client)


async def leave(served: Pooled, leaving: Leaving, cut: Cut) -> None:
    async with plain_client(served.app) as client:
        await client.start_up()
        await client.send(leaving.before)
        for kind in leaving.answers:
            while (await client.receive_exactly(1))[0] != kind:
                await skip(client)
            await skip(client)
        with suppress(ConnectionError):  # it is closed at the first Terminate
            await client.send(leaving.last, cut)
        leaving.end(client)
        if client.open:
            await client.ended()
    await served.at_rest()


async def skip(client: Client) -> None:
    """Receive the rest of a message whose type was received."""
    length = int.from_bytes(await client.receive_exactly(4), "big")
    await client.receive_exactly(length - 4)


@pytest.mark.parametrize("cut", [whole, byte_by_byte], ids=lambda cut: cut.__name__)
@pytest.mark.parametrize("leaving", LEAVINGS, ids=lambda one: one.name.replace(" ", "-"))
async def test_p12_p13_p14_p15_a_session_is_kept_if_its_client_leaves_it_quiet(
    served: Pooled, leaving: Leaving, cut: Cut
) -> None:
    if cut is byte_by_byte and not leaving.last:
        return  # the same as whole
    before = await next_pid(served)
    await served.at_rest()
    await leave(served, leaving, cut)
    assert (await next_pid(served) == before) == leaving.kept, served.retired()
    await served.at_rest()


async def test_p14_a_statement_ahead_of_terminate_runs_to_its_end(served: Pooled) -> None:
    served.cluster.execute("CREATE TABLE public.pool_goodbye (n int)")
    served.cluster.execute("GRANT ALL ON public.pool_goodbye TO PUBLIC")
    async with plain_client(served.app) as client:
        await client.start_up()
        await client.send(
            query("SELECT pg_sleep(0.1)") + query("INSERT INTO pool_goodbye VALUES (1)") + TERMINATE
        )
        client.close()
    await served.at_rest()
    assert served.cluster.execute("SELECT n FROM public.pool_goodbye") == "1"
    served.cluster.execute("DROP TABLE public.pool_goodbye")


@pytest.mark.parametrize("spoiler", SPOILERS, ids=lambda sql: sql[:40].replace(" ", "-"))
async def test_the_next_client_is_as_new_after(served: Pooled, spoiler: str) -> None:
    async with served.client() as client:
        with_error = await value(client, spoiler)
        assert with_error is None, with_error
    await served.at_rest()
    await next_pid(served)
    await served.at_rest()


@pytest.mark.parametrize("last", [TERMINATE, b""], ids=["Terminate", "end of stream"])
async def test_p17_a_client_that_cancels_and_leaves_gives_its_session_to_no_other(
    served: Pooled, last: bytes
) -> None:
    retired = served.retired().get("cancelled", 0)
    before = await next_pid(served)
    await served.at_rest()
    async with plain_client(served.app) as client:
        key = await client.start_up()
        assert key is not None
        await client.query("SELECT pg_sleep(20)")
        await cancel(served, key)
        assert (await client.error()).sqlstate == "57014"
        await client.messages_until(ReadyForQuery)
        await client.send(last)
    await served.at_rest()
    assert await next_pid(served) != before
    assert served.retired()["cancelled"] == retired + 1
    await served.at_rest()


async def test_p30_a_key_ends_with_its_client(served: Pooled) -> None:
    await served.at_rest()
    async with plain_client(served.app) as first:
        old = await first.start_up()
        assert old is not None
        await first.send(TERMINATE)
    await served.at_rest()
    async with served.client() as second:
        pid = await backend_pid(second)
        running = asyncio.create_task(value(second, "SELECT pg_sleep(2)"))
        activity = f"SELECT state FROM pg_stat_activity WHERE pid = {pid}"
        await eventually(lambda: served.cluster.execute(activity) == "active", "it runs")
        cancels = len(served.lakebase.gateway.cancels)
        await cancel(served, old)
        assert await running is None or await running == ""
        assert len(served.lakebase.gateway.cancels) == cancels


async def test_p31_a_cancel_that_is_still_on_its_way_when_its_client_leaves_is_dropped(
    served: Pooled,
) -> None:
    gateway = served.lakebase.gateway
    before, cancels = await next_pid(served), len(gateway.cancels)
    await served.at_rest()
    async with plain_client(served.app) as client, plain_client(served.app) as canceller:
        key = await client.start_up()
        assert key is not None
        connections = len(gateway.records)
        gateway.inject(Stage.ACCEPTED, Injection.HANG, times=1)
        await canceller.send(CancelRequest(key.pid, key.key).encode())
        await eventually(lambda: len(gateway.records) > connections, "it is on its way")
        await client.send(TERMINATE)
        await client.ended()
        await eventually(lambda: states(served.app).keys() <= {"idle"}, "it is kept")
        gateway.clear_faults()
        await canceller.ended()
    assert len(gateway.cancels) == cancels
    assert await next_pid(served) == before
    await served.at_rest()


async def test_p32_a_client_that_is_gone_when_it_is_served_costs_no_session(
    served: Pooled,
) -> None:
    before, logins = await next_pid(served), served.logins
    for _ in range(5):
        await served.at_rest()
        async with plain_client(served.app) as client:
            await client.send(startup(database="databricks_postgres"))
            client.reset()
    await served.at_rest()
    assert (await next_pid(served), served.logins) == (before, logins)
    await served.at_rest()


async def cancel(served: Pooled, key: BackendKeyData) -> None:
    """Send a CancelRequest and wait until the proxy has closed its connection."""
    async with plain_client(served.app) as canceller:
        await canceller.send(CancelRequest(key.pid, key.key).encode())
        await canceller.ended()


async def test_p30_each_client_has_a_secret_of_its_own(served: Pooled) -> None:
    keys = set()
    for _ in range(3):
        async with plain_client(served.app) as client:
            key = await client.start_up()
            assert key is not None
            keys.add(key.key.reveal())
            await client.send(TERMINATE)
        await served.at_rest()
    upstream = {record.issued_key for record in served.lakebase.gateway.sessions}
    shown = {key.key.reveal() for key in upstream if key is not None}
    assert len(keys) == 3
    assert not keys & shown


async def test_p12_a_driver_that_leaves_in_a_transaction(
    served: Pooled,
) -> None:
    connection = await psycopg.AsyncConnection.connect(**libpq(served.app))
    await connection.execute("CREATE TEMP TABLE not_committed (n int)")
    await connection.close()  # in its transaction
    await served.at_rest()
    await next_pid(served)
