"""What workers ask of the supervisor, with reloads in between, which end-to-end tests leave out."""

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
from proxy.workers.credential_service import CredentialService
from proxy.workers.remote_credentials import GENERATIONS_MAX, RemoteWorkspaceRegistry
from proxy.workers.rpc import RpcConnection
from proxy.workspace.registry import LocalWorkspaceRegistry
from tests.support.running import proxy_settings


class Pair:
    """A supervisor's App and a worker's, and calls between them. Each reload is one of both."""

    def __init__(
        self,
        settings: Settings,
        accounts: RemoteWorkspaceRegistry,
        credential_service: CredentialService,
    ) -> None:
        self._accounts = accounts
        self._credentials = credential_service
        self._generation = 1
        self.supervisor = App(settings)
        credential_service.register(self._generation, self.supervisor.snapshot.upstreams)
        accounts.register(self._generation, settings)
        self.worker = App(settings, workspaces=accounts)

    def reload(self, settings: Settings) -> None:
        """Serve by these settings in both."""
        self._generation += 1
        self.supervisor.reload(settings)
        self._credentials.register(self._generation, self.supervisor.snapshot.upstreams)
        self._accounts.register(self._generation, settings)
        self.worker.reload(settings)


@asynccontextmanager
async def paired(settings: Settings, credential_service: CredentialService) -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    connections = (
        await RpcConnection.open(ours, {}),
        await RpcConnection.open(theirs, credential_service.methods),
    )
    pair = Pair(settings, RemoteWorkspaceRegistry(connections[0]), credential_service)
    try:
        yield pair
    finally:
        await pair.worker.workspaces.close()
        for connection in connections:
            connection.close()
            await connection.lost.wait()
        await credential_service.close()
        await pair.supervisor.workspaces.close()


async def test_a_worker_gets_tokens_and_hosts_from_the_supervisor(lakebase: Lakebase) -> None:
    async with paired(proxy_settings(lakebase), CredentialService()) as pair:
        upstream = pair.worker.snapshot.upstreams["upstream"]
        credential = await upstream.credentials.fresh()
        assert upstream.credentials.is_fresh(credential)
        assert await upstream.credentials.fresh() == credential
        assert (await upstream.address_lookup.target()).host == lakebase.shards[0].endpoint.host
        assert len(lakebase.workspace.mints) == 1


async def test_a_token_that_is_rejected_is_invalidated_once_and_its_successor_is_not(
    lakebase: Lakebase,
) -> None:
    async with paired(proxy_settings(lakebase), CredentialService()) as pair:
        credentials = pair.worker.snapshot.upstreams["upstream"].credentials
        first = await credentials.fresh()
        assert credentials.reject(first)
        second = await credentials.fresh()
        assert second != first
        assert credentials.reject(first), "however late another session rejects it, too"
        assert await credentials.fresh() == second
        assert not credentials.reject(second), "it is not the token then"
        assert await credentials.fresh() == second
        assert len(lakebase.workspace.mints) == 2


async def test_an_upstream_that_reloads_keep_is_answered_after_any_number_of_them(
    lakebase: Lakebase,
) -> None:
    settings = proxy_settings(lakebase)
    async with paired(settings, CredentialService()) as pair:
        upstream = pair.worker.snapshot.upstreams["upstream"]
        for _ in range(GENERATIONS_MAX + 1):
            pair.reload(settings)
        assert pair.worker.snapshot.upstreams["upstream"] is upstream
        await upstream.credentials.fresh()
        assert (await upstream.address_lookup.target()).host == lakebase.shards[0].endpoint.host


async def test_an_upstream_of_before_a_reload_is_answered_from_its_own_workspace_or_refused(
    lakebase: Lakebase,
) -> None:
    settings = proxy_settings(lakebase)
    other = settings.model_copy(
        update={"workspace": settings.workspace.model_copy(update={"host": "https://a.invalid"})}
    )
    async with paired(settings, CredentialService()) as pair:
        before = pair.worker.snapshot.upstreams["upstream"]
        for number in range(GENERATIONS_MAX - 1):
            pair.reload(other)
            await before.credentials.fresh()
            assert len(lakebase.workspace.mints) == 1, number
        pair.reload(other)
        for ask in (before.credentials.fresh, before.address_lookup.target):
            with pytest.raises(ProxyError) as caught:
                await ask()
            assert caught.value.kind is ErrorKind.SHUTTING_DOWN


async def test_without_the_supervisor_nothing_is_answered(lakebase: Lakebase) -> None:
    async with paired(proxy_settings(lakebase), CredentialService()) as pair:
        credentials = pair.worker.snapshot.upstreams["upstream"].credentials
    with pytest.raises(ProxyError) as caught:
        await credentials.fresh()
    assert caught.value.kind is ErrorKind.SHUTTING_DOWN


async def test_workers_that_look_up_one_host_at_once_are_one_look_up(lakebase: Lakebase) -> None:
    settings, credential_service = proxy_settings(lakebase), CredentialService()
    async with (
        paired(settings, credential_service) as one,
        paired(settings, credential_service) as other,
    ):
        upstreams = [pair.worker.snapshot.upstreams["upstream"] for pair in (one, other)]
        await asyncio.gather(*(upstream.address_lookup.target() for upstream in upstreams))
        assert lakebase.workspace.calls[Call.RESOURCE] == 1
        upstreams[0].address_lookup.invalidate_host()
        await upstreams[0].address_lookup.target()
        assert lakebase.workspace.calls[Call.RESOURCE] == 2, "an answer is not kept here"


async def test_what_one_worker_found_out_serves_another_while_the_workspace_does_not_answer(
    lakebase: Lakebase,
) -> None:
    # The successor of a dead worker could not serve any client until the workspace was back.
    settings, credential_service = proxy_settings(lakebase), CredentialService()
    client = StartupMessage(V3_0, ((b"user", b"anyone"),))
    async with paired(settings, credential_service) as pair:
        upstream = pair.worker.snapshot.upstreams["upstream"]
        known = (
            await upstream.address_lookup.target(),
            await upstream.address_lookup.login_names(client),
        )
        await upstream.credentials.fresh()
        await lakebase.workspace.refuse_connections()
        pair.reload(settings)
        successor = App(settings, workspaces=pair.worker.workspaces).snapshot.upstreams["upstream"]
        lookup = successor.address_lookup
        assert (await lookup.target(), await lookup.login_names(client)) == known
        assert (await successor.credentials.fresh()).expires_at > 0


async def test_an_account_stays_open_while_a_worker_may_still_ask_by_an_older_configuration(
    lakebase: Lakebase,
) -> None:
    settings = proxy_settings(lakebase)
    age = settings.credentials.model_copy(update={"token_max_age_seconds": 59})
    other = settings.model_copy(update={"credentials": age})
    async with paired(settings, CredentialService()) as pair:
        registry = pair.supervisor.workspaces
        assert isinstance(registry, LocalWorkspaceRegistry)
        await pair.worker.snapshot.upstreams["upstream"].credentials.fresh()
        pair.reload(other)
        pair.reload(settings)
        await pair.worker.snapshot.upstreams["upstream"].credentials.fresh()
        assert len(lakebase.workspace.mints) == 1, "it came back with its token"
        assert len(registry) == 2
        for _ in range(GENERATIONS_MAX):
            pair.reload(settings)
        assert len(registry) == 1
