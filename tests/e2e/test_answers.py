"""What a client is told when it cannot be served, as a driver shows it; others are served on.

The SQLSTATE and the reason word are a contract (style: `errors.py`); a hint is there wherever a
person can do something.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from proxy.app import App
from proxy.standin import faults
from proxy.standin.api import Call
from proxy.standin.certificates import Certificate
from proxy.standin.endpoints import neon_error
from proxy.standin.faults import Stage, Strike
from proxy.standin.lakebase import Lakebase
from proxy.standin.tokens import TokenIssuer
from proxy.wire.messages import ErrorResponse
from tests.e2e.conftest import StartProxy
from tests.support.plain_client import plain_client, startup
from tests.support.running import LogLines, libpq

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


def _refuse_logins(error: ErrorResponse) -> Break:
    return lambda lakebase: lakebase["one"].endpoint.refuse(error, None)


def _fail(call: Call, reply: faults.Reply | faults.Hang) -> Break:
    return lambda lakebase: lakebase.workspace.fail(call, reply)


def _show(certificate: Certificate) -> Break:
    def break_world(lakebase: Lakebase) -> None:
        lakebase.gateway.certificate = certificate

    return break_world


def _strike(stage: Stage, strike: Strike | bytes) -> Break:
    return lambda lakebase: lakebase.gateway.strike(stage, strike)


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


NO_API: dict[str, dict[str, object]] = {"credentials": {"mint_timeout_seconds": 0.2}}
SOON: dict[str, dict[str, object]] = {"upstream": {"connect_timeout_seconds": 0.3}}

CASES = (
    # The token
    Case(
        *("token expired", _refuse_logins(neon_error("JWT token has expired"))),
        *("28000", "token_rejected", "databricks_create_role", "JWT token has expired"),
    ),
    Case(
        *("token of another workspace", _foreign_issuer),
        *("28000", "token_rejected", "another workspace", "jwk not found"),
    ),
    Case(
        *("not a token", _refuse_logins(neon_error(faults_text := "not a valid JWT encoding"))),
        *("28000", "not_a_token", "personal access token", faults_text),
    ),
    Case(
        *("expired when minted", _expired_credentials),
        *("57P03", "credential_invalid", "clock"),
        settings=SOON,
    ),
    # The upstream refuses
    Case(
        *("identity mismatch", _refuse_logins(neon_error("x did not match the security label y"))),
        *("28000", "identity_mismatch", "client id"),
    ),
    Case(
        "role missing, Postgres' words",
        _refuse_logins(ErrorResponse.fatal("28000", 'role "x" does not exist')),
        *("28000", "role_missing", "databricks_create_role('5ca1ab1e-"),
    ),
    Case(
        *("endpoint disabled", _disabled, "08001", "endpoint_disabled", "Enable it"),
        "endpoint is disabled",
    ),
    Case(*("full", _full, "53300", "upstream_full", "fewer connections"), "reserved for roles"),
    Case(
        "not authorized",
        _refuse_logins(ErrorResponse.fatal("28000", "External authorization failed.")),
        *("28000", "authorization_denied", "IP access list", "External authorization failed."),
    ),
    Case(
        "unknown text",
        _refuse_logins(neon_error("something nobody has seen before")),
        *("08006", "upstream_error", "", "something nobody has seen before"),
    ),
    Case(
        "the port is closed",
        lambda lakebase: lakebase.gateway.refuse_connections(),
        *("08001", "upstream_unreachable", "firewall"),
    ),
    Case("no TLS", _no_tls, "08001", "upstream_no_tls", "not a Lakebase host"),
    Case("bytes before TLS", _early_bytes, "08006", "upstream_protocol", ""),
    Case(
        "closed after the StartupMessage",
        _strike(Stage.STARTUP, Strike.CLOSE),
        *("08006", "upstream_lost", "Try again"),
    ),
    Case(
        "reset after the password",
        _strike(Stage.PASSWORD, Strike.RESET),
        *("08006", "upstream_lost", "Try again"),
    ),
    Case(
        "nonsense before ready",
        _strike(Stage.AUTHENTICATED, b"\0\xff\xff\xff\xff not Postgres"),
        *("08006", "upstream_protocol", ""),
    ),
    Case(
        "silent before ready",
        _strike(Stage.AUTHENTICATED, Strike.HANG),
        *("08006", "upstream_timeout", "Try again", "within 0.3 seconds"),
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
        *("57P03", "api_unreachable", "workspace.host"),
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
    if "Postgres' words" not in case.name:
        assert error.text(b"D").startswith(f"reason={case.reason}")
        assert case.detail in error.text(b"D")
    assert case.hint in error.text(b"H")
    assert proxy.metrics.value("startup_failures_total", reason=case.reason) == 1
    assert log.above_info() == []


@pytest.mark.parametrize("case", [CASES[1], CASES[10], CASES[-6]], ids=lambda case: case.name)
async def test_once_the_world_is_mended_the_next_client_is_served(
    start_proxy: StartProxy, lakebase: Lakebase, case: Case
) -> None:
    proxy = await start_proxy(**case.settings)
    issuer, secret = lakebase.gateway.issuer, lakebase.client_secret
    broken = case.break_world(lakebase)
    if broken is not None:
        await broken
    await told(proxy)
    lakebase.gateway.issuer = issuer
    lakebase.workspace.api.clients[lakebase.client_id] = secret
    await lakebase.gateway.accept_connections()
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


async def test_an_expired_token_in_the_cache_is_replaced_and_nobody_notices(
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
    endpoint.wake_seconds, endpoint.wake_patience_seconds = 0.5, 0.1
    proxy = await start_proxy()
    async with await Connection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)


async def test_a_database_that_does_not_wake_in_time_is_reported_as_starting(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_patience_seconds = 30, 0.05
    error = await told(await start_proxy(**SOON))
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("57P03", "reason=upstream_starting")
