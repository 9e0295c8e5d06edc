"""What a client is told when it cannot be served, as a driver shows it; others are served on.

The cases are the rows of the tables of connection errors and of REST errors in the Lakebase facts,
each over real sockets; the emulator sends the texts that only production sends. The
SQLSTATE and the reason word are a contract (style: `errors.py`); a hint is there wherever a
person can do something.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.certificates import Certificate
from proxy.emulator.endpoints import neon_error
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.tokens import TokenIssuer
from proxy.server.app import App
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import ProtocolVersion
from proxy.workspace.single_flight import BACKOFF_SECONDS_MIN
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import LogLines, libpq
from tests.support.sharding import sharded

# Reasons that no operator has to act on.
CLIENTS_OWN = {"database_missing", "setting_unknown", "pooler_parameter"}
OWN_MISTAKES = {
    "unknown setting": startup(database="app@7", options="-c nonsense=1"),
    "no setting": startup(database="app@7", options="nonsense"),
    "no shard key": startup(),
    "no value of the key's type": startup(database="app@seven"),
    "no mapping": startup(database="app@999999"),
    "no user": startup(user=""),
    "protocol": startup(ProtocolVersion(4, 0)),
}

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Break = Callable[[Lakebase], Awaitable[None] | None]


@dataclass(frozen=True)
class Case:
    """How the world is broken, and what the client hears then."""

    name: str
    break_world: Break
    sqlstate: str
    reason: str
    hint: str  # a part of it
    detail: str = ""  # a part of it, besides the reason
    settings: dict[str, dict[str, object]] = field(default_factory=dict)
    original: ErrorResponse | None = None  # PostgreSQL's own error, which goes out as it is


def _refuse_logins(error: ErrorResponse) -> Break:
    return lambda lakebase: lakebase["one"].endpoint.refuse(error, None)


def _fail(call: Call, reply: faults.Reply | faults.Hang) -> Break:
    return lambda lakebase: lakebase.workspace.fail(call, reply)


def _say(error: ErrorResponse) -> Break:
    """Make the front end send it in answer to the StartupMessage, before it asks for anything."""
    return lambda lakebase: lakebase.gateway.inject(Stage.STARTUP, error.encode())


def _uid_for_id(lakebase: Lakebase) -> None:
    # The settings name the id; to the API it is now the uid, as for one who mixed them up.
    endpoint = lakebase["one"].endpoint
    endpoint.name, endpoint.uid = endpoint.name.replace("primary", endpoint.uid), "primary"


def _show(certificate: Certificate) -> Break:
    def break_world(lakebase: Lakebase) -> None:
        lakebase.gateway.certificate = certificate

    return break_world


def _inject(stage: Stage, inject: Injection | bytes) -> Break:
    return lambda lakebase: lakebase.gateway.inject(stage, inject)


def _foreign_issuer(lakebase: Lakebase) -> None:
    lakebase.gateway.issuer = TokenIssuer("another-workspace", time.time)


def _expired_credentials(lakebase: Lakebase) -> None:
    lakebase.workspace.api.credential_seconds = -10


def _wrong_secret(lakebase: Lakebase) -> None:
    lakebase.workspace.api.clients[lakebase.client_id] = "another-not-real-secret"


def _no_tls(lakebase: Lakebase) -> None:
    lakebase.gateway.offers_tls = False


def _early_bytes(lakebase: Lakebase) -> None:
    lakebase.gateway.early_bytes = b"R\0\0\0\x08\0\0\0\0"


def _disabled(lakebase: Lakebase) -> None:
    lakebase["one"].endpoint.disabled = True


def _full(lakebase: Lakebase) -> None:
    lakebase["one"].endpoint.sessions_max = 0


# Time for one call of the API, but not for another after it.
NO_API: dict[str, dict[str, object]] = {"credentials": {"mint_timeout_seconds": 0.2}}
FEW_CALLS: dict[str, dict[str, object]] = {"credentials": {"mint_timeout_seconds": 1.5}}
SOME_CALLS: dict[str, dict[str, object]] = {"credentials": {"mint_timeout_seconds": 4}}
# Long enough for the first token on a busy machine.
SOON_SECONDS = 1.0
SOON: dict[str, dict[str, object]] = {"upstream": {"connect_timeout_seconds": SOON_SECONDS}}
CREATE_ROLE = (
    "CREATE EXTENSION IF NOT EXISTS databricks_auth; "
    "SELECT databricks_create_role('5ca1ab1e-"  # the client id, ready to paste
)


def _front_end(sqlstate: str, reason: str, hint: str, *texts: ErrorResponse) -> tuple[Case, ...]:
    """Return a case for each text of one row of the table of connection errors."""
    waits = reason in ("upstream_starting", "upstream_busy", "upstream_full")
    return tuple(
        Case(
            *(f"{reason}: {error.message}", _say(error), sqlstate, reason, hint, error.message),
            settings=SOON if waits else {},
        )
        for error in texts
    )


def _postgres(
    sqlstate: str, reason: str, hint: str, message: str, *, told: str = ""
) -> tuple[Case, ...]:
    """Return a case for an error of PostgreSQL itself; `told` is its SQLSTATE where it differs."""
    error = ErrorResponse.fatal(sqlstate, message)
    name = f"{reason}: {message} {sqlstate}"
    if not told:
        return (Case(name, _refuse_logins(error), sqlstate, reason, hint, original=error),)
    settings = SOON if reason == "upstream_starting" else {}
    return (Case(name, _refuse_logins(error), told, reason, hint, message, settings),)


def _api(
    sqlstate: str,
    reason: str,
    hint: str,
    *replies: faults.Reply,
    call: Call = Call.CREDENTIAL,
    settings: dict[str, dict[str, object]] | None = None,
) -> tuple[Case, ...]:
    """Return a case for each reply of one row of the table of REST errors."""
    return tuple(
        Case(
            f"{reason}: {call.name} {reply.status} {reply.body[:60].decode()}",
            *(_fail(call, reply), sqlstate, reason, hint),
            settings=settings or FEW_CALLS,
        )
        for reply in replies
    )


fatal = ErrorResponse.fatal
CONNECTION_ERRORS = (
    *_front_end(
        *("28000", "not_a_token", "an OAuth role needs a minted credential"),
        neon_error("Provided authentication token is not a valid JWT encoding"),
    ),
    *_front_end(
        *("28000", "token_rejected", "another workspace? Is this machine's clock right?"),
        neon_error("JWT token has expired"),
        neon_error("jwk not found"),
        neon_error("invalid JWT token audience"),
        neon_error("JWKs settings for this role were not configured"),
    ),
    *_front_end(
        *("28000", "token_rejected", "Is upstream.user the identity of the token"),
        neon_error("OAuth: User is not authorized"),
        fatal("28P01", "OAuth: User is not authorized"),
        neon_error("Invalid authorization for databricks identity login"),
        fatal("28000", "Invalid authorization for databricks identity login"),
    ),
    *_front_end(
        *("28000", "native_login_disabled", "enable_pg_native_login"),
        neon_error("native postgres login is disabled for this endpoint"),
    ),
    *_front_end(
        *("28000", "token_rejected", CREATE_ROLE),
        neon_error("password authentication failed for user 'x'"),
    ),
    *_postgres(
        *("28P01", "password_rejected", CREATE_ROLE),
        'password authentication failed for user "x"',
    ),
    *_front_end(
        *("28000", "identity_mismatch", "the client id, the e-mail, or a group"),
        neon_error('The token\'s identity "x" did not match the security label of role "y"'),
        fatal("28000", 'The token\'s identity "x" did not match the security label of role "y"'),
    ),
    *_postgres("28000", "role_missing", CREATE_ROLE, 'role "x" does not exist'),
    *_postgres("3D000", "database_missing", "databricks_postgres", 'database "x" does not exist'),
    *_front_end(
        *("28000", "authorization_denied", "IP access list and the private link"),
        fatal("28000", "External authorization failed."),
    ),
    *_front_end(
        *("28000", "network_denied", "retrying does not help"),
        fatal("28000", "External authorization failed. Reason: private-link-not-supported"),
        fatal("28000", "External authorization failed. Reason: unsupported-destination-type"),
        fatal("28000", "Source IP address: 192.0.2.7 is blocked by Databricks IP ACL"),
        neon_error("This IP address 192.0.2.7 is not allowed to connect to this endpoint."),
        neon_error("Connections from a blocked network are not allowed"),
        neon_error("VPC endpoint ID is not specified."),
    ),
    *_front_end(
        *("08001", "front_end_protocol", "another program answers"),
        fatal("08006", "Connection does not have SNI."),
        fatal("08P01", "Insecure connection."),
        fatal("08P01", "Invalid protocol version. Protocol version: 196610"),
        fatal("0A000", "Unsupported frontend protocol 3.2: server supports 3.0 to 3.0"),
        fatal("08P01", "Received unencrypted data after SSL request."),
        fatal("08006", "Invalid length of startup packet."),
    ),
    *_front_end(
        *("08001", "front_end_protocol", "Remove endpoint= and project="),
        neon_error("Inconsistent project name inferred from SNI ('a') and domain ('b')."),
        neon_error("Endpoint ID is not specified"),
    ),
    *_front_end(
        *("57P03", "upstream_timeout", "Try again"),
        fatal("08006", "Client handshake timeout."),
        neon_error("Authentication timed out"),
    ),
    *_front_end(
        *("57P03", "front_end_error", "Try again"),
        fatal("XX000", "Internal error. Please try again."),
        fatal("XX000", "Invalid upstream handshake state."),
    ),
    *_front_end(
        *("08001", "endpoint_not_found", "Was it deleted?"),
        neon_error("Control plane request failed: endpoint cannot be found"),
    ),
    *_front_end(
        *("08001", "endpoint_disabled", "Enable it in the project"),
        neon_error("Control plane request failed: endpoint is disabled"),
    ),
    *_front_end(
        *("57P03", "upstream_starting", "Try again"),
        neon_error("Control plane request failed: endpoint is temporarily unavailable"),
        neon_error("Control plane request failed"),
        neon_error("Couldn't connect to compute node"),
    ),
    *_front_end(
        *("53300", "upstream_busy", "use a pool in the application"),
        neon_error("Failed to acquire permit to connect to the database. Too many concurrent."),
        neon_error("Too many connections attempts"),
        neon_error("Too many connections to this endpoint"),
    ),
    *_front_end(
        *("53300", "upstream_full", "more CU or fewer connections"),
        fatal("08P01", "no more connections allowed (max_client_conn)"),
    ),
    *_postgres(
        *("53300", "upstream_full", "more CU or fewer connections"),
        "remaining connection slots are reserved for roles with the SUPERUSER attribute",
    ),
    *_postgres(
        "53300", "upstream_full", "more CU or fewer connections", "sorry, too many clients already"
    ),
    *_front_end(
        *("28000", "pooler_needs_password", "the direct host (without -pooler)"),
        fatal("08P01", "SASL authentication failed"),
    ),
    *_postgres(
        *("08P01", "pooler_parameter", "use the direct host"),
        "unsupported startup parameter in options: search_path",
    ),
    *_postgres(
        *("57P03", "upstream_starting", "Try again", "the database system is starting up"),
        told="57P03",
    ),
    *_postgres(
        "57P03", "upstream_starting", "Try again", "the database system is not yet...", told="57P03"
    ),
    *(
        _postgres(
            *(sqlstate, "upstream_lost", "Try again", "terminating connection due to something"),
            told="57P03",
        )[0]
        for sqlstate in ("57P01", "57P02")
    ),
    Case(
        "the name is unknown to DNS",
        lambda _: None,
        *("57P03", "upstream_dns", "Does the resolver work?", "no-such-host.invalid"),
        settings={"upstream": {"host": "no-such-host.invalid", "hostaddr": ""}},
    ),
)

WORKSPACE_LOGIN = ("28000", "workspace_login_failed", "Are client id and secret right")
UNREACHABLE = ("57P03", "api_unreachable", "Is workspace.host right and reachable")
API_ERROR = ("57P03", "api_error", "It is a failure of the Databricks API")
PAGE = ("28000", "workspace_configuration", "workspace's own address")
INVALID = ("57P03", "credential_invalid", "Check this machine's clock")
REST_ERRORS = (
    *_api(*WORKSPACE_LOGIN, faults.INVALID_CLIENT, call=Call.TOKEN),
    *_api(*WORKSPACE_LOGIN, faults.UNAUTHENTICATED),
    *_api(
        *("28000", "workspace_access_missing", "Workspace access entitlement"),
        faults.ACCESS_MISSING,
    ),
    *_api("28000", "ip_blocked", "a new token will not help", faults.IP_BLOCKED),
    *_api("28000", "pat_scope", "Use OAuth", faults.PAT_SCOPE),
    *_api(
        *("28000", "permission_denied", "May the identity use this Lakebase project?"),
        *(faults.PERMISSION_DENIED, faults.NUMERIC_CODE),
    ),
    *_api(
        *("08001", "endpoint_invalid", "projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT"),
        faults.api_error(400, "INVALID_PARAMETER_VALUE", "endpoint is not valid"),
    ),
    *_api(
        *("08001", "endpoint_not_found", "such as primary), not its uid (ep-...)"),
        faults.NOT_FOUND,
        faults.api_error(404, "RESOURCE_DOES_NOT_EXIST", "no such endpoint"),
    ),
    Case("the uid", _uid_for_id, "08001", "endpoint_not_found", "not its uid (ep-...)"),
    *_api("57P03", "api_busy", "Try again", faults.ABORTED),
    *_api(
        *("57P03", "api_throttled", "Raise credentials.token_max_age_seconds"),
        *(faults.THROTTLED, faults.THROTTLED_NO_DELAY),
        settings=SOME_CALLS,
    ),
    *_api(*API_ERROR, faults.INTERNAL, faults.BAD_GATEWAY, faults.GATEWAY_TIMEOUT),
    *_api(*API_ERROR, faults.UNAVAILABLE, settings=SOME_CALLS),
    *_api(*API_ERROR, faults.INTERNAL, call=Call.TOKEN),
    *_api(*API_ERROR, faults.INTERNAL, call=Call.DISCOVERY),
    *_api(*PAGE, faults.SIGN_IN_PAGE),
    *_api(
        *("28000", "ip_blocked", "service-direct endpoint"),
        *(faults.NETWORK_DENIED, faults.NETWORK_DENIED_PLAIN),
    ),
    *_api(*UNREACHABLE, faults.NOT_JSON),
    *_api(*UNREACHABLE, faults.NOT_JSON, faults.EMPTY, call=Call.TOKEN),
    *_api(*PAGE, faults.NOT_FOUND, call=Call.DISCOVERY),
    *_api(*UNREACHABLE, faults.EMPTY, call=Call.DISCOVERY),
    *_api(*INVALID, faults.EMPTY),
    Case(
        "the credential call hangs",
        _fail(Call.CREDENTIAL, faults.HANG),
        *UNREACHABLE,
        "no answer within 0.2 seconds",
        NO_API,
    ),
    Case(
        "the credential call hangs for longer than a dial may take",
        _fail(Call.CREDENTIAL, faults.HANG),
        *UNREACHABLE,
        f"the workspace API did not answer within {SOON_SECONDS:g} seconds",
        SOON,
    ),
    Case(
        "the workspace is unknown to DNS",
        lambda _: None,
        *UNREACHABLE,
        settings={**FEW_CALLS, "workspace": {"host": "https://no-such-host.invalid"}},
    ),
    # The same for the call that says where to dial: the token is there already.
    *_api("08001", "endpoint_not_found", "not its uid", faults.NOT_FOUND, call=Call.RESOURCE),
    *_api("28000", "permission_denied", "May the", faults.PERMISSION_DENIED, call=Call.RESOURCE),
    *_api(*API_ERROR, faults.INTERNAL, call=Call.RESOURCE, settings={**FEW_CALLS, **SOON}),
)

CASES = (
    # The token
    Case(
        *("token of another workspace", _foreign_issuer),
        *("28000", "token_rejected", "another workspace", "jwk not found"),
    ),
    Case(
        *("expired when minted", _expired_credentials),
        *("57P03", "credential_invalid", "clock"),
        settings=FEW_CALLS,
    ),
    # The upstream refuses
    Case(
        *("endpoint disabled", _disabled, "08001", "endpoint_disabled", "Enable it"),
        "projects/demo-one/branches/production/endpoints/primary",
    ),
    Case(*("full", _full, "53300", "upstream_full", "fewer connections"), "reserved for roles"),
    Case(
        "unknown text",
        _refuse_logins(neon_error("something not seen before")),
        *("08006", "upstream_error", "", "something not seen before"),
    ),
    Case(
        "the port is closed",
        lambda lakebase: lakebase.gateway.refuse_connections(),
        *("57P03", "upstream_unreachable", "firewall"),
    ),
    Case("no TLS", _no_tls, "08001", "upstream_no_tls", "not a Lakebase host"),
    Case("bytes before TLS", _early_bytes, "08006", "upstream_protocol", ""),
    Case(
        "closed after the StartupMessage",
        _inject(Stage.STARTUP, Injection.CLOSE),
        *("57P03", "upstream_lost", "Try again"),
    ),
    Case(
        "reset after the password",
        _inject(Stage.PASSWORD, Injection.RESET),
        *("57P03", "upstream_lost", "Try again"),
    ),
    Case(
        "nonsense before ready",
        _inject(Stage.AUTHENTICATED, b"\0\xff\xff\xff\xff not Postgres"),
        *("08006", "upstream_protocol", ""),
    ),
    Case(
        "silent before ready",
        _inject(Stage.AUTHENTICATED, Injection.HANG),
        *(
            "57P03",
            "upstream_timeout",
            "Try again",
            f"no session within {SOON_SECONDS / 2:g} seconds",
        ),
        settings=SOON,
    ),
    # Its certificate
    *(
        Case(
            f"certificate {kind.name}",
            _show(kind),
            *("08001", "upstream_certificate", "upstream.ssl_root_cert"),
        )
        for kind in (Certificate.WRONG_NAME, Certificate.EXPIRED, Certificate.UNTRUSTED)
    ),
    # The workspace
    Case(
        *("wrong secret", _wrong_secret, "28000", "workspace_login_failed"),
        "Are client id and secret right",
    ),
    Case(
        "no permission",
        _fail(Call.CREDENTIAL, faults.PERMISSION_DENIED),
        *("28000", "permission_denied", "use this Lakebase project", "CAN_USE"),
    ),
    Case(
        "no such endpoint",
        _fail(Call.CREDENTIAL, faults.NOT_FOUND),
        *("08001", "endpoint_not_found", "not its uid"),
    ),
    Case(
        "API fails",
        _fail(Call.CREDENTIAL, faults.INTERNAL),
        *("57P03", "api_error", "a failure of the Databricks API"),
        settings=SOON,
    ),
    Case(
        "API hangs",
        _fail(Call.TOKEN, faults.HANG),
        *("57P03", "api_unreachable", "workspace.host"),
        settings={**NO_API, **SOON},
    ),
    Case(
        "API down",
        lambda lakebase: lakebase.workspace.refuse_connections(),
        *("57P03", "api_unreachable", "workspace.host"),
        settings={**NO_API, **SOON},
    ),
)


async def told(proxy: App, first_packet: bytes = startup()) -> ErrorResponse:
    """Return the error that a connecting client is told; a driver keeps only its text."""
    async with plain_client(proxy) as client:
        await client.send(first_packet)
        first = await client.message()
        assert isinstance(first, ErrorResponse), "nothing may come before the error"
        assert await client.receive_rest() == b""
        return first


@pytest.mark.parametrize(
    "case", [*CASES, *CONNECTION_ERRORS, *REST_ERRORS], ids=lambda case: case.name
)
async def test_a_client_that_cannot_be_served_is_told_why_and_others_are_served_on(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, case: Case
) -> None:
    served = await start_proxy()
    proxy = await start_proxy(**case.settings)
    async with await Connection.connect(**libpq(served)) as other:
        broken = case.break_world(lakebase)
        if broken is not None:
            await broken
        error = await told(proxy)
        assert (await (await other.execute("SELECT 1")).fetchone()) == (1,)
    assert (error.text(b"S"), error.text(b"V"), error.sqlstate) == ("FATAL", "FATAL", case.sqlstate)
    if case.original is None:
        assert error.text(b"D").startswith(f"reason={case.reason}")
        assert case.detail in error.text(b"D")
    else:
        assert error.fields[:-2] == case.original.fields
        assert error.text(b"D") == f"reason={case.reason}"
    assert case.hint in error.text(b"H")
    assert proxy.metrics.value("startup_failures_total", reason=case.reason) == 1
    # A refusal and an outage are warnings, the client's own mistake is none; a bug is an error.
    assert [line for line in log.above_info() if line["level"] != "warning"] == []
    (line,) = log.events("session refused")
    is_own = case.reason in CLIENTS_OWN or "client's options" in error.text(b"H")
    assert (line["reason"], line["level"]) == (case.reason, "info" if is_own else "warning")


@pytest.mark.parametrize("first_packet", OWN_MISTAKES.values(), ids=OWN_MISTAKES)
async def test_a_clients_own_mistake_is_no_warning(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, first_packet: bytes
) -> None:
    await told(await start_proxy(**sharded(lakebase)), first_packet)
    assert log.above_info() == []


FIXED = ("token of another workspace", "the port is closed", "wrong secret")


@pytest.mark.parametrize("name", FIXED)
async def test_once_the_fault_is_fixed_the_next_client_is_served(
    start_proxy: StartProxy, lakebase: Lakebase, name: str
) -> None:
    case = next(case for case in CASES if case.name == name)
    proxy = await start_proxy(**case.settings)
    issuer, secret = lakebase.gateway.issuer, lakebase.client_secret
    broken = case.break_world(lakebase)
    if broken is not None:
        await broken
    await told(proxy)
    lakebase.gateway.issuer = issuer
    lakebase.workspace.api.clients[lakebase.client_id] = secret
    await lakebase.gateway.accept_connections()
    await asyncio.sleep(
        BACKOFF_SECONDS_MIN
    )  # for so long a failure for good is not asked for again
    async with await Connection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)


async def test_a_driver_shows_sentence_reason_and_hint(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()
    lakebase.gateway.certificate = Certificate.EXPIRED
    with pytest.raises(psycopg.OperationalError) as raised:
        await Connection.connect(**libpq(proxy))
    text = str(raised.value)
    assert "FATAL:  the upstream's certificate does not verify" in text
    assert "DETAIL:  reason=upstream_certificate " in text
    assert "HINT:  Is there an intercepting proxy?" in text


async def test_a_database_that_does_not_exist_is_reported_with_its_own_sqlstate(
    proxy: App,
) -> None:
    error = await told(proxy, startup(database="nowhere"))
    assert error.sqlstate == "3D000"
    assert 'database "nowhere" does not exist' in error.text(b"D")
    assert "databricks_postgres" in error.text(b"H")


async def test_a_wrong_setting_of_the_client_is_postgres_own_error(proxy: App) -> None:
    with pytest.raises(psycopg.OperationalError, match="nonsense"):
        await Connection.connect(**libpq(proxy, options="-c nonsense=1"))


async def test_an_expired_token_in_the_cache_is_replaced_unnoticed(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()
    async with await Connection.connect(**libpq(proxy)):
        pass
    # The front end has another idea of the time than we have.
    lakebase["one"].endpoint.refuse(neon_error("JWT token has expired"), 1)
    async with await Connection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)
    assert len(lakebase.workspace.mints) == 2


async def test_an_outage_of_the_api_costs_no_connection_while_a_token_is_valid(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(credentials={"token_max_age_seconds": 0.01})
    async with await Connection.connect(**libpq(proxy)):
        pass
    lakebase.workspace.fail(Call.CREDENTIAL, faults.INTERNAL)
    async with await Connection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)
    assert proxy.metrics.value("token_mint_failures_total") >= 1


async def test_a_sleeping_database_is_waited_for(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 0.5, 0.1
    proxy = await start_proxy()
    async with await Connection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)


async def test_a_database_that_does_not_wake_in_time_is_reported_as_starting(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 30, 0.05
    error = await told(await start_proxy(**SOON))
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("57P03", "reason=upstream_starting")
