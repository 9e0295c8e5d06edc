"""One connection's story where no driver leads: the order of its first bytes, and TLS below it.

The upstream is the real Lakebase emulator. What drivers and psql see is in `e2e`.
"""

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
import pytest_asyncio
import trustme

from proxy.catalogue.model import Located
from proxy.config import ListenSettings
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.observe.metrics import Metrics
from proxy.routing.router import Route
from proxy.server.app import App
from proxy.server.metric_labels import build_metrics
from proxy.server.serving import serving
from proxy.session.cancel import CancelForwarder, CancelKeys, IssuedKey
from proxy.session.drain import OpenSession
from proxy.session.listener import Listener
from proxy.session.mapped_sessions import MappedSessions
from proxy.session.session import Session, SessionParts
from proxy.session.slots import Slots
from proxy.session.starting_client import StartingClient
from proxy.transport.stream import StartupStream
from proxy.upstream.connector import Connector
from proxy.upstream.name_lookup import NameLookup
from proxy.upstream.upstreams import SessionOpener
from proxy.wire.client_startup import ClientStartup
from proxy.wire.messages import (
    AuthenticationOk,
    BackendKeyData,
    BackendMessage,
    ErrorResponse,
    Frame,
    NegotiateProtocolVersion,
    ParameterStatus,
    ReadyForQuery,
)
from proxy.wire.startup import CancelRequest, ProtocolVersion, SSLRequest, StartupMessage
from proxy.wire.upstream_startup import UpstreamStartup
from proxy.workspace.single_flight import PendingCalls
from tests.support.client import Client, plain_client, query, startup
from tests.support.running import captured_log, eventually, proxy_settings
from tests.support.secret_canaries import watching

SERVER_NAME = "localhost"
STARTUP_OBJECTS = (StartupStream, StartingClient, ClientStartup, UpstreamStartup)


@dataclass(frozen=True, slots=True)
class Where:
    """Where a listener listens."""

    listen_host: str
    listen_port: int


@pytest_asyncio.fixture
async def proxy(lakebase: Lakebase) -> AsyncIterator[App]:
    async with serving(proxy_settings(lakebase)) as app, watching(app):
        yield app


Routing = Callable[[StartupMessage], Awaitable[tuple[Route, SessionOpener]]]


async def nowhere(map_id: UUID, routing_keys: Sequence[bytes]) -> Sequence[Located | None]:
    return [None for _ in routing_keys]


async def unchanged(map_id: UUID, routing_key: bytes) -> None:
    pass


def listener_with(
    metrics: Metrics, route: Routing, forwarder: type[CancelForwarder] = CancelForwarder
) -> Listener:
    """Return a listener that serves one session at a time, and routes them like this."""
    keys, slots = CancelKeys(), Slots(1)
    connector = Connector(NameLookup(PendingCalls()).resolve)
    parts = SessionParts(
        route=route,
        cancel_keys=keys,
        cancels=forwarder(keys, connector, metrics),
        metrics=metrics,
        startup_timeout_seconds=5,
        tls=lambda: None,
        slot=slots.take,
        mapped_sessions=MappedSessions(nowhere, unchanged),
    )

    async def serve(stream: StartupStream, entry: OpenSession) -> None:
        await Session(stream, entry, parts).run()

    return Listener(ListenSettings(port=0), slots, metrics, serve)


async def until_ready(client: Client) -> list[BackendMessage | Frame]:
    messages = [await client.message()]
    while not isinstance(messages[-1], ReadyForQuery):
        messages.append(await client.message())
    return messages


async def test_w24_the_welcome_is_in_order_and_complete(proxy: App) -> None:
    async with plain_client(proxy) as client:
        await client.send(startup())
        welcome = await until_ready(client)
    assert welcome[0] == AuthenticationOk()
    kinds = [type(message) for message in welcome[1:]]
    assert set(kinds[:-2]) == {ParameterStatus}
    assert kinds[-2:] == [BackendKeyData, ReadyForQuery]
    names = {message.name for message in welcome if isinstance(message, ParameterStatus)}
    assert names >= {b"server_version", b"client_encoding", b"TimeZone", b"in_hot_standby"}


async def test_w24_nothing_is_said_before_the_upstream_is_ready(
    proxy: App, lakebase: Lakebase
) -> None:
    lakebase.gateway.inject(Stage.READY, Injection.HANG)
    async with plain_client(proxy) as client:
        await client.send(startup())
        await lakebase.gateway.until(
            lambda: (
                any(record.issued_key for record in lakebase.gateway.records)
                or any(record.real_pid for record in lakebase.gateway.records)
                or any(record.token for record in lakebase.gateway.records)
            )
        )
        with pytest.raises(TimeoutError):
            await client.receive(0.1)


