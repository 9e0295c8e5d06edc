"""Where to dial and as whom: settings, the workspace's answers, and what the client asks for."""

import asyncio
import json
from typing import Any

import pytest
from pydantic import SecretStr

from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.emulator import workspace as emulator
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.faults import (
    INTERNAL,
    INVALID_CLIENT,
    NOT_FOUND,
    PERMISSION_DENIED,
    UNAUTHENTICATED,
    Reply,
)
from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.address_lookup import AddressLookup, LoginNames, Target
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workspace.client import Workspace
from proxy.workspace.resources import resource_of
from proxy.workspace.single_flight import BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN, PendingCalls
from tests.support.emulated_workspace import ENDPOINT
from tests.support.fake_clock import FakeClock


def address_lookup(
    api: emulator.Workspace, clock: FakeClock | None = None, **upstream: Any
) -> AddressLookup:
    settings = WorkspaceSettings(
        host=api.url, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    made = Workspace(settings, CredentialsSettings(), version="0")
    given = UpstreamSettings(**{"endpoint": ENDPOINT, **upstream})
    told = clock or FakeClock()
    return AddressLookup(
        given,
        resource_of(given),
        made,
        PendingCalls(),
        clock=told,
        jitter=lambda: 1.0,
        sleep=told.sleep,
    )


def client(**parameters: str) -> StartupMessage:
    pairs = tuple((name.encode(), value.encode()) for name, value in parameters.items())
    return StartupMessage(V3_0, pairs)


async def test_a_configured_host_needs_no_workspace(api: emulator.Workspace) -> None:
    made = address_lookup(
        api, host="db.example.com", hostaddr="192.0.2.1", port=6000, sslmode="verify-ca"
    )
    expected = Target("db.example.com", "192.0.2.1", 6000, "verify-ca", "system")
    assert await made.target() == expected
    made.invalidate_host()
    assert await made.target() == expected
    assert not api.calls


async def test_a_host_is_looked_up_once_until_it_is_forgotten(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    made = address_lookup(api)
    assert (await made.target()).host == endpoint.host
    assert (await made.target()).host == endpoint.host
    assert api.calls[Call.RESOURCE] == 1
    endpoint.hosts["host"] = "ep-moved.database.example.com"
    made.invalidate_host()
    assert (await made.target()).host == "ep-moved.database.example.com"
    assert api.calls[Call.RESOURCE] == 2


async def test_a_burst_looks_the_host_and_the_identity_up_once(api: emulator.Workspace) -> None:
    # Each of a thousand connections asked the API, and those beyond the eighth thread failed.
    made = address_lookup(api)
    async with asyncio.timeout(10):
        found = await asyncio.gather(*(made.target() for _ in range(100)))
        logins = await asyncio.gather(*(made.login_names(client(user="app")) for _ in range(100)))
    assert len(set(found)) == len(set(logins)) == 1
    assert api.calls[Call.RESOURCE] == 1


async def test_a_look_up_that_failed_is_made_again(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    clock = FakeClock()
    made = address_lookup(api, clock)
    api.fail(Call.RESOURCE, NOT_FOUND, times=1)
    for _ in range(5):  # the failure is for good: it is not asked for again so soon
        with pytest.raises(ProxyError) as refused:
            await made.target()
        assert refused.value.kind is ErrorKind.ENDPOINT_NOT_FOUND
    assert api.calls[Call.RESOURCE] == 1
    clock.move(BACKOFF_SECONDS_MIN)
    assert (await made.target()).host == endpoint.host


@pytest.mark.parametrize("asking", [1, 100])
async def test_a_look_up_that_fails_for_a_while_is_made_again_after_a_while(
    api: emulator.Workspace, endpoint: Endpoint, asking: int
) -> None:
    clock = FakeClock()
    made = address_lookup(api, clock)
    api.fail(Call.RESOURCE, INTERNAL, times=1)
    await asyncio.gather(*(made.target() for _ in range(asking)), return_exceptions=True)
    found = await asyncio.gather(*(made.target() for _ in range(asking)))
    assert {target.host for target in found} == {endpoint.host}
    assert api.calls[Call.RESOURCE] == 2
    assert clock() == FakeClock()() + BACKOFF_SECONDS_MIN


async def test_a_host_that_is_forgotten_again_and_again_is_asked_for_now_and_then(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    # Each try to reach a database that sleeps asked the API for its host.
    clock = FakeClock()
    made = address_lookup(api, clock)
    for _ in range(600):  # a minute
        assert (await made.target()).host == endpoint.host
        made.invalidate_host()
        clock.move(0.1)
    assert api.calls[Call.RESOURCE] <= 2 + 4 + 60 / BACKOFF_SECONDS_MAX
    endpoint.hosts["host"] = "ep-moved.database.example.com"
    clock.move(BACKOFF_SECONDS_MAX)
    assert (await made.target()).host == "ep-moved.database.example.com"


async def test_an_endpoint_that_was_disabled_is_told_so_even_if_its_host_was_known(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    made = address_lookup(api)
    await made.target()
    made.invalidate_host()
    endpoint.disabled = True
    with pytest.raises(ProxyError) as refused:
        await made.target()
    assert refused.value.kind is ErrorKind.ENDPOINT_DISABLED


async def test_an_endpoint_without_a_host_is_starting(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    endpoint.hidden_hosts = set(endpoint.hosts)
    with pytest.raises(ProxyError) as refused:
        await address_lookup(api).target()
    assert refused.value.kind is ErrorKind.UPSTREAM_STARTING
    assert "ACTIVE" in refused.value.detail


@pytest.mark.parametrize(
    "host", [5, ["x"], "a\0b", "https://db.example.com/", "\ud800", "a b", "x" * 300], ids=repr
)
async def test_a_host_that_is_none_is_a_failure_of_the_api_and_no_crash(
    api: emulator.Workspace, host: object
) -> None:
    # The session ended without an answer.
    body = {"status": {"current_state": "ACTIVE", "hosts": {"host": host}}}
    api.fail(Call.RESOURCE, Reply(200, json.dumps(body).encode()))
    with pytest.raises(ProxyError) as refused:
        await address_lookup(api).target()
    assert refused.value.kind is ErrorKind.API_REPLY_INVALID
    assert "must be a host name or an address" in refused.value.detail


@pytest.mark.parametrize(
    ("read_only", "expected"),
    [(False, "read_write_pooled_host"), (True, "read_only_pooled_host")],
)
async def test_the_pooled_host_is_taken_where_it_is_asked_for(
    api: emulator.Workspace, endpoint: Endpoint, read_only: bool, expected: str
) -> None:
    target = await address_lookup(api, read_only=read_only, pooled=True).target()
    assert target.host == endpoint.hosts[expected]
    assert target.pooled


@pytest.mark.parametrize("read_only", [True, False])
async def test_the_read_only_host_is_taken_where_it_is_asked_for(
    api: emulator.Workspace, endpoint: Endpoint, read_only: bool
) -> None:
    expected = endpoint.hosts["read_only_host" if read_only else "host"]
    assert (await address_lookup(api, read_only=read_only).target()).host == expected


@pytest.mark.parametrize("fault", [INTERNAL, NOT_FOUND, UNAUTHENTICATED, PERMISSION_DENIED])
async def test_a_host_that_was_forgotten_serves_while_the_api_fails(
    api: emulator.Workspace, endpoint: Endpoint, fault: Reply
) -> None:
    # A dial that failed for a reason of its own must not need the API to be made again.
    made = address_lookup(api)
    await made.target()
    made.invalidate_host()
    api.fail(Call.RESOURCE, fault)
    assert (await made.target()).host == endpoint.host
    assert api.calls[Call.RESOURCE] == (3 if fault is UNAUTHENTICATED else 2)


@pytest.mark.parametrize(
    ("parameters", "database"),
    [
        ({"user": "app"}, "databricks_postgres"),
        ({"user": "app", "database": ""}, "databricks_postgres"),
        ({"user": "app", "database": "app"}, "app"),
        ({"user": "app", "database": "orders"}, "orders"),
        ({"user": "", "database": ""}, "databricks_postgres"),
        ({"user": "app", "database": "databricks_postgres"}, "databricks_postgres"),
    ],
)
async def test_w16_without_a_database_the_targets_own_is_opened(
    api: emulator.Workspace, parameters: dict[str, str], database: str
) -> None:
    made = address_lookup(api, user="role")
    assert await made.login_names(client(**parameters)) == LoginNames(b"role", database.encode())


async def test_the_user_is_the_tokens_identity_unless_it_is_configured(
    api: emulator.Workspace,
) -> None:
    assert (await address_lookup(api).login_names(client(user="app"))).user == CLIENT_ID.encode()
    assert (await address_lookup(api, user="ada").login_names(client(user="app"))).user == b"ada"
    assert (await address_lookup(api, user="*").login_names(client(user="app"))).user == b"app"


@pytest.mark.parametrize("asking", [1, 100])
async def test_who_we_are_is_asked_again_after_a_while_and_by_one_for_all(
    api: emulator.Workspace, asking: int
) -> None:
    # Each client of an outage asked by itself as soon as the one before had failed.
    clock = FakeClock()
    made = address_lookup(api, clock)
    api.fail(Call.TOKEN, INTERNAL, times=1)
    message = client(user="app")
    await asyncio.gather(
        *(made.login_names(message) for _ in range(asking)), return_exceptions=True
    )
    found = await asyncio.gather(*(made.login_names(message) for _ in range(asking)))
    assert {login.user for login in found} == {CLIENT_ID.encode()}
    assert api.calls[Call.TOKEN] == 2
    assert clock() == FakeClock()() + BACKOFF_SECONDS_MIN


async def test_an_identity_that_is_refused_is_not_asked_for_with_every_client(
    api: emulator.Workspace,
) -> None:
    clock = FakeClock()
    made = address_lookup(api, clock)
    api.fail(Call.TOKEN, INVALID_CLIENT)
    for _ in range(100):
        with pytest.raises(ProxyError) as refused:
            await made.login_names(client(user="app"))
        assert refused.value.kind is ErrorKind.WORKSPACE_LOGIN_FAILED
    assert api.calls[Call.TOKEN] == 1


async def test_names_of_the_client_need_not_be_utf_8(api: emulator.Workspace) -> None:
    message = StartupMessage(V3_0, ((b"user", b"\xff"), (b"database", b"\xfe")))
    assert await address_lookup(api, user="*").login_names(message) == LoginNames(b"\xff", b"\xfe")
