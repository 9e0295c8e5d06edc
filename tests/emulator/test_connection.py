"""One gateway connection, byte by byte: what a test with a driver cannot observe."""

import asyncio
import os
import resource

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import RECORD_BYTES_MAX, EndedBy
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationSASL,
    BackendKeyData,
    ErrorResponse,
    Frame,
    NegotiateProtocolVersion,
    ParameterStatus,
    PasswordMessage,
    ReadyForQuery,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import (
    V3_0,
    CancelRequest,
    GSSENCRequest,
    ProtocolVersion,
    SSLRequest,
    StartupMessage,
)
from tests.support.client import Client, startup
from tests.support.cuts import byte_by_byte

TLS_OVERHEAD_BYTES = 32  # of a record: type, tag, padding


async def secure(lakebase: Lakebase, shard: str = "one", *, sni: bool = True) -> Client:
    return await secure_to(lakebase, lakebase[shard].endpoint.host if sni else None)


async def secure_to(lakebase: Lakebase, host: str | None) -> Client:
    client = await connect(lakebase)
    await client.request_tls(lakebase.ca_file, host)
    return client


async def connect(lakebase: Lakebase) -> Client:
    return await Client.connect((lakebase.host_address, lakebase.port))


async def logged_in(lakebase: Lakebase, shard: str = "one") -> tuple[Client, BackendKeyData]:
    client = await secure(lakebase, shard)
    await client.send(startup(user=lakebase.client_id, database=lakebase.database))
    await client.show_token(lakebase.token())
    messages = await client.messages_until(ReadyForQuery)
    (key,) = (message for message in messages if isinstance(message, BackendKeyData))
    return client, key


# -- first packets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (GSSENCRequest().encode(), 80877104),
        (StartupMessage(V3_0, ((b"user", b"x"),)).encode(), 196608),
        (b"\x00\x00\x00\x08\x00\x02\x00\x00", 131072),
    ],
)
async def test_only_ssl_and_cancel_may_come_first(
    lakebase: Lakebase, packet: bytes, code: int
) -> None:
    client = await connect(lakebase)
    await client.send(packet)
    error = await client.error()
    assert error.sqlstate == "08P01"
    assert error.message == f"Invalid protocol version. Protocol version: {code}"
    client.abort()


async def test_a_client_hello_first_gets_silence_and_then_a_misleading_text(
    lakebase: Lakebase,
) -> None:
    lakebase.gateway.startup_seconds_max = 0.2
    client = await connect(lakebase)
    await client.send(bytes.fromhex("1603010200010001fc0303") + os.urandom(500))
    error = await client.error()
    assert (error.sqlstate, error.message) == ("08006", "Insecure connection.")
    client.abort()


async def test_a_startup_that_does_not_come_gets_the_same_text(lakebase: Lakebase) -> None:
    lakebase.gateway.startup_seconds_max = 0.2
    client = await secure(lakebase)
    assert (await client.error()).message == "Insecure connection."
    client.abort()


async def test_bytes_after_ssl_request_are_refused(lakebase: Lakebase) -> None:
    client = await connect(lakebase)
    await client.send(SSLRequest().encode() + b"\x16")
    error = await client.error()
    assert error.sqlstate == "08P01"
    assert error.message == "Received unencrypted data after SSL request."
    client.abort()


async def test_split_into_single_bytes_it_is_the_same_login(lakebase: Lakebase) -> None:
    client = await connect(lakebase)
    await client.send(SSLRequest().encode(), byte_by_byte)
    assert await client.receive_exactly(1) == b"S"
    await client.start_tls(lakebase.ca_file, lakebase["one"].endpoint.host)
    pairs = ((b"user", lakebase.client_id.encode()),)
    await client.send(StartupMessage(V3_0, pairs).encode(), byte_by_byte)
    assert await client.message() == AuthenticationCleartextPassword()
    client.abort()


async def test_no_sni_is_refused(lakebase: Lakebase) -> None:
    client = await secure(lakebase, sni=False)
    await client.send(startup(user=lakebase.client_id))
    error = await client.error()
    assert (error.sqlstate, error.message) == ("08006", "Connection does not have SNI.")
    client.abort()


