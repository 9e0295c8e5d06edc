"""What workspaces and accounts are made once for, and when the last use of them is over."""

import asyncio

import pytest
from pydantic import SecretStr

from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.emulator import workspace as emulator
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.faults import HANG
from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.server.metric_labels import build_metrics
from proxy.workspace.registry import (
    AccountKey,
    LocalWorkspaceRegistry,
    TokenAccount,
    UseCount,
    WorkspaceKey,
)
from proxy.workspace.resources import Endpoint, Instance, Resource
from tests.support.emulated_workspace import ENDPOINT

PRIMARY = Endpoint(ENDPOINT)


@pytest.fixture
def registry() -> LocalWorkspaceRegistry:
    return LocalWorkspaceRegistry(build_metrics(), version="0")


def workspace_key(name: str = "", host: str = "https://a.invalid") -> WorkspaceKey:
    settings = WorkspaceSettings(
        host=host, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    return WorkspaceKey(name, settings, CredentialsSettings())


def account(
    registry: LocalWorkspaceRegistry, key: AccountKey, resource: Resource = PRIMARY
) -> TokenAccount:
    return registry.account(key, [resource])


def test_endpoints_of_a_workspace_share_an_account_and_each_instance_has_its_own() -> None:
    key = workspace_key()
    assert AccountKey.of(key, Endpoint("a")) == AccountKey.of(key, Endpoint("b"))
    assert AccountKey.of(key, Endpoint("a")) == AccountKey.of(key, None)
    one, two = (AccountKey.of(key, Instance(name)) for name in ("one", "two"))
    assert one != two
    assert AccountKey.of(key, Instance("one", read_only=True)) == one


@pytest.mark.parametrize(
    ("workspace", "instance", "name"),
    [("", "", "workspace"), ("b", "", "b"), ("", "one", "workspace/one"), ("b", "one", "b/one")],
)
def test_an_account_is_shown_by_its_section_and_instance(
    workspace: str, instance: str, name: str
) -> None:
    assert AccountKey(workspace_key(workspace), instance).name == name


def test_equal_keys_share_a_workspace_and_an_account(registry: LocalWorkspaceRegistry) -> None:
    one, same, other = (AccountKey(workspace_key(name), "") for name in ("", "", "b"))
    assert registry.workspace(one.workspace) is registry.workspace(same.workspace)
    assert registry.workspace(one.workspace) is not registry.workspace(other.workspace)
    assert account(registry, one) is account(registry, same)
    assert account(registry, one) is not account(registry, other)


def test_account_and_workspace_are_closed_after_the_last_use(
    registry: LocalWorkspaceRegistry,
) -> None:
    key = AccountKey(workspace_key(), "")
    made, workspace = account(registry, key), registry.workspace(key.workspace)
    use = registry.use_of(key)
    with use:
        with use, registry.use_of(key):
            pass
        assert account(registry, key) is made
        assert registry.workspace(key.workspace) is workspace
    assert len(registry) == 0
    assert account(registry, key) is not made
    assert registry.workspace(key.workspace) is not workspace


def test_a_workspace_stays_as_long_as_one_of_its_accounts(
    registry: LocalWorkspaceRegistry,
) -> None:
    key = workspace_key()
    one, two = (AccountKey(key, name) for name in ("one", "two"))
    made = account(registry, one)
    workspace = registry.workspace(key)
    with registry.use_of(one):
        with registry.use_of(two):
            account(registry, two)
        assert len(registry) == 1
        assert account(registry, one) is made
        assert registry.workspace(key) is workspace


def test_a_use_that_begins_after_the_close_does_not_close_the_successor(
    registry: LocalWorkspaceRegistry,
) -> None:
    # A session may have got its upstream before a reload, and open it after that.
    key = AccountKey(workspace_key(), "")
    account(registry, key)
    early = registry.use_of(key)
    with early:
        pass
    made = account(registry, key)
    with registry.use_of(key):
        with early:
            pass
        assert account(registry, key) is made


def test_what_is_used_is_closed_once() -> None:
    closed = []
    use = UseCount(lambda: closed.append(True))
    for _ in range(3):
        with use, use:
            assert len(closed) < 2
    assert closed == [True]


async def test_a_mint_under_way_is_a_use(
    api: emulator.Workspace, registry: LocalWorkspaceRegistry
) -> None:
    api.fail(Call.CREDENTIAL, HANG)
    key = AccountKey(workspace_key(host=api.url), "")
    with registry.use_of(key):
        made = account(registry, key)
        waiting = asyncio.create_task(made.token_source.fresh())
        await api.called(Call.CREDENTIAL)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert account(registry, key) is made
    api.clear_faults()
    async with asyncio.timeout(10):
        with registry.use_of(key):
            await made.token_source.fresh()
    assert len(api.mints) == 1
    assert len(registry) == len(registry.calls) == 0


async def test_closing_the_registry_cancels_mints_of_accounts_that_are_closed(
    api: emulator.Workspace, registry: LocalWorkspaceRegistry
) -> None:
    api.fail(Call.CREDENTIAL, HANG)
    key = AccountKey(workspace_key(host=api.url), "")
    with registry.use_of(key):
        waiting = asyncio.create_task(account(registry, key).token_source.fresh())
        await api.called(Call.CREDENTIAL)
    await registry.close()
    assert len(registry) == len(registry.calls) == 0
    await asyncio.wait([waiting])
    api.clear_faults()
