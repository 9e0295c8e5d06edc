"""From a target to a connection under TLS, and cancels over it: the emulator, and scripted servers.

What follows from a failure is the dialer's to decide, so that most of this is seen through one.
"""

import asyncio
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import (
    AsyncExitStack,
    ExitStack,
    contextmanager,
    suppress,
)
from pathlib import Path

import pytest
import trustme
from aiohappyeyeballs import AddrInfoType

from proxy.emulator.certificates import Certificate
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.address_lookup import Target
from proxy.upstream.connector import NEXT_ADDRESS_SECONDS
from proxy.upstream.name_lookup import NameLookup
from proxy.upstream.phases import ConnectPhase
from proxy.wire.messages import (
    BackendKeyData,
    ErrorResponse,
    ReadyForQuery,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import CancelRequest, SSLRequest
from proxy.workspace.single_flight import PendingCalls
from tests.support.dialing import (
    HONEST,
    HOST,
    TOKEN,
    WAIT_SECONDS_MAX,
    Counted,
    all_closed,
    dialing,
    dialing_script,
    lakebase_dialing,
    messages_until,
    query,
)
from tests.support.peer_server import scripted, tls_opening
from tests.support.running import captured_log, nothing_left
from tests.support.script import Close, Expect, ExpectPacket, Reset, Send, StartTLS, Step


@pytest.fixture
def endpoint(lakebase: Lakebase) -> Endpoint:
    lakebase.gateway.close_delay_seconds = 0.1
    return lakebase["one"].endpoint


PROTOCOL = ErrorKind.UPSTREAM_PROTOCOL


# -- certificates and TLS ------------------------------------------------------------------------


@pytest.mark.parametrize("sslmode", ["verify-full", "verify-ca", "require"])
@pytest.mark.parametrize("certificate", list(Certificate), ids=lambda kind: kind.name.lower())
async def test_a_certificate_is_checked_as_far_as_sslmode_says(
    lakebase: Lakebase, endpoint: Endpoint, certificate: Certificate, sslmode: str
) -> None:
    lakebase.gateway.certificate = certificate
    accepted = {
        "verify-full": {Certificate.GOOD},
        "verify-ca": {Certificate.GOOD, Certificate.WRONG_NAME},
        "require": set(Certificate),
    }
    async with lakebase_dialing(lakebase, endpoint, sslmode=sslmode) as made:
        if certificate in accepted[sslmode]:
            (await made.dial()).stream.transport.abort()
            return
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_CERTIFICATE
        assert error.detail.startswith(endpoint.host)
        assert lakebase.gateway.accepted == 1  # the same certificate would come again
        assert lakebase.gateway.records[0].token is None
        await all_closed(lakebase)


async def test_the_systems_authorities_do_not_trust_a_stranger(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint, ssl_root_cert="system") as made:
        assert (await made.refusal()).kind is ErrorKind.UPSTREAM_CERTIFICATE


async def test_authorities_that_are_replaced_count_from_the_next_connection_on(
    lakebase: Lakebase, endpoint: Endpoint, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    async with lakebase_dialing(lakebase, endpoint, ssl_root_cert=str(path)) as made:
        assert (await made.refusal()).kind is ErrorKind.UPSTREAM_CERTIFICATE
        shutil.copyfile(lakebase.ca_file, path)
        (await made.dial()).stream.transport.abort()
        path.unlink()
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_CERTIFICATE
        assert error.detail == f"{path}: No such file or directory"


async def test_w52_an_upstream_without_tls_is_never_continued_in_plaintext(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.offers_tls = False
    async with lakebase_dialing(lakebase, endpoint) as made:
        assert (await made.refusal()).kind is ErrorKind.UPSTREAM_NO_TLS
        await all_closed(lakebase)
        (record,) = lakebase.gateway.records
        assert (record.parameters, record.token) == ((), None)


async def test_w52_bytes_after_s_are_an_injection(lakebase: Lakebase, endpoint: Endpoint) -> None:
    lakebase.gateway.early_bytes = ReadyForQuery(b"I").encode()
    async with lakebase_dialing(lakebase, endpoint) as made:
        error = await made.refusal()
        assert error.kind in (ErrorKind.UPSTREAM_PROTOCOL, ErrorKind.UPSTREAM_LOST)
        await all_closed(lakebase)
        assert all(record.token is None for record in lakebase.gateway.records)


async def test_w36_an_upstream_connection_has_a_bound_for_unacknowledged_bytes(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        sock = session.stream.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        session.stream.transport.abort()


async def test_a_trailing_dot_is_asked_of_dns_and_left_out_of_sni_and_the_comparison(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    # The certificate did not match, and the front end knew no such endpoint.
    async with lakebase_dialing(lakebase, endpoint, host=f"{endpoint.host}.") as made:
        session = await made.dial()
        assert lakebase.gateway.records[-1].sni == endpoint.host
        assert session.target.host == f"{endpoint.host}."
        session.stream.transport.abort()
    target = Target("no-such-host.invalid.", "", 5432, "verify-full", "system")
    with pytest.raises(ProxyError, match=r"no-such-host\.invalid\."):
        await NameLookup(PendingCalls()).resolve(target)


async def test_a_closed_port_is_unreachable(lakebase: Lakebase, endpoint: Endpoint) -> None:
    await lakebase.gateway.refuse_connections()
    async with lakebase_dialing(lakebase, endpoint) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_UNREACHABLE
        assert f"{endpoint.host}:{lakebase.port}" in error.detail
        await lakebase.gateway.accept_connections()
        (await made.dial()).stream.transport.abort()


@pytest.mark.parametrize(
    "host",
    [
        "no-such-host.invalid",
        f"{'x' * 64}.example.invalid",
        "two..dots.invalid",
        f"{'x' * 60}." * 4 + "invalid",
    ],
    ids=["unknown", "long_label", "empty_label", "long_name"],
)
async def test_a_name_that_does_not_resolve_is_a_matter_of_dns(host: str) -> None:
    # The names that the codec refuses came out of the dialer as UnicodeError.
    async with dialing(Counted(TOKEN), host=host, user="app") as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_DNS
        assert host in error.detail


async def test_an_address_that_swallows_packets_is_unreachable_at_the_timeout() -> None:
    # A listening socket whose queue is full drops what else wants in.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        address = full.getsockname()
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        async with dialing(
            Counted(TOKEN), seconds=0.3, host=HOST, hostaddr=address[0], port=address[1], user="app"
        ) as made:
            error = await made.refusal()
            assert error.kind is ErrorKind.UPSTREAM_UNREACHABLE
            assert error.response().sqlstate == "57P03"


# -- cancel requests -----------------------------------------------------------------------------


def wanted() -> bool:
    return True


async def test_w40_a_cancel_reaches_the_query_and_brings_no_token(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        key = session.startup.key
        assert key is not None
        session.stream.write(query("SELECT pg_sleep(30)"))
        record = lakebase.gateway.sessions[0]
        await _until_asleep(lakebase, record.real_pid)
        await made.connector.cancel(session.target, key, still_wanted=wanted)
        (error,) = [
            message
            for message in await messages_until(session, ReadyForQuery)
            if isinstance(message, ErrorResponse)
        ]
        assert error.sqlstate == "57014"
        (cancel,) = lakebase.gateway.cancels
        assert (cancel.secure, cancel.sni, cancel.token) == (True, endpoint.host, None)
        session.stream.transport.close()
        await all_closed(lakebase)


async def _until_asleep(lakebase: Lakebase, pid: int | None) -> None:
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while await asyncio.to_thread(lakebase["one"].cluster.execute, sql) != "1":
            pass


async def test_w39_a_cancel_is_delivered_only_when_the_upstream_has_closed(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.inject(Stage.CANCEL, Injection.HANG)
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        key = session.startup.key
        assert key is not None
        cancel = asyncio.create_task(
            made.connector.cancel(session.target, key, still_wanted=wanted)
        )
        await lakebase.gateway.until(lambda: len(lakebase.gateway.cancels) == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not cancel.done()
        lakebase.gateway.clear_faults()
        await cancel
        session.stream.transport.abort()


async def test_w40_a_cancel_whose_session_ends_meanwhile_is_dropped(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.inject(Stage.CANCEL, Injection.HANG)
    async with lakebase_dialing(lakebase, endpoint) as made:
        target = Target(
            endpoint.host,
            lakebase.host_address,
            lakebase.port,
            "verify-full",
            str(lakebase.ca_file),
        )
        key = BackendKeyData(1, Secret(b"none"))
        cancel = asyncio.create_task(made.connector.cancel(target, key, still_wanted=wanted))
        await lakebase.gateway.until(lambda: len(lakebase.gateway.cancels) == 1)
        cancel.cancel()
        await asyncio.wait([cancel])
        await all_closed(lakebase)


async def test_w40_a_cancel_that_cannot_be_delivered_is_a_proxy_error(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    target = Target(
        endpoint.host, lakebase.host_address, lakebase.port, "verify-full", str(lakebase.ca_file)
    )
    key = BackendKeyData(1, Secret(b"none"))
    async with lakebase_dialing(lakebase, endpoint) as made:
        lakebase.gateway.offers_tls = False
        with pytest.raises(ProxyError) as refused:
            await made.connector.cancel(target, key, still_wanted=wanted)
        assert refused.value.kind is ErrorKind.UPSTREAM_NO_TLS
        lakebase.gateway.certificate, lakebase.gateway.offers_tls = Certificate.UNTRUSTED, True
        with pytest.raises(ProxyError) as refused:
            await made.connector.cancel(target, key, still_wanted=wanted)
        assert refused.value.kind is ErrorKind.UPSTREAM_CERTIFICATE
        await lakebase.gateway.refuse_connections()
        with pytest.raises(ProxyError) as refused:
            await made.connector.cancel(target, key, still_wanted=wanted)
        assert refused.value.kind is ErrorKind.UPSTREAM_UNREACHABLE


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ((Send(b"N"),), ErrorKind.UPSTREAM_NO_TLS),
        ((Send(b"E" + b"\0\0\0\x10FATAL\0text"),), PROTOCOL),
        ((Send(b"S" + HONEST),), PROTOCOL),
        ((Send(b"G"),), PROTOCOL),
        ((Send(b"\x16\x03\x01"),), PROTOCOL),
        ((Close(),), ErrorKind.UPSTREAM_LOST),
        ((Reset(),), ErrorKind.UPSTREAM_LOST),
        ((Send(b"S"), Close()), ErrorKind.UPSTREAM_LOST),
        ((Send(b"S"), Reset()), ErrorKind.UPSTREAM_LOST),
        ((Send(b"S"), Expect(b"\x16"), Send(b"nonsense" * 9)), ErrorKind.UPSTREAM_TLS_FAILED),
        ((Send(b"S"), Expect(b"\x16"), Close()), ErrorKind.UPSTREAM_LOST),
    ],
    ids=["n", "e", "s_and_more", "g", "tls", "eof", "rst", "s_eof", "s_rst", "no_tls", "hello_eof"],
)
async def test_w52_any_answer_but_s_alone_ends_the_dial(
    ca_file: str, steps: tuple[Step, ...], kind: ErrorKind
) -> None:
    async with dialing_script(ca_file, Expect(SSLRequest().encode()), *steps) as (made, server):
        assert (await made.refusal()).kind is kind
        lost = (ErrorKind.UPSTREAM_LOST, ErrorKind.UPSTREAM_TLS_FAILED)
        assert server.accepted >= 3 if kind in lost else server.accepted == 1
        assert server.packets == []
        await server.until_open(0)


async def test_w52_an_error_in_plaintext_is_logged_and_not_passed_on(ca_file: str) -> None:
    text = b"E" + b"FATAL:  \x1b[31mout of memory\n " + b"x" * 2000 + b"\0"
    steps = (Expect(SSLRequest().encode()), Send(text))
    with captured_log() as log:
        async with dialing_script(ca_file, *steps) as (made, _):
            error = await made.refusal()
    (line,) = log.events("upstream sent an error in plaintext")
    assert line["host"] == HOST
    assert line["text"].startswith("FATAL:   [31mout of memory  xxx")
    assert len(line["text"]) <= 512
    assert "out of memory" not in f"{error!r} {error.response()!r}"


# -- cancels and addresses -------------------------------------------------------------------------


async def test_w40_a_cancel_is_sixteen_bytes_inside_tls(
    ca_file: str, context: ssl.SSLContext
) -> None:
    key = BackendKeyData(-5, Secret(b"none"))
    steps = (Expect(SSLRequest().encode()), Send(b"S"), StartTLS(context), ExpectPacket(), Close())
    async with dialing_script(ca_file, *steps) as (made, server):
        target = Target(HOST, "127.0.0.1", server.port, "verify-full", ca_file)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await made.connector.cancel(target, key, still_wanted=wanted)
        assert server.packets == [CancelRequest(-5, Secret(b"none")).encode()]
        await server.until_open(0)


async def test_a_host_that_no_certificate_can_have_is_a_matter_of_certificates(
    ca_file: str,
) -> None:
    # The API names the host, and nothing has checked that name.
    async with dialing_script(ca_file, Expect(SSLRequest().encode()), Send(b"S")) as (made, server):
        target = Target(".example.com", "127.0.0.1", server.port, "verify-full", ca_file)
        with pytest.raises(ProxyError) as refused:
            await made.connector.cancel(
                target, BackendKeyData(1, Secret(b"none")), still_wanted=wanted
            )
        assert refused.value.kind is ErrorKind.UPSTREAM_CERTIFICATE


async def test_the_first_address_that_answers_is_taken(
    ca_file: str, context: ssl.SSLContext
) -> None:
    # localhost: the script listens on 127.0.0.1 alone, and the resolver may name ::1 first.
    steps = (*tls_opening(context), Send(HONEST))
    async with dialing_script(
        ca_file, *steps, host="localhost", hostaddr="", sslmode="verify-ca"
    ) as (made, _):
        (await made.dial()).stream.transport.abort()


# -- several addresses ---------------------------------------------------------------------------


def address(host: str, port: int) -> AddrInfoType:
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)


@contextmanager
def black_hole() -> Iterator[AddrInfoType]:
    """Yield an address that answers nothing: a listening socket whose queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        host, port = full.getsockname()
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        yield address(host, port)


@pytest.mark.parametrize("dead_first", [1, 2, 3])
async def test_addresses_that_are_dead_are_passed_over(
    lakebase: Lakebase, endpoint: Endpoint, dead_first: int
) -> None:
    dead, good = (
        address(host, lakebase.port) for host in (lakebase.dead_address, lakebase.host_address)
    )
    async with lakebase_dialing(lakebase, endpoint) as made:
        made.addresses = (*[dead] * dead_first, good)
        (await made.dial()).stream.transport.abort()
        assert lakebase.gateway.accepted == 1
        assert made.metrics.value("upstream_connect_seconds_sum", phase=ConnectPhase.TCP) < 0.2


@pytest.mark.parametrize("holes", [1, 2])
async def test_an_address_that_swallows_packets_costs_a_quarter_of_a_second(
    lakebase: Lakebase, endpoint: Endpoint, holes: int
) -> None:
    good = address(lakebase.host_address, lakebase.port)
    async with lakebase_dialing(lakebase, endpoint) as made, AsyncExitStack() as stack:
        made.addresses = (*(stack.enter_context(black_hole()) for _ in range(holes)), good)
        (await made.dial()).stream.transport.abort()
        seconds = made.metrics.value("upstream_connect_seconds_sum", phase=ConnectPhase.TCP)
        assert holes * NEXT_ADDRESS_SECONDS <= seconds < holes * NEXT_ADDRESS_SECONDS + 0.3
        assert lakebase.gateway.accepted == 1


SILENT_SECONDS_MAX = 0.2


@pytest.mark.parametrize(
    "steps",
    [
        (Reset(),),
        (Close(),),
        (Expect(SSLRequest().encode()), Reset()),
        (Expect(SSLRequest().encode()),),
        (Expect(SSLRequest().encode()), Send(b"S")),
    ],
    ids=["resets", "closes", "resets_after_the_request", "silent", "silent_in_tls"],
)
async def test_an_address_that_connects_and_does_no_more_is_not_the_only_one_tried(
    lakebase: Lakebase, endpoint: Endpoint, steps: tuple[Step, ...]
) -> None:
    # The race is won by TCP alone: all three tries went to the one address that dropped or kept
    # silent, and a silent one had the whole of connect_timeout_seconds.
    options = {"silence_seconds_max": SILENT_SECONDS_MAX}
    async with scripted(*steps) as server, lakebase_dialing(lakebase, endpoint, **options) as made:
        made.addresses = (
            address("127.0.0.1", server.port),
            address(lakebase.host_address, lakebase.port),
        )
        (await made.dial()).stream.transport.abort()
        assert (server.accepted, lakebase.gateway.accepted) == (1, 1)
        await server.until_open(0)


async def test_silence_in_tls_is_tried_once_more_and_then_told(ca_file: str) -> None:
    async with dialing_script(
        ca_file, Expect(SSLRequest().encode()), silence_seconds_max=SILENT_SECONDS_MAX
    ) as (made, server):
        error = await made.refusal()
        assert (error.reason, error.response().sqlstate) == ("upstream_timeout", "57P03")
        assert error.detail == f"{HOST}: no TLS within {SILENT_SECONDS_MAX:g} seconds"
        assert server.accepted == 2
        await server.until_open(0)


async def test_when_every_address_is_dead_the_upstream_is_unreachable(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        made.addresses = [address(lakebase.dead_address, lakebase.port)] * 3
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_UNREACHABLE
        assert error.detail.startswith(f"{endpoint.host}:{lakebase.port}: ")
        assert "refused" in error.detail.lower()


async def test_w54_a_dial_cancelled_while_addresses_are_tried_leaves_no_socket(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        with black_hole() as hole:
            made.addresses = (hole, hole)
            async with nothing_left():
                dial = asyncio.create_task(made.dial())
                with suppress(TimeoutError):
                    async with asyncio.timeout(2 * NEXT_ADDRESS_SECONDS):
                        await asyncio.shield(dial)
                dial.cancel()
                await asyncio.wait([dial])
                assert dial.cancelled()
