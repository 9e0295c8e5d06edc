"""Outages that happen to a running proxy in front of the emulator, and the alerts that tell them.

For: the alert rules (`tests/observe/test_alert_rules.py`), which are evaluated over what the proxy
exposes meanwhile. Not for: outages of a process, which the tests there start.
"""

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.tokens import TokenIssuer
from proxy.server.app import App
from proxy.server.first_tokens import mint_first_tokens
from proxy.server.serving import serving
from proxy.session.end_reason import EndReason
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import CancelRequest
from tests.support.admin_address import ask
from tests.support.client import plain_client, query, startup
from tests.support.prometheus import Alert, Scrape
from tests.support.running import (
    WAIT_SECONDS_MAX,
    eventually,
    libpq,
    proxy_settings,
)

CLIENTS_A_MINUTE: Final = 10
LOST_SESSIONS: Final = 15
DESCRIPTORS: Final = 300
# How late the loop of a busy machine is must not decide what other tests see.
LAG: Final = "lakebase_proxy_event_loop_lag_seconds"
ADMIN: Final = {"admin": {"enabled": True, "port": 0}}


def refuses(reason: str) -> Alert:
    return Alert("LakebaseProxyRefusesSessions", reason)


async def scrape(port: int, instance: str = "a", *, with_lag: bool = False) -> Scrape:
    text = (await ask(port, "/metrics")).body.decode()
    return Scrape.of(text if with_lag else without_lag(text), instance)


def without_lag(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if LAG not in line)


@dataclass
class World:
    """A proxy, what is in front and behind, and what ends with the test."""

    lakebase: Lakebase
    proxy: App
    stack: AsyncExitStack

    @property
    def admin_port(self) -> int:
        assert self.proxy.admin is not None
        return self.proxy.admin.port

    async def connect(self, **more: Any) -> None:
        """Connect and close politely, or be refused."""
        with suppress(psycopg.OperationalError):
            async with await psycopg.AsyncConnection.connect(**libpq(self.proxy, **more)):
                pass

    async def connects(self, **more: Any) -> None:
        """Do what clients do in a minute."""
        await asyncio.gather(*(self.connect(**more) for _ in range(CLIENTS_A_MINUTE)))

    async def hold_sessions(self, count: int) -> None:
        """Open sessions that stay open."""
        for _ in range(count):
            client = await self.stack.enter_async_context(plain_client(self.proxy))
            await client.start_up()


@asynccontextmanager
async def running(lakebase: Lakebase, sections: Mapping[str, Any]) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        settings = proxy_settings(lakebase, **{**ADMIN, **sections})
        proxy = await stack.enter_async_context(serving(settings))
        first = asyncio.create_task(mint_first_tokens(proxy))  # as a process does
        stack.callback(first.cancel)
        yield World(lakebase, proxy, stack)


# -- the outages ---------------------------------------------------------------------------------

Happens = Callable[[World], Awaitable[None]]


async def connects(world: World) -> None:
    await world.connects()


async def mints_fail(world: World) -> None:
    """Connect until a mint has failed, be it for clients that the last token serves."""
    await world.connects()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not world.proxy.metrics.value("token_mint_failures_total"):
            await world.connects()


async def unreachable(world: World) -> None:
    await world.lakebase.gateway.refuse_connections()
    await world.connects()


async def all_slots_are_taken(world: World) -> None:
    await world.hold_sessions(CLIENTS_A_MINUTE)
    await world.connects()


async def application_requires_tls(world: World) -> None:
    await world.connects(sslmode="require")


async def database_ends_sessions(world: World) -> None:
    await world.hold_sessions(LOST_SESSIONS)
    world.lakebase["one"].endpoint.end_sessions()
    closed = world.proxy.metrics.value
    await eventually(
        lambda: closed("sessions_ended_total", reason="upstream_closed") == LOST_SESSIONS, "ended"
    )


