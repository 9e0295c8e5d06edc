"""Where to dial and as whom: settings, the workspace's answers, and what the client asks for."""

import asyncio
from typing import Any

import pytest
from pydantic import SecretStr

from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.standin import workspace as standin
from proxy.standin.api import Call
from proxy.standin.cluster import CLIENT_ID
from proxy.standin.endpoints import Endpoint
from proxy.standin.faults import INTERNAL, NOT_FOUND
from proxy.standin.lakebase import CLIENT_SECRET
from proxy.upstream.targets import Login, Target, Targets
from proxy.upstream.workspace import Workspace
from proxy.wire.startup import V3_0, StartupMessage
from tests.upstream.conftest import ENDPOINT


def targets(api: standin.Workspace, **upstream: Any) -> Targets:
    settings = WorkspaceSettings(
        host=api.url, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    made = Workspace(settings, CredentialsSettings(), version="0")
    return Targets(UpstreamSettings(endpoint=ENDPOINT, **upstream), made)


def client(**parameters: str) -> StartupMessage:
    pairs = tuple((name.encode(), value.encode()) for name, value in parameters.items())
    return StartupMessage(V3_0, pairs)


async def test_a_configured_host_needs_no_workspace(api: standin.Workspace) -> None:
    made = targets(api, host="db.example.com", hostaddr="192.0.2.1", port=6000, sslmode="verify-ca")
    expected = Target("db.example.com", "192.0.2.1", 6000, "verify-ca", "system")
    assert await made.target() == expected
    made.forget_host()
    assert await made.target() == expected
    assert not api.calls


async def test_a_host_is_looked_up_once_until_it_is_forgotten(
    api: standin.Workspace, endpoint: Endpoint
) -> None:
    made = targets(api)
    assert (await made.target()).host == endpoint.host
    assert (await made.target()).host == endpoint.host
    assert api.calls[Call.RESOURCE] == 1
    endpoint.hosts["host"] = "ep-moved.database.example.com"
    made.forget_host()
    assert (await made.target()).host == "ep-moved.database.example.com"
    assert api.calls[Call.RESOURCE] == 2


async def test_a_burst_looks_the_host_and_the_identity_up_once(api: standin.Workspace) -> None:
    # Each of a thousand connections asked the API, and those beyond the eighth thread failed.
    made = targets(api)
    async with asyncio.timeout(10):
        found = await asyncio.gather(*(made.target() for _ in range(100)))
        logins = await asyncio.gather(*(made.login(client(user="app")) for _ in range(100)))
    assert len(set(found)) == len(set(logins)) == 1
    assert api.calls[Call.RESOURCE] == 1


async def test_a_look_up_that_failed_is_made_again(
    api: standin.Workspace, endpoint: Endpoint
) -> None:
    made = targets(api)
    api.fail(Call.RESOURCE, NOT_FOUND, times=1)
    with pytest.raises(ProxyError) as refused:
        await made.target()
    assert refused.value.kind is ErrorKind.ENDPOINT_NOT_FOUND
    assert (await made.target()).host == endpoint.host


async def test_a_host_that_was_forgotten_serves_while_the_api_is_down(
    api: standin.Workspace, endpoint: Endpoint
) -> None:
    # A dial that failed for a reason of its own must not need the API to be made again.
    made = targets(api)
    await made.target()
    made.forget_host()
    api.fail(Call.RESOURCE, INTERNAL)
    assert (await made.target()).host == endpoint.host
    assert api.calls[Call.RESOURCE] == 2


@pytest.mark.parametrize(
    ("parameters", "database"),
    [
        ({"user": "app"}, "databricks_postgres"),
        ({"user": "app", "database": ""}, "databricks_postgres"),
        ({"user": "app", "database": "app"}, "databricks_postgres"),
        ({"user": "app", "database": "App"}, "App"),
        ({"user": "app", "database": "orders"}, "orders"),
        ({"user": "", "database": ""}, "databricks_postgres"),
        ({"user": "app", "database": "databricks_postgres"}, "databricks_postgres"),
    ],
)
async def test_w16_a_database_that_is_none_or_the_users_name_is_the_targets(
    api: standin.Workspace, parameters: dict[str, str], database: str
) -> None:
    made = targets(api, user="role")
    assert await made.login(client(**parameters)) == Login(b"role", database.encode())


async def test_the_user_is_the_tokens_identity_unless_it_is_configured(
    api: standin.Workspace,
) -> None:
    assert (await targets(api).login(client(user="app"))).user == CLIENT_ID.encode()
    assert (await targets(api, user="ada").login(client(user="app"))).user == b"ada"
    assert (await targets(api, user="*").login(client(user="app"))).user == b"app"


async def test_names_of_the_client_need_not_be_utf_8(api: standin.Workspace) -> None:
    message = StartupMessage(V3_0, ((b"user", b"\xff"), (b"database", b"\xfe")))
    assert await targets(api, user="*").login(message) == Login(b"\xff", b"\xfe")
