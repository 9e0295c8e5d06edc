"""What happens to idle sessions of a pool upstream: suspends, promotions, silence, bad resets.

Nothing of it is verified on a live Lakebase, so the emulator does each of the ways, and the next
client is served after all of them (P71 to P76).
"""

import asyncio
from itertools import count
from typing import Final

import pytest

from proxy.emulator.cluster import CLIENT_ID, Cluster, running
from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import (
    ErrorResponse,
    Frame,
    NoticeResponse,
    ParameterStatus,
    ReadyForQuery,
)
from proxy.wire.startup import CancelRequest
from tests.differential.frontend import TERMINATE
from tests.support.client import plain_client, startup
from tests.support.pooling import Pooled, backend_pid, pooled, value
from tests.support.running import eventually

COMPLETE: Final = Frame(b"C", b"DISCARD ALL\0").encode()
READY: Final = Frame(b"Z", b"I").encode()


async def one_client(served: Pooled) -> int:
    """Serve a client; return its backend once its session is kept, or was retired."""
    async with served.client() as client:
        pid = await backend_pid(client)
    await served.at_rest()
    return pid


# -- idle sessions that end, or go silent ---------------------------------------------------------


@pytest.mark.parametrize("how", SessionEnd, ids=lambda how: how.name)
async def test_p75_no_client_meets_a_suspend(lakebase: Lakebase, how: SessionEnd) -> None:
    async with pooled(lakebase, pool_check_seconds=0) as served:
        before = await one_client(served)
        served.endpoint.suspend_end = how
        served.endpoint.suspend()
        await served.lakebase.gateway.until(lambda: not served.endpoint.sessions)
        assert await one_client(served) != before
        assert (served.endpoint.wakes, served.logins) == (1, 2)


@pytest.mark.parametrize("how", [SessionEnd.RESET, SessionEnd.SILENCE], ids=lambda how: how.name)
async def test_p71_an_idle_connection_that_is_dropped_early_costs_two_seconds_at_most(
    lakebase: Lakebase, how: SessionEnd
) -> None:
    async with pooled(lakebase, pool_check_seconds=0) as served:
        served.endpoint.idle_seconds_max, served.endpoint.idle_end = 0.3, how
        before = await one_client(served)
        await served.lakebase.gateway.until(lambda: not served.endpoint.sessions)
        began = asyncio.get_running_loop().time()
        assert await one_client(served) != before
        took = asyncio.get_running_loop().time() - began
        assert took < (8 if how is SessionEnd.SILENCE else 2)  # on a busy machine


async def test_p23_a_silent_host_costs_one_client_one_check(lakebase: Lakebase) -> None:
    async with pooled(lakebase, pool_check_seconds=0) as served:
        await served.fill(4)
        served.endpoint.end_sessions(SessionEnd.SILENCE)
        await one_client(served)
        retired = served.retired()
        assert retired["check_failed"] == 4
        assert served.logins == 5


async def test_p34_an_end_without_a_word_makes_the_others_suspect(lakebase: Lakebase) -> None:
    # Their age is below pool_check_seconds: without the suspicion a client would get a silent one.
    async with pooled(lakebase) as served:
        await served.fill(2)
        first, second = list(served.endpoint.sessions)
        first.end(SessionEnd.SILENCE)
        second.end(SessionEnd.ADMIN_SHUTDOWN)
        await eventually(lambda: served.row().present.idle == 1, "one has ended")
        await one_client(served)
        assert served.retired() == {"upstream_ended": 1, "check_failed": 1}


@pytest.mark.parametrize(
    "garbage",
    [b"\0", b"garbage", ParameterStatus(b"in_hot_standby", b"on").encode(), READY],
    ids=["a byte", "some bytes", "a report", "a message"],
)
async def test_p25_a_byte_from_an_idle_session_retires_it(
    lakebase: Lakebase, garbage: bytes
) -> None:
    async with pooled(lakebase) as served:
        before = await one_client(served)
        await served.endpoint.say(garbage)
        await eventually(lambda: served.row().present.idle == 0, "it is retired")
        assert await one_client(served) != before


async def test_p25_an_idle_session_hears_nothing_from_its_pool(lakebase: Lakebase) -> None:
    async with pooled(lakebase, pool_check_seconds=0) as served:
        await one_client(served)
        before = served.endpoint.last_activity
        await asyncio.sleep(0.3)  # nothing is to happen
        assert served.endpoint.last_activity == before


