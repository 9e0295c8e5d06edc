"""The upstream's side of a session's start, byte for byte on real sockets (W24 to W30, W52 to W54).

The upstream is written by the test, so that it can say what no honest server would.
"""

import struct

import psycopg
import pytest

from proxy.emulator.certificates import Certificate
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.server.app import App
from proxy.server.first_tokens import mint_first_tokens
from proxy.wire.messages import (
    AuthenticationOk,
    ErrorResponse,
    Frame,
    NegotiateProtocolVersion,
    NoticeResponse,
    ParameterStatus,
)
from proxy.wire.startup import SSLRequest
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, query, startup
from tests.support.manual_upstream import KEY, READY, WELCOME, manual_upstream
from tests.support.peer_server import scripted, tls_opening
from tests.support.running import LogLines, eventually, libpq
from tests.support.script import Expect, Send, SendSplit

OK = AuthenticationOk().encode()
NOTICE = NoticeResponse(((b"S", b"NOTICE"), (b"M", b"mind the \xff"))).encode()
STATUS = ParameterStatus(b"application_name", b"\xffx").encode()
UNKNOWN = Frame(b"y", b"from a later version").encode()
POSTGRES_ERROR = ErrorResponse(
    (
        *((b"S", b"FATAL"), (b"V", b"FATAL"), (b"C", b"42704"), (b"M", b"no such \xff thing")),
        *((b"D", b"d"), (b"P", b"7"), (b"F", b"guc.c"), (b"L", b"1"), (b"R", b"f"), (b"y", b"?")),
    )
).encode()


async def to(start_proxy: StartProxy, upstream_port: int, seconds: float = 5) -> App:
    more = {"port": upstream_port, "connect_timeout_seconds": seconds}
    return await start_proxy(upstream=more)


async def told(proxy: App, sent: bytes = b"") -> bytes:
    """Return all that a client is told who is not served."""
    async with plain_client(proxy) as client:
        await client.send(sent or startup())
        return await client.receive_rest()


def assert_fatal(received: bytes, sqlstate: str, reason: str) -> None:
    kind, length = struct.unpack_from("!cI", received)
    assert (kind, length + 1) == (b"E", len(received)), received
    assert f"SFATAL\0VFATAL\0C{sqlstate}\0M".encode() in received
    assert f"\0Dreason={reason}".encode() in received


# -- what the client is told, and when -------------------------------------------------------------


