"""What a client leaves in its session, and that the next one on the same backend finds none of it.

The reset sends DISCARD ALL and RESET ROLE (P20). Every case of P26 is here: the next client has the
same backend and sees what the first one saw before it left something.
"""

# ruff: noqa: E501 - a leak is a row of a table, and a row is a line

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from struct import pack
from typing import Final

import pytest
import pytest_asyncio

from proxy.emulator.cluster import CLIENT_ID, Cluster, running
from proxy.wire.messages import Frame, ReadyForQuery
from tests.support.client import plain_client, startup
from tests.support.pooling import Connection, Pooled, backend_pid, pooled_for_module, value
from tests.support.running import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

GROUP: Final = '"demo-engineers"'
PRIVILEGED: Final = "pool_superuser"

Act = Callable[[Connection], Awaitable[object]]
# A name, what the client does (statements, or with its driver), and what shows it.
Leak = tuple[str, str | Act, str]
# What they leave is no more than what a fresh session has.
HARMLESS: Final = ("role none", "error of the last transaction")


async def prepare_by_protocol(client: Connection) -> None:
    await client.execute("SELECT 1", prepare=True)


LEAKS: Final[tuple[Leak, ...]] = (
    ("temporary table", "CREATE TEMP TABLE left_here (n int)", "SELECT to_regclass('left_here')"),
    ("temporary view", "CREATE TEMP VIEW left_view AS SELECT 1", "SELECT to_regclass('left_view')"),
    ("temporary function", "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "SELECT to_regprocedure('pg_temp.f()')"),
    ("reported setting", "SET IntervalStyle = iso_8601", "SHOW IntervalStyle"),
    ("unreported setting", "SET work_mem = '5MB'", "SHOW work_mem"),
    ("set_config of a reported setting", "SELECT set_config('standard_conforming_strings', 'off', false)", "SHOW standard_conforming_strings"),
    ("set_config of an unreported setting", "SELECT set_config('work_mem', '6MB', false)", "SHOW work_mem"),
    ("application name", "SET application_name = 'left'", "SHOW application_name"),
    ("search path", "SET search_path = nowhere", "SHOW search_path"),
    ("time zone", "SET TimeZone = 'Asia/Tokyo'", "SHOW TimeZone"),
    ("client encoding", "SET client_encoding = LATIN1", "SHOW client_encoding"),
    ("client encoding SQL_ASCII", "SET client_encoding = SQL_ASCII", "SHOW client_encoding"),
    ("date style", "SET DateStyle = 'German, DMY'", "SHOW DateStyle"),
    ("statement by PREPARE", "PREPARE p AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements"),
    ("statement by protocol", prepare_by_protocol, "SELECT count(*) FROM pg_prepared_statements"),
    ("advisory lock", "SELECT pg_advisory_lock(4711)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"),
    ("listening", "LISTEN news", "SELECT count(*) FROM pg_listening_channels()"),
    ("role", f"SET ROLE {GROUP}", "SELECT current_user"),
    ("role none", "SET ROLE none", "SHOW role"),
    ("isolation of the session", "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SHOW transaction_isolation"),
    ("read only by characteristics", "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SHOW transaction_read_only"),
    ("read only by a setting", "SET default_transaction_read_only = on", "SHOW transaction_read_only"),
    ("cursor with hold", "DECLARE c CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) FROM pg_cursors"),
    ("last value", "CREATE TEMP SEQUENCE s; SELECT nextval('s')", "SELECT lastval()"),
    ("current value", "SELECT nextval('public.pool_s')", "SELECT currval('public.pool_s')"),
    ("time limit of statements", "SET statement_timeout = 1", "SHOW statement_timeout"),
    ("time limit of locks", "SET lock_timeout = 1", "SHOW lock_timeout"),
    ("time limit of idle sessions", "SET idle_session_timeout = '1h'", "SHOW idle_session_timeout"),
    ("schema with its own unlock", "CREATE SCHEMA IF NOT EXISTS pool_trap; CREATE OR REPLACE FUNCTION pool_trap.pg_advisory_unlock_all() RETURNS void LANGUAGE sql AS ''; SET search_path = pool_trap, pg_catalog; SELECT pg_catalog.pg_advisory_lock(4712)", "SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()"),
    ("row security off", "SET row_security = off", "SHOW row_security"),
    ("planner's settings", "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan", "SELECT current_setting('enable_seqscan') || current_setting('plan_cache_mode')"),
    ("level of messages", "SET client_min_messages = error", "SHOW client_min_messages"),
    ("error of the last transaction", "BEGIN; SELECT 1; ROLLBACK", "SELECT txid_current_if_assigned()"),
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["as Lakebase", "newest"])
async def served(
    request: pytest.FixtureRequest, clusters: Mapping[str, Cluster]
) -> AsyncIterator[Pooled]:
    """Return a proxy with a pool, for all tests of this file.

    The newest PostgreSQL reports its search_path, and the first reset asks for login triggers.
    """
    async with AsyncExitStack() as stack:
        if request.param == "newest":
            clusters = {"newest": Cluster("newest", version=18)}
            await stack.enter_async_context(running([*clusters.values()]))
        served = await stack.enter_async_context(pooled_for_module(clusters))
        served.cluster.execute("CREATE SEQUENCE public.pool_s; GRANT ALL ON pool_s TO PUBLIC")
        yield served
        served.cluster.execute("DROP SEQUENCE public.pool_s")


async def act(client: Connection, what: str | Act) -> None:
    await (client.execute(what.encode()) if isinstance(what, str) else what(client))


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak[0].replace(" ", "-"))
async def test_p26_the_next_client_finds_nothing_of(served: Pooled, leak: Leak) -> None:
    name, leave, look = leak
    async with served.client() as first:
        pid, fresh = await backend_pid(first), await value(first, look)
        await act(first, leave)
        assert name in HARMLESS or await value(first, look) != fresh
    await served.at_rest()
    async with served.client() as second:
        assert (await backend_pid(second), await value(second, look)) == (pid, fresh)


