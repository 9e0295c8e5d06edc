"""The listener's own TLS: `listen.tls_certificate` and `listen.tls_key` (W3, W5, W7, W8, W38).

For drivers that insist on `sslmode=require`. TLS ends here: it says nothing about the way upstream,
and needs nothing from it.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import pytest_asyncio
import trustme

from proxy.config import ConfigurationError
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.server.app import App
from proxy.wire.messages import AuthenticationOk, BackendKeyData, ErrorResponse, ReadyForQuery
from proxy.wire.startup import CancelRequest
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.cuts import THREE_WAYS, Cut
from tests.support.running import (
    LogLines,
    asyncpg_arguments,
    eventually,
    libpq,
    nothing_left,
    query_runs,
)

SERVER_NAME = "localhost"
SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
GSSENC_REQUEST = bytes.fromhex("00000008 04d21630")
ALPN = "postgresql"
WAIT_SECONDS_MAX = 10.0


@dataclass(frozen=True)
class Pem:
    """A certificate for SERVER_NAME in files, and the authority that clients trust."""

    certificate: Path
    key: Path
    ca: Path

    @property
    def settings(self) -> dict[str, str]:
        return {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}

    def context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    directory = tmp_path_factory.mktemp("listener")
    authority = trustme.CA()
    issued = authority.issue_cert(SERVER_NAME, "127.0.0.1")
    made = Pem(directory / "chain.pem", directory / "key.pem", directory / "ca.pem")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(made.certificate), append=number > 0)
    issued.private_key_pem.write_to_path(str(made.key))
    authority.cert_pem.write_to_path(str(made.ca))
    return made


@pytest_asyncio.fixture
async def secure_proxy(start_proxy: StartProxy, pem: Pem) -> App:
    return await start_proxy(listen=pem.settings)


async def query_answered(client: Client) -> None:
    """Start a session on a client whose TLS is up, and use it."""
    await client.send(startup() + query("SELECT 'inside'"))
    first = (await client.messages_until(ReadyForQuery))[0]
    assert isinstance(first, AuthenticationOk)
    await client.messages_until(ReadyForQuery)


def address(proxy: App) -> tuple[str, int]:
    return proxy.listen_host, proxy.listen_port


@asynccontextmanager
async def direct(proxy: App, pem: Pem, *protocols: str) -> AsyncIterator[Client]:
    """Connect with TLS from the first byte, offering these protocols by ALPN."""
    async with plain_client(proxy) as client:
        client.server_name = SERVER_NAME
        await client.handshake(pem.context(*protocols), server_side=False)
        yield client


# -- drivers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
async def test_w7_libpq_gets_its_tls_whatever_it_insists_on(
    secure_proxy: App, pem: Pem, mode: str
) -> None:
    where = libpq(secure_proxy, sslmode=mode, sslrootcert=str(pem.ca))
    async with await psycopg.AsyncConnection.connect(**where) as connection:
        assert connection.pgconn.ssl_in_use
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


async def test_w7_a_client_without_tls_is_served_as_before(secure_proxy: App) -> None:
    where = libpq(secure_proxy, sslmode="disable")
    async with await psycopg.AsyncConnection.connect(**where) as connection:
        assert not connection.pgconn.ssl_in_use


async def test_w7_without_a_certificate_require_fails_with_the_known_sentence(proxy: App) -> None:
    with pytest.raises(psycopg.OperationalError, match="server does not support SSL, but SSL was"):
        await psycopg.AsyncConnection.connect(**libpq(proxy, sslmode="require"))


async def test_w5_libpq_may_begin_with_tls(secure_proxy: App, pem: Pem) -> None:
    if psycopg.pq.version() < 170000:
        pytest.skip("this libpq knows no sslnegotiation")
    more = {"sslmode": "verify-full", "sslrootcert": str(pem.ca), "sslnegotiation": "direct"}
    async with await psycopg.AsyncConnection.connect(**libpq(secure_proxy, **more)) as connection:
        assert connection.pgconn.ssl_in_use
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


async def test_w7_asyncpg_is_served_inside_tls(secure_proxy: App, pem: Pem) -> None:
    arguments: dict[str, Any] = {**asyncpg_arguments(secure_proxy), "ssl": pem.context()}
    connection = await asyncpg.connect(**arguments)
    assert await connection.fetchval("SELECT 'x' || repeat('y', 100000)") == "x" + "y" * 100_000
    await connection.close()


# -- SSLRequest ------------------------------------------------------------------------------------


async def test_w7_ssl_request_is_answered_by_the_one_byte_s_and_tls_is_awaited(
    secure_proxy: App, pem: Pem
) -> None:
    client = await Client.connect(address(secure_proxy))
    await client.send(SSL_REQUEST)
    assert await client.receive() == b"\x53"
    await client.start_tls(pem.ca, SERVER_NAME)
    await query_answered(client)
    client.close()


async def test_w8_gssenc_request_may_come_first_and_is_answered_n(
    secure_proxy: App, pem: Pem
) -> None:
    client = await Client.connect(address(secure_proxy))
    await client.send(GSSENC_REQUEST)
    assert await client.receive_exactly(1) == b"\x4e"
    await client.send(SSL_REQUEST)
    assert await client.receive_exactly(1) == b"\x53"
    await client.start_tls(pem.ca, SERVER_NAME)
    await query_answered(client)
    client.close()


async def test_w2_w8_both_requests_in_one_segment_are_answered_as_if_they_came_apart(
    secure_proxy: App, pem: Pem
) -> None:
    # TLS was started at the first answer, N, because both had been understood by then: the client
    # never saw its S, and the connection hung until the startup timeout.
    client = await Client.connect(address(secure_proxy))
    await client.send(GSSENC_REQUEST + SSL_REQUEST)
    assert await client.receive_exactly(2) == b"NS"
    await client.start_tls(pem.ca, SERVER_NAME)
    await query_answered(client)
    client.close()


@pytest.mark.parametrize("request_inside", [SSL_REQUEST, GSSENC_REQUEST])
async def test_w9_inside_tls_no_more_encryption_can_be_asked_for(
    secure_proxy: App, pem: Pem, request_inside: bytes
) -> None:
    client = await Client.connect(address(secure_proxy))
    await client.request_tls(pem.ca, SERVER_NAME)
    await client.send(request_inside)
    error = await client.error()
    assert error.sqlstate == "0A000"
    assert error.message.startswith("unsupported frontend protocol 1234.")
    assert await client.ended() is EndedBy.CLOSE_NOTIFY  # with close_notify
    client.close()


@pytest.mark.parametrize(
    "following",
    [b"\0", startup(), b"\x16\x03\x01\x00"],
    ids=["a byte", "a startup", "half a hello"],
)
async def test_w3_bytes_after_an_accepted_ssl_request_are_an_injection(
    secure_proxy: App, lakebase: Lakebase, following: bytes
) -> None:
    async with plain_client(secure_proxy) as client:
        await client.send(SSL_REQUEST + following)
        received = await client.receive_rest()
    text = "received unencrypted data after SSL request"
    error = ErrorResponse.fatal("08P01", text, "reason=early_plaintext").encode()
    assert received == b"S" + error
    assert lakebase.gateway.accepted == 0


@pytest.mark.parametrize("cut", THREE_WAYS)
async def test_w2_the_hello_may_come_in_any_pieces(secure_proxy: App, pem: Pem, cut: Cut) -> None:
    async with plain_client(secure_proxy) as client:
        await client.send(SSL_REQUEST)
        assert await client.receive() == b"S"
        client.server_name = SERVER_NAME
        await client.handshake(pem.context(), server_side=False, cut=cut)
        await client.send_raw(client.encrypted(startup()), cut)
        assert await client.message() == AuthenticationOk()


async def test_w7_old_tls_is_refused(secure_proxy: App, pem: Pem, log: LogLines) -> None:
    context = pem.context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with plain_client(secure_proxy) as client:
        await client.send(SSL_REQUEST)
        assert await client.receive() == b"S"
        client.server_name = SERVER_NAME
        with pytest.raises(ssl.SSLError):
            await client.handshake(context, server_side=False)
        assert await client.receive_rest() == b""
    counted = {"reason": "client_tls"}
    assert secure_proxy.metrics.value("startup_failures_total", **counted) == 1
    assert log.above_info() == []


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_w1_a_client_that_leaves_within_the_handshake_is_forgotten(
    secure_proxy: App, lakebase: Lakebase, log: LogLines, way: str
) -> None:
    async with nothing_left():
        async with plain_client(secure_proxy) as client:
            await client.send(SSL_REQUEST)
            assert await client.receive() == b"S"
            await client.send(b"\x16\x03\x01")
            getattr(client, way)()
        open_now = "connections"
        await eventually(lambda: secure_proxy.metrics.value(open_now) == 0, "it is gone")
    assert lakebase.gateway.accepted == 0
    assert log.above_info() == []


async def test_w49_the_startup_timeout_covers_the_handshake(
    start_proxy: StartProxy, pem: Pem
) -> None:
    proxy = await start_proxy(listen={**pem.settings, "startup_timeout_seconds": 0.15})
    async with plain_client(proxy) as client:
        await client.send(SSL_REQUEST)
        assert await client.receive() == b"S"
        assert await client.receive_rest() == b""
    assert proxy.metrics.value("startup_failures_total", reason="startup_timeout") == 1


# -- TLS from the first byte -----------------------------------------------------------------------


async def test_w5_direct_tls_with_the_right_alpn_is_served(secure_proxy: App, pem: Pem) -> None:
    async with direct(secure_proxy, pem, "h2", ALPN) as client:
        assert client.tls is not None
        assert client.tls.selected_alpn_protocol() == ALPN
        await client.send(startup())
        assert await client.message() == AuthenticationOk()


@pytest.mark.parametrize("protocols", [(), ("h2",), ("http/1.1", "postgresql2")])
async def test_w5_direct_tls_without_the_right_alpn_is_closed_without_a_word(
    secure_proxy: App, pem: Pem, lakebase: Lakebase, protocols: tuple[str]
) -> None:
    # It may be refused within the handshake, which is as good.
    with suppress(ssl.SSLError, ConnectionError, EOFError):
        async with direct(secure_proxy, pem, *protocols) as client:
            await client.send(startup())
            assert await client.receive_rest() == b""
    counted = {"reason": "client_tls"}
    await eventually(
        lambda: secure_proxy.metrics.value("startup_failures_total", **counted) == 1, "counted"
    )
    assert lakebase.gateway.accepted == 0


async def test_w5_after_a_refused_request_tls_is_not_begun_without_asking(
    secure_proxy: App, pem: Pem
) -> None:
    # After GSSENCRequest and its N the client must ask: PostgreSQL looks for TLS only at the start.
    client = await Client.connect(address(secure_proxy))
    await client.send(GSSENC_REQUEST)
    assert await client.receive_exactly(1) == b"N"
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = pem.context().wrap_bio(incoming, outgoing, server_hostname=SERVER_NAME)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    await client.send(outgoing.read())
    # Without ALPN it is closed in any case; what matters is that no session comes of it.
    assert b"R\0\0\0\x08" not in await client.receive()
    client.close()


async def test_w5_inside_direct_tls_an_ssl_request_is_answered_n(
    secure_proxy: App, pem: Pem
) -> None:
    # PostgreSQL 17: "also no SSL negotiation if we already have a direct SSL connection".
    async with direct(secure_proxy, pem, ALPN) as client:
        await client.send(SSL_REQUEST)
        assert await client.receive_exactly(1) == b"N"
        await client.send(startup())
        assert await client.message() == AuthenticationOk()


# -- cancel and end --------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", ["SSLRequest", "TLS"])
async def test_w38_a_cancel_inside_tls_is_delivered_and_not_answered(
    secure_proxy: App, pem: Pem, lakebase: Lakebase, begins: str
) -> None:
    async with plain_client(secure_proxy) as client:
        key = await client.start_up()
        assert key is not None
        await client.query("SELECT pg_sleep(60)")
        await query_runs(lakebase)
        request = CancelRequest(key.pid, key.key).encode()
        if begins == "TLS":
            async with direct(secure_proxy, pem, ALPN) as canceller:
                await canceller.send(request)
                assert await canceller.receive_rest() == b""
        else:
            canceller = await Client.connect(address(secure_proxy))
            await canceller.request_tls(pem.ca, SERVER_NAME)
            await canceller.send(request + b"\0ignored")
            assert await canceller.receive() == b""
            canceller.close()
        assert (await client.error()).sqlstate == "57014"
    assert [record.cancel_known for record in lakebase.gateway.cancels] == [True]


async def test_w34_the_last_words_come_inside_tls_and_before_close_notify(
    secure_proxy: App, pem: Pem, lakebase: Lakebase
) -> None:
    client = await Client.connect(address(secure_proxy))
    await client.request_tls(pem.ca, SERVER_NAME)
    await query_answered(client)
    lakebase["one"].endpoint.end_sessions()
    assert (await client.error()).sqlstate == "57P01"
    assert await client.ended() is EndedBy.CLOSE_NOTIFY
    client.close()


async def test_w27_the_key_is_the_same_inside_tls(
    secure_proxy: App, pem: Pem, lakebase: Lakebase
) -> None:
    lakebase["one"].endpoint.passes_real_key = True
    client = await Client.connect(address(secure_proxy))
    await client.request_tls(pem.ca, SERVER_NAME)
    await client.send(startup())
    welcome = await client.messages_until(ReadyForQuery)
    assert [m for m in welcome if isinstance(m, BackendKeyData)] == [
        lakebase.gateway.sessions[-1].issued_key
    ]
    client.close()


async def test_w32_a_large_result_and_a_large_query_pass_through_both_tls_hops(
    secure_proxy: App, pem: Pem
) -> None:
    text = "x" * 3_000_000
    where = libpq(secure_proxy, sslmode="require")
    async with await psycopg.AsyncConnection.connect(**where) as connection:
        row = await (await connection.execute(f"SELECT '{text}'")).fetchone()
    assert row == (text,)


# -- settings --------------------------------------------------------------------------------------


async def test_files_that_cannot_be_used_are_reported_at_the_start(
    start_proxy: StartProxy, pem: Pem, tmp_path: Path
) -> None:
    noise = tmp_path / "noise.pem"
    noise.write_text("no certificate")
    for settings in (
        {"tls_certificate": str(tmp_path / "absent.pem"), "tls_key": str(pem.key)},
        {"tls_certificate": str(pem.certificate), "tls_key": str(noise)},
        {"tls_certificate": str(pem.ca), "tls_key": str(pem.key)},  # not a pair
    ):
        with pytest.raises(ConfigurationError, match=r"listen\.tls_certificate"):
            await start_proxy(listen=settings)


@pytest.mark.slow
async def test_a_process_serves_tls_and_keeps_its_key_to_itself(
    start_process: StartProcess, pem: Pem
) -> None:
    proxy = await start_process(listen=pem.settings)
    async with await psycopg.AsyncConnection.connect(**libpq(proxy, sslmode="require")) as one:
        assert one.pgconn.ssl_in_use
    assert "PRIVATE KEY" not in proxy.out + proxy.err


async def test_a_self_signed_certificate_serves_clients_that_require_tls(
    start_proxy: StartProxy,
) -> None:
    # Many applications have sslmode=require built in; a certificate in files had to be made first.
    proxy = await start_proxy(listen={"port": 0, "tls": "self-signed"})
    for sslmode in ("require", "disable"):
        where = libpq(proxy, sslmode=sslmode)
        async with await psycopg.AsyncConnection.connect(**where) as connection:
            assert connection.pgconn.ssl_in_use == (sslmode == "require")
            assert await (await connection.execute("SELECT 1")).fetchone() == (1,)
