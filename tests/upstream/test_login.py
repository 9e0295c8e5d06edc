"""A login from StartupMessage to ReadyForQuery: native roles with a real PostgreSQL, and scripted
servers that send what no honest one would."""

import ssl
from collections.abc import Iterator
from contextlib import (
    contextmanager,
)
from pathlib import Path

import pytest

from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.errors import ErrorKind
from proxy.upstream.address_lookup import AddressLookup
from proxy.upstream.password_file import PasswordFile
from proxy.wire.messages import (
    AuthenticationSASL,
    Frame,
    NegotiateProtocolVersion,
)
from proxy.wire.startup import V3_0
from proxy.workspace.client import Workspace
from proxy.workspace.single_flight import PendingCalls
from tests.support.dialing import (
    ASK,
    HONEST,
    KEY,
    NOTICE,
    OK,
    READY,
    TOKEN,
    Dialing,
    asked,
    dialing_script,
    fields,
    lakebase_dialing,
    toward,
)
from tests.support.peer_server import password_in, password_opening, tls_opening
from tests.support.script import Close, ExpectMessage, Send, SendSplit


@pytest.fixture
def endpoint(lakebase: Lakebase) -> Endpoint:
    lakebase.gateway.close_delay_seconds = 0.1
    return lakebase["one"].endpoint


# -- native passwords ----------------------------------------------------------------------------


@contextmanager
def _password_source(tmp_path: Path, password: str) -> Iterator[PasswordFile]:
    path = tmp_path / "password"
    path.write_text(password + "\n")
    yield PasswordFile(str(path))


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_w28_a_native_role_logs_in_with_scram(
    lakebase: Lakebase, tmp_path: Path, right: bool, face: str
) -> None:
    endpoint: Endpoint = getattr(lakebase["one"], face)
    endpoint.native_login = True
    lakebase.gateway.close_delay_seconds = 0.1
    password = lakebase.native_password if right else "wrong-not-real"
    upstream = {**toward(lakebase, endpoint), "user": lakebase.native_role}
    workspace = Workspace(WorkspaceSettings(), CredentialsSettings(), version="0")
    with _password_source(tmp_path, password) as source:
        made = Dialing(
            source, AddressLookup(UpstreamSettings(**upstream), None, workspace, PendingCalls()), 5
        )
        if right:
            session = await made.dial()
            assert await asked(session, "SELECT current_user") == lakebase.native_role.encode()
            session.stream.transport.abort()
        else:
            error = await made.refusal()
            assert error.response().sqlstate in ("28P01", "28000")
            assert "password authentication failed" in repr(error.response())
            assert password not in repr(error.response())
            assert lakebase.gateway.accepted == 1  # the file was read for this dial: no second try


