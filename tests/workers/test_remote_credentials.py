"""What workers ask of the supervisor, where end-to-end tests do not come: reloads in between."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.config import Settings
from proxy.emulator.api import Call
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ErrorKind, ProxyError
from proxy.server.app import App
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workers.credential_service import Desk
from proxy.workers.remote_credentials import CONFIGURATIONS_MAX, RemoteAccounts
from proxy.workers.rpc import Channel
from tests.support.running import proxy_settings


class Pair:
    """A supervisor's App and a worker's, over a channel; each reload is one of both."""

    def __init__(self, settings: Settings, accounts: RemoteAccounts, desk: Desk) -> None:
        self._accounts = accounts
        self._desk = desk
        self._number = 1
        self.supervisor = App(settings)
        desk.open(self._number, self.supervisor.plan.fleet)
        accounts.take_over(self._number, settings)
        self.worker = App(settings, accounts=accounts)

    def reload(self, settings: Settings) -> None:
        """Serve by these settings in both."""
        self._number += 1
        self.supervisor.reload(settings)
        self._desk.open(self._number, self.supervisor.plan.fleet)
        self._accounts.take_over(self._number, settings)
        self.worker.reload(settings)


@asynccontextmanager
async def paired(settings: Settings, desk: Desk) -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    channels = await Channel.open(ours, {}), await Channel.open(theirs, desk.answers)
    pair = Pair(settings, RemoteAccounts(channels[0]), desk)
    try:
        yield pair
    finally:
        await pair.worker.accounts.close()
        for channel in channels:
            channel.close()
            await channel.lost.wait()
        await desk.close()
        await pair.supervisor.accounts.close()


async def test_a_worker_gets_tokens_and_hosts_from_the_supervisor(lakebase: Lakebase) -> None:
    async with paired(proxy_settings(lakebase), Desk()) as pair:
        way = pair.worker.plan.fleet["upstream"]
        credential = await way.credentials.fresh()
        assert way.credentials.is_fresh(credential)
        assert await way.credentials.fresh() == credential
        assert (await way.targets.target()).host == lakebase.shards[0].endpoint.host
        assert len(lakebase.workspace.mints) == 1


async def test_a_token_that_is_rejected_is_forgotten_once_and_its_successor_is_not(
    lakebase: Lakebase,
) -> None:
    async with paired(proxy_settings(lakebase), Desk()) as pair:
        credentials = pair.worker.plan.fleet["upstream"].credentials
        first = await credentials.fresh()
        assert credentials.reject(first)
        second = await credentials.fresh()
        assert second != first
        assert credentials.reject(first), "however late another session rejects it, too"
        assert await credentials.fresh() == second
        assert not credentials.reject(second), "it is not the token then"
        assert await credentials.fresh() == second
        assert len(lakebase.workspace.mints) == 2


async def test_a_way_that_reloads_leave_as_it_is_is_answered_after_any_number_of_them(
    lakebase: Lakebase,
) -> None:
    settings = proxy_settings(lakebase)
    async with paired(settings, Desk()) as pair:
        way = pair.worker.plan.fleet["upstream"]
        for _ in range(CONFIGURATIONS_MAX + 1):
            pair.reload(settings)
        assert pair.worker.plan.fleet["upstream"] is way
        await way.credentials.fresh()
        assert (await way.targets.target()).host == lakebase.shards[0].endpoint.host


async def test_a_way_of_before_a_reload_is_answered_from_its_own_workspace_or_refused(
    lakebase: Lakebase,
) -> None:
    settings = proxy_settings(lakebase)
    other = settings.model_copy(
        update={"workspace": settings.workspace.model_copy(update={"host": "https://a.invalid"})}
    )
    async with paired(settings, Desk()) as pair:
        before = pair.worker.plan.fleet["upstream"]
        for number in range(CONFIGURATIONS_MAX - 1):
            pair.reload(other)
            await before.credentials.fresh()
            assert len(lakebase.workspace.mints) == 1, number
        pair.reload(other)
        for ask in (before.credentials.fresh, before.targets.target):
            with pytest.raises(ProxyError) as caught:
                await ask()
            assert caught.value.kind is ErrorKind.SHUTTING_DOWN


async def test_without_the_supervisor_nothing_is_answered(lakebase: Lakebase) -> None:
    async with paired(proxy_settings(lakebase), Desk()) as pair:
        credentials = pair.worker.plan.fleet["upstream"].credentials
    with pytest.raises(ProxyError) as caught:
        await credentials.fresh()
    assert caught.value.kind is ErrorKind.SHUTTING_DOWN


async def test_workers_that_look_up_one_host_at_once_are_one_look_up(lakebase: Lakebase) -> None:
    settings, desk = proxy_settings(lakebase), Desk()
    async with paired(settings, desk) as one, paired(settings, desk) as other:
        ways = [pair.worker.plan.fleet["upstream"] for pair in (one, other)]
        await asyncio.gather(*(way.targets.target() for way in ways))
        assert lakebase.workspace.calls[Call.RESOURCE] == 1
        ways[0].targets.forget_host()
        await ways[0].targets.target()
        assert lakebase.workspace.calls[Call.RESOURCE] == 2, "an answer is not kept here"


async def test_what_one_worker_found_out_serves_another_while_the_workspace_is_away(
    lakebase: Lakebase,
) -> None:
    # A worker that came in place of a dead one could serve nobody until the workspace was back.
    settings, desk = proxy_settings(lakebase), Desk()
    client = StartupMessage(V3_0, ((b"user", b"anyone"),))
    async with paired(settings, desk) as pair:
        way = pair.worker.plan.fleet["upstream"]
        known = await way.targets.target(), await way.targets.login(client)
        await way.credentials.fresh()
        await lakebase.workspace.refuse_connections()
        pair.reload(settings)
        successor = App(settings, accounts=pair.worker.accounts).plan.fleet["upstream"]
        assert (await successor.targets.target(), await successor.targets.login(client)) == known
        assert (await successor.credentials.fresh()).expires_at > 0