async def test_w24_an_error_after_the_upstreams_authentication_ok_comes_alone(
    proxy: App,
) -> None:
    async with plain_client(proxy) as client:
        await client.send(startup(options="-c nonsense=1"))
        assert isinstance(await client.message(), ErrorResponse)
        assert await client.receive_rest() == b""


async def test_w11_the_negotiation_comes_first_and_alone(proxy: App) -> None:
    async with plain_client(proxy) as client:
        parameters = {"_pq_.test_protocol_negotiation": ""}
        await client.send(startup(ProtocolVersion(3, 9999), **parameters))
        negotiated = await client.message()
        assert isinstance(negotiated, NegotiateProtocolVersion)
        assert negotiated.options == (b"_pq_.test_protocol_negotiation",)
        assert (await until_ready(client))[0] == AuthenticationOk()


async def test_a_client_that_closes_its_sending_side_after_the_query_is_a_client_that_left(
    proxy: App, lakebase: Lakebase
) -> None:
    # PostgreSQL knows no half-close: the end of one side is the end of both.
    async with plain_client(proxy) as client:
        await client.start_up()
        client.sock.shutdown(1)
        assert await client.receive_rest() == b""
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "no session upstream")


async def test_w3_the_tail_after_the_startup_message_is_not_forwarded_before_ready(
    proxy: App, lakebase: Lakebase
) -> None:
    async with plain_client(proxy) as client:
        await client.send(startup() + query("SELECT 'tail'"))
        welcome = await until_ready(client)
        answer = await until_ready(client)
    assert all(not isinstance(message, Frame) for message in welcome)
    assert any(isinstance(message, Frame) and b"tail" in message.payload for message in answer)


async def test_a_relayed_session_holds_nothing_of_its_startup(proxy: App) -> None:
    # It may go on for days; a thousand idle ones are to be small.
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as far:
        far.connect(listening.getsockname())
        near, _ = listening.accept()
        near.setblocking(False)
        proxy.listener.adopt(near, 7, lambda: None)
        async with plain_client(proxy) as client:
            await client.start_up()
            await loop.run_in_executor(None, far.sendall, startup())
            async with asyncio.timeout(10):
                received = b""
                while ReadyForQuery(b"I").encode() not in received:
                    received += await loop.run_in_executor(None, far.recv, 65536)
            gc.collect()
            held = [each for each in gc.get_objects() if isinstance(each, STARTUP_OBJECTS)]
            assert held == []


async def test_a_bug_before_the_session_is_ready_is_answered_counted_and_logged() -> None:
    # What the program did not expect closed the connection without a word.
    async def bug(_startup: StartupMessage) -> tuple[Route, SessionOpener]:
        raise ZeroDivisionError("a bug")

    metrics = build_metrics()
    listener = listener_with(metrics, bug)
    with captured_log() as log:
        async with listener.accepting() as ((host, port), *_):
            for _ in range(2):  # the slot is free again
                async with plain_client(Where(host, port)) as client:
                    await client.send(startup())
                    error = await client.error()
                    assert await client.receive_rest() == b""
                assert (error.severity, error.sqlstate) == ("FATAL", "XX000")
                assert error.text(b"D") == "reason=internal_error"
            ended = partial(metrics.value, "sessions_ended_total", reason="internal_error")
            await eventually(lambda: ended() == 2, "both are counted")
    assert metrics.value("startup_failures_total", reason="internal_error") == 2
    refused, failed = log.events("session refused"), log.events("session failed")
    assert [line["connection"] for line in refused] == [1, 2]
    assert [line["connection"] for line in failed] == [1, 2]
    assert all(line["reason"] == "internal_error" for line in refused)
    assert all("ZeroDivisionError: a bug" in line["exception"] for line in failed)


