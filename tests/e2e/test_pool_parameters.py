"""What a server reports while a client has a pooled session is not lost for the next one (P22)."""

from typing import Final, LiteralString

import psycopg
import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import BackendKeyData, ParameterStatus, ReadyForQuery
from proxy.wire.startup import V3_0
from tests.e2e.conftest import StartProxy
from tests.support.client import startup
from tests.support.pooling import both_relays, pooling, retired, settled, taken, visit, visitor
from tests.support.running import eventually, libpq

STYLE: Final = "IntervalStyle"
SHOW: Final = "SHOW IntervalStyle"
PID: Final = "SELECT pg_backend_pid()"


@pytest.mark.parametrize("accelerated", [True, False], ids=["compiled", "python"])
async def test_p22_a_default_that_changes_within_a_clients_session_retires_it(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    # The server says it once, to that client: the next one was once welcomed with the old value.
    proxy = await start_proxy(
        upstream={"pool": "session", "pool_spare_min": 0, "accelerated": accelerated}
    )
    cluster = lakebase["one"].cluster

    async def at_rest() -> None:
        states = ("in_use", "resetting", "dialling")
        await eventually(
            lambda: not any(proxy.metrics.value("pool_sessions", state=one) for one in states),
            "no session is on its way",
        )

    async def show(
        connection: psycopg.AsyncConnection[tuple[object, ...]], sql: LiteralString = SHOW
    ) -> str:
        cursor = await connection.execute(sql)
        (found,) = await cursor.fetchone() or ("",)
        return str(found)

    async with await psycopg.AsyncConnection.connect(**libpq(proxy), autocommit=True) as first:
        await first.execute("SET TimeZone = 'Asia/Tokyo'")
        for at in range(200):  # as a pool of its own does that sets it at each checkout
            await first.execute(f"SET application_name = 'checkout {at}'".encode())
        pid = await show(first, PID)
    await at_rest()
    try:
        async with await psycopg.AsyncConnection.connect(**libpq(proxy), autocommit=True) as second:
            assert await show(second, PID) == pid, "what a client itself has set is no change"
            cluster.execute(f"ALTER SYSTEM SET {STYLE} = 'iso_8601'")
            cluster.execute("SELECT pg_reload_conf()")
            while await show(second) != "iso_8601":  # bounded by the test's own time
                pass
        await at_rest()
        assert proxy.metrics.value("pool_retired_total", reason="parameter_changed") == 1
        async with await psycopg.AsyncConnection.connect(**libpq(proxy), autocommit=True) as third:
            assert third.info.parameter_status(STYLE) == await show(third) == "iso_8601"
            assert await show(third, PID) != pid
    finally:
        cluster.execute(f"ALTER SYSTEM RESET {STYLE}")
        cluster.execute("SELECT pg_reload_conf()")


@both_relays
async def test_p22_a_session_whose_server_is_demoted_under_its_client_is_retired(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    async with visitor(proxy) as client:
        first = await client.enter()
        lakebase["one"].endpoint.promote_another()
        assert await client.value("SELECT 1") == "1"
        await client.leave()
    await eventually(lambda: retired(proxy) == {"parameter_changed": 1}, "it is retired")
    assert await visit(proxy) != first


@both_relays
async def test_p29_a_reused_session_welcomes_as_a_fresh_one_does_but_for_the_key(
    start_proxy: StartProxy, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    options = "-c DateStyle=German -c TimeZone=CET"

    async def welcome(**more: str) -> list[object]:
        async with visitor(proxy) as client:
            await client.send(startup(V3_0, application_name="same", options=options, **more))
            messages = await client.messages_until(ReadyForQuery)
            await client.value("SET DateStyle = 'SQL'; SET application_name = 'mine'")
            await client.leave()
        return [b"K" if isinstance(one, BackendKeyData) else one for one in messages]

    fresh = await welcome(**{"lakebase.pool": "off"})
    assert ParameterStatus(b"DateStyle", b"German, DMY") in fresh
    for _ in range(3):
        assert await welcome() == fresh
        await settled(proxy, idle=1)
    assert taken(proxy) == {"dialled": 2, "reused": 2}