@pytest.mark.parametrize("heard", [False, True], ids=["by the reset", "by its client"])
async def test_p76_a_session_that_stayed_on_a_standby_is_given_to_no_client(
    lakebase: Lakebase, *, heard: bool
) -> None:
    # A reset reports what it changes. What was reported to the client before stays as it is.
    async with pooled(lakebase) as served:
        async with served.client() as client:
            before = await backend_pid(client)
            served.endpoint.promote_another()
            if heard:
                await value(client, "SELECT 1")
                assert client.info.parameter_status("in_hot_standby") == "on"
        await served.at_rest()
        assert served.retired() == {"parameter_changed": 1}
        assert await one_client(served) != before


async def test_p22_a_default_that_changed_retires_the_session(lakebase: Lakebase) -> None:
    async with pooled(lakebase) as served:
        before = await one_client(served)
        default = "SELECT setting FROM pg_settings WHERE name = 'IntervalStyle'"
        served.cluster.execute("ALTER SYSTEM SET IntervalStyle = 'iso_8601'")
        try:
            served.cluster.execute("SELECT pg_reload_conf()")
            await eventually(
                lambda: served.cluster.execute(default) == "iso_8601", "it was reloaded"
            )
            while (pid := await one_client(served)) == before:
                pass  # a backend reads its configuration when it next gets a message
            async with served.client() as client:
                assert await value(client, "SHOW IntervalStyle") == "iso_8601"
            assert pid != before
        finally:
            served.cluster.execute("ALTER SYSTEM RESET IntervalStyle")
            served.cluster.execute("SELECT pg_reload_conf()")


async def test_p74_clients_of_a_revoked_identity_get_a_logins_answer_once_the_session_is_gone(
    lakebase: Lakebase,
) -> None:
    async with pooled(lakebase) as served:
        before = await one_client(served)
        served.endpoint.refuse(ErrorResponse.fatal("28000", "revoked"), times=None)
        assert await one_client(served) == before
        served.endpoint.end_sessions(SessionEnd.CLOSE)
        await eventually(lambda: served.row().present.idle == 0, "it has ended")
        async with plain_client(served.app) as client:
            await client.send(startup())
            assert (await client.error()).sqlstate == "28000"


# -- resets ---------------------------------------------------------------------------------------

BAD_RESETS: Final = {
    "an error": ErrorResponse.fatal("0A000", "DISCARD ALL is not supported").encode(),
    "a row": Frame(b"T", b"\0\0").encode() + Frame(b"D", b"\0\0").encode() + COMPLETE + READY,
    "a transaction": COMPLETE + Frame(b"Z", b"T").encode(),
    "another tag": Frame(b"C", b"RESET\0").encode() + READY,
    "one answer of two": COMPLETE + READY,
    "a megabyte of notices": NoticeResponse(((b"M", b"x" * 1000),)).encode() * 1000,
    "reports without end": ParameterStatus(b"x", b"y" * 1000).encode() * 1000,
    "a length beyond all bounds": b"C\x7f\xff\xff\xff",
}


@pytest.mark.parametrize(
    "answer", [*BAD_RESETS.values(), *Injection], ids=[*BAD_RESETS, *(i.name for i in Injection)]
)
async def test_p20_a_session_whose_reset_goes_wrong_is_retired(
    lakebase: Lakebase, answer: bytes | Injection
) -> None:
    async with pooled(lakebase) as served:
        lakebase.gateway.inject(Stage.RESET, answer, times=1)
        before = await one_client(served)
        assert served.retired() == {"reset_failed": 1}
        assert await one_client(served) != before


ANOTHER_ZONE: Final = ParameterStatus(b"TimeZone", b"Mars").encode()
RESET: Final = COMPLETE + READY + Frame(b"C", b"RESET\0").encode() + ANOTHER_ZONE + READY
# From 17 on, the first reset also counts login triggers (P21).
NO_TRIGGERS: Final = (
    Frame(b"T", b"\0\1count\0" + bytes(18)).encode()
    + Frame(b"D", b"\0\1\0\0\0\1" + b"0").encode()
    + Frame(b"C", b"SELECT 1\0").encode()
    + READY
)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(BAD_RESETS["an error"], "reset_failed"), (RESET, "parameter_changed")],
    ids=["refused", "loses a parameter of the login"],
)
async def test_p73_a_pool_whose_resets_fail_serves_fresh_sessions(
    lakebase: Lakebase, answer: bytes, reason: str
) -> None:
    async with pooled(lakebase) as served:
        counts = int(served.cluster.execute("SHOW server_version_num")) >= 170000
        more = NO_TRIGGERS if counts and answer == RESET else b""
        lakebase.gateway.inject(Stage.RESET, answer + more)
        for _ in range(6):
            await one_client(served)
        assert served.logins == 6
        assert served.retired() == {reason: 3}
        assert len(served.log.above_info()) == 1