class LookUp:
    """A route that is looked up for ever; shows how its callers end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def route(self, _startup: StartupMessage) -> tuple[Route, SessionOpener]:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


async def test_a_client_that_leaves_while_its_route_is_looked_up_ends_the_look_up() -> None:
    metrics, look_up = build_metrics(), LookUp()
    async with listener_with(metrics, look_up.route).accepting() as ((host, port), *_):
        async with plain_client(Where(host, port)) as client, asyncio.timeout(10):
            await client.send(startup())
            await look_up.begun.wait()
            client.close()
            await look_up.cancelled.wait()
        failed = partial(metrics.value, "startup_failures_total", reason="client_gone")
        await eventually(lambda: failed() == 1, "it is counted")


async def test_a_drain_refuses_a_client_whose_route_is_looked_up() -> None:
    metrics, look_up = build_metrics(), LookUp()
    listener = listener_with(metrics, look_up.route)
    async with (
        listener.accepting() as ((host, port), *_),
        plain_client(Where(host, port)) as client,
        asyncio.timeout(10),
    ):
        await client.send(startup())
        await look_up.begun.wait()
        draining = asyncio.create_task(listener.drain(60))
        assert (await client.error()).sqlstate == "57P01"
        assert await client.receive_rest() == b""
        client.close()
        assert await draining == 0


# -- TLS towards the client; as configured it is in e2e/test_wire_listener_tls.py -----------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest_asyncio.fixture
async def secure_proxy(
    lakebase: Lakebase, authority: trustme.CA, tmp_path: Path
) -> AsyncIterator[App]:
    """A proxy that offers TLS to its clients."""
    issued = authority.issue_cert(SERVER_NAME)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    listen = {
        "tls_certificate": str(certificate),
        "tls_key": str(key),
        "port": 0,
        "startup_timeout_seconds": 0.5,
    }
    async with serving(proxy_settings(lakebase, listen=listen)) as app, watching(app):
        yield app


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def secured(proxy: App, authority: trustme.CA) -> Streams:
    """Connect, ask for TLS, and bring it up."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    reader, writer = await asyncio.open_connection(proxy.listen_host, proxy.listen_port)
    writer.write(SSLRequest().encode())
    assert await reader.readexactly(1) == b"S"
    await writer.start_tls(context, server_hostname=SERVER_NAME)
    return reader, writer


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError):  # it is the proxy that ended
        await writer.wait_closed()


async def test_a_client_is_served_inside_tls(secure_proxy: App, authority: trustme.CA) -> None:
    async with asyncio.timeout(10):
        reader, writer = await secured(secure_proxy, authority)
        writer.write(startup() + query("SELECT 'inside'"))
        received = b""
        while b"inside" not in received:
            received += await reader.read(65536)
        assert received.startswith(AuthenticationOk().encode())
        await closed(writer)


async def test_w38_a_cancel_inside_tls_is_delivered(
    secure_proxy: App, authority: trustme.CA, lakebase: Lakebase
) -> None:
    async with asyncio.timeout(10), plain_client(secure_proxy) as client:
        key = await client.start_up()
        assert key is not None
        reader, writer = await secured(secure_proxy, authority)
        writer.write(CancelRequest(key.pid, key.key).encode())
        assert await reader.read() == b""
        await closed(writer)
    (cancel,) = lakebase.gateway.cancels
    assert cancel.cancel_known


async def test_w3_plaintext_after_an_accepted_ssl_request_is_an_injection(
    secure_proxy: App,
) -> None:
    async with plain_client(secure_proxy) as client:
        await client.send(SSLRequest().encode() + startup())
        rest = await client.receive_rest()
    assert b"received unencrypted data after SSL request" in rest
    assert b"C08P01\0" in rest


@pytest.mark.parametrize("hello", [b"not a hello", b"\x16\x03\x01\x00\x05nonsense"], ids=repr)
async def test_a_broken_handshake_ends_the_connection_and_is_counted(
    secure_proxy: App, hello: bytes
) -> None:
    async with plain_client(secure_proxy) as client:
        await client.send(SSLRequest().encode())
        assert await client.receive() == b"S"
        await client.send(hello)
        await client.receive_rest()
    reason = {"reason": "client_tls"}
    await eventually(
        lambda: secure_proxy.metrics.value("startup_failures_total", **reason) == 1, "it is counted"
    )


async def test_a_client_that_stops_within_the_handshake_is_ended_by_the_startup_timeout(
    secure_proxy: App,
) -> None:
    async with plain_client(secure_proxy) as client:
        await client.send(SSLRequest().encode())
        assert await client.receive() == b"S"
        await client.send(b"\x16\x03\x01")
        receiving = partial(client.receive_rest)
        assert await receiving() == b""
    failures = secure_proxy.metrics.value("startup_failures_total", reason="startup_timeout")
    assert failures == 1


class BrokenForwarder(CancelForwarder):
    """A forwarder with a bug."""

    async def cancel_disconnected(self, issued: IssuedKey) -> None:
        raise ZeroDivisionError("a bug")


async def test_a_session_that_a_bug_ends_while_it_is_relayed_has_its_line(
    lakebase: Lakebase,
) -> None:
    metrics = build_metrics()
    settings = proxy_settings(lakebase, upstream={"cancel_method": "cancel_request"})
    async with serving(settings) as proxy, watching(proxy):
        listener = listener_with(metrics, proxy.snapshot.route, BrokenForwarder)
        with captured_log() as log:
            async with listener.accepting() as ((host, port), *_):
                async with plain_client(Where(host, port)) as client:
                    await client.start_up()
                    client.close()  # which cancels what the upstream does
                await eventually(lambda: log.events("session failed"), "it fails")
    (ended,) = log.events("session ended")
    assert (ended["reason"], ended["target"]) == ("internal_error", "upstream")
    assert metrics.value("sessions_ended_total", reason="internal_error") == 1