async def test_p26_the_next_client_of_a_superuser_has_its_own_authorization(
    clusters: Mapping[str, Cluster],
) -> None:
    cluster = clusters["one"]
    cluster.execute(f"CREATE ROLE {PRIVILEGED} LOGIN SUPERUSER")
    try:
        async with pooled_for_module(clusters, user=PRIVILEGED) as served:
            served.endpoint.members[PRIVILEGED] = {CLIENT_ID}
            look = "SELECT session_user || ' ' || current_user"
            async with served.client() as first:
                pid = await backend_pid(first)
                await first.execute(f'SET SESSION AUTHORIZATION "{CLIENT_ID}"'.encode())
                await first.execute(f"SET ROLE {GROUP}".encode())
            await served.at_rest()
            async with served.client() as second:
                assert await value(second, look) == f"{PRIVILEGED} {PRIVILEGED}"
                assert await backend_pid(second) == pid
    finally:
        cluster.execute(f"DROP ROLE {PRIVILEGED}")


async def test_p26_reset_all_gives_the_second_client_its_own_values(served: Pooled) -> None:
    own = {"application_name": "mine", "options": "-c work_mem=7MB"}
    look = "SELECT current_setting('application_name') || current_setting('work_mem')"
    pids = set()
    for _ in range(2):
        async with served.client(**own) as client:
            pids.add(await backend_pid(client))
            await client.execute("SET application_name = 'other'; SET work_mem = '8MB'")
            await client.execute("RESET ALL")
            assert await value(client, look) == "mine7MB"
        await served.at_rest()
    assert len(pids) == 1
    async with served.client() as other:  # without them it is another key
        assert await backend_pid(other) not in pids
        assert await value(other, look) != "mine7MB"


async def test_p26_an_advisory_lock_is_free_although_no_client_comes(served: Pooled) -> None:
    async with served.client() as first:
        await first.execute("SELECT pg_advisory_lock(4713)")
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4713"
    await eventually(lambda: served.cluster.execute(locks) == "0", "the lock is free", 2)


async def test_p26_a_notification_between_end_and_reset_reaches_no_client(served: Pooled) -> None:
    async def notify() -> None:
        while True:
            for _ in range(20):
                await other.execute("NOTIFY pool_news, 'unasked'")
            await asyncio.sleep(0)

    reused = 0
    async with served.client(application_name="other") as other:
        notifying = asyncio.create_task(notify())
        try:
            for _ in range(5):
                async with served.client() as first:
                    pid = str(await backend_pid(first)).encode()
                    await first.execute("LISTEN pool_news")
                async with plain_client(served.app) as second:
                    await second.send(startup(database="databricks_postgres"))
                    heard = await second.messages_until(ReadyForQuery)
                    await second.query("SELECT pg_backend_pid()")
                    heard += await second.messages_until(ReadyForQuery)
                    assert [m for m in heard if isinstance(m, Frame) and m.type == b"A"] == []
                    reused += Frame(b"D", pack("!hi", 1, len(pid)) + pid) in heard
        finally:
            notifying.cancel()
            await asyncio.wait((notifying,))
    assert reused  # the first ones may have been dialled while the reset took longer
