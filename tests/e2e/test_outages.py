"""The API's bad days with a thousand clients: real sockets, the real SDK, calls that are counted.

A call of the proxy is up to three HTTP requests: the SDK tries a lost connection again inside it.
"""

import asyncio
import time
from contextlib import suppress

import psycopg
import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.endpoints import neon_error
from proxy.emulator.faults import Hang, Reply
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.framing import MessageReader
from proxy.wire.messages import ErrorResponse, decode_backend
from proxy.workspace.single_flight import BACKOFF_SECONDS_MAX
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import libpq

CLIENTS = 1000
# A handful. Without sharing it would be a thousand, and each some requests.
CALLS_MAX = 12
MINT_SECONDS = 3.0
BUSY_SECONDS = 60.0  # for a thousand connections, on a machine that does something else as well

pytestmark = pytest.mark.slow


async def told(proxy: App) -> ErrorResponse:
    """Connect and return the error."""
    async with plain_client(proxy) as client:
        await client.send(startup())
        reader = MessageReader(1 << 16)
        while (frame := reader.next()) is None:
            received = await client.receive(MINT_SECONDS + BUSY_SECONDS)
            assert received, "the connection ended without an answer"
            reader.feed(received)
        message = decode_backend(frame)
        assert isinstance(message, ErrorResponse)
        return message


REASONS: dict[str, tuple[Reply | Hang | None, str]] = {
    "500": (faults.INTERNAL, "api_error"),
    "503": (faults.UNAVAILABLE, "api_error"),
    "429": (faults.THROTTLED, "api_throttled"),
    "hang": (faults.HANG, "api_unreachable"),
    "refused": (None, "api_unreachable"),
}


@pytest.mark.parametrize("max_age_seconds", [60, 0])
@pytest.mark.parametrize("how", REASONS)
async def test_a_thousand_clients_of_an_outage_make_a_handful_of_calls(
    start_proxy: StartProxy, lakebase: Lakebase, how: str, max_age_seconds: float
) -> None:
    fault, reason = REASONS[how]
    proxy = await start_proxy(
        listen={"port": 0, "max_connections": CLIENTS},
        credentials={
            "mint_timeout_seconds": MINT_SECONDS,
            "token_max_age_seconds": max_age_seconds,
        },
    )
    await _break(lakebase, fault)
    begun = time.monotonic()
    errors = await asyncio.gather(*(told(proxy) for _ in range(CLIENTS)))
    assert time.monotonic() - begun < MINT_SECONDS + BUSY_SECONDS
    assert {error.sqlstate for error in errors} == {"57P03"}
    assert {error.text(b"D").split()[0] for error in errors} == {f"reason={reason}"}
    # With a token for each, as many as there are threads may be under way when it begins.
    together = 1 if max_age_seconds else 8
    assert lakebase.workspace.calls[Call.CREDENTIAL] <= CALLS_MAX + 2 * together
    assert lakebase.workspace.calls[Call.TOKEN] <= CALLS_MAX + 2 * together
    assert lakebase.gateway.accepted == 0


async def _break(lakebase: Lakebase, fault: Reply | Hang | None) -> None:
    if fault is None:
        await lakebase.workspace.refuse_connections()
    else:
        lakebase.workspace.fail(Call.CREDENTIAL, fault)


