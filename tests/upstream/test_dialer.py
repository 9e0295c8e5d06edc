"""A dial from name to ReadyForQuery: against the stand-in's gateway with a real PostgreSQL, and
against scripted servers that do what no honest one would."""

import asyncio
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohappyeyeballs import AddrInfoType
from pydantic import SecretStr

from proxy.app import build_metrics
from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import ConnectPhase, Metrics
from proxy.standin import faults
from proxy.standin.api import Call
from proxy.standin.certificates import Certificate
from proxy.standin.endpoints import Endpoint, neon_error
from proxy.standin.faults import HANG, Stage, Strike
from proxy.standin.lakebase import Lakebase
from proxy.standin.streams import EndedBy
from proxy.upstream.connector import NEXT_ADDRESS_SECONDS, Connector, resolve
from proxy.upstream.credentials import Credentials, CredentialSource, PasswordFile
from proxy.upstream.dialer import CONNECTS_MAX, Dialer, UpstreamSession
from proxy.upstream.resources import resource_of
from proxy.upstream.targets import Target, Targets
from proxy.upstream.workspace import Credential, Workspace
from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationSASL,
    BackendKeyData,
    ErrorResponse,
    Frame,
    NegotiateProtocolVersion,
    NoticeResponse,
    ParameterStatus,
    ReadyForQuery,
    decode_backend,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, CancelRequest, SSLRequest, StartupMessage
from proxy.wire.violations import ClientViolation
from tests.support.fake_clock import FakeClock
from tests.support.running import captured_log, nothing_left
from tests.support.script import (
    Close,
    Expect,
    ExpectMessage,
    ExpectPacket,
    Reset,
    ScriptedServer,
    Send,
    SendSplit,
    StartTLS,
    Step,
    password_in,
    password_opening,
    scripted,
    tls_opening,
)

WAIT_SECONDS_MAX = 8.0
HOST = "db.example.com"
TOKEN = b"eyJ-not-a-real-token"
CLIENT = StartupMessage(V3_0, ((b"user", b"app"), (b"application_name", b"test")))
DISCONNECTS = [Strike.CLOSE, Strike.FIN, Strike.RESET]
STAGES = [
    Stage.ACCEPTED,
    Stage.SSL_REPLY,
    Stage.TLS,
    Stage.STARTUP,
    Stage.PASSWORD,
    Stage.AUTHENTICATED,
    Stage.READY,
]


def always() -> bool:
    """A cancel that stays wanted."""
    return True


class Counted:
    """A source of credentials that counts; `tokens` are minted in turn, the last one for ever."""

    def __init__(self, *tokens: bytes) -> None:
        self.minted = 0
        self._tokens = tokens

    async def __call__(self) -> Credential:
        self.minted += 1
        token = self._tokens[min(self.minted, len(self._tokens)) - 1]
        now = CLOCK()
        return Credential(Secret(token), now, now + 3600)


CLOCK = FakeClock()


class Dialing:
    """A dialer and what belongs to it."""

    def __init__(
        self,
        credentials: CredentialSource,
        targets: Targets,
        seconds: float,
        clock: Callable[[], float] = CLOCK,
        connects_max: int = CONNECTS_MAX,
    ) -> None:
        self.metrics: Metrics = build_metrics()
        self.connector = Connector(self.metrics.connect_phase_took, resolve=self._resolve)
        self.addresses: Sequence[AddrInfoType] = ()  # what the resolver says, if not the truth
        self.dialer = Dialer(
            self.connector,
            targets,
            credentials,
            self.metrics.connect_phase_took,
            connect_timeout_seconds=seconds,
            connects_max=connects_max,
            jitter=lambda: 0.05,
            clock=clock,
        )

    async def _resolve(self, target: Target) -> Sequence[AddrInfoType]:
        return self.addresses or await resolve(target)

    async def dial(self, client: StartupMessage = CLIENT) -> UpstreamSession:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await self.dialer.dial(client)

    async def refusal(self) -> ProxyError:
        with pytest.raises(ProxyError) as refused:
            await self.dial()
        return refused.value


