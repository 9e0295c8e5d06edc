"""The credential service alone: what it answers, from which generation, and what it keeps.

It asks the emulator's workspace through the real SDK. Over a socket pair, with a worker's side of
it, it is in `test_remote_credentials.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.config import Settings
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID, Cluster
from proxy.emulator.endpoints import Dialect, Endpoint
from proxy.emulator.faults import ACCESS_MISSING, HANG
from proxy.emulator.lakebase import CLIENT_SECRET, PERSONAL_TOKEN
from proxy.emulator.workspace import Workspace
from proxy.errors import ErrorKind, ProxyError
from proxy.server.metric_labels import build_metrics
from proxy.upstream.upstreams import Upstreams
from proxy.workers.credential_service import CredentialService
from proxy.workers.remote_credentials import GENERATIONS_MAX
from proxy.workspace.registry import LocalWorkspaceRegistry

INSTANCE = "shop"
TOKEN = {"workspace": "", "instance": ""}


class Service:
    """A service over a workspace, and the configurations that it was given."""

    def __init__(self, api: Workspace, endpoint: Endpoint) -> None:
        self.service = CredentialService()
        self.registry = LocalWorkspaceRegistry(build_metrics(), version="1")
        self.resource = {
            "workspace": "",
            "resource": endpoint.name,
            "read_only": False,
            "pooled": False,
        }
        self._url = api.url
        self._endpoint = endpoint.name
        self._upstreams: Upstreams | None = None
        self._generation = 0

    def settings(self, **upstream: object) -> Settings:
        """Return settings with an endpoint, an instance and a second workspace."""
        login = {
            "host": self._url,
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
            "auth_type": "oauth-m2m",
        }
        targets = {
            "one": {"endpoint": self._endpoint, **upstream},
            "two": {"instance": INSTANCE},
            "other": {"endpoint": self._endpoint, "workspace": "second"},
        }
        second = {"host": self._url, "token": PERSONAL_TOKEN}
        sections = {"workspace": login, "workspaces": {"second": second}, "targets": targets}
        return Settings.model_validate(sections)

    def register(self, settings: Settings) -> int:
        """Register the next generation, as a reload does, and return its number."""
        self._generation += 1
        before = self._upstreams
        self._upstreams = Upstreams(settings, self.registry, lambda *_: None, before)
        if before is not None:
            before.close()
        self.service.register(self._generation, self._upstreams)
        return self._generation

    async def call(self, name: str, generation: int, arguments: Mapping[str, object]) -> Any:
        """Call a method as a worker does."""
        return await self.service.methods[name](generation=generation, **arguments)


@asynccontextmanager
async def service_of(api: Workspace, endpoint: Endpoint) -> AsyncIterator[Service]:
    instance = Endpoint(INSTANCE, "instance-00000001", Dialect.PROVISIONED, Cluster("none"))
    api.api.endpoints.append(instance)
    made = Service(api, endpoint)
    try:
        yield made
    finally:
        await made.service.close()
        await made.registry.close()


async def test_a_token_comes_with_its_times_and_is_minted_once_for_all(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        found = await asyncio.gather(*(service.call("fresh", generation, TOKEN) for _ in range(5)))
        assert all(one == found[0] for one in found)
        assert found[0]["secret"]
        assert found[0]["requested_at"] <= time.time() < found[0]["expires_at"]
        assert [mint.name for mint in api.mints] == [endpoint.name]


async def test_each_workspace_and_each_instance_has_tokens_of_its_own(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        accounts = [TOKEN, {**TOKEN, "instance": INSTANCE}, {**TOKEN, "workspace": "second"}]
        found = [await service.call("fresh", generation, account) for account in accounts]
        assert len({token["secret"] for token in found}) == 3
        assert [mint.name for mint in api.mints] == [endpoint.name, INSTANCE, endpoint.name]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fresh", {**TOKEN, "workspace": "unknown"}),
        ("fresh", {**TOKEN, "instance": "unknown"}),
        ("reject", {**TOKEN, "workspace": "unknown", "requested_at": 1.0}),
        ("status", {"workspace": "", "resource": "unknown", "read_only": False, "pooled": False}),
        ("identity", {"workspace": "unknown"}),
    ],
    ids=str,
)
async def test_what_the_configuration_does_not_have_is_refused(
    api: Workspace, endpoint: Endpoint, name: str, arguments: dict[str, object]
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        with pytest.raises(ProxyError) as caught:
            await service.call(name, generation, arguments)
        assert caught.value.kind is ErrorKind.SHUTTING_DOWN
        assert api.calls.total() == 0


async def test_the_newest_generations_are_answered_and_no_older_one(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        numbers = [service.register(service.settings()) for _ in range(GENERATIONS_MAX + 1)]
        for generation in (numbers[0], numbers[-1] + 1):
            with pytest.raises(ProxyError) as caught:
                await service.call("fresh", generation, TOKEN)
            assert caught.value.kind is ErrorKind.SHUTTING_DOWN
        for generation in numbers[1:]:
            await service.call("fresh", generation, TOKEN)
        assert len(api.mints) == 1, "they are one account"


async def test_a_token_is_invalidated_only_while_it_is_the_newest(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())

        async def reject(token: dict[str, Any]) -> None:
            when = {"requested_at": token["requested_at"]}
            await service.call("reject", generation, TOKEN | when)

        first = await service.call("fresh", generation, TOKEN)
        await reject({**first, "requested_at": first["requested_at"] - 1})
        assert await service.call("fresh", generation, TOKEN) == first
        await reject(first)
        second = await service.call("fresh", generation, TOKEN)
        assert second["secret"] != first["secret"]
        await reject(first)
        assert await service.call("fresh", generation, TOKEN) == second


async def test_a_look_up_is_shared_while_it_is_open_and_made_again_after(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        ask = [service.call("status", generation, service.resource) for _ in range(5)]
        found = await asyncio.gather(*ask)
        assert found == [["ACTIVE", endpoint.host, False]] * 5
        assert api.calls[Call.RESOURCE] == 1
        endpoint.hosts["host"] = "moved.example.com"
        moved = await service.call("status", generation, service.resource)
        assert moved == ["ACTIVE", "moved.example.com", False]
        assert api.calls[Call.RESOURCE] == 2


async def test_while_the_workspace_fails_the_last_host_is_answered_but_no_first_one(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        known = await service.call("status", generation, service.resource)
        api.fail(Call.RESOURCE, ACCESS_MISSING)
        assert await service.call("status", generation, service.resource) == known
        with pytest.raises(ProxyError) as caught:
            await service.call("status", generation, {**service.resource, "workspace": "second"})
        assert caught.value.kind is ErrorKind.WORKSPACE_ACCESS_MISSING
        # A reload that keeps an upstream keeps what is known of it, and no more.
        kept = service.register(service.settings())
        assert await service.call("status", kept, service.resource) == known
        changed = service.register(service.settings(connects_max=7))
        with pytest.raises(ProxyError):
            await service.call("status", changed, service.resource)


async def test_a_disabled_endpoint_is_answered_and_does_not_replace_the_last_host(
    api: Workspace, endpoint: Endpoint
) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        known = await service.call("status", generation, service.resource)
        endpoint.disabled = True
        assert (await service.call("status", generation, service.resource))[2] is True
        api.fail(Call.RESOURCE, ACCESS_MISSING)
        assert await service.call("status", generation, service.resource) == known


async def test_an_identity_is_asked_for_once(api: Workspace, endpoint: Endpoint) -> None:
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        asked = [service.call("identity", generation, {"workspace": "second"}) for _ in range(3)]
        found = await asyncio.gather(*asked)
        assert found == [[CLIENT_ID, api.url, "pat"]] * 3
        assert await service.call("identity", generation, {"workspace": "second"}) == found[0]
        assert api.calls[Call.ME] == 1


async def test_when_it_is_closed_what_is_asked_ends(api: Workspace, endpoint: Endpoint) -> None:
    api.fail(Call.RESOURCE, HANG)
    async with service_of(api, endpoint) as service:
        generation = service.register(service.settings())
        asking = asyncio.ensure_future(service.call("status", generation, service.resource))
        async with asyncio.timeout(10):
            await api.called(Call.RESOURCE)
        await service.service.close()
        await asyncio.wait({asking}, timeout=10)
        assert asking.cancelled()
    api.clear_faults()