async def test_p21_a_login_trigger_ends_pooling_with_one_warning() -> None:
    cluster = Cluster("newest", version=18)
    async with running([cluster]), Lakebase(("newest",), clusters={"newest": cluster}) as lakebase:
        async with pooled(lakebase) as served:
            before = await one_client(served)
            assert await one_client(served) == before  # without a trigger it is as any
            served.endpoint.add_login_trigger("set_config('app.login', 'set', false)")
            for _ in range(3):
                async with served.client() as client:
                    await value(client, "SELECT 1")
                await served.at_rest()
        async with pooled(lakebase) as served:
            for _ in range(3):
                async with served.client() as client:
                    assert await value(client, "SELECT current_setting('app.login')") == "set"
                await served.at_rest()
            assert served.logins == 4  # one of the pool before
            assert served.retired() == {"login_trigger": 1}
            # Clients choose the keys, and the triggers are the database's.
            async with served.client(application_name="other") as client:
                await value(client, "SELECT 1")
            await served.at_rest()
            assert served.retired() == {"login_trigger": 1}
            (warning,) = served.log.above_info()
            assert "login event triggers" in warning["event"]


# -- many clients ---------------------------------------------------------------------------------


async def test_many_clients_one_after_the_other_need_three_logins_at_most(
    lakebase: Lakebase,
) -> None:
    async with pooled(lakebase) as served:
        for _ in range(400):  # `make bench` counts those of 10,000
            async with plain_client(served.app) as client:
                await client.start_up()
                await client.send(TERMINATE)
                await client.ended()
        assert served.logins <= 3
        assert served.lakebase.gateway.logins == {CLIENT_ID: served.logins}


async def test_p25_p36_a_database_with_idle_sessions_and_spares_sleeps_until_a_client_comes(
    lakebase: Lakebase,
) -> None:
    endpoint, asleep_seconds, spares = lakebase["one"].endpoint, 0.5, 3
    endpoint.suspend_after_seconds = asleep_seconds
    async with pooled(lakebase, pool_spare_min=spares) as served:
        await one_client(served)
        await eventually(lambda: served.row().present.idle >= spares, "its spares are there")
        await served.at_rest()
        logins, wakes = served.logins, endpoint.wakes
        await eventually(lambda: endpoint.state == "IDLE", "it sleeps", 10 * asleep_seconds)
        await asyncio.sleep(10 * asleep_seconds)  # nothing is to happen
        assert (endpoint.state, endpoint.wakes, served.logins) == ("IDLE", wakes, logins)
        await one_client(served)
        assert endpoint.wakes == wakes + 1


LATE_CANCELS: Final = 200  # `make pooling` does thousands
AT_ONCE: Final = 50


@pytest.mark.slow
async def test_p78_a_late_cancel_hits_no_other_client(lakebase: Lakebase) -> None:
    lakebase.gateway.cancel_delay_seconds = 0.3
    lakebase["one"].endpoint.passes_real_key = True
    tries = count()
    async with pooled(lakebase, pool_idle_max=AT_ONCE) as served, asyncio.TaskGroup() as group:

        async def canceller() -> None:
            while next(tries) < LATE_CANCELS:
                async with plain_client(served.app) as client:
                    key = await client.start_up()
                    assert key is not None
                    await client.query("SELECT pg_sleep(0.02)")
                    async with plain_client(served.app) as other:
                        await other.send(CancelRequest(key.pid, key.key).encode())
                        await other.ended()
                    await client.messages_until(ReadyForQuery)
                    await client.send(TERMINATE)
                async with served.client() as victim:
                    assert await value(victim, "SELECT pg_sleep(0.4)") == ""

        for _ in range(AT_ONCE):
            group.create_task(canceller())
