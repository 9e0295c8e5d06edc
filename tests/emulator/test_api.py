"""The workspace API, called with the real databricks-sdk."""

import asyncio
import datetime
import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.config import Config
from databricks.sdk.errors import (
    InvalidParameterValue,
    NotFound,
    Unauthenticated,
)
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from proxy.emulator.api import Api, ApiRequest, Call, ExpiryFormat
from proxy.emulator.cluster import GROUP, PERSON
from proxy.emulator.lakebase import Lakebase

BRANCH = "projects/demo-one/branches/production"


def client_of(lakebase: Lakebase, **overrides: str) -> WorkspaceClient:
    login = {"client_id": lakebase.client_id, "client_secret": lakebase.client_secret}
    settings: dict[str, Any] = {**(overrides or login), "retry_timeout_seconds": 5}
    config = Config(host=lakebase.workspace_url, **settings)
    return WorkspaceClient(config=config)


async def with_client(
    lakebase: Lakebase, work: Callable[[WorkspaceClient], Any], **overrides: str
) -> Any:
    """Run blocking SDK calls in a thread, since the workspace runs on this event loop."""

    def in_thread() -> Any:
        return work(client_of(lakebase, **overrides))

    return await asyncio.to_thread(in_thread)


async def test_a_credential_is_minted_for_the_service_principal_and_counted(
    lakebase: Lakebase,
) -> None:
    endpoint = lakebase["one"].endpoint

    def mint(client: WorkspaceClient) -> Any:
        return client.postgres.generate_database_credential(endpoint.name)

    credential = await with_client(lakebase, mint)
    assert len(credential.token) > 2048
    (minted,) = lakebase.workspace.mints
    assert (minted.identity, minted.name) == (lakebase.client_id, endpoint.name)
    expires = credential.expire_time.ToDatetime(tzinfo=datetime.UTC)
    left = expires - datetime.datetime.now(datetime.UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    made = {Call.DISCOVERY: 1, Call.OIDC: 1, Call.TOKEN: 1, Call.CREDENTIAL: 1}
    assert lakebase.workspace.calls == made
    assert lakebase.workspace.api.workspace_id_headers == {lakebase.workspace.api.workspace_id}


async def test_one_workspace_login_serves_many_mints(lakebase: Lakebase) -> None:
    name = lakebase["one"].endpoint.name

    def mint(client: WorkspaceClient) -> Any:
        return {client.postgres.generate_database_credential(name).token for _ in range(3)}

    assert len(await with_client(lakebase, mint)) == 3
    assert lakebase.workspace.calls[Call.TOKEN] == 1


async def test_a_wrong_secret_is_an_invalid_client(lakebase: Lakebase) -> None:
    with pytest.raises(ValueError, match="invalid_client"):
        await with_client(
            lakebase,
            lambda client: client.current_user.me(),
            client_id=lakebase.client_id,
            client_secret="not-the-secret",
        )


async def test_a_federated_token_from_a_file_is_exchanged(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(lakebase.workspace.federation_token(lakebase.client_id) + "\n")
    login = {
        "auth_type": "file-oidc",
        "client_id": lakebase.client_id,
        "oidc_token_filepath": str(token_file),
    }
    me = await with_client(lakebase, lambda client: client.current_user.me(), **login)
    assert me.user_name == lakebase.client_id
    token_file.write_text("eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.forged")
    with pytest.raises(ValueError, match="invalid_client"):
        await with_client(lakebase, lambda client: client.current_user.me(), **login)


async def test_a_personal_token_is_a_bearer(lakebase: Lakebase) -> None:
    login = {"token": lakebase.personal_token}
    me = await with_client(lakebase, lambda client: client.current_user.me(), **login)
    assert me.user_name == lakebase.client_id
    assert me.display_name
    assert lakebase.workspace.calls[Call.TOKEN] == 0
    name = lakebase["one"].endpoint.name

    def mint(client: WorkspaceClient) -> Any:
        return client.postgres.generate_database_credential(name)

    await with_client(lakebase, mint, **login)
    lakebase.workspace.api.pats_may_mint = False
    with pytest.raises(Unauthenticated):
        await with_client(lakebase, mint, **login)


async def test_an_unknown_bearer_token_is_refused(lakebase: Lakebase) -> None:
    with pytest.raises(Unauthenticated):
        await with_client(lakebase, lambda client: client.current_user.me(), token="dapi-unknown")


async def test_a_workspace_token_expires(lakebase: Lakebase) -> None:
    """The SDK drops a token when it has expired by its own clock, not when the API refuses it."""
    lakebase.workspace.api.workspace_token_seconds = 3600

    def me_twice(client: WorkspaceClient) -> Any:
        client.current_user.me()
        lakebase.workspace.api.issuer = type(lakebase.workspace.api.issuer)("other", lambda: 0.0)
        return client.current_user.me()

    with pytest.raises(Unauthenticated):
        await with_client(lakebase, me_twice)
    assert lakebase.workspace.calls[Call.TOKEN] == 1


async def test_an_endpoint_shows_its_hosts_and_state(lakebase: Lakebase) -> None:
    endpoint = lakebase["one"].endpoint
    shown = await with_client(lakebase, lambda c: c.postgres.get_endpoint(endpoint.name))
    assert (shown.name, shown.uid) == (endpoint.name, endpoint.uid)
    assert shown.status.hosts.host == endpoint.host
    assert shown.status.hosts.read_write_pooled_host == endpoint.pooled_host
    assert shown.status.current_state.value == "ACTIVE"
    assert endpoint.host.startswith("ep-demo-one-")


@pytest.mark.parametrize("state", ["ACTIVE", "IDLE", "INIT", "DEGRADED"])
async def test_every_state_can_be_shown(lakebase: Lakebase, state: str) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.state_override = state
    shown = await with_client(lakebase, lambda c: c.postgres.get_endpoint(endpoint.name))
    assert shown.status.current_state.value == state


async def test_hosts_may_be_missing_and_an_endpoint_disabled(lakebase: Lakebase) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.hidden_hosts = {"read_only_host", "read_write_pooled_host"}
    endpoint.disabled = True
    shown = await with_client(lakebase, lambda c: c.postgres.get_endpoint(endpoint.name))
    assert shown.status.hosts.read_only_host is None
    assert shown.status.hosts.host == endpoint.host
    assert shown.status.disabled


@pytest.mark.parametrize(
    "name", [f"{BRANCH}/endpoints/other", "projects/no/branches/b/endpoints/e"]
)
async def test_an_unknown_endpoint_is_not_found(lakebase: Lakebase, name: str) -> None:
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.postgres.get_endpoint(name))
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.postgres.generate_database_credential(name))