async def bug(world: World) -> None:
    # Which bug does not matter here: all are counted by this call.
    world.proxy.metrics.session_ended(EndReason.INTERNAL_ERROR)


async def loop_is_blocked(world: World) -> None:
    for _ in range(10):
        time.sleep(0.4)  # noqa: ASYNC251 - this is the outage
        await asyncio.sleep(0.01)


async def cancels_fail(world: World) -> None:
    async with plain_client(world.proxy) as client:
        key = await client.start_up()
        assert key is not None
        await world.lakebase.gateway.refuse_connections()
        for _ in range(CLIENTS_A_MINUTE):
            async with plain_client(world.proxy) as canceller:
                await canceller.send(CancelRequest(key.pid, key.key).encode())
                await canceller.receive_rest()


async def drain_does_not_end(world: World) -> None:
    client = await world.stack.enter_async_context(plain_client(world.proxy))
    await client.start_up()
    await client.send(query("BEGIN"))
    await client.receive()
    draining = asyncio.create_task(world.proxy.drain(600))
    world.stack.push_async_callback(asyncio.wait, [draining])
    world.stack.push_async_callback(world.proxy.drain, 0)
    await eventually(lambda: world.proxy.lifecycle.draining, "it drains")


async def clients_wait_for_a_session(world: World) -> None:
    await world.hold_sessions(1)
    client = await world.stack.enter_async_context(plain_client(world.proxy))
    await client.send(startup())
    await eventually(lambda: world.proxy.metrics.value("pool_waiting") == 1, "it waits")


async def resets_fail(world: World) -> None:
    await world.connects()
    retired = world.proxy.metrics.value
    # Then clients get fresh sessions for a minute.
    await eventually(lambda: retired("pool_retired_total", reason="reset_failed") > 2, "told")


async def a_login_trigger_is_made(world: World) -> None:
    world.lakebase.shards[0].endpoint.add_login_trigger("1")
    await world.proxy.reconnect()
    await world.connects()
    retired = world.proxy.metrics.value
    await eventually(lambda: retired("pool_retired_total", reason="login_trigger") > 0, "told")