@pytest.mark.parametrize("version", [(3, 1), (3, 2), (3, 9999), (2, 0)])
async def test_the_version_is_exactly_3_0(lakebase: Lakebase, version: tuple[int, int]) -> None:
    client = await secure(lakebase)
    await client.send(startup(ProtocolVersion(*version), user=lakebase.client_id))
    messages = await client.messages_until(ErrorResponse)
    assert not any(isinstance(message, NegotiateProtocolVersion) for message in messages)
    assert isinstance(messages[-1], ErrorResponse)
    assert messages[-1].sqlstate == "0A000"
    client.abort()


@pytest.mark.parametrize(("length", "taken"), [(9999, True), (10000, False)])
async def test_a_startup_message_is_shorter_than_10000_bytes(
    lakebase: Lakebase, length: int, *, taken: bool
) -> None:
    client = await secure(lakebase)
    user = lakebase.client_id.encode()
    empty = StartupMessage(V3_0, ((b"user", user), (b"x.y", b"")))
    padding = b"x" * (length - len(empty.encode()))
    await client.send(StartupMessage(V3_0, ((b"user", user), (b"x.y", padding))).encode())
    if taken:
        assert await client.message() == AuthenticationCleartextPassword()
    else:
        assert (await client.error()).sqlstate == "08006"
    client.abort()


async def test_a_client_that_only_connects_is_counted_and_forgotten(lakebase: Lakebase) -> None:
    client = await connect(lakebase)
    client.close()
    await lakebase.gateway.until(
        lambda: bool(lakebase.gateway.records) and lakebase.gateway.records[0].closed
    )
    (record,) = lakebase.gateway.records
    assert (record.ended_by, record.ready, record.secure) == (EndedBy.FIN, False, False)


# -- login ---------------------------------------------------------------------------------------


async def test_a_login_is_what_postgres_says_with_another_key(lakebase: Lakebase) -> None:
    client = await secure(lakebase)
    await client.send(startup(user=lakebase.client_id, database=lakebase.database))
    await client.show_token(lakebase.token())
    messages = await client.messages_until(ReadyForQuery)
    assert messages[0] == AuthenticationOk()
    names = {message.name for message in messages if isinstance(message, ParameterStatus)}
    assert {b"server_version", b"TimeZone", b"client_encoding"} <= names
    (key,) = (message for message in messages if isinstance(message, BackendKeyData))
    (record,) = lakebase.gateway.sessions
    assert record.issued_key == key
    assert record.real_pid != key.pid
    client.abort()


async def test_neons_errors_have_no_v_and_always_xx000(lakebase: Lakebase) -> None:
    client = await secure(lakebase)
    await client.send(startup(user=lakebase.client_id))
    await client.show_token("not-a-real-token")
    error = await client.error()
    kinds = [kind for kind, _ in error.fields]
    assert (kinds, error.severity, error.sqlstate) == ([b"S", b"C", b"M"], "ERROR", "XX000")
    # The front end waits for the client to close first.
    client.close()
    (record,) = lakebase.gateway.records
    await lakebase.gateway.until(lambda: record.closed)
    assert record.ended_by is EndedBy.CLOSE_NOTIFY


async def test_a_refused_client_that_stays_is_closed_after_the_delay(lakebase: Lakebase) -> None:
    lakebase.gateway.close_delay_seconds = 0.1
    client = await secure(lakebase)
    await client.send(startup(user=lakebase.client_id))
    await client.show_token("not-a-real-token")
    assert (await client.error()).severity == "ERROR"
    assert await client.ended() is EndedBy.CLOSE_NOTIFY
    client.abort()


async def test_a_token_is_refused_on_a_pooled_host_by_sasl(lakebase: Lakebase) -> None:
    pooled = lakebase["one"].endpoint.pooled_host
    client = await secure_to(lakebase, pooled)
    await client.send(startup(user=lakebase.client_id))
    assert await client.message() == AuthenticationSASL((b"SCRAM-SHA-256",))
    await client.send(PasswordMessage(Secret(lakebase.token().encode())).encode())
    assert (await client.error()).message == "SASL authentication failed"
    client.abort()


