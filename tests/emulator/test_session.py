"""What a pool meets at the gateway: ends of idle sessions, late cancels, resets that go wrong."""

import asyncio
from itertools import pairwise

import pytest

from proxy.emulator.cluster import Cluster, running
from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.session import MessageEnds
from proxy.emulator.streams import EndedBy
from proxy.wire.messages import (
    ErrorResponse,
    Frame,
    ParameterStatus,
    ReadyForQuery,
)
from proxy.wire.startup import CancelRequest
from tests.emulator.test_connection import connect, logged_in
from tests.support.client import Client

STANDBY = ParameterStatus(b"in_hot_standby", b"on")
READY = Frame(b"Z", b"I").encode()


async def answers(client: Client, sql: str) -> None:
    await client.query(sql)
    await client.messages_until(ReadyForQuery)


@pytest.mark.parametrize(
    ("how", "seen"),
    [
        (SessionEnd.CLOSE, EndedBy.CLOSE_NOTIFY),
        (SessionEnd.END_OF_FILE, EndedBy.FIN),
        (SessionEnd.RESET, EndedBy.RESET),
    ],
)
async def test_p71_an_idle_session_ends_early_as_told(
    lakebase: Lakebase, how: SessionEnd, seen: EndedBy
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.idle_seconds_max, endpoint.idle_end = 0.05, how
    client, _ = await logged_in(lakebase)
    assert await client.ended() is seen
    client.abort()


async def test_p76_a_silent_session_answers_nothing_and_stays_open(lakebase: Lakebase) -> None:
    endpoint = lakebase["one"].endpoint
    client, _ = await logged_in(lakebase)
    endpoint.suspend_end = SessionEnd.SILENCE
    endpoint.suspend()
    await lakebase.gateway.until(lambda: not endpoint.sessions)
    await client.query("SELECT 1")
    with pytest.raises(TimeoutError):
        await client.receive(0.05)
    assert endpoint.slots == 0  # Postgres has noticed
    client.close()
    (record,) = lakebase.gateway.sessions
    await lakebase.gateway.until(lambda: record.closed)


async def test_p76_a_promotion_leaves_old_sessions_on_a_standby(lakebase: Lakebase) -> None:
    old, _ = await logged_in(lakebase)
    lakebase["one"].endpoint.promote_another()
    await old.query("SELECT 1")
    messages = await old.messages_until(ReadyForQuery)
    assert messages[-2] == STANDBY
    await old.query("SELECT 1")
    assert STANDBY not in await old.messages_until(ReadyForQuery)
    new, _ = await logged_in(lakebase)
    await new.query("SELECT 1")
    assert STANDBY not in await new.messages_until(ReadyForQuery)
    old.close()
    new.close()


@pytest.mark.parametrize("size", [1, 3, 6, 7, 100])
def test_a_message_of_the_gateways_stands_between_two_of_postgres(size: int) -> None:
    stream = Frame(b"D", b"Z" * 20).encode() + READY + Frame(b"C", b"").encode() + READY
    pieces = [stream[a:b] for a, b in pairwise([*range(0, len(stream), size), len(stream)])]
    finder = MessageEnds()
    assert [finder.before_ready(piece) for piece in pieces] == [None] * len(pieces)
    finder.wanted = True
    sent = b""
    for piece in pieces:
        at = finder.before_ready(piece)
        sent += piece if at is None else piece[:at] + b"!" + piece[at:]
    if size >= len(READY):
        assert sent.replace(b"!" + READY, READY, 1) == stream
        assert sent != stream
    else:
        assert sent == stream  # a header that is cut is left alone: there will be another


async def test_p76_a_login_trigger_runs_at_logins_alone() -> None:
    cluster = Cluster("newest", version=18)
    async with running([cluster]), Lakebase(("newest",), clusters={"newest": cluster}) as lakebase:
        lakebase["newest"].endpoint.add_login_trigger("set_config('app.login', 'set', false)")
        client, _ = await logged_in(lakebase, "newest")
        for sql, value in ((None, b"set"), ("DISCARD ALL", b"")):
            if sql:
                await answers(client, sql)
            await client.query("SELECT current_setting('app.login', true)")
            rows = [m for m in await client.messages_until(ReadyForQuery) if isinstance(m, Frame)]
            assert [row.payload[6:] for row in rows if row.type == b"D"] == [value]
        client.close()


async def test_p77_logins_are_counted_for_each_role(lakebase: Lakebase) -> None:
    for _ in range(2):
        client, _ = await logged_in(lakebase)
        client.close()
    assert lakebase.gateway.logins == {lakebase.client_id: 2}


async def test_p78_a_cancel_can_arrive_long_after_its_connection_has_closed(
    lakebase: Lakebase,
) -> None:
    gateway = lakebase.gateway
    gateway.cancel_delay_seconds = 0.2
    client, key = await logged_in(lakebase)
    other = await connect(lakebase)
    await other.send(CancelRequest(key.pid, key.key).encode())
    assert await other.receive() == b""
    await answers(client, "SELECT 1")  # not yet
    await client.query("SELECT pg_sleep(30)")
    assert (await client.error()).sqlstate == "57014"
    await gateway.until(lambda: gateway.cancels[0].cancel_late)
    client.close()
    other.close()


async def test_a_reset_can_be_answered_with_anything(lakebase: Lakebase) -> None:
    refusal = ErrorResponse.fatal("0A000", "DISCARD is not supported")
    lakebase.gateway.inject(Stage.RESET, refusal.encode())
    client, _ = await logged_in(lakebase)
    await answers(client, "SELECT 1")
    await client.query("DISCARD ALL")
    assert (await client.error()).message == refusal.message
    assert await client.ended() is EndedBy.CLOSE_NOTIFY
    client.abort()


async def test_a_reset_can_hang_and_go_on(lakebase: Lakebase) -> None:
    lakebase.gateway.inject(Stage.RESET, Injection.HANG, times=1)
    client, _ = await logged_in(lakebase)
    await client.query("DISCARD ALL")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.message()
    lakebase.gateway.clear_faults()
    await client.messages_until(ReadyForQuery)
    client.close()


async def test_bytes_that_are_not_postgres_reach_an_idle_session(lakebase: Lakebase) -> None:
    client, _ = await logged_in(lakebase)
    await lakebase["one"].endpoint.say(b"\x00garbage")
    assert await client.receive_exactly(8) == b"\x00garbage"
    client.close()