@asynccontextmanager
async def dialing(
    mint: Callable[[], Any],
    *,
    seconds: float = 5,
    max_age: float = 60,
    connects_max: int = CONNECTS_MAX,
    **upstream: Any,
) -> AsyncIterator[Dialing]:
    workspace = Workspace(WorkspaceSettings(), CredentialsSettings(), version="0")
    settings = CredentialsSettings(token_max_age_seconds=max_age)
    credentials = Credentials(mint, settings, build_metrics(), clock=CLOCK, sleep=CLOCK.sleep)
    targets = Targets(UpstreamSettings(**upstream), None, workspace)
    try:
        yield Dialing(credentials, targets, seconds, connects_max=connects_max)
    finally:
        await credentials.close()
        await targets.close()


def toward(lakebase: Lakebase, endpoint: Endpoint) -> dict[str, Any]:
    """Return the settings that lead to an endpoint."""
    return {
        "host": endpoint.host,
        "hostaddr": lakebase.host_address,
        "port": lakebase.port,
        "user": lakebase.client_id,
        "ssl_root_cert": str(lakebase.ca_file),
    }


@pytest.fixture
def endpoint(lakebase: Lakebase) -> Endpoint:
    lakebase.gateway.close_delay_seconds = 0.1
    return lakebase["one"].endpoint


@asynccontextmanager
async def lakebase_dialing(
    lakebase: Lakebase, endpoint: Endpoint, *tokens: str, **options: Any
) -> AsyncIterator[Dialing]:
    mint = Counted(*(token.encode() for token in tokens or (lakebase.token(),)))
    async with dialing(mint, **{**toward(lakebase, endpoint), **options}) as made:
        yield made


async def all_closed(lakebase: Lakebase) -> None:
    await lakebase.gateway.until(lambda: all(record.closed for record in lakebase.gateway.records))
    assert lakebase.gateway.open_sessions == 0


async def messages_until(session: UpstreamSession, kind: type) -> list[object]:
    """Read from a session that is ready."""
    reader = MessageReader(1 << 20)
    reader.feed(session.startup.trailing_data())
    messages: list[object] = []
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not messages or not isinstance(messages[-1], kind):
            while (frame := reader.next()) is None:
                data = await session.link.receive()
                assert data, f"ended after {messages}"
                reader.feed(data)
            messages.append(decode_backend(frame))
    return messages


def query(sql: str) -> bytes:
    return Frame(b"Q", sql.encode() + b"\0").encode()


async def asked(session: UpstreamSession, sql: str) -> bytes:
    """Return the one value of the one row."""
    session.link.write(query(sql))
    messages = await messages_until(session, ReadyForQuery)
    (row,) = [m for m in messages if isinstance(m, Frame) and m.type == b"D"]
    return row.payload[6:]


# -- what works ----------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_a_dial_ends_with_a_session_that_is_ready(lakebase: Lakebase, face: str) -> None:
    endpoint: Endpoint = getattr(lakebase["one"], face)
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        assert await asked(session, "SELECT current_user") == lakebase.client_id.encode()
        assert await asked(session, "SELECT current_database()") == b"databricks_postgres"
        assert await asked(session, "SHOW application_name") == b"test"
        (record,) = lakebase.gateway.sessions
        assert record.sni == endpoint.host == session.target.host
        assert session.startup.key == record.shown_key
        welcome = session.startup.welcome(session.startup.key)
        assert welcome.endswith(ReadyForQuery(b"I").encode())
        for phase in ConnectPhase:
            count = made.metrics.value("upstream_connect_seconds_count", phase=phase)
            assert count == 1, phase
        await session.link.close()
        await all_closed(lakebase)
        assert record.ended_by is EndedBy.CLOSE_NOTIFY