async def test_another_message_in_place_of_the_token_is_refused(lakebase: Lakebase) -> None:
    client = await secure(lakebase)
    await client.send(startup(user=lakebase.client_id))
    await client.message()
    await client.query("SELECT 1")
    assert (await client.error()).sqlstate == "08P01"
    client.abort()


# -- the session ---------------------------------------------------------------------------------


async def test_records_towards_the_client_are_cut(lakebase: Lakebase) -> None:
    client, _ = await logged_in(lakebase)
    client.record_bytes.clear()
    await client.query("SELECT repeat('x', 1000000)")
    await client.messages_until(ReadyForQuery)
    assert max(client.record_bytes) <= RECORD_BYTES_MAX + TLS_OVERHEAD_BYTES
    assert len(client.record_bytes) > 1_000_000 // RECORD_BYTES_MAX
    client.close()


async def test_a_bare_end_is_told_from_an_orderly_one(lakebase: Lakebase) -> None:
    client, _ = await logged_in(lakebase)
    client.abort()
    (record,) = lakebase.gateway.sessions
    await lakebase.gateway.until(lambda: record.closed)
    assert record.ended_by in (EndedBy.FIN, EndedBy.RESET)


async def test_postgres_last_word_arrives_before_the_end(lakebase: Lakebase) -> None:
    client, _ = await logged_in(lakebase)
    lakebase["one"].endpoint.end_sessions()
    assert (await client.error()).sqlstate == "57P01"
    assert await client.ended() is EndedBy.CLOSE_NOTIFY
    client.abort()


async def test_a_client_that_does_not_read_stops_the_flow(lakebase: Lakebase) -> None:
    """Data that a client does not read must not accumulate in the gateway."""
    client, _ = await logged_in(lakebase)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await client.query("SELECT repeat('x', 1000) FROM generate_series(1, 300000)")
    record = lakebase.gateway.sessions[0]
    await _until_waiting(lakebase, "ClientWrite")
    grown_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kilobytes < 16 * 1024
    client.abort()
    await lakebase.gateway.until(lambda: record.closed)


# -- cancel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside_tls", [False, True])
async def test_a_cancel_is_delivered_and_then_closed(
    lakebase: Lakebase, *, inside_tls: bool
) -> None:
    client, key = await logged_in(lakebase)
    await client.query("SELECT pg_sleep(30)")
    await _until_waiting(lakebase, "PgSleep")
    other = await secure(lakebase) if inside_tls else await connect(lakebase)
    await other.send(CancelRequest(key.pid, key.key).encode())
    assert await other.receive() == b""
    assert (await client.error()).sqlstate == "57014"
    (record,) = lakebase.gateway.cancels
    assert (record.cancel_known, record.secure) == (True, inside_tls)
    client.close()
    other.close()


