"""Clients that leave because of an answer to their first packets: each is counted, and advised.

Their driver says what it misses, and the application often does not log it. Here the log has a line
a minute, and the page a row, with what to set.
"""

import asyncio
from functools import partial
from pathlib import Path

import psycopg
import pytest
import trustme

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.session.session_log import SessionLog, StartupAdvice
from proxy.upstream.phases import DialPhases
from proxy.wire.messages import NegotiateProtocolVersion
from proxy.wire.startup import GSSENCRequest, ProtocolVersion
from tests.e2e.conftest import StartProxy
from tests.support.admin_address import ask
from tests.support.client import plain_client, startup
from tests.support.running import LogLines, eventually, libpq


async def assert_advised(proxy: App, log: LogLines, reason: str, event: str, words: str) -> None:
    """Check that one client has left, for this reason, and that line and page advise its words."""
    failed = partial(proxy.metrics.value, "startup_failures_total")
    await eventually(lambda: failed(reason=reason) == 1, "it is counted")
    assert failed() == 1
    (line,) = log.events(event)
    assert (line["level"], line["reason"]) == ("info", reason)
    assert words in line["advice"]
    assert proxy.admin is not None
    (row,) = (await ask(proxy.admin.port, "/status")).json["errors"]
    assert (row["reason"], row["count"], row["message"]) == (reason, 1, line["advice"])


async def test_a_client_that_leaves_when_tls_is_refused_is_told_of_and_advised(
    start_proxy: StartProxy, log: LogLines
) -> None:
    # sslmode=require ends at the N that refuses TLS. It was a bare client_gone, without a line.
    proxy = await start_proxy(admin={"enabled": True, "port": 0})
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError, match="does not support SSL"):
            await psycopg.AsyncConnection.connect(**libpq(proxy, sslmode="require"))
    failed = partial(proxy.metrics.value, "startup_failures_total", reason="client_wants_tls")
    await eventually(lambda: failed() == 3, "they are counted")
    (line,) = log.events("client wants TLS")
    assert line["level"] == "info"
    assert "sslmode=disable" in line["advice"]
    assert proxy.admin is not None
    (row,) = (await ask(proxy.admin.port, "/status")).json["errors"]
    assert (row["reason"], row["count"]) == ("client_wants_tls", 3)
    assert "sslmode=disable" in row["message"]


async def test_a_client_that_begins_with_tls_is_told_of_and_advised_too(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    # sslnegotiation=direct sends no SSLRequest: it was counted, but had no line and no row.
    proxy = await start_proxy(admin={"enabled": True, "port": 0})
    async with plain_client(proxy) as client:
        with pytest.raises(EOFError, match="during the handshake"):
            await client.start_tls(lakebase.ca_file, None)
    await assert_advised(proxy, log, "direct_tls", "client wants TLS", "sslnegotiation=direct")


async def test_a_client_that_leaves_when_gssapi_is_refused_is_told_of_and_advised(
    start_proxy: StartProxy, log: LogLines
) -> None:
    # gssencmode=require ends at the N that refuses it. It was a bare client_gone, without a line.
    proxy = await start_proxy(admin={"enabled": True, "port": 0})
    async with plain_client(proxy) as client:
        await client.send(GSSENCRequest().encode())
        assert await client.receive() == b"N"
    event, words = "client wants GSSAPI encryption", "gssencmode=disable"
    await assert_advised(proxy, log, "client_wants_gssenc", event, words)


async def test_a_client_that_leaves_at_another_version_is_told_of_and_advised(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    # It was told of NegotiateProtocolVersion, left, and was counted as one that waited too long.
    proxy = await start_proxy(admin={"enabled": True, "port": 0})
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with plain_client(proxy) as client:
        await client.send(startup(ProtocolVersion(3, 9)))
        assert isinstance(await client.message(), NegotiateProtocolVersion)
    event, words = "client left when it was told the protocol version", "min_protocol_version=3.0"
    await assert_advised(proxy, log, "client_gone_version", event, words)


@pytest.mark.parametrize(
    ("waited", "reason"),
    [(0.0, "client_gone_version"), (2.0, "client_gone"), (None, "client_gone")],
)
async def test_a_client_that_waits_after_another_version_left_for_its_wait(
    proxy: App, waited: float | None, reason: str
) -> None:
    # A client that was long in its TLS handshake was taken for one that waited.
    now = asyncio.get_running_loop().time()
    session = SessionLog(proxy.metrics, StartupAdvice(), now - 10)
    session.client_gone(DialPhases(), None if waited is None else now - waited)
    assert proxy.metrics.value("startup_failures_total", reason=reason) == 1


def listener_tls(authority: trustme.CA, directory: Path) -> dict[str, str]:
    """Write a certificate for another host to files. Return the settings of a listener with it."""
    issued = authority.issue_cert("db.example.com")
    files = {"tls_certificate": directory / "chain.pem", "tls_key": directory / "key.pem"}
    issued.cert_chain_pems[0].write_to_path(str(files["tls_certificate"]))
    issued.private_key_pem.write_to_path(str(files["tls_key"]))
    return {key: str(file) for key, file in files.items()}


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_client_that_does_not_accept_the_certificate_is_told_of_and_advised(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, tmp_path: Path, trusted: bool
) -> None:
    # libpq sends an alert for an unknown authority, and leaves without one for a wrong name. Both
    # were counted as scans are, without a line.
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    listen = {"port": 0, **listener_tls(authority, tmp_path)}
    proxy = await start_proxy(listen=listen, admin={"enabled": True, "port": 0})
    root = ca if trusted else lakebase.ca_file
    where = libpq(proxy, sslmode="verify-full", sslrootcert=str(root))
    with pytest.raises(psycopg.OperationalError, match="certificate"):
        await psycopg.AsyncConnection.connect(**where)
    reason, event = (
        ("client_gone_handshake", "client left after its TLS handshake")
        if trusted
        else ("client_rejects_certificate", "client rejects the certificate")
    )
    await assert_advised(proxy, log, reason, event, "sslmode=require")


def test_each_advice_is_due_once_a_minute() -> None:
    advice = StartupAdvice()
    assert [advice.is_due("a", now) for now in (5, 6, 64.9, 65, 66, 200)] == [
        *(True, False, False, True, False, True),
    ]
    assert advice.is_due("b", 201)