async def test_a_pooled_host_that_wants_a_password_gets_no_token(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    # It was "unsupported_auth", without useful advice.
    async with lakebase_dialing(lakebase, endpoint, host=endpoint.pooled_host) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.POOLER_NEEDS_PASSWORD
        assert "SASL" in error.detail
        assert "direct host" in error.response().text(b"H")


async def test_a_pooled_host_that_takes_tokens_gets_one(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.pooler_takes_tokens = True
    async with lakebase_dialing(lakebase, endpoint, host=endpoint.pooled_host) as made:
        session = await made.dial()
        assert await asked(session, "SELECT current_user") == lakebase.client_id.encode()
        session.stream.transport.abort()


@pytest.mark.parametrize("takes_tokens", [True, False])
@pytest.mark.parametrize("right", [True, False])
async def test_a_native_role_logs_in_on_either_kind_of_pooled_host(
    lakebase: Lakebase, endpoint: Endpoint, tmp_path: Path, takes_tokens: bool, right: bool
) -> None:
    # A wrong password was told as "the pooled host takes no OAuth token".
    endpoint.pooler_takes_tokens = takes_tokens
    upstream = {**toward(lakebase, endpoint), "user": lakebase.native_role}
    upstream["host"] = endpoint.pooled_host
    workspace = Workspace(WorkspaceSettings(), CredentialsSettings(), version="0")
    password = lakebase.native_password if right else "wrong-not-real"
    with _password_source(tmp_path, password) as source:
        lookup = AddressLookup(UpstreamSettings(**upstream), None, workspace, PendingCalls())
        made = Dialing(source, lookup, 5)
        if right:
            (await made.dial()).stream.transport.abort()
        else:
            error = await made.refusal()
            assert (error.reason, error.response().sqlstate) == ("password_rejected", "28P01")


async def test_a_native_login_that_is_disabled_is_told_so(
    lakebase: Lakebase, endpoint: Endpoint, tmp_path: Path
) -> None:
    # It was "not a token", with the advice to mint one.
    upstream = {**toward(lakebase, endpoint), "user": lakebase.native_role}
    workspace = Workspace(WorkspaceSettings(), CredentialsSettings(), version="0")
    with _password_source(tmp_path, lakebase.native_password) as source:
        lookup = AddressLookup(UpstreamSettings(**upstream), None, workspace, PendingCalls())
        error = await Dialing(source, lookup, 5).refusal()
        assert error.reason == "native_login_disabled"
        assert "enable_pg_native_login" in error.response().text(b"H")


# -- servers that do as they are told ------------------------------------------------------------


@pytest.mark.parametrize("send", [Send, SendSplit])
async def test_w30_an_honest_server_may_send_notices_early_and_name_the_version_asked_for(
    ca_file: str, context: ssl.SSLContext, send: type[Send] | type[SendSplit]
) -> None:
    v = NegotiateProtocolVersion(V3_0.number, ()).encode()
    steps = (*tls_opening(context), send(NOTICE + v + ASK), ExpectMessage(b"p"), send(HONEST))
    async with dialing_script(ca_file, *steps) as (made, server):
        session = await made.dial()
        assert session.startup.welcome(session.startup.key) == NOTICE + HONEST[len(OK) :]
        startup, password = server.packets
        assert b"user\0app\0database\0databricks_postgres\0application_name\0test\0" in startup
        assert password_in(password) == TOKEN
        session.stream.transport.close()
        await server.until_open(0)
        assert server.ends == [EndedBy.CLOSE_NOTIFY]


async def test_w26_a_server_may_give_no_key_and_ask_no_password(
    ca_file: str, context: ssl.SSLContext
) -> None:
    async with dialing_script(ca_file, *tls_opening(context), Send(OK + READY)) as (made, server):
        session = await made.dial()
        assert session.startup.key is None
        assert session.startup.welcome(None) == READY
        assert len(server.packets) == 1  # the token was not asked for
        session.stream.transport.abort()


async def test_bytes_after_ready_for_query_are_kept(ca_file: str, context: ssl.SSLContext) -> None:
    steps = (*password_opening(context), Send(HONEST + NOTICE + b"S\0\0"))
    async with dialing_script(ca_file, *steps) as (made, _):
        session = await made.dial()
        assert session.startup.trailing_data() == NOTICE + b"S\0\0"
        session.stream.transport.abort()


PROTOCOL, AUTH = ErrorKind.UPSTREAM_PROTOCOL, ErrorKind.UNSUPPORTED_AUTH
HOSTILE: dict[str, tuple[bytes, ErrorKind]] = {
    # W28: what is asked for
    "w28_md5": (Frame(b"R", b"\0\0\0\5salt").encode(), AUTH),
    "w28_gss": (Frame(b"R", b"\0\0\0\7").encode(), AUTH),
    "w28_unknown": (Frame(b"R", b"\0\0\0\x63").encode(), AUTH),
    "w28_sasl_for_a_token": (AuthenticationSASL((b"SCRAM-SHA-256",)).encode(), AUTH),
    "w28_sasl_continue_first": (Frame(b"R", b"\0\0\0\x0bx").encode(), AUTH),
    # W30: order
    "w30_another_version": (NegotiateProtocolVersion(196610, ()).encode(), PROTOCOL),
    "w30_ready_before_ok": (READY, PROTOCOL),
    "w30_key_before_ok": (KEY, PROTOCOL),
    "w30_ok_twice": (OK + OK, PROTOCOL),
    "w30_password_after_ok": (OK + ASK, PROTOCOL),
    "w30_two_keys": (OK + KEY + KEY, PROTOCOL),
    "w30_data_row": (Frame(b"D", b"\0\0").encode(), PROTOCOL),
    # W53: lengths, layouts, amounts
    "w53_length_0": (b"R\0\0\0\0", PROTOCOL),
    "w53_length_3": (b"R\0\0\0\3", PROTOCOL),
    "w53_length_negative": (b"R\xff\xff\xff\xff", PROTOCOL),
    "w53_length_2_gib": (b"E\x7f\xff\xff\xff", PROTOCOL),
    "w53_length_over_64_kib": (b"N\0\1\0\5", PROTOCOL),
    "w53_held_over_256_kib": (
        OK + Frame(b"S", b"x\0" + b"y" * 60000 + b"\0").encode() * 5,
        PROTOCOL,
    ),
    "w53_r_without_code": (Frame(b"R", b"").encode(), PROTOCOL),
    "w53_ok_with_more": (Frame(b"R", b"\0\0\0\0x").encode(), PROTOCOL),
    "w53_key_of_no_bytes": (OK + Frame(b"K", b"\0\0\0\1").encode(), PROTOCOL),
    "w53_key_of_257_bytes": (OK + Frame(b"K", b"\0\0\0\1" + b"k" * 257).encode(), PROTOCOL),
    "w53_status_without_value": (OK + Frame(b"S", b"x\0").encode(), PROTOCOL),
    "w53_ready_with_another_status": (OK + Frame(b"Z", b"Q").encode(), PROTOCOL),
    "w53_error_without_c": (fields(b"SFATAL", b"Mno code", b""), PROTOCOL),
    "w53_error_without_anything": (fields(b""), PROTOCOL),
    "w53_error_without_terminator": (Frame(b"E", b"SFATAL\0C28000").encode(), PROTOCOL),
    "w53_error_with_bytes_after": (fields(b"SFATAL", b"C28000", b"", b"x"), PROTOCOL),
    "w53_unknown_fields": (
        fields(b"SFATAL", b"VFATAL", b"C42704", b"Mm", b"zz", b"\xff\xfe", b""),
        ErrorKind.SETTING_UNKNOWN,
    ),
    "w53_not_postgres": (b"HTTP/1.1 400 Bad Request\r\n\r\n", PROTOCOL),
}


@pytest.mark.parametrize(("content", "kind"), HOSTILE.values(), ids=HOSTILE)
async def test_w53_a_hostile_answer_ends_the_dial_and_nothing_else(
    ca_file: str, context: ssl.SSLContext, content: bytes, kind: ErrorKind
) -> None:
    async with dialing_script(ca_file, *tls_opening(context), Send(content)) as (made, server):
        error = await made.refusal()
        assert error.kind is kind
        assert error.response().sqlstate in ("08006", "28000", "42704")
        assert server.accepted == 1
        assert len(server.packets) == 1  # no password
        await server.until_open(0)


async def test_w28_a_second_request_for_the_password_is_refused_and_gets_none(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*password_opening(context), Send(ASK), ExpectMessage(b"p"))
    async with dialing_script(ca_file, *steps) as (made, server):
        error = await made.refusal()
        assert error.kind is AUTH
        await server.until_open(0)
        assert len(server.packets) == 2


async def test_w28_two_requests_in_one_write_get_one_password(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*tls_opening(context), Send(ASK + ASK), ExpectMessage(b"p"), ExpectMessage(b"p"))
    async with dialing_script(ca_file, *steps) as (made, server):
        assert (await made.refusal()).kind is AUTH
        await server.until_open(0)
        assert len(server.packets) <= 2


@pytest.mark.slow
async def test_w53_an_end_at_any_offset_is_a_loss(ca_file: str, context: ssl.SSLContext) -> None:
    for offset in range(len(HONEST)):
        steps = (*tls_opening(context), Send(HONEST[:offset]), Close())
        async with dialing_script(ca_file, *steps, retry_seconds=0) as (made, server):
            assert (await made.refusal()).kind is ErrorKind.UPSTREAM_LOST, offset
            assert server.accepted == 1
