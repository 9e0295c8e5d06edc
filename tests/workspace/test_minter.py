"""One profile's mints: the real SDK, and a workspace in which endpoints come and go."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from pydantic import SecretStr

from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID, Cluster
from proxy.emulator.endpoints import Dialect, Endpoint
from proxy.emulator.faults import Reply, api_error
from proxy.emulator.lakebase import CLIENT_SECRET, Lakebase
from proxy.emulator.workspace import Workspace as EmulatedWorkspace
from proxy.errors import ErrorKind, ProxyError
from proxy.server.metric_labels import build_metrics
from proxy.wire.messages import AuthenticationOk
from proxy.workspace import resources
from proxy.workspace.client import Workspace
from proxy.workspace.minter import TRIES_MAX, Minter
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import LocalTokenSource
from tests.support.client import Client, startup

NAMES = [f"projects/p{number}/branches/b/endpoints/primary" for number in range(5)]


@pytest_asyncio.fixture
async def api() -> AsyncIterator[EmulatedWorkspace]:
    """Return a workspace with an endpoint for each name; no cluster runs."""
    endpoints = [
        Endpoint(name, f"ep-{number}", Dialect.AUTOSCALING, Cluster("none"))
        for number, name in enumerate(NAMES)
    ]
    async with EmulatedWorkspace(endpoints, {CLIENT_ID: CLIENT_SECRET}) as started:
        yield started


def minting(api: EmulatedWorkspace, names: list[str]) -> Minter:
    settings = WorkspaceSettings(
        host=api.url, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    made = Workspace(settings, CredentialsSettings(), version="0")
    return Minter(made.mint, [resources.Endpoint(name) for name in names])


def delete(api: EmulatedWorkspace, *names: str) -> None:
    api.api.endpoints = [found for found in api.api.endpoints if found.name not in names]


def minted_for(api: EmulatedWorkspace) -> list[str]:
    return [mint.name for mint in api.mints]


async def test_the_first_is_used_as_long_as_it_works(api: EmulatedWorkspace) -> None:
    mint = minting(api, NAMES)
    for _ in range(3):
        await mint()
    assert minted_for(api) == [NAMES[0]] * 3
    assert api.calls[Call.CREDENTIAL] == 3


async def test_one_that_was_deleted_costs_one_call_and_not_again(api: EmulatedWorkspace) -> None:
    mint = minting(api, NAMES[:2])
    await mint()
    delete(api, NAMES[0])
    for _ in range(3):
        await mint()
    assert minted_for(api) == [NAMES[0], *[NAMES[1]] * 3]
    assert api.calls[Call.CREDENTIAL] == 5


REFUSALS: list[tuple[Reply, ErrorKind]] = [
    (faults.NOT_FOUND, ErrorKind.ENDPOINT_NOT_FOUND),
    (
        api_error(400, "INVALID_PARAMETER_VALUE", "endpoint is not valid"),
        ErrorKind.ENDPOINT_INVALID,
    ),
    (faults.PERMISSION_DENIED, ErrorKind.PERMISSION_DENIED),
]


@pytest.mark.parametrize("refusal", [row[0] for row in REFUSALS], ids=["404", "400", "403"])
async def test_what_is_wrong_with_one_sends_us_to_the_next(
    api: EmulatedWorkspace, refusal: Reply
) -> None:
    api.fail(Call.CREDENTIAL, refusal, times=2)
    await minting(api, NAMES)()
    assert minted_for(api) == [NAMES[2]]


@pytest.mark.parametrize(("refusal", "kind"), REFUSALS, ids=["404", "400", "403"])
async def test_a_mint_tries_three_resources_at_most_and_the_next_one_goes_on_after_them(
    api: EmulatedWorkspace, refusal: Reply, kind: ErrorKind
) -> None:
    mint = minting(api, NAMES)
    api.fail(Call.CREDENTIAL, refusal, times=TRIES_MAX)
    with pytest.raises(ProxyError) as refused:
        await mint()
    assert refused.value.kind is kind
    assert api.calls[Call.CREDENTIAL] == TRIES_MAX
    await mint()
    assert minted_for(api) == [NAMES[TRIES_MAX]]


async def test_one_alone_is_tried_once(api: EmulatedWorkspace) -> None:
    delete(api, NAMES[0])
    with pytest.raises(ProxyError) as refused:
        await minting(api, NAMES[:1])()
    assert refused.value.kind is ErrorKind.ENDPOINT_NOT_FOUND
    assert api.calls[Call.CREDENTIAL] == 1


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (faults.INTERNAL, ErrorKind.API_ERROR),
        (faults.ACCESS_MISSING, ErrorKind.WORKSPACE_ACCESS_MISSING),
        (faults.IP_BLOCKED, ErrorKind.IP_BLOCKED),
        (faults.EMPTY, ErrorKind.CREDENTIAL_INVALID),
    ],
    ids=lambda value: value.name if isinstance(value, ErrorKind) else "",
)
async def test_what_would_be_the_same_for_the_next_is_told_at_once(
    api: EmulatedWorkspace, reply: Reply, kind: ErrorKind
) -> None:
    api.fail(Call.CREDENTIAL, reply)
    with pytest.raises(ProxyError) as refused:
        await minting(api, NAMES)()
    assert refused.value.kind is kind
    assert api.calls[Call.CREDENTIAL] == 1


async def test_mints_at_the_same_time_do_not_skip_one_that_works(api: EmulatedWorkspace) -> None:
    delete(api, NAMES[0])
    mint = minting(api, NAMES)
    await asyncio.gather(*(mint() for _ in range(8)))
    assert minted_for(api) == [NAMES[1]] * 8


async def test_a_token_minted_for_one_shard_opens_the_other(lakebase: Lakebase) -> None:
    one, two = (shard.endpoint for shard in lakebase.shards)
    delete(lakebase.workspace, one.name)
    mint = minting(lakebase.workspace, [one.name, two.name])
    calls = PendingCalls()
    credentials = LocalTokenSource(mint, CredentialsSettings(), build_metrics(), calls)
    first = await credentials.fresh()
    assert await credentials.fresh() is first
    assert minted_for(lakebase.workspace) == [two.name]
    await calls.close()
    for endpoint in (one, two):
        client = await Client.connect((lakebase.host_address, lakebase.port))
        await client.request_tls(lakebase.ca_file, endpoint.host)
        await client.send(startup(user=CLIENT_ID, database=lakebase.database))
        await client.show_token(first.secret.reveal().decode())
        assert await client.message() == AuthenticationOk()
        client.abort()