async def test_w36_an_upstream_connection_has_a_bound_for_unacknowledged_bytes(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        sock = session.link.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        session.link.transport.abort()


async def test_the_workspace_says_with_what_where_and_as_whom(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with _through_workspace(lakebase, endpoint) as made:
        session = await made.dial()
        assert await asked(session, "SELECT current_user") == lakebase.client_id.encode()
        assert len(lakebase.workspace.mints) == 1
        session.link.transport.abort()


@asynccontextmanager
async def _through_workspace(
    lakebase: Lakebase, endpoint: Endpoint, seconds: float = 5
) -> AsyncIterator[Dialing]:
    settings = WorkspaceSettings(
        host=lakebase.workspace_url,
        client_id=lakebase.client_id,
        client_secret=SecretStr(lakebase.client_secret),
    )
    workspace = Workspace(settings, CredentialsSettings(), version="0")
    upstream = UpstreamSettings(
        endpoint=endpoint.name,
        hostaddr=lakebase.host_address,
        port=lakebase.port,
        ssl_root_cert=str(lakebase.ca_file),
    )
    resource = resource_of(upstream)
    assert resource is not None
    credentials = Credentials(
        partial(workspace.mint, resource), CredentialsSettings(), build_metrics()
    )
    targets = Targets(upstream, resource, workspace)
    try:
        yield Dialing(credentials, targets, seconds, time.time)
    finally:
        await credentials.close()
        await targets.close()


@pytest.mark.parametrize("fault", [faults.INTERNAL, faults.ABORTED, faults.BAD_GATEWAY])
async def test_a_failure_of_the_api_that_passes_is_nobodys_failure(
    lakebase: Lakebase, endpoint: Endpoint, fault: faults.Reply
) -> None:
    # The SDK retries 429 and 503 alone; the document's class R has the others too.
    lakebase.workspace.fail(Call.CREDENTIAL, fault, times=1)
    lakebase.workspace.fail(Call.RESOURCE, fault, times=1)
    async with _through_workspace(lakebase, endpoint) as made:
        session = await made.dial()
        session.link.transport.abort()


async def test_a_refused_login_to_the_workspace_is_told_at_once(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.workspace.fail(Call.TOKEN, faults.INVALID_CLIENT)
    async with _through_workspace(lakebase, endpoint) as made:
        assert (await made.refusal()).kind is ErrorKind.WORKSPACE_LOGIN_FAILED
        assert lakebase.workspace.calls[Call.TOKEN] == 1
        assert lakebase.gateway.accepted == 0


async def test_an_endpoint_that_moved_is_found_by_the_next_dial(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with _through_workspace(lakebase, endpoint) as made:
        (await made.dial()).link.transport.abort()
        endpoint.hosts["host"] = "ep-moved" + endpoint.host[endpoint.host.index(".") :]
        assert (await made.refusal()).kind is ErrorKind.ENDPOINT_GONE
        session = await made.dial()
        assert session.target.host == endpoint.host
        session.link.transport.abort()


async def test_w51_a_client_that_cannot_be_passed_on_is_told_and_nothing_is_dialled(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        long = StartupMessage(V3_0, ((b"user", b"app"), (b"search_path", b"x" * 9980)))
        with pytest.raises(ClientViolation):
            await made.dial(long)
        assert lakebase.gateway.accepted == 0


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
        made = Dialing(source, Targets(UpstreamSettings(**upstream), None, workspace), 5)
        if right:
            session = await made.dial()
            assert await asked(session, "SELECT current_user") == lakebase.native_role.encode()
            session.link.transport.abort()
        else:
            error = await made.refusal()
            assert error.response().sqlstate in ("28P01", "28000")
            assert "password authentication failed" in repr(error.response())
            assert password not in repr(error.response())
            assert lakebase.gateway.accepted == 1  # the file was read for this dial: no second try


async def test_a_pooled_host_that_wants_a_password_gets_no_token(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint, host=endpoint.pooled_host) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UNSUPPORTED_AUTH
        assert "SASL" in error.detail


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
            (await made.dial()).link.transport.abort()
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
        (await made.dial()).link.transport.abort()
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


async def test_w52_bytes_behind_s_are_an_injection(lakebase: Lakebase, endpoint: Endpoint) -> None:
    lakebase.gateway.early_bytes = ReadyForQuery(b"I").encode()
    async with lakebase_dialing(lakebase, endpoint) as made:
        error = await made.refusal()
        assert error.kind in (ErrorKind.UPSTREAM_PROTOCOL, ErrorKind.UPSTREAM_LOST)
        await all_closed(lakebase)
        assert all(record.token is None for record in lakebase.gateway.records)


# -- loss, refusal, sleep ------------------------------------------------------------------------


@pytest.mark.parametrize("strike", DISCONNECTS, ids=lambda strike: strike.name.lower())
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_w53_an_upstream_lost_at_any_stage_is_dialled_again(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage, strike: Strike
) -> None:
    lakebase.gateway.strike(stage, strike, times=2)
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        assert lakebase.gateway.accepted == 3
        session.link.transport.close()
        await all_closed(lakebase)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_an_upstream_lost_again_and_again_is_given_up_after_three_tries(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.strike(stage, Strike.CLOSE)
    async with lakebase_dialing(lakebase, endpoint) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_LOST
        assert error.response().sqlstate == "08006"
        assert lakebase.gateway.accepted == 3
        await all_closed(lakebase)


async def test_a_closed_port_is_unreachable(lakebase: Lakebase, endpoint: Endpoint) -> None:
    await lakebase.gateway.refuse_connections()
    async with lakebase_dialing(lakebase, endpoint) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_UNREACHABLE
        assert f"{endpoint.host}:{lakebase.port}" in error.detail
        await lakebase.gateway.accept_connections()
        (await made.dial()).link.transport.abort()


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


@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_a_sleeping_database_is_waited_for(lakebase: Lakebase, face: str) -> None:
    endpoint: Endpoint = getattr(lakebase["one"], face)
    lakebase.gateway.close_delay_seconds = 0.1
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_patience_seconds = 0.3, 0.01
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        assert endpoint.wakes == 1
        assert lakebase.gateway.accepted > 1
        session.link.transport.close()
        await all_closed(lakebase)


async def test_an_overloaded_front_end_is_waited_for(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.refuse(neon_error("Too many connections attempts"), times=4)
    async with lakebase_dialing(lakebase, endpoint) as made:
        (await made.dial()).link.transport.abort()
        assert lakebase.gateway.accepted == 5


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ErrorResponse.fatal("28000", 'role "x" does not exist'), ErrorKind.ROLE_MISSING),
        (ErrorResponse.fatal("53300", "too many clients already"), ErrorKind.UPSTREAM_FULL),
        (neon_error("something new"), ErrorKind.UPSTREAM_ERROR),
    ],
)
async def test_what_is_refused_for_good_is_not_tried_again(
    lakebase: Lakebase, endpoint: Endpoint, error: ErrorResponse, kind: ErrorKind
) -> None:
    endpoint.refuse(error, times=None)
    async with lakebase_dialing(lakebase, endpoint) as made:
        assert (await made.refusal()).kind is kind
        assert lakebase.gateway.accepted == 1


async def test_w29_an_error_of_postgres_itself_comes_with_all_its_fields(
    lakebase: Lakebase,
) -> None:
    endpoint = lakebase["one"].instance
    lakebase.gateway.close_delay_seconds = 0.1
    async with lakebase_dialing(lakebase, endpoint, database="no_such_database") as made:
        answer = (await made.refusal()).response()
        assert answer.sqlstate == "3D000"
        assert answer.message == 'database "no_such_database" does not exist'
        assert answer.text(b"R") == "InitPostgres"  # only PostgreSQL says in which routine
        assert "databricks_postgres" in answer.text(b"H")


# -- tokens --------------------------------------------------------------------------------------


async def _dial_with_cached(
    lakebase: Lakebase, endpoint: Endpoint, *tokens: str
) -> tuple[ProxyError | UpstreamSession, int]:
    """Dial with the first token in the cache already; return the outcome and the mints."""
    mint = Counted(*(token.encode() for token in tokens))
    async with dialing(mint, **toward(lakebase, endpoint)) as made:
        await made.dialer._credentials.fresh()
        CLOCK.move(10)
        try:
            session = await made.dial()
        except ProxyError as error:
            return error, mint.minted
        session.link.transport.abort()
        return session, mint.minted


@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_a_cached_token_that_is_rejected_is_minted_anew_once(
    lakebase: Lakebase, face: str
) -> None:
    endpoint: Endpoint = getattr(lakebase["one"], face)
    lakebase.gateway.close_delay_seconds = 0.1
    expired, good = lakebase.token(lifetime_seconds=-1), lakebase.token()
    outcome, minted = await _dial_with_cached(lakebase, endpoint, expired, good)
    assert isinstance(outcome, UpstreamSession)
    assert (minted, lakebase.gateway.accepted) == (2, 2)


async def test_a_token_minted_anew_that_is_rejected_too_ends_the_dial(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    expired = lakebase.token(lifetime_seconds=-1)
    outcome, minted = await _dial_with_cached(lakebase, endpoint, expired)
    assert isinstance(outcome, ProxyError)
    assert outcome.kind is ErrorKind.TOKEN_REJECTED
    assert (minted, lakebase.gateway.accepted) == (2, 2)
    assert expired not in repr(outcome.response())


async def test_a_token_minted_for_this_dial_is_not_minted_again(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    mint = Counted(lakebase.token(lifetime_seconds=-1).encode())
    async with dialing(mint, **toward(lakebase, endpoint)) as made:
        assert (await made.refusal()).kind is ErrorKind.TOKEN_REJECTED
        assert (mint.minted, lakebase.gateway.accepted) == (1, 1)


async def test_what_is_no_token_at_all_is_told_so(lakebase: Lakebase, endpoint: Endpoint) -> None:
    async with lakebase_dialing(lakebase, endpoint, lakebase.personal_token) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.NOT_A_TOKEN
        assert lakebase.personal_token not in repr(error.response())


async def test_a_role_of_somebody_else_is_an_identity_mismatch(
    lakebase: Lakebase,
) -> None:
    for face in (lakebase["one"].endpoint, lakebase["one"].instance):
        lakebase.gateway.close_delay_seconds = 0.1
        async with lakebase_dialing(lakebase, face, user="ada@example.com") as made:
            error = await made.refusal()
            assert error.kind is ErrorKind.IDENTITY_MISMATCH
            assert error.response().text(b"D").startswith("reason=identity_mismatch The token's")


# -- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_w49_silence_at_any_stage_ends_with_the_connect_timeout(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.strike(stage, Strike.HANG)
    async with lakebase_dialing(lakebase, endpoint, seconds=0.2) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_TIMEOUT
        assert error.response().sqlstate == "08006"
        await all_closed(lakebase)


async def test_w49_a_database_that_is_still_starting_at_the_timeout_says_so(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_patience_seconds = 60, 0.01
    async with lakebase_dialing(lakebase, endpoint, seconds=0.3) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_STARTING
        assert error.response().sqlstate == "57P03"


async def test_a_mint_that_hangs_longer_than_the_dial_may_take_is_the_workspaces_fault() -> None:
    async def never() -> Credential:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with dialing(never, seconds=0.05, host=HOST, user="app") as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.API_UNREACHABLE
        assert error.response().sqlstate == "57P03"


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
            assert error.response().sqlstate == "08001"


# -- the client goes away ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_w54_a_dial_cancelled_at_any_stage_leaves_nothing_open(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.strike(stage, Strike.HANG)
    async with lakebase_dialing(lakebase, endpoint) as made:
        dial = asyncio.create_task(made.dial())
        await lakebase.gateway.until(
            lambda: (
                lakebase.gateway.accepted == 1
                and (
                    stage.value < Stage.STARTUP.value
                    or bool(lakebase.gateway.records[0].parameters)
                )
            )
        )
        dial.cancel()
        await asyncio.wait([dial])
        assert dial.cancelled()
        await all_closed(lakebase)
        (record,) = lakebase.gateway.records
        if record.secure and stage is not Stage.TLS:
            assert record.ended_by is EndedBy.CLOSE_NOTIFY


async def test_w54_a_dial_cancelled_while_the_token_is_minted_opens_nothing(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, HANG)
    async with _through_workspace(lakebase, endpoint) as made:
        dial = asyncio.create_task(made.dial())
        await lakebase.workspace.called(Call.CREDENTIAL)
        dial.cancel()
        await asyncio.wait([dial])
        assert dial.cancelled()
        lakebase.workspace.heal()
        session = await made.dial()  # the mint went on into the cache
        assert lakebase.workspace.calls[Call.CREDENTIAL] == 1
        assert lakebase.gateway.accepted == 1
        session.link.transport.abort()


async def test_w54_a_dial_cancelled_between_two_tries_opens_nothing_more(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_patience_seconds = 60, 0.01
    async with lakebase_dialing(lakebase, endpoint) as made:
        dial = asyncio.create_task(made.dial())
        await lakebase.gateway.until(lambda: lakebase.gateway.accepted == 3)
        dial.cancel()
        await asyncio.wait([dial])
        await all_closed(lakebase)


async def test_w54_dials_cancelled_at_any_moment_leak_no_connection(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.close_delay_seconds = 0
    async with lakebase_dialing(lakebase, endpoint) as made:
        (await made.dial()).link.transport.abort()
        for turns in range(0, 60, 2):
            dial = asyncio.create_task(made.dial())
            for _ in range(turns):
                await asyncio.sleep(0)
            dial.cancel()
            await asyncio.wait([dial])
            if not dial.cancelled():
                dial.result().link.transport.abort()
        await all_closed(lakebase)


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
        session.link.write(query("SELECT pg_sleep(30)"))
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
        session.link.transport.close()
        await all_closed(lakebase)


async def _until_asleep(lakebase: Lakebase, pid: int | None) -> None:
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while await asyncio.to_thread(lakebase["one"].cluster.execute, sql) != "1":
            pass


async def test_w39_a_cancel_is_delivered_only_when_the_upstream_has_closed(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.strike(Stage.CANCEL, Strike.HANG)
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
        lakebase.gateway.heal()
        await cancel
        session.link.transport.abort()


async def test_w40_a_cancel_whose_session_ends_meanwhile_is_dropped(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.strike(Stage.CANCEL, Strike.HANG)
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


# -- servers that do as they are told ------------------------------------------------------------

OK = AuthenticationOk().encode()
ASK = AuthenticationCleartextPassword().encode()
KEY = BackendKeyData(77, Secret(b"none")).encode()
READY = ReadyForQuery(b"I").encode()
STATUS = ParameterStatus(b"server_version", b"17.0").encode()
NOTICE = NoticeResponse(((b"S", b"NOTICE"), (b"C", b"00000"), (b"M", b"hello"))).encode()
HONEST = OK + STATUS + KEY + NOTICE + READY


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def context(authority: trustme.CA) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(made)
    return made


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("script") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@asynccontextmanager
async def dialing_script(
    ca_file: str, *steps: Step, **options: Any
) -> AsyncIterator[tuple[Dialing, ScriptedServer]]:
    async with scripted(*steps) as server:
        upstream = {
            "host": HOST,
            "hostaddr": "127.0.0.1",
            "port": server.port,
            "user": "app",
            "ssl_root_cert": ca_file,
        }
        async with dialing(Counted(TOKEN), **{**upstream, **options}) as made:
            yield made, server


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
        session.link.transport.close()
        await server.until_open(0)
        assert server.ends == [EndedBy.CLOSE_NOTIFY]


async def test_w26_a_server_may_give_no_key_and_ask_no_password(
    ca_file: str, context: ssl.SSLContext
) -> None:
    async with dialing_script(ca_file, *tls_opening(context), Send(OK + READY)) as (made, server):
        session = await made.dial()
        assert session.startup.key is None
        assert session.startup.welcome(None) == READY
        assert len(server.packets) == 1  # nobody asked for the token
        session.link.transport.abort()


async def test_what_comes_behind_ready_for_query_is_kept(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*password_opening(context), Send(HONEST + NOTICE + b"S\0\0"))
    async with dialing_script(ca_file, *steps) as (made, _):
        session = await made.dial()
        assert session.startup.trailing_data() == NOTICE + b"S\0\0"
        session.link.transport.abort()


def fields(*pairs: bytes) -> bytes:
    return Frame(b"E", b"".join(pair + b"\0" for pair in pairs)).encode()


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
    "w53_error_with_bytes_behind": (fields(b"SFATAL", b"C28000", b"", b"x"), PROTOCOL),
    "w53_unknown_fields": (
        fields(b"SFATAL", b"VFATAL", b"C42704", b"Mm", b"zz", b"\xff\xfe", b""),
        ErrorKind.STARTUP_REFUSED,
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
        ((Send(b"S"), Expect(b"\x16"), Send(b"nonsense" * 9)), ErrorKind.UPSTREAM_LOST),
        ((Send(b"S"), Expect(b"\x16"), Close()), ErrorKind.UPSTREAM_LOST),
    ],
    ids=["n", "e", "s_and_more", "g", "tls", "eof", "rst", "s_eof", "s_rst", "no_tls", "hello_eof"],
)
async def test_w52_any_answer_but_s_alone_ends_the_dial(
    ca_file: str, steps: tuple[Step, ...], kind: ErrorKind
) -> None:
    async with dialing_script(ca_file, Expect(SSLRequest().encode()), *steps) as (made, server):
        assert (await made.refusal()).kind is kind
        assert server.accepted == (3 if kind is ErrorKind.UPSTREAM_LOST else 1)
        assert server.packets == []
        await server.until_open(0)


async def test_w52_an_error_in_plaintext_is_logged_and_not_passed_on(ca_file: str) -> None:
    text = b"E" + b"FATAL:  \x1b[31mout of memory\n eyJhbGciOi-not-real " + b"x" * 2000 + b"\0"
    steps = (Expect(SSLRequest().encode()), Send(text))
    with captured_log() as log:
        async with dialing_script(ca_file, *steps) as (made, _):
            error = await made.refusal()
    (line,) = log.events("upstream sent an error in plaintext")
    assert line["host"] == HOST
    assert line["text"].startswith("FATAL:   [31mout of memory  [masked] xxx")
    assert len(line["text"]) <= 512
    assert "out of memory" not in f"{error!r} {error.response()!r}"


@pytest.mark.slow
async def test_w53_an_end_at_any_offset_is_a_loss(ca_file: str, context: ssl.SSLContext) -> None:
    for offset in range(len(HONEST)):
        steps = (*tls_opening(context), Send(HONEST[:offset]), Close())
        async with dialing_script(ca_file, *steps) as (made, server):
            assert (await made.refusal()).kind is ErrorKind.UPSTREAM_LOST, offset
            assert server.accepted == 3


# -- many at once --------------------------------------------------------------------------------


async def opened(made: Dialing) -> None:
    """Open a session and close it."""
    (await made.dialer.dial(CLIENT)).link.transport.close()


@pytest.mark.slow
async def test_a_thousand_clients_are_served_by_connects_max_handshakes_at_a_time(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*tls_opening(context), Send(HONEST))
    async with dialing_script(ca_file, *steps, seconds=60, connects_max=7) as (made, server):
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(1000):
                group.create_task(opened(made))
        assert server.accepted == 1000
        assert 1 < server.scripted_most <= 7


async def test_who_waits_for_a_place_until_the_end_is_told_so(ca_file: str) -> None:
    async with dialing_script(ca_file, seconds=0.05, connects_max=1) as (made, server):
        async with made.dialer._places:
            error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_BUSY
        assert error.response().sqlstate == "53300"
        assert "waited for one of 1 places" in error.detail
        assert server.accepted == 0
        for phase in (ConnectPhase.DNS, ConnectPhase.TCP):
            assert made.metrics.value("upstream_connect_seconds_count", phase=phase) == 0


async def test_places_are_given_in_the_order_of_arrival(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*tls_opening(context), Send(HONEST))
    async with dialing_script(ca_file, *steps, connects_max=1) as (made, _):
        served: list[int] = []

        async def one(number: int) -> None:
            await opened(made)
            served.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(one(number))
        assert served == [0, 1, 2, 3, 4]


async def test_a_dial_that_sleeps_before_its_next_try_holds_no_place(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    waking = neon_error("Couldn't connect to compute node").encode()
    lakebase.gateway.strike(Stage.STARTUP, waking, times=1)
    async with lakebase_dialing(lakebase, endpoint, connects_max=1) as made:
        made.dialer._jitter = lambda: 1.0
        first = asyncio.create_task(opened(made))
        await lakebase.gateway.until(lambda: lakebase.gateway.accepted == 1)
        await opened(made)
        assert not first.done()
        await first
        assert lakebase.gateway.accepted == 3


async def test_w54_a_client_that_leaves_the_queue_takes_no_place_with_it(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*tls_opening(context), Send(HONEST))
    async with dialing_script(ca_file, *steps, connects_max=1) as (made, server):
        async with made.dialer._places:
            leaving = asyncio.create_task(made.dial())
            staying = asyncio.create_task(opened(made))
            for _ in range(20):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
        await staying
        assert server.accepted == 1


@pytest.mark.parametrize(("max_age", "waited", "minted"), [(60, 61, 2), (60, 30, 1), (0, 61, 1)])
async def test_a_token_that_grew_too_old_in_the_queue_is_not_shown(
    ca_file: str, context: ssl.SSLContext, max_age: float, waited: float, minted: int
) -> None:
    mint = Counted(b"eyJ-first-not-real", b"eyJ-second-not-real")
    async with scripted(*password_opening(context), Send(HONEST)) as server:
        upstream: dict[str, Any] = {"host": HOST, "hostaddr": "127.0.0.1", "user": "app"}
        async with dialing(
            mint,
            max_age=max_age,
            connects_max=1,
            port=server.port,
            ssl_root_cert=ca_file,
            **upstream,
        ) as made:
            async with made.dialer._places:
                dial = asyncio.create_task(opened(made))
                for _ in range(20):
                    await asyncio.sleep(0)
                CLOCK.move(waited)
            await dial
        assert mint.minted == minted
        shown = password_in(server.packets[-1])
        assert shown == (b"eyJ-second-not-real" if minted == 2 else b"eyJ-first-not-real")


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
        (await made.dial()).link.transport.abort()


# -- several addresses ---------------------------------------------------------------------------


def address(host: str, port: int) -> AddrInfoType:
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)


@contextmanager
def black_hole() -> Iterator[AddrInfoType]:
    """Give an address that answers nothing: a listening socket whose queue is full."""
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
        (await made.dial()).link.transport.abort()
        assert lakebase.gateway.accepted == 1
        assert made.metrics.value("upstream_connect_seconds_sum", phase=ConnectPhase.TCP) < 0.2


@pytest.mark.parametrize("holes", [1, 2])
async def test_an_address_that_swallows_packets_costs_a_quarter_of_a_second(
    lakebase: Lakebase, endpoint: Endpoint, holes: int
) -> None:
    good = address(lakebase.host_address, lakebase.port)
    async with lakebase_dialing(lakebase, endpoint) as made, AsyncExitStack() as stack:
        made.addresses = (*(stack.enter_context(black_hole()) for _ in range(holes)), good)
        (await made.dial()).link.transport.abort()
        seconds = made.metrics.value("upstream_connect_seconds_sum", phase=ConnectPhase.TCP)
        assert holes * NEXT_ADDRESS_SECONDS <= seconds < holes * NEXT_ADDRESS_SECONDS + 0.3
        assert lakebase.gateway.accepted == 1


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


async def test_no_secret_is_in_what_a_dial_leaves_behind(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*password_opening(context), Send(fields(b"SFATAL", b"VFATAL", b"C28P01", b"Mno", b"")))
    async with dialing_script(ca_file, *steps) as (made, server):
        error = await made.refusal()
        assert server.packets[1].find(TOKEN) > 0
        assert TOKEN.decode() not in f"{error!r} {error} {error.response()!r}"
