"""A dial from name to ReadyForQuery: against the emulator's gateway with a real PostgreSQL, and
against scripted servers that do what no honest one would."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import (
    asynccontextmanager,
)
from functools import partial
from typing import Any

import pytest
from pydantic import SecretStr

from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.endpoints import Endpoint, neon_error
from proxy.emulator.faults import HANG, Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy
from proxy.errors import ErrorKind, ProxyError
from proxy.server.metric_labels import build_metrics
from proxy.upstream.address_lookup import AddressLookup
from proxy.upstream.phases import ConnectPhase
from proxy.upstream.upstream_session import UpstreamSession
from proxy.wire.messages import (
    ErrorResponse,
    ReadyForQuery,
)
from proxy.wire.startup import V3_0, StartupMessage
from proxy.wire.violations import ClientViolation
from proxy.workspace.client import Workspace
from proxy.workspace.credential import Credential
from proxy.workspace.resources import resource_of
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import REJECTION_SECONDS_MIN, LocalTokenSource
from tests.support.dialing import (
    CLIENT,
    CLOCK,
    HONEST,
    HOST,
    TOKEN,
    Counted,
    Dialing,
    all_closed,
    asked,
    dialing,
    dialing_script,
    fields,
    lakebase_dialing,
    toward,
)
from tests.support.peer_server import password_in, password_opening, scripted, tls_opening
from tests.support.script import Send


@pytest.fixture
def endpoint(lakebase: Lakebase) -> Endpoint:
    lakebase.gateway.close_delay_seconds = 0.1
    return lakebase["one"].endpoint


DISCONNECTS = [Injection.CLOSE, Injection.FIN, Injection.RESET]
STAGES = [
    Stage.ACCEPTED,
    Stage.SSL_REPLY,
    Stage.TLS,
    Stage.STARTUP,
    Stage.PASSWORD,
    Stage.AUTHENTICATED,
    Stage.READY,
]


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
        assert session.startup.key == record.issued_key
        welcome = session.startup.welcome(session.startup.key)
        assert welcome.endswith(ReadyForQuery(b"I").encode())
        for phase in ConnectPhase:
            count = made.metrics.value("upstream_connect_seconds_count", phase=phase)
            assert count == 1, phase
        await session.stream.close()
        await all_closed(lakebase)
        assert record.ended_by is EndedBy.CLOSE_NOTIFY


async def test_the_workspace_says_with_what_where_and_as_whom(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with _through_workspace(lakebase, endpoint) as made:
        session = await made.dial()
        assert await asked(session, "SELECT current_user") == lakebase.client_id.encode()
        assert len(lakebase.workspace.mints) == 1
        session.stream.transport.abort()


async def test_what_a_message_of_a_thousand_parameters_needs_is_not_remembered(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    large = StartupMessage(V3_0, (*CLIENT.parameters, *((b"p%d" % n, b"") for n in range(1000))))
    async with lakebase_dialing(lakebase, endpoint) as made:
        prepare = made.dialer.prepare
        assert prepare(large) is not None
        assert prepare(large) == prepare(large)
        assert prepare(CLIENT) is prepare(CLIENT)
        assert list(made.dialer._known) == [CLIENT]


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
    calls = PendingCalls()
    credentials = LocalTokenSource(
        partial(workspace.mint, resource), CredentialsSettings(), build_metrics(), calls
    )
    targets = AddressLookup(upstream, resource, workspace, calls)
    try:
        yield Dialing(credentials, targets, seconds, time.time)
    finally:
        await calls.close()


@pytest.mark.parametrize("fault", [faults.INTERNAL, faults.ABORTED, faults.BAD_GATEWAY])
async def test_a_transient_failure_of_the_api_fails_no_dial(
    lakebase: Lakebase, endpoint: Endpoint, fault: faults.Reply
) -> None:
    # The SDK retries 429 and 503 alone; the document's class R has the others too.
    lakebase.workspace.fail(Call.CREDENTIAL, fault, times=1)
    lakebase.workspace.fail(Call.RESOURCE, fault, times=1)
    async with _through_workspace(lakebase, endpoint) as made:
        session = await made.dial()
        session.stream.transport.abort()


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
        (await made.dial()).stream.transport.abort()
        endpoint.hosts["host"] = "ep-moved" + endpoint.host[endpoint.host.index(".") :]
        assert (await made.refusal()).kind is ErrorKind.ENDPOINT_GONE
        session = await made.dial()
        assert session.target.host == endpoint.host
        session.stream.transport.abort()


async def test_w51_a_client_that_cannot_be_passed_on_is_told_and_nothing_is_dialled(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    async with lakebase_dialing(lakebase, endpoint) as made:
        long = StartupMessage(V3_0, ((b"user", b"app"), (b"search_path", b"x" * 9980)))
        with pytest.raises(ClientViolation):
            await made.dial(long)
        assert lakebase.gateway.accepted == 0


# -- loss, refusal, sleep ------------------------------------------------------------------------


@pytest.mark.parametrize("inject", DISCONNECTS, ids=lambda inject: inject.name.lower())
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_w53_an_upstream_lost_at_any_stage_is_dialled_again(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage, inject: Injection
) -> None:
    # After three tries in half a second it was given up, while a restart takes 20 seconds.
    lakebase.gateway.inject(stage, inject, times=5)
    async with lakebase_dialing(lakebase, endpoint, retry_seconds=30) as made:
        session = await made.dial()
        assert lakebase.gateway.accepted == 6
        session.stream.transport.close()
        await all_closed(lakebase)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_an_upstream_lost_again_and_again_is_given_up_after_connect_retry_seconds(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.inject(stage, Injection.CLOSE)
    async with lakebase_dialing(lakebase, endpoint) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_LOST
        assert error.response().sqlstate == "57P03"
        assert lakebase.gateway.accepted > 3
        await all_closed(lakebase)


@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_a_sleeping_database_is_waited_for(lakebase: Lakebase, face: str) -> None:
    endpoint: Endpoint = getattr(lakebase["one"], face)
    lakebase.gateway.close_delay_seconds = 0.1
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 0.3, 0.01
    async with lakebase_dialing(lakebase, endpoint) as made:
        session = await made.dial()
        assert endpoint.wakes == 1
        assert lakebase.gateway.accepted > 1
        session.stream.transport.close()
        await all_closed(lakebase)


async def test_an_overloaded_front_end_is_waited_for(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.refuse(neon_error("Too many connections attempts"), times=4)
    async with lakebase_dialing(lakebase, endpoint) as made:
        (await made.dial()).stream.transport.abort()
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
        session.stream.transport.abort()
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
    assert outcome.reason == "token_rejected"
    assert (minted, lakebase.gateway.accepted) == (2, 2)
    assert expired not in repr(outcome.response())


async def test_a_token_minted_for_this_dial_is_not_minted_again(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    mint = Counted(lakebase.token(lifetime_seconds=-1).encode())
    async with dialing(mint, **toward(lakebase, endpoint)) as made:
        assert (await made.refusal()).reason == "token_rejected"
        assert (mint.minted, lakebase.gateway.accepted) == (1, 1)


@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_a_role_that_is_refused_again_and_again_does_not_cost_a_mint_each_time(
    lakebase: Lakebase, face: str
) -> None:
    # Each refusal left the token that it had just minted in the cache, where the next client found
    # it, had it refused, and minted another: forty clients without a role were forty mints.
    endpoint: Endpoint = getattr(lakebase["one"], face)
    lakebase.gateway.close_delay_seconds = 0
    text = f"password authentication failed for user '{lakebase.client_id}'"
    endpoint.refuse(neon_error(text), times=None)
    mint = Counted(lakebase.token().encode())
    async with dialing(mint, **toward(lakebase, endpoint)) as made:
        for _ in range(25):
            assert (await made.refusal()).kind is ErrorKind.TOKEN_REJECTED
            CLOCK.move(1)
        assert mint.minted == 2  # its own, and one for the dial that found that one in the cache
        CLOCK.move(REJECTION_SECONDS_MIN)
        await made.refusal()
        await made.refusal()
        assert mint.minted == 3
        endpoint.refusals.clear()
        (await made.dial()).stream.transport.abort()
        assert mint.minted == 3


async def test_a_token_that_ages_while_the_host_is_looked_up_is_not_sent(
    ca_file: str, context: ssl.SSLContext
) -> None:
    # It was fetched first, and then shown whatever time the rest took.
    mint = Counted(b"eyJ-first-not-real", b"eyJ-second-not-real")
    async with scripted(*password_opening(context), Send(HONEST)) as server:
        upstream: dict[str, Any] = {"host": HOST, "hostaddr": "127.0.0.1", "user": "app"}
        async with dialing(mint, port=server.port, ssl_root_cert=ca_file, **upstream) as made:
            await made.dialer._credentials.fresh()
            made.resolving_seconds = 61
            await opened(made)
        assert password_in(server.packets[-1]) == b"eyJ-second-not-real"


async def test_what_is_no_token_at_all_is_told_so(lakebase: Lakebase, endpoint: Endpoint) -> None:
    async with lakebase_dialing(lakebase, endpoint, lakebase.personal_token) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.NOT_A_TOKEN
        assert lakebase.personal_token not in repr(error.response())


@pytest.mark.parametrize(
    ("face", "reason", "text"),
    [
        ("endpoint", "token_rejected", "OAuth: User is not authorized"),
        ("instance", "identity_mismatch", "The token's"),
    ],
)
async def test_a_role_of_another_identity_is_told_so(
    lakebase: Lakebase, face: str, reason: str, text: str
) -> None:
    lakebase.gateway.close_delay_seconds = 0.1
    endpoint: Endpoint = getattr(lakebase["one"], face)
    async with lakebase_dialing(lakebase, endpoint, user="ada@example.com") as made:
        error = await made.refusal()
        assert error.response().text(b"D").startswith(f"reason={reason} {text}")
        assert "upstream.user" in error.response().text(b"H")


async def test_a_cached_token_that_is_not_authorized_is_minted_once_more(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    # It was "upstream_error": no new token, no advice.
    expired, good = lakebase.token(lifetime_seconds=-1), lakebase.token()
    async with lakebase_dialing(lakebase, endpoint, expired, good) as made:
        await made.dialer._credentials.fresh()
        CLOCK.move(1)
        await opened(made)
        assert lakebase.gateway.accepted == 2


# -- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_w49_silence_at_any_stage_ends_with_the_connect_timeout(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.inject(stage, Injection.HANG)
    async with lakebase_dialing(lakebase, endpoint, seconds=0.2) as made:
        error = await made.refusal()
        assert error.reason == "upstream_timeout"
        assert error.response().sqlstate == "57P03"
        await all_closed(lakebase)


async def test_w49_a_front_end_that_asks_for_nothing_is_given_up_before_the_timeout(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    lakebase.gateway.inject(Stage.STARTUP, Injection.HANG)
    async with lakebase_dialing(lakebase, endpoint, silence_seconds_max=0.1) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_TIMEOUT
        assert error.detail == "no answer to the StartupMessage within 0.1 seconds"
        assert lakebase.gateway.accepted == 2
        lakebase.gateway.clear_faults()
        await all_closed(lakebase)


@pytest.mark.parametrize("stage", [Stage.PASSWORD, Stage.AUTHENTICATED, Stage.READY])
async def test_w49_a_login_that_hangs_after_the_password_is_tried_again_for_the_whole_time(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.inject(stage, Injection.HANG)
    async with lakebase_dialing(lakebase, endpoint, seconds=0.5, silence_seconds_max=0.1) as made:
        # One try took the whole time, and a login to a database that wakes can hang.
        detail = (await made.refusal()).detail
        assert detail == f"{endpoint.host}: no session within 0.25 seconds"
        assert lakebase.gateway.accepted >= 2


async def test_w49_a_database_that_is_still_starting_at_the_timeout_says_so(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 60, 0.01
    async with lakebase_dialing(lakebase, endpoint, seconds=0.3) as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_STARTING
        assert error.response().sqlstate == "57P03"


async def test_a_mint_that_hangs_longer_than_the_dial_may_take_is_the_workspaces_fault() -> None:
    async def never() -> Credential:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with dialing(never, seconds=0.05, host=HOST, hostaddr="127.0.0.1", user="app") as made:
        error = await made.refusal()
        assert error.kind is ErrorKind.API_UNREACHABLE
        assert error.detail == "the workspace API did not answer within 0.05 seconds"
        assert error.response().sqlstate == "57P03"


# -- the client goes away ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name.lower())
async def test_w54_a_dial_cancelled_at_any_stage_leaves_nothing_open(
    lakebase: Lakebase, endpoint: Endpoint, stage: Stage
) -> None:
    lakebase.gateway.inject(stage, Injection.HANG)
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
        lakebase.workspace.clear_faults()
        session = await made.dial()  # the mint went on into the cache
        assert lakebase.workspace.calls[Call.CREDENTIAL] == 1
        assert lakebase.gateway.accepted == 1
        session.stream.transport.abort()


async def test_w54_a_dial_cancelled_between_two_tries_opens_nothing_more(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 60, 0.01
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
        (await made.dial()).stream.transport.abort()
        for turns in range(0, 60, 2):
            dial = asyncio.create_task(made.dial())
            for _ in range(turns):
                await asyncio.sleep(0)
            dial.cancel()
            await asyncio.wait([dial])
            if not dial.cancelled():
                dial.result().stream.transport.abort()
        await all_closed(lakebase)


# -- many at once --------------------------------------------------------------------------------


async def opened(made: Dialing) -> None:
    """Open a session and close it."""
    (await made.dialer.dial(CLIENT)).stream.transport.close()


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


async def test_a_dial_that_waits_for_a_slot_until_the_timeout_says_so(ca_file: str) -> None:
    async with dialing_script(ca_file, seconds=0.05, connects_max=1) as (made, server):
        async with made.dialer._connects:
            error = await made.refusal()
        assert error.kind is ErrorKind.UPSTREAM_BUSY
        assert error.response().sqlstate == "53300"
        assert "all 1 connects (upstream.connects_max) were in use" in error.detail
        assert server.accepted == 0
        tcp = made.metrics.value("upstream_connect_seconds_count", phase=ConnectPhase.TCP)
        assert tcp == 0


async def test_slots_are_given_in_the_order_of_arrival(
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


async def test_a_dial_that_sleeps_before_its_next_try_holds_no_slot(
    lakebase: Lakebase, endpoint: Endpoint
) -> None:
    waking = neon_error("Couldn't connect to compute node").encode()
    lakebase.gateway.inject(Stage.STARTUP, waking, times=1)
    async with lakebase_dialing(lakebase, endpoint, connects_max=1) as made:
        made.dialer._jitter = lambda: 1.0
        first = asyncio.create_task(opened(made))
        await lakebase.gateway.until(lambda: lakebase.gateway.accepted == 1)
        await opened(made)
        assert not first.done()
        await first
        assert lakebase.gateway.accepted == 3


async def test_w54_a_client_that_leaves_the_queue_takes_no_slot(
    ca_file: str, context: ssl.SSLContext
) -> None:
    steps = (*tls_opening(context), Send(HONEST))
    async with dialing_script(ca_file, *steps, connects_max=1) as (made, server):
        async with made.dialer._connects:
            leaving = asyncio.create_task(made.dial())
            staying = asyncio.create_task(opened(made))
            for _ in range(20):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
        await staying
        assert server.accepted == 1


@pytest.mark.parametrize(("max_age", "waited", "minted"), [(60, 61, 2), (60, 30, 1), (0, 61, 1)])
async def test_a_token_that_grew_too_old_in_the_queue_is_not_sent(
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
            async with made.dialer._connects:
                dial = asyncio.create_task(opened(made))
                for _ in range(20):
                    await asyncio.sleep(0)
                CLOCK.move(waited)
            await dial
        assert mint.minted == minted
        shown = password_in(server.packets[-1])
        assert shown == (b"eyJ-second-not-real" if minted == 2 else b"eyJ-first-not-real")


async def test_no_secret_is_in_what_a_dial_leaves(ca_file: str, context: ssl.SSLContext) -> None:
    steps = (*password_opening(context), Send(fields(b"SFATAL", b"VFATAL", b"C28P01", b"Mno", b"")))
    async with dialing_script(ca_file, *steps) as (made, server):
        error = await made.refusal()
        assert server.packets[1].find(TOKEN) > 0
        assert TOKEN.decode() not in f"{error!r} {error} {error.response()!r}"