async def test_the_close_waits_for_the_delivery(lakebase: Lakebase) -> None:
    client, key = await logged_in(lakebase)
    lakebase.gateway.inject(Stage.CANCEL, Injection.HANG)
    other = await secure(lakebase)
    await other.send(CancelRequest(key.pid, key.key).encode())
    await lakebase.gateway.until(lambda: len(lakebase.gateway.cancels) == 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await other.receive()
    lakebase.gateway.clear_faults()
    assert await other.receive() == b""
    client.close()
    other.close()


async def test_an_unknown_key_and_one_without_sni_are_silent(lakebase: Lakebase) -> None:
    client, key = await logged_in(lakebase)
    for pid, sni in ((key.pid ^ 1, True), (key.pid, False)):
        other = await secure(lakebase, sni=sni)
        await other.send(CancelRequest(pid, key.key).encode())
        assert await other.receive() == b""
        other.close()
    assert [record.cancel_known for record in lakebase.gateway.cancels] == [False, False]
    client.close()
    record = lakebase.gateway.sessions[0]
    await lakebase.gateway.until(lambda: record.closed)
    other = await secure(lakebase)
    await other.send(CancelRequest(key.pid, key.key).encode())
    assert await other.receive() == b""
    other.close()
    assert not lakebase.gateway.cancels[-1].cancel_known


# -- faults --------------------------------------------------------------------------------------


async def test_tls_can_be_denied(lakebase: Lakebase) -> None:
    lakebase.gateway.offers_tls = False
    client = await connect(lakebase)
    await client.send(SSLRequest().encode())
    assert await client.receive_exactly(1) == b"N"
    assert await client.receive() == b""
    client.close()


async def test_bytes_can_follow_s_in_the_clear(lakebase: Lakebase) -> None:
    lakebase.gateway.early_bytes = ErrorResponse.fatal("XX000", "injected").encode()
    client = await connect(lakebase)
    await client.send(SSLRequest().encode())
    assert (await client.receive()).startswith(b"SE")
    client.abort()


async def _reach(lakebase: Lakebase, stage: Stage) -> Client:
    """Run the startup up to a stage at which a fault is injected."""
    client = await connect(lakebase)
    if stage is Stage.ACCEPTED:
        return client
    await client.send(SSLRequest().encode())
    if stage is Stage.SSL_REPLY:
        return client
    assert await client.receive_exactly(1) == b"S"
    if stage is Stage.TLS:
        return client
    await client.start_tls(lakebase.ca_file, lakebase["one"].endpoint.host)
    await client.send(startup(user=lakebase.client_id, database=lakebase.database))
    if stage is not Stage.STARTUP:
        await client.show_token(lakebase.token())
    return client


LOGIN_STAGES = [stage for stage in Stage if stage not in (Stage.RESET, Stage.CANCEL)]


@pytest.mark.parametrize("inject", [Injection.CLOSE, Injection.FIN, Injection.RESET])
@pytest.mark.parametrize("stage", LOGIN_STAGES)
async def test_a_connection_can_end_early_at_every_stage(
    lakebase: Lakebase, stage: Stage, inject: Injection
) -> None:
    lakebase.gateway.inject(stage, inject)
    client = await _reach(lakebase, stage)
    orderly = await client.ended() is EndedBy.CLOSE_NOTIFY
    secure = stage.value > Stage.TLS.value
    assert orderly == (secure and inject is Injection.CLOSE)
    assert lakebase.gateway.sessions == []
    client.abort()


@pytest.mark.parametrize("stage", LOGIN_STAGES)
async def test_a_connection_can_hang_at_every_stage_and_go_on(
    lakebase: Lakebase, stage: Stage
) -> None:
    lakebase.gateway.inject(stage, Injection.HANG)
    client = await _reach(lakebase, stage)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.messages_until(ReadyForQuery)
    lakebase.gateway.clear_faults()
    if stage.value > Stage.TLS.value:
        client_sees: type = (
            AuthenticationCleartextPassword if stage is Stage.STARTUP else ReadyForQuery
        )
        await client.messages_until(client_sees)
    client.abort()


@pytest.mark.parametrize("stage", LOGIN_STAGES)
async def test_a_client_that_leaves_a_hanging_login_is_noticed(
    lakebase: Lakebase, stage: Stage
) -> None:
    lakebase.gateway.inject(stage, Injection.HANG)
    client = await _reach(lakebase, stage)
    client.close()
    records = lakebase.gateway.records
    await lakebase.gateway.until(lambda: bool(records) and records[0].closed)


async def test_a_fault_can_be_one_endpoints_and_can_be_bytes(lakebase: Lakebase) -> None:
    lakebase.gateway.inject(
        Stage.STARTUP, Frame(b"!", b"nonsense").encode(), endpoint=lakebase["two"].endpoint
    )
    client, _ = await logged_in(lakebase)
    client.close()
    host = lakebase["two"].endpoint.host
    other = await secure_to(lakebase, host)
    await other.send(startup(user=lakebase.client_id))
    assert await other.message() == Frame(b"!", b"nonsense")
    assert await other.ended() is EndedBy.CLOSE_NOTIFY
    other.abort()


async def _until_waiting(lakebase: Lakebase, event: str) -> None:
    """Wait until Postgres itself waits for this, in the first session."""
    pid = lakebase.gateway.sessions[0].real_pid
    sql = f"SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}"
    async with asyncio.timeout(10):
        while await asyncio.to_thread(lakebase["one"].cluster.execute, sql) != event:
            pass