async def test_w24_the_welcome_is_one_write_and_nothing_comes_before_it(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    async with manual_upstream(lakebase, welcome=OK + STATUS + KEY.encode()) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            await client.send(startup())
            session = await upstream.session()
            with pytest.raises(TimeoutError):  # all but ReadyForQuery has been said upstream
                await client.receive(0.1)
            await session.peer.send(READY)
            assert await client.receive() == OK + STATUS + KEY.encode() + READY


async def test_w24_w29_an_error_after_authentication_ok_comes_verbatim_and_alone(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    async with manual_upstream(lakebase, welcome=OK + STATUS + POSTGRES_ERROR) as upstream:
        assert await told(await to(start_proxy, upstream.port)) == POSTGRES_ERROR


async def test_w29_an_error_of_postgres_is_not_tried_again(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    async with manual_upstream(lakebase, welcome=POSTGRES_ERROR) as upstream:
        assert await told(await to(start_proxy, upstream.port)) == POSTGRES_ERROR
        assert len(upstream.first_bytes) == 1


async def test_w29_a_gateway_error_is_told_as_a_fatal_with_its_text_in_the_detail(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    text = b"Control plane request failed: endpoint is disabled"
    error = ErrorResponse(((b"S", b"ERROR"), (b"C", b"XX000"), (b"M", text)))
    async with manual_upstream(lakebase, welcome=error.encode()) as upstream:
        received = await told(await to(start_proxy, upstream.port))
    assert_fatal(received, "08001", "endpoint_disabled")
    assert text in received


async def test_w25_everything_between_ok_and_ready_passes_verbatim_and_in_order(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    held = STATUS + NOTICE + UNKNOWN + KEY.encode() + STATUS + NOTICE
    async with manual_upstream(lakebase, welcome=OK + held + READY) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            await client.send(startup())
            assert await client.receive() == OK + held + READY


async def test_w26_an_upstream_without_a_key_gives_none_and_nothing_is_cancelled(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    async with manual_upstream(lakebase, welcome=OK + STATUS + READY) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            await client.send(startup())
            assert await client.receive() == OK + STATUS + READY
            assert len(proxy.cancel_keys) == 0
            session = await upstream.session()
            await client.send(query("SELECT 1"))  # it is busy, and could be cancelled (W35)
            await upstream.until(lambda: session.received == query("SELECT 1"))
            client.close()
            await upstream.until(lambda: session.ended)
        assert upstream.cancels == []
        assert session.ended_by is EndedBy.CLOSE_NOTIFY


async def test_w26_libpq_is_content_without_a_key(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    async with manual_upstream(lakebase, welcome=OK + READY) as upstream:
        proxy = await to(start_proxy, upstream.port)
        where = libpq(proxy, sslmode="disable", client_encoding="")
        connection = await psycopg.AsyncConnection.connect(**where)
        assert connection.pgconn.backend_pid == 0
        await connection.close()


async def test_w27_the_pid_that_a_driver_shows_is_the_backends_where_the_upstream_is_honest(
    proxy: App, lakebase: Lakebase
) -> None:
    lakebase["one"].endpoint.passes_real_key = True
    connect = psycopg.AsyncConnection.connect
    async with await connect(**libpq(proxy), autocommit=True) as connection:
        row = await (await connection.execute("SELECT pg_backend_pid()")).fetchone()
        assert row == (connection.info.backend_pid,)
        await connection.execute("LISTEN w27; NOTIFY w27")
        async for notification in connection.notifies(timeout=5, stop_after=1):
            assert notification.pid == connection.info.backend_pid


# -- what the upstream asks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "method"),
    [
        ("00000005 01020304", b"MD5"),
        ("00000007", b"GSS"),
        ("00000009", b"SSPI"),
        ("00000002", b"Kerberos"),
        ("00000063", b"99"),
    ],
)
async def test_w28_an_authentication_that_is_not_supported_is_named(
    start_proxy: StartProxy, lakebase: Lakebase, question: str, method: bytes
) -> None:
    asked = Frame(b"R", bytes.fromhex(question)).encode()
    async with manual_upstream(lakebase, question=asked) as upstream:
        received = await told(await to(start_proxy, upstream.port))
        assert_fatal(received, "28000", "unsupported_auth")
        assert method.lower() in received.lower()
        assert upstream.sessions == []


async def test_w28_a_second_question_for_the_token_is_not_answered(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    again = Frame(b"R", b"\0\0\0\3").encode()
    async with manual_upstream(lakebase, welcome=again) as upstream:
        received = await told(await to(start_proxy, upstream.port))
        assert_fatal(received, "28000", "unsupported_auth")
        session = await upstream.session()
        assert session.token
        assert session.token not in session.received


@pytest.mark.parametrize(
    "before", [NOTICE, NegotiateProtocolVersion(3 << 16, ()).encode()], ids=["notice", "v 3.0"]
)
async def test_w30_surprises_before_the_authentication_are_taken(
    start_proxy: StartProxy, lakebase: Lakebase, before: bytes
) -> None:
    question = before + Frame(b"R", b"\0\0\0\3").encode()
    async with manual_upstream(lakebase, question=question) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            await client.send(startup())
            received = await client.receive()
    assert received.endswith(WELCOME.removeprefix(OK))
    assert (NOTICE in received) == (before == NOTICE)


@pytest.mark.parametrize("version", [3 << 16 | 2, 2 << 16, 0])
async def test_w30_an_unasked_negotiation_is_a_violation(
    start_proxy: StartProxy, lakebase: Lakebase, version: int
) -> None:
    question = NegotiateProtocolVersion(version, ()).encode()
    async with manual_upstream(lakebase, question=question) as upstream:
        received = await told(await to(start_proxy, upstream.port))
    assert_fatal(received, "08006", "upstream_protocol")


async def test_w30_version_3_0_is_asked_whatever_the_client_speaks(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    async with manual_upstream(lakebase) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            sent = bytearray(startup())
            sent[4:8] = bytes.fromhex("0003000f")
            await client.send(bytes(sent))
            assert (await upstream.session()).startup[4:8] == bytes.fromhex("00030000")


# -- TLS upstream, and nonsense --------------------------------------------------------------------


async def test_w52_ssl_request_goes_out_alone(start_proxy: StartProxy, lakebase: Lakebase) -> None:
    async with manual_upstream(lakebase) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            await client.send(startup())
            await upstream.session()
        assert upstream.first_bytes == [bytes.fromhex("00000008 04d2162f")]
        assert upstream.server_names == [lakebase["one"].endpoint.host]


@pytest.mark.parametrize(
    ("answer", "sqlstate", "reason"),
    [
        (b"N", "08001", "upstream_no_tls"),
        (b"EFATAL: go away\n\0", "08006", "upstream_protocol"),
        (b"S" + OK, "08006", "upstream_protocol"),
        (b"G", "08006", "upstream_protocol"),
        (b"\0", "08006", "upstream_protocol"),
    ],
)
async def test_w52_no_other_answer_than_s_alone_is_taken_and_nothing_is_said_in_plaintext(
    start_proxy: StartProxy, lakebase: Lakebase, answer: bytes, sqlstate: str, reason: str
) -> None:
    async with scripted(Expect(SSLRequest().encode()), Send(answer)) as upstream:
        received = await told(await to(start_proxy, upstream.port))
        await upstream.until_open(0)
    assert_fatal(received, sqlstate, reason)
    assert b"go away" not in received  # no party that is trusted said it
    assert EndedBy.TLS_ERROR not in upstream.ends


BIG = 64 * 1024
HOSTILE = {
    "a length below 4": b"S\0\0\0\3",
    "a negative length": b"S\xff\xff\xff\xff",
    "a length of 2 GB": b"D\x7f\xff\xff\xff",
    "one message too large": Frame(b"S", b"a\0" + b"x" * BIG + b"\0").encode(),
    "too much altogether": NOTICE * (5 * BIG // len(NOTICE)),
    "an error without a terminator": Frame(b"E", b"SFATAL\0").encode(),
    "a key of 3 bytes": Frame(b"K", b"\0\0\0\1abc").encode(),
    "two keys": KEY.encode() * 2,
    "a status of nonsense": Frame(b"Z", b"").encode(),
    "a parameter without a value": Frame(b"S", b"name\0").encode(),
}


@pytest.mark.parametrize("nonsense", HOSTILE.values(), ids=HOSTILE.keys())
async def test_w53_a_hostile_upstream_costs_its_own_client_and_no_other(
    start_proxy: StartProxy, lakebase: Lakebase, nonsense: bytes, log: LogLines
) -> None:
    served = await start_proxy()
    async with (
        plain_client(served) as other,
        manual_upstream(lakebase, welcome=OK + nonsense) as upstream,
    ):
        await other.start_up()
        received = await told(await to(start_proxy, upstream.port))
        assert_fatal(received, "08006", "upstream_protocol")
        await other.query("SELECT 'served on'")
        assert b"served on" in await other.receive()
    assert log.events("session failed") == []


async def test_w53_an_error_without_a_code_is_an_error_and_no_crash(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    error = ErrorResponse(((b"S", b"FATAL"), (b"M", b"no code"))).encode()
    async with manual_upstream(lakebase, welcome=OK + error) as upstream:
        received = await told(await to(start_proxy, upstream.port))
    assert received.startswith(b"E")
    assert b"\0M" in received
    assert log.events("session failed") == []


async def test_w53_an_end_at_every_offset_of_the_welcome_is_answered(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    context_steps = tls_opening(lakebase.gateway.certificates.context(Certificate.GOOD))
    for cut in range(1, len(WELCOME), 3):
        steps = (*context_steps, SendSplit(WELCOME[:cut]))
        async with scripted(*steps) as upstream:
            proxy = await to(start_proxy, upstream.port, 0.4)
            await mint_first_tokens(proxy)
            async with plain_client(proxy) as client:
                await client.send(startup())
                await upstream.until_read(1)
                await upstream.stop()
                received = await client.receive_rest()
        assert received.startswith(b"E\0\0"), cut
        assert b"C57P03" in received, cut


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w54_a_client_that_vanishes_before_ready_leaves_no_session_upstream(
    start_proxy: StartProxy, lakebase: Lakebase, way: str
) -> None:
    async with manual_upstream(lakebase, welcome=OK + KEY.encode()) as upstream:
        proxy = await to(start_proxy, upstream.port)
        async with plain_client(proxy) as client:
            await client.send(startup() + query("SELECT 'pipelined'"))
            session = await upstream.session()
            getattr(client, way)()
            await upstream.until(lambda: session.ended)
            await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone")
        assert session.received == b""  # the pipelined query was never sent
        assert session.ended_by is EndedBy.CLOSE_NOTIFY
        assert upstream.cancels == []
