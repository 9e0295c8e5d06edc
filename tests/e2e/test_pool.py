"""Sessions of a pool, from one client to the next: the key, the return, the take (P6 to P35)."""

import asyncio
from functools import partial

import pytest

from proxy.emulator.cluster import CLIENT_ID, quoted
from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.server.app import App
from proxy.wire.messages import ErrorResponse, ParameterStatus, ReadyForQuery, Terminate
from proxy.wire.startup import V3_0, V3_2
from tests.e2e.conftest import StartProxy
from tests.e2e.test_psql import psql
from tests.support.client import query, startup
from tests.support.pooling import (
    PID,
    both_relays,
    pooling,
    retired,
    settled,
    states,
    taken,
    visit,
    visitor,
)
from tests.support.running import LogLines, eventually, first_lines


@both_relays
async def test_two_clients_have_one_backend(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    pids = []
    for _ in range(3):
        pids.append(await psql(proxy, PID))
        await settled(proxy, idle=1)
    assert len(set(pids)) == 1
    assert lakebase.gateway.logins.total() == 1
    assert [line["reused"] for line in first_lines(log)] == [False, True, True]
    assert log.above_info() == []


async def test_p6_equal_bytes_share_sessions_and_others_do_not(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    clients: list[dict[str, str]] = [
        {},
        {"application_name": "one"},
        {"application_name": "two"},
        {"options": "-c work_mem=1MB -c DateStyle=German"},
        {"options": "-c DateStyle=German -c work_mem=1MB"},  # another order: another pool
        {"database": "postgres"},
    ]
    first = [await visit(proxy, **one) for one in clients]
    await settled(proxy, idle=len(clients))
    assert len(set(first)) == len(clients)
    assert [await visit(proxy, **one) for one in clients] == first
    assert lakebase.gateway.logins.total() == len(clients)


async def test_p6_reset_gives_each_client_its_own_values(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling())
    for _ in range(2):
        async with visitor(proxy) as client:
            await client.enter(application_name="mine", options="-c work_mem=2MB")
            for reset in ("RESET ALL", "DISCARD ALL"):
                await client.value("SET work_mem = '9MB'; SET application_name = 'x'")
                await client.value(reset)
                assert await client.value("SHOW work_mem") == "2MB"
                assert await client.value("SHOW application_name") == "mine"
            await client.leave()
        await settled(proxy, idle=1)


async def test_p7_sessions_of_one_role_never_reach_anothers_client(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(user="*"))
    own = await visit(proxy, user=lakebase.client_id)
    await settled(proxy, idle=1)
    async with visitor(proxy) as other:
        await other.send(query(""))  # no startup at all
    assert await visit(proxy, user=lakebase.client_id) == own
    async with visitor(proxy) as other:
        with pytest.raises(AssertionError, match="28000"):
            await other.enter(user="somebody-else")
    await settled(proxy, idle=1)
    assert taken(proxy) == {"dialled": 1, "reused": 1}


async def test_p10_a_replication_session_is_never_pooled(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    cluster = lakebase["one"].cluster
    cluster.execute(f"ALTER ROLE {quoted(CLIENT_ID)} REPLICATION")
    try:
        proxy = await start_proxy(**pooling())
        for spelling in ("database", "on", "TRUE", "database"):
            async with visitor(proxy) as client:
                await client.send(startup(replication=spelling))
                await client.messages_until(ReadyForQuery)
                await client.leave()
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "each is closed")
    finally:
        cluster.execute(f"ALTER ROLE {quoted(CLIENT_ID)} NOREPLICATION")
    # To PostgreSQL this is an ordinary session.
    first = await visit(proxy, replication="false")
    await settled(proxy, idle=1)
    assert await visit(proxy, replication="false") == first
    assert retired(proxy) == {}
    assert taken(proxy) == {"dialled": 5, "reused": 1}


async def test_p11_the_clients_protocol_version_is_not_in_the_key(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as old, visitor(proxy) as new:
        pid = await old.enter(V3_0)
        await old.leave()
        await settled(proxy, idle=1)
        assert await new.enter(V3_2) == pid
        await new.leave()


async def test_p18_without_room_the_least_recently_used_session_goes(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(**pooling(pool_idle_max=2))
    names = ("a", "b", "c")
    pids = {name: await visit(proxy, application_name=name) for name in names}
    await settled(proxy, idle=2)
    assert retired(proxy) == {"surplus": 1}
    assert await visit(proxy, application_name="c") == pids["c"]
    assert await visit(proxy, application_name="b") == pids["b"]
    assert await visit(proxy, application_name="a") != pids["a"]


async def test_p18_a_pool_may_keep_nothing_idle(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_idle_max=0))
    first, second = await visit(proxy), await visit(proxy)
    assert first != second
    await settled(proxy, idle=0)
    assert retired(proxy) == {"surplus": 2}


@both_relays
async def test_p19_the_clients_slot_is_free_before_the_reset_is_over(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(listen={"max_connections": 1}, **pooling(accelerated=accelerated))
    lakebase.gateway.inject(Stage.RESET, Injection.HANG)
    first = await visit(proxy)
    await eventually(lambda: states(proxy) == {"resetting": 1}, "its reset hangs")
    second = await visit(proxy)  # which waits for half of a dial's time at most
    assert second != first
    lakebase.gateway.clear_faults()
    await settled(proxy, idle=2)


async def test_p19_a_client_waits_for_a_session_in_its_reset(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    for _ in range(20):  # as fast as they can, and each finds the one session
        await visit(proxy)
    await settled(proxy, idle=1)
    assert lakebase.gateway.logins.total() <= 3


@pytest.mark.parametrize(
    "answer",
    [
        ErrorResponse.fatal("0A000", "DISCARD is not supported").encode(),
        Injection.CLOSE,
        Injection.RESET,
        ReadyForQuery(b"I").encode(),
        ReadyForQuery(b"T").encode(),
        b"garbage",
    ],
    ids=["refused", "closed", "reset", "too soon", "in a transaction", "garbage"],
)
async def test_p20_a_reset_that_is_not_answered_as_it_must_be_retires_the_session(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, answer: Injection | bytes
) -> None:
    proxy = await start_proxy(**pooling())
    lakebase.gateway.inject(Stage.RESET, answer, times=1)
    first = await visit(proxy)
    await eventually(lambda: retired(proxy) == {"reset_failed": 1}, "it is retired")
    assert await visit(proxy) != first
    await settled(proxy, idle=1)
    assert log.above_info() == []


async def test_p24_three_failures_in_a_row_make_a_key_unpoolable(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    refused = ErrorResponse.fatal("0A000", "DISCARD is not supported").encode()
    lakebase.gateway.inject(Stage.RESET, refused, times=3)
    for failures in range(1, 4):
        await visit(proxy)
        wanted = {"reset_failed": failures}
        await eventually(partial(_is, proxy, wanted), f"{wanted}")
    assert await visit(proxy) != await visit(proxy)
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "nothing is kept")
    await visit(proxy, application_name="other")
    await settled(proxy, idle=1)


@both_relays
@pytest.mark.parametrize(
    "content",
    [
        b"\0garbage",
        b"E",
        ParameterStatus(b"TimeZone", b"Mars").encode(),
        ErrorResponse.fatal("57P01", "bye").encode(),
    ],
    ids=["garbage", "half a header", "a parameter", "57P01"],
)
async def test_p25_a_byte_while_idle_retires_the_session(
    start_proxy: StartProxy, lakebase: Lakebase, content: bytes, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    first = await visit(proxy)
    await settled(proxy, idle=1)
    await lakebase["one"].endpoint.say(content)
    await eventually(lambda: retired(proxy) == {"upstream_ended": 1}, "it is retired")
    assert await visit(proxy) != first


async def test_p28_the_session_that_was_used_last_is_taken_first(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as one, visitor(proxy) as two:
        pids = [await one.enter(), await two.enter()]
        await one.leave()
        await settled(proxy, idle=1, in_use=1)
        await two.leave()
    await settled(proxy, idle=2)
    assert await visit(proxy) == pids[1]
    await settled(proxy, idle=2)
    assert await visit(proxy) == pids[1]


@both_relays
async def test_p29_p30_welcomes_are_equal_but_for_the_secret(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    lakebase["one"].endpoint.passes_real_key = True
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    welcomes, keys = [], []
    for _ in range(3):
        async with visitor(proxy) as client:
            pid = await client.enter(application_name="same")
            assert client.key is not None
            keys.append(client.key)
            welcomes.append(pid)
            await client.leave()
        await settled(proxy, idle=1)
    assert {str(key.pid) for key in keys} == set(welcomes) == {welcomes[0]}
    assert len({key.key.reveal() for key in keys}) == 3


@pytest.mark.parametrize("how", list(SessionEnd), ids=lambda how: how.name.lower())
@both_relays
async def test_p34_p75_no_client_meets_a_session_that_a_suspend_has_ended(
    start_proxy: StartProxy, lakebase: Lakebase, how: SessionEnd, *, accelerated: bool
) -> None:
    silent = how is SessionEnd.SILENCE
    proxy = await start_proxy(
        **pooling(accelerated=accelerated, pool_check_seconds=0 if silent else 30)
    )
    async with visitor(proxy) as one, visitor(proxy) as two:
        await one.enter()
        await two.enter()
        await one.leave()
        await settled(proxy, idle=1, in_use=1)
        await two.leave()
    await settled(proxy, idle=2)
    lakebase["one"].endpoint.suspend_end = how
    lakebase["one"].endpoint.suspend()
    if not silent:
        await eventually(lambda: retired(proxy) == {"upstream_ended": 2}, "both are retired")
    began = asyncio.get_running_loop().time()
    await visit(proxy)
    assert asyncio.get_running_loop().time() - began < 8  # one sign of life, not two
    if silent:
        assert retired(proxy) == {"check_failed": 2}


async def test_p23_a_session_that_was_idle_for_long_gives_a_sign_of_life(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_check_seconds=0))
    pid = await visit(proxy)
    await settled(proxy, idle=1)
    assert await visit(proxy) == pid
    assert retired(proxy) == {}


async def test_p43_idle_time_ends_a_session_politely(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling(pool_idle_seconds=1))
    await visit(proxy)
    await settled(proxy, idle=1)
    await eventually(lambda: retired(proxy) == {"idle": 1}, "its time is over")
    await eventually(lambda: lakebase.gateway.sessions[0].closed, "it is closed")
    assert lakebase.gateway.sessions[0].ended_by is EndedBy.CLOSE_NOTIFY
    assert states(proxy) == {}


async def test_p43_a_session_in_use_is_not_cut_for_its_age(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(**pooling(pool_lifetime_seconds=1))
    async with visitor(proxy) as client:
        await client.enter()
        await client.value("SELECT pg_sleep(1.1)")
        await client.leave()
    await eventually(lambda: retired(proxy) == {"lifetime": 1}, "it is not kept")


async def test_p46_reconnect_closes_idle_sessions_and_the_others_behind_their_clients(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as busy:
        first = await busy.enter()
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        for pool in proxy.snapshot.pools:
            pool.reconnect()
        await settled(proxy, idle=0, in_use=1)
        assert await busy.value(PID) == first
        await busy.leave()
    await eventually(lambda: retired(proxy) == {"reconnect": 2}, "it is not kept")


async def test_p47_a_drain_keeps_nothing(start_proxy: StartProxy, lakebase: Lakebase) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as client:
        await client.enter()
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        lakebase.gateway.inject(Stage.RESET, Injection.HANG)
        await visit(proxy)
        await settled_in_reset(proxy)
        draining = asyncio.create_task(proxy.drain(5))
        error = await client.error()
        assert error.sqlstate == "57P01"
        assert await draining == 0
    await eventually(lambda: states(proxy) == {}, "nothing is left")
    assert retired(proxy) == {"drain": 2}


def _is(proxy: App, wanted: dict[str, int]) -> bool:
    return retired(proxy) == wanted


async def settled_in_reset(proxy: App) -> None:
    """Wait until one session is in its reset."""
    await eventually(lambda: states(proxy).get("resetting") == 1, "one is reset")


@both_relays
async def test_p12_a_transaction_left_open_is_retired(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    async with visitor(proxy) as client:
        await client.enter()
        await client.value("BEGIN")
        await client.send(Terminate().encode())
        await client.receive_rest()
    await eventually(lambda: retired(proxy) == {"busy": 1}, "it is retired")
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "and closed")