async def test_the_uid_in_place_of_the_id_is_not_found(lakebase: Lakebase) -> None:
    name = f"{BRANCH}/endpoints/{lakebase['one'].endpoint.uid}"
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.postgres.get_endpoint(name))
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.postgres.generate_database_credential(name))
    assert lakebase.workspace.mints == []


@pytest.mark.parametrize("name", ["", "primary", "projects/demo-one"])
async def test_a_credential_needs_a_whole_endpoint_name(lakebase: Lakebase, name: str) -> None:
    with pytest.raises(InvalidParameterValue):
        await with_client(lakebase, lambda c: c.postgres.generate_database_credential(name))


@pytest.mark.parametrize(
    ("seconds", "taken"), [(299, False), (300, True), (3600, True), (3601, False)]
)
async def test_a_ttl_has_bounds(lakebase: Lakebase, seconds: int, *, taken: bool) -> None:
    name = lakebase["one"].endpoint.name

    def mint(client: WorkspaceClient) -> Any:
        return client.postgres.generate_database_credential(name, ttl=Duration(seconds=seconds))

    if taken:
        await with_client(lakebase, mint)
        assert lakebase.workspace.mints[0].lifetime_seconds == seconds
    else:
        with pytest.raises(InvalidParameterValue):
            await with_client(lakebase, mint)


async def test_an_expire_time_can_be_asked_for(lakebase: Lakebase) -> None:
    name = lakebase["one"].endpoint.name
    until = Timestamp()
    until.FromDatetime(datetime.datetime.now(datetime.UTC) + timedelta(minutes=10))

    def mint(client: WorkspaceClient) -> Any:
        return client.postgres.generate_database_credential(name, expire_time=until)

    credential = await with_client(lakebase, mint)
    assert abs(credential.expire_time.seconds - until.seconds) <= 1


@pytest.mark.parametrize("expiry_format", list(ExpiryFormat))
async def test_every_format_of_an_expiry_is_understood(
    lakebase: Lakebase, expiry_format: ExpiryFormat
) -> None:
    lakebase.workspace.api.expiry_format = expiry_format
    name = lakebase["one"].endpoint.name
    credential = await with_client(
        lakebase, lambda c: c.postgres.generate_database_credential(name)
    )
    now = datetime.datetime.now(datetime.UTC)
    assert abs((credential.expire_time.ToDatetime(tzinfo=datetime.UTC) - now).seconds - 3600) < 60


async def test_lists_come_in_pages(lakebase: Lakebase) -> None:
    lakebase.workspace.api.page_size_max = 1

    def names(client: WorkspaceClient) -> Any:
        return (
            [project.name for project in client.postgres.list_projects()],
            [branch.name for branch in client.postgres.list_branches("projects/demo-two")],
            [endpoint.name for endpoint in client.postgres.list_endpoints(BRANCH)],
        )

    projects, branches, endpoints = await with_client(lakebase, names)
    assert projects == ["projects/demo-one", "projects/demo-two"]
    assert branches == ["projects/demo-two/branches/production"]
    assert endpoints == [lakebase["one"].endpoint.name]
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: list(c.postgres.list_branches("projects/none")))