async def test_clients_that_come_one_after_the_other_in_an_outage_make_no_more_calls(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(credentials={"mint_timeout_seconds": 2})
    lakebase.workspace.fail(Call.CREDENTIAL, faults.INTERNAL)
    waiting = []
    for number in range(200):
        waiting.append(asyncio.create_task(told(proxy)))
        if number % 10 == 0:
            await asyncio.sleep(0.01)
    await asyncio.gather(*waiting)
    assert lakebase.workspace.calls[Call.CREDENTIAL] <= CALLS_MAX


async def test_a_host_that_the_api_does_not_say_costs_a_handful_of_calls_too(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen={"port": 0, "max_connections": CLIENTS})
    lakebase.workspace.fail(Call.RESOURCE, faults.INTERNAL)
    errors = await asyncio.gather(*(told(proxy) for _ in range(CLIENTS)))
    assert {error.text(b"D").split()[0] for error in errors} == {"reason=api_error"}
    assert lakebase.workspace.calls[Call.RESOURCE] <= CALLS_MAX


async def test_an_identity_that_the_api_does_not_say_costs_a_handful_of_calls_too(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # With a personal access token the current user's name is the role, and the API is asked for it.
    workspace = {"client_id": "", "client_secret": "", "auth_type": "pat"}
    proxy = await start_proxy(
        listen={"port": 0, "max_connections": CLIENTS},
        workspace={**workspace, "token": lakebase.personal_token},
    )
    lakebase.workspace.fail(Call.ME, faults.INTERNAL)
    errors = await asyncio.gather(*(told(proxy) for _ in range(CLIENTS)))
    assert {error.text(b"D").split()[0] for error in errors} == {"reason=api_error"}
    assert lakebase.workspace.calls[Call.ME] <= CALLS_MAX
    assert lakebase.gateway.accepted == 0


@pytest.mark.parametrize("how", REASONS)
async def test_an_outage_costs_no_connection_while_a_token_is_valid(
    start_proxy: StartProxy, lakebase: Lakebase, how: str
) -> None:
    proxy = await start_proxy(
        credentials={"mint_timeout_seconds": 60, "token_max_age_seconds": 0.01}
    )
    async with await psycopg.AsyncConnection.connect(**libpq(proxy)):
        pass
    await asyncio.sleep(0.02)
    await _break(lakebase, REASONS[how][0])
    begun = time.monotonic()

    async def served() -> None:
        async with await psycopg.AsyncConnection.connect(**libpq(proxy)):
            pass

    await asyncio.gather(*(served() for _ in range(20)))
    assert time.monotonic() - begun < BUSY_SECONDS
    assert len(lakebase.workspace.mints) == 1


async def test_a_database_that_is_lost_while_the_api_hangs_is_dialled_again_where_it_was(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # The host was looked up again after a failed dial, and that waited for the API to the end.
    proxy = await start_proxy()
    async with await psycopg.AsyncConnection.connect(**libpq(proxy)):
        pass
    lakebase.workspace.fail(Call.RESOURCE, faults.HANG)
    lakebase.gateway.inject(faults.Stage.PASSWORD, faults.Injection.RESET, times=1)
    begun = time.monotonic()
    async with await psycopg.AsyncConnection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)
    assert time.monotonic() - begun < BUSY_SECONDS
    lakebase.workspace.clear_faults()


async def test_a_database_that_sleeps_is_not_asked_for_at_the_api_with_every_try(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 2.0, 0.01
    proxy = await start_proxy()

    async def served() -> None:
        async with await psycopg.AsyncConnection.connect(**libpq(proxy)):
            pass

    await asyncio.gather(*(served() for _ in range(30)))
    assert lakebase.gateway.accepted > 60
    assert lakebase.workspace.calls[Call.RESOURCE] <= CALLS_MAX


async def test_logins_that_never_return_cost_nothing_once_the_api_is_well(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # Each held one of eight threads for ever: nothing was minted until a restart.
    proxy = await start_proxy(credentials={"token_max_age_seconds": 0, "mint_timeout_seconds": 1})
    lakebase.workspace.fail(Call.TOKEN, faults.HANG, times=8)

    async def served() -> bool:
        with suppress(psycopg.OperationalError):
            async with await psycopg.AsyncConnection.connect(**libpq(proxy)):
                return True
        return False

    async with asyncio.timeout(60):
        while lakebase.workspace.calls[Call.TOKEN] < 8:
            await asyncio.gather(*(served() for _ in range(8)))
    async with asyncio.timeout(BUSY_SECONDS + BACKOFF_SECONDS_MAX):
        while not await served():
            pass


@pytest.mark.parametrize("max_age_seconds", [60, 0])
@pytest.mark.parametrize("token", ["5", '"\\ud800"', '"not-a\\u0000real-token"'])
async def test_a_token_that_is_none_is_told_and_no_crash(
    start_proxy: StartProxy, lakebase: Lakebase, token: str, max_age_seconds: float
) -> None:
    proxy = await start_proxy(
        credentials={"token_max_age_seconds": max_age_seconds, "mint_timeout_seconds": 1}
    )
    body = f'{{"token": {token}, "expire_time": "2099-01-01T00:00:00Z"}}'
    lakebase.workspace.fail(Call.CREDENTIAL, Reply(200, body.encode()))
    assert (await told(proxy)).text(b"D").startswith("reason=credential_invalid ")


@pytest.mark.parametrize("host", ["5", '"a\\u0000b"', '"https://db.example.com/"'])
async def test_a_host_that_is_none_is_told_and_no_crash(
    start_proxy: StartProxy, lakebase: Lakebase, host: str
) -> None:
    proxy = await start_proxy()
    body = f'{{"status": {{"current_state": "ACTIVE", "hosts": {{"host": {host}}}}}}}'
    lakebase.workspace.fail(Call.RESOURCE, Reply(200, body.encode()))
    assert (await told(proxy)).text(b"D").startswith("reason=api_unreachable the host that")


async def test_a_role_that_is_refused_does_not_cost_a_mint_for_each_client(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()
    text = f"password authentication failed for user '{lakebase.client_id}'"
    lakebase["one"].endpoint.refuse(neon_error(text), None)
    for _ in range(20):
        assert (await told(proxy)).text(b"D").startswith("reason=token_rejected ")
    assert len(lakebase.workspace.mints) <= 2
