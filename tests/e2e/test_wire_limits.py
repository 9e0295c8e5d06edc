"""Limits and failures as a client is told them (W44 to W46, W49).

What each failure says in full is in `test_answers`.
"""

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.server.first_tokens import mint_first_tokens
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import V3_0
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, startup
from tests.support.manual_upstream import manual_upstream
from tests.support.running import eventually

SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
# Those that every session has; the others are of a reset and of a cancel.
LOGIN_STAGES = [stage for stage in Stage if stage not in (Stage.RESET, Stage.CANCEL)]


async def told(proxy: App, **parameters: str) -> ErrorResponse:
    async with plain_client(proxy) as client:
        await client.send(startup(V3_0, **parameters))
        error = await client.error()
        assert await client.receive_rest() == b""
        return error


async def test_w44_one_too_many_hears_53300_at_its_startup_message_and_not_before(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen={"max_connections": 1})
    async with plain_client(proxy) as one, plain_client(proxy) as more:
        await one.start_up()
        await more.send(SSL_REQUEST)
        assert await more.receive() == b"N"
        await more.send(startup())
        error = await more.error()
        assert (error.sqlstate, error.message) == ("53300", "too many clients already")
        assert await more.receive_rest() == b""  # an end, no RST
        assert lakebase.gateway.accepted == 1
        one.close()
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "the place is free")
        await eventually(lambda: proxy.metrics.value("connections") == 0, "both are gone")
        async with plain_client(proxy) as next_one:
            await next_one.start_up()


async def test_w45_an_unknown_database_is_3d000_with_a_stable_word(proxy: App) -> None:
    error = await told(proxy, database="nowhere")
    assert error.sqlstate == "3D000"
    assert error.text(b"D").startswith("reason=database_missing")


@pytest.mark.parametrize("stage", [Stage.STARTUP, Stage.PASSWORD, Stage.AUTHENTICATED, Stage.READY])
@pytest.mark.parametrize("inject", [Injection.CLOSE, Injection.FIN, Injection.RESET])
async def test_w46_an_upstream_that_is_lost_before_ready_is_57p03(
    start_proxy: StartProxy, lakebase: Lakebase, stage: Stage, inject: Injection
) -> None:
    proxy = await start_proxy(upstream={"connect_timeout_seconds": 1})
    await mint_first_tokens(proxy)
    lakebase.gateway.inject(stage, inject)
    error = await told(proxy)
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("57P03", "reason=upstream_lost")


async def test_w46_a_database_that_wakes_too_slowly_is_57p03(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    proxy = await start_proxy(upstream={"connect_timeout_seconds": 0.4})
    await mint_first_tokens(proxy)
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 30, 0.05
    error = await told(proxy)
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("57P03", "reason=upstream_starting")


@pytest.mark.parametrize("stage", LOGIN_STAGES, ids=lambda stage: stage.name)
async def test_w46_no_answer_contains_the_token(
    start_proxy: StartProxy, lakebase: Lakebase, stage: Stage
) -> None:
    proxy = await start_proxy(upstream={"connect_timeout_seconds": 0.4})
    await mint_first_tokens(proxy)
    lakebase.gateway.inject(stage, Injection.CLOSE)
    answer = (await told(proxy)).encode()
    assert lakebase.workspace.mints
    assert b"eyJ" not in answer  # how every such token begins
    async with manual_upstream(lakebase, welcome=b"R\0\0\0\x08\0\0\0\x03") as upstream:
        other = await start_proxy(upstream={"port": upstream.port, "connect_timeout_seconds": 0.4})
        await mint_first_tokens(other)
        answer = (await told(other)).encode()
        token = (await upstream.session()).token
        assert token.startswith(b"eyJ")
        assert token not in answer


@pytest.mark.parametrize("stage", [Stage.ACCEPTED, Stage.TLS, Stage.PASSWORD, Stage.READY])
async def test_w49_a_silent_upstream_is_57p03_after_connect_timeout_and_not_before(
    start_proxy: StartProxy, lakebase: Lakebase, stage: Stage
) -> None:
    limits = {"startup_timeout_seconds": 0.1}
    proxy = await start_proxy(listen=limits, upstream={"connect_timeout_seconds": 0.4})
    await mint_first_tokens(proxy)
    lakebase.gateway.inject(stage, Injection.HANG)
    error = await told(proxy)
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("57P03", "reason=upstream_timeout")
    assert proxy.metrics.value("startup_failures_total", reason="startup_timeout") == 0