async def test_projects_and_branches_can_be_looked_at(lakebase: Lakebase) -> None:
    assert (await with_client(lakebase, lambda c: c.postgres.get_branch(BRANCH))).name == BRANCH
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.postgres.get_project("projects/none"))


async def test_a_provisioned_instance_has_names_of_its_own(lakebase: Lakebase) -> None:
    instance = lakebase["one"].instance

    def ask(client: WorkspaceClient) -> Any:
        return (
            client.database.get_database_instance(instance.name),
            client.database.find_database_instance_by_uid(uid=instance.uid),
            client.database.generate_database_credential(
                instance_names=[instance.name], request_id="1"
            ),
        )

    by_name, by_uid, credential = await with_client(lakebase, ask)
    assert by_name == by_uid
    assert (
        by_name.read_write_dns
        == instance.host
        == f"instance-{instance.uid}.database.cloud.databricks.com"
    )
    assert by_name.state.value == "AVAILABLE"
    assert credential.expiration_time.endswith("Z")
    assert lakebase.workspace.mints[0].name == instance.name


async def test_roles_and_databases_are_those_of_the_branch(lakebase: Lakebase) -> None:
    lakebase["one"].cluster.execute("CREATE ROLE added LOGIN")
    try:
        roles, databases, role = await with_client(
            lakebase,
            lambda client: (
                list(client.postgres.list_roles(BRANCH)),
                list(client.postgres.list_databases(BRANCH)),
                client.postgres.get_role(f"{BRANCH}/roles/added"),
            ),
        )
    finally:
        lakebase["one"].cluster.execute("DROP ROLE added")
    kinds = {
        one.status.postgres_role: one.status.identity_type and one.status.identity_type.value
        for one in roles
    }
    assert kinds == {
        lakebase.client_id: "SERVICE_PRINCIPAL",
        PERSON: "USER",
        GROUP: "GROUP",
        lakebase.native_role: None,
        "added": None,
    }
    assert role.status.auth_method.value == "PG_PASSWORD_SCRAM_SHA_256"
    (database,) = databases
    assert database.name == f"{BRANCH}/databases/databricks-postgres"
    assert database.status.postgres_database == lakebase.database
    assert database.status.role == f"{BRANCH}/roles/{lakebase.client_id}"
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.postgres.get_role(f"{BRANCH}/roles/none"))
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: list(c.postgres.list_roles("projects/x/branches/y")))


async def test_instances_and_their_roles_are_listed_in_pages(lakebase: Lakebase) -> None:
    lakebase.workspace.api.page_size_max = 1
    name = lakebase["one"].instance.name
    instances, roles = await with_client(
        lakebase,
        lambda client: (
            [one.name for one in client.database.list_database_instances()],
            list(client.database.list_database_instance_roles(name)),
        ),
    )
    assert instances == [shard.instance.name for shard in lakebase.shards]
    kinds = {role.name: role.identity_type.value for role in roles}
    assert kinds[lakebase.client_id] == "SERVICE_PRINCIPAL"
    assert kinds[lakebase.native_role] == "PG_ONLY"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({}, 200),
        ({"page_size": "0"}, 200),
        ({"page_size": "-1"}, 400),
        ({"page_size": "many"}, 400),
        ({"page_token": "-1"}, 400),
        ({"page_token": "none"}, 400),
    ],
)
def test_a_list_ends_for_every_size_of_a_page(query: dict[str, str], status: int) -> None:
    # A page of none, or of fewer, was followed by another one for ever.
    api = Api((), {}, time.time)
    api.personal_tokens["token"] = "someone"
    headers = {"authorization": "Bearer token"}
    reply = api.answer(ApiRequest(Call.INSTANCES, "", query, headers, b"", ""))
    assert reply.status == status
    if status == 200:
        assert json.loads(reply.body)["next_page_token"] == ""


async def test_an_unknown_instance_is_not_found(lakebase: Lakebase) -> None:
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: c.database.get_database_instance("none"))
    with pytest.raises(NotFound):
        await with_client(lakebase, lambda c: list(c.database.list_database_instance_roles("none")))
    with pytest.raises(NotFound):
        await with_client(
            lakebase,
            lambda c: c.database.generate_database_credential(instance_names=["none"]),
        )
    with pytest.raises(InvalidParameterValue):
        await with_client(
            lakebase, lambda c: c.database.generate_database_credential(instance_names=[])
        )


async def test_minting_does_not_wake_a_compute(lakebase: Lakebase) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    await with_client(lakebase, lambda c: c.postgres.generate_database_credential(endpoint.name))
    assert (endpoint.state, endpoint.wakes) == ("IDLE", 0)