async def descriptors_run_out(world: World) -> None:
    """Use nearly all descriptors that the process may have, until the proxy ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    world.stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(DESCRIPTORS)]
    for number in opened:
        world.stack.callback(os.close, number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + DESCRIPTORS // 10, hard))


def _wrong_secret(lakebase: Lakebase) -> None:
    lakebase.workspace.api.clients[lakebase.client_id] = "another-not-real-secret"


def _foreign_issuer(lakebase: Lakebase) -> None:
    lakebase.gateway.issuer = TokenIssuer("another-workspace", time.time)


def _refuse_logins(lakebase: Lakebase) -> None:
    error = ErrorResponse.fatal("28000", 'role "x" does not exist')
    lakebase["one"].endpoint.refuse(error, None)


def _close_at_resets(lakebase: Lakebase) -> None:
    lakebase.gateway.inject(Stage.RESET, Injection.CLOSE)


def _wake_slowly(lakebase: Lakebase) -> None:
    lakebase["one"].endpoint.suspend()
    lakebase["one"].endpoint.wake_seconds = 5.5


@dataclass(frozen=True)
class Outage:
    """What breaks, what happens in a minute of it, and which alerts fire at its end."""

    alerts: tuple[Alert, ...]
    breaks: Callable[[Lakebase], object] = lambda _: None
    happens: Happens = connects
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    minutes: float = 20
    from_the_start: bool = False


def _api(call: Call, fault: faults.Reply | faults.Hang) -> Callable[[Lakebase], object]:
    return lambda lakebase: lakebase.workspace.fail(call, fault)


TOKENS_FAIL: Final = Alert("LakebaseProxyTokensFail")
POOL: Final = {"pool": "session", "pool_spare_min": 0}
# The time for a mint with its retries. On a busy machine one try must fit.
MINT_SECONDS_MAX: Final = 1.5
SHORT: Final = {"credentials": {"mint_timeout_seconds": MINT_SECONDS_MAX}}
OUTAGES: Final[Mapping[str, Outage]] = {
    "the API fails and a token is valid": Outage(
        (TOKENS_FAIL, Alert("LakebaseProxyTokenRunsOut")),
        _api(Call.CREDENTIAL, faults.INTERNAL),
        mints_fail,
        {"credentials": {"token_max_age_seconds": 0, "mint_timeout_seconds": MINT_SECONDS_MAX}},
        minutes=50,
    ),
    "the API fails and there is no token": Outage(
        (TOKENS_FAIL, refuses("api_error")),
        _api(Call.CREDENTIAL, faults.INTERNAL),
        mints_fail,
        SHORT,
        from_the_start=True,
    ),
    "wrong secret": Outage(
        (TOKENS_FAIL, refuses("workspace_login_failed")),
        _wrong_secret,
        mints_fail,
        SHORT,
        from_the_start=True,
    ),
    "wrong secret, and no token is required": Outage(
        (TOKENS_FAIL, refuses("workspace_login_failed")),
        _wrong_secret,
        settings={**SHORT, "startup": {"require": "none"}},
        from_the_start=True,
    ),
    "wrong workspace": Outage(
        (TOKENS_FAIL, refuses("workspace_configuration")),
        _api(Call.TOKEN, faults.SIGN_IN_PAGE),
        mints_fail,
        SHORT,
        from_the_start=True,
    ),
    "token refused": Outage((refuses("token_rejected"),), _foreign_issuer),
    "role missing": Outage((refuses("role_missing"),), _refuse_logins),
    "upstream unreachable": Outage(
        (refuses("upstream_unreachable"),),
        happens=unreachable,
    ),
    "DNS": Outage(
        (refuses("upstream_dns"),),
        settings={"upstream": {"host": "no-such-host.invalid", "hostaddr": ""}},
        from_the_start=True,
    ),
    "slots full": Outage(
        (Alert("LakebaseProxyNearlyFull"), refuses("too_many_connections")),
        happens=all_slots_are_taken,
        settings={"listen": {"port": 0, "max_connections": CLIENTS_A_MINUTE}},
    ),
    "an application requires TLS": Outage(
        (refuses("client_wants_tls"),), happens=application_requires_tls
    ),
    "slow wakes": Outage((Alert("LakebaseProxyConnectsSlowly"),), _wake_slowly),
    "sessions lost": Outage((Alert("LakebaseProxyLosesUpstream"),), happens=database_ends_sessions),
    "a bug": Outage((Alert("LakebaseProxyInternalErrors", "internal_error"),), happens=bug),
    "loop blocked": Outage((Alert("LakebaseProxyLoopLags"),), happens=loop_is_blocked),
    "descriptors": Outage((Alert("LakebaseProxyFilesRunOut"),), happens=descriptors_run_out),
    "cancels": Outage((Alert("LakebaseProxyCancelsFail"),), happens=cancels_fail),
    "no pooled session": Outage(
        (Alert("LakebaseProxyPoolWaits"),),
        happens=clients_wait_for_a_session,
        settings={"upstream": {**POOL, "pool_size_max": 1, "pool_wait_seconds": 60}},
    ),
    "resets fail": Outage(
        (Alert("LakebaseProxyPoolResetsFail"),),
        _close_at_resets,
        resets_fail,
        {"upstream": POOL},
    ),
    "drain": Outage((Alert("LakebaseProxyDrainsForLong"),), happens=drain_does_not_end),
}
# It needs PostgreSQL 17.
LOGIN_TRIGGER: Final = Outage(
    (Alert("LakebaseProxyPoolLoginTrigger"),),
    happens=a_login_trigger_is_made,
    settings={"upstream": POOL},
)
