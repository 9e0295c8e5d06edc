"""Endpoint and instance: which calls, and what becomes of replies that lack their fields."""

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio
from pydantic import SecretStr

from proxy.config import CredentialsSettings, UpstreamSettings, WorkspaceSettings
from proxy.emulator import faults
from proxy.emulator import workspace as emulator
from proxy.emulator.api import Call, ExpiryFormat
from proxy.emulator.cluster import CLIENT_ID, Cluster
from proxy.emulator.endpoints import Dialect
from proxy.emulator.endpoints import Endpoint as EmulatedEndpoint
from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace.client import Workspace
from proxy.workspace.resources import Endpoint, Instance, resource_of
from tests.support.emulated_workspace import ENDPOINT

FACES = {
    Dialect.AUTOSCALING: (ENDPOINT, "ep-quiet-forest-00000001"),
    Dialect.PROVISIONED: ("shop", "00000000-0000-4000-8000-000000000001"),
}
CREDENTIAL = {Endpoint: Call.CREDENTIAL, Instance: Call.INSTANCE_CREDENTIAL}
STATUS = {Endpoint: Call.RESOURCE, Instance: Call.INSTANCE}


@pytest.fixture(params=list(FACES), ids=lambda dialect: dialect.name.lower())
def face(request: pytest.FixtureRequest) -> EmulatedEndpoint:
    """Return an endpoint or an instance whose cluster does not run."""
    name, uid = FACES[request.param]
    return EmulatedEndpoint(name, uid, request.param, Cluster("none"))


@pytest_asyncio.fixture
async def both(face: EmulatedEndpoint) -> AsyncIterator[emulator.Workspace]:
    """Return a workspace that knows it."""
    async with emulator.Workspace([face], {CLIENT_ID: CLIENT_SECRET}) as started:
        yield started


def reached(api: emulator.Workspace) -> Workspace:
    settings = WorkspaceSettings(
        host=api.url, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    return Workspace(settings, CredentialsSettings(), version="0")


def resource(
    face: EmulatedEndpoint, *, read_only: bool = False, name: str = ""
) -> Endpoint | Instance:
    kind = Endpoint if face.dialect is Dialect.AUTOSCALING else Instance
    return kind(name or face.name, read_only)


@pytest.mark.parametrize("form", list(ExpiryFormat))
async def test_a_credential_is_minted_whatever_the_form_of_its_expiry(
    both: emulator.Workspace, face: EmulatedEndpoint, form: ExpiryFormat
) -> None:
    both.api.expiry_format = form
    credential = await reached(both).mint(resource(face))
    assert 3590 < credential.expires_at - credential.requested_at < 3610
    assert [(mint.identity, mint.name) for mint in both.mints] == [(CLIENT_ID, face.name)]


@pytest.mark.parametrize("read_only", [True, False])
async def test_state_and_host_are_what_the_api_says(
    both: emulator.Workspace, face: EmulatedEndpoint, read_only: bool
) -> None:
    status = await reached(both).status(resource(face, read_only=read_only))
    assert status.state == face.state
    assert status.host == face.hosts["read_only_host" if read_only else "host"]
    assert not status.disabled


async def test_a_reply_without_any_field_is_no_crash(
    both: emulator.Workspace, face: EmulatedEndpoint
) -> None:
    asked = resource(face)
    kind = type(asked)
    both.fail(CREDENTIAL[kind], faults.EMPTY)
    both.fail(STATUS[kind], faults.EMPTY)
    with pytest.raises(ProxyError) as refused:
        await reached(both).mint(asked)
    assert refused.value.kind is ErrorKind.CREDENTIAL_INVALID
    status = await reached(both).status(asked)
    assert (status.state, status.host, status.disabled) == ("unknown", "", False)


async def test_an_expiry_that_is_no_time_is_a_failure_of_the_api(
    both: emulator.Workspace, face: EmulatedEndpoint
) -> None:
    body = b'{"token": "x", "expire_time": "soon", "expiration_time": "soon"}'
    both.fail(CREDENTIAL[type(resource(face))], faults.Reply(200, body))
    with pytest.raises(ProxyError) as refused:
        await reached(both).mint(resource(face))
    assert refused.value.kind in (ErrorKind.API_UNREACHABLE, ErrorKind.CREDENTIAL_INVALID)


async def test_an_expiry_without_an_offset_is_utc(
    both: emulator.Workspace, face: EmulatedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was taken for this machine's time: hours too long or too short.
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    expiry = datetime.now(UTC) + timedelta(minutes=30)
    text = expiry.strftime("%Y-%m-%dT%H:%M:%S") + (
        "Z" if face.dialect is Dialect.AUTOSCALING else ""
    )
    body = {"token": "x", "expire_time": text, "expiration_time": text}
    both.fail(CREDENTIAL[type(resource(face))], faults.Reply(200, json.dumps(body).encode()))
    try:
        credential = await reached(both).mint(resource(face))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert credential.expires_at == pytest.approx(expiry.timestamp(), abs=1)


async def test_a_name_that_is_not_there_is_not_found(
    both: emulator.Workspace, face: EmulatedEndpoint
) -> None:
    missing = resource(face, name=face.name + "x")
    for asked in (reached(both).mint(missing), reached(both).status(missing)):
        with pytest.raises(ProxyError) as refused:
            await asked
        assert refused.value.reason == "endpoint_not_found"
        told_as_instance = refused.value.kind is ErrorKind.INSTANCE_NOT_FOUND
        assert told_as_instance == isinstance(missing, Instance)


def test_the_settings_name_one_or_none() -> None:
    assert resource_of(UpstreamSettings(endpoint=ENDPOINT)) == Endpoint(ENDPOINT)
    given = UpstreamSettings(instance="shop", read_only=True)
    assert resource_of(given) == Instance("shop", read_only=True)
    assert resource_of(UpstreamSettings(host="db.example.com")) is None
