"""Two workspaces in one process: none logs in with what belongs to the other."""

import importlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.emulator import workspace as emulator
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.lakebase import CLIENT_SECRET, PERSONAL_TOKEN
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace import resources
from proxy.workspace.client import Workspace
from tests.support.emulated_workspace import ENDPOINT

PRIMARY = resources.Endpoint(ENDPOINT)
OTHER_ID = "00000000-0000-4000-8000-0000000000ff"
OTHER_SECRET = "other-secret-not-real"
OTHER_TOKEN = "dapi0000000000000000000000000000ffff"


@pytest_asyncio.fixture
async def other(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[emulator.Workspace]:
    """Return the workspace that the environment, and the machine's profile, belong to."""
    from databricks.sdk.core import Config

    async with emulator.Workspace([endpoint], {OTHER_ID: OTHER_SECRET}) as started:
        started.api.personal_tokens[OTHER_TOKEN] = OTHER_ID
        for attribute in Config.attributes():  # the Azure ones, which begin with ARM_, included
            if attribute.env:
                monkeypatch.setenv(attribute.env, f"poison-{attribute.name}")
        for name in ("AUTH_TYPE", "CONFIG_PROFILE", "CLOUD", "RATE_LIMIT", "DISCOVERY_URL"):
            monkeypatch.delenv(f"DATABRICKS_{name}")
        monkeypatch.delenv("DATABRICKS_DEBUG_TRUNCATE_BYTES")
        monkeypatch.setenv("DATABRICKS_HOST", started.url)
        monkeypatch.setenv("DATABRICKS_CLIENT_ID", OTHER_ID)
        monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", OTHER_SECRET)
        monkeypatch.setenv("DATABRICKS_TOKEN", OTHER_TOKEN)
        monkeypatch.setenv("DATABRICKS_OIDC_TOKEN", started.federation_token(OTHER_ID))
        monkeypatch.setenv("HOME", str(tmp_path))
        profile = f"[DEFAULT]\nhost = {started.url}\ntoken = {OTHER_TOKEN}\n"
        (tmp_path / ".databrickscfg").write_text(profile)
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / ".databrickscfg"))
        yield started


@pytest.fixture(scope="module", autouse=True)
def sdk_is_imported() -> None:
    """Import it once, so that its second is no part of a deadline."""
    importlib.import_module("databricks.sdk.core")


def named(**settings: Any) -> Workspace:
    return Workspace(
        WorkspaceSettings(**settings), CredentialsSettings(), version="0", discover=False
    )


async def refusal(made: Workspace) -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        await made.mint(PRIMARY)
    return refused.value


@pytest.mark.parametrize("way", ["service principal", "token", "file-oidc", "profile"])
async def test_a_named_workspace_logs_in_with_its_own_settings_alone(
    api: emulator.Workspace, other: emulator.Workspace, tmp_path: Path, way: str
) -> None:
    token_file, profiles = tmp_path / "oidc", tmp_path / "profiles"
    token_file.write_text(api.federation_token(CLIENT_ID))
    profiles.write_text(f"[shop]\nhost = {api.url}\ntoken = {PERSONAL_TOKEN}\n")
    ways: dict[str, dict[str, Any]] = {
        "service principal": {"client_id": CLIENT_ID, "client_secret": SecretStr(CLIENT_SECRET)},
        "token": {"token": SecretStr(PERSONAL_TOKEN)},
        "file-oidc": {
            "client_id": CLIENT_ID,
            "oidc_token_filepath": str(token_file),
            "auth_type": "file-oidc",
        },
        "profile": {"profile": "shop", "config_file": str(profiles)},
    }
    host = {} if way == "profile" else {"host": api.url}
    made = named(**host, **ways[way])
    await made.mint(PRIMARY)
    assert (await made.identity()).role == CLIENT_ID
    assert [mint.identity for mint in api.mints] == [CLIENT_ID]
    assert not other.calls


@pytest.mark.parametrize(
    "missing",
    [
        {"client_id": CLIENT_ID},
        {"client_secret": SecretStr(CLIENT_SECRET)},
        {"azure_client_id": CLIENT_ID},
        {},
    ],
    ids=repr,
)
async def test_what_a_named_workspace_does_not_set_is_missing_and_taken_from_nowhere(
    api: emulator.Workspace, other: emulator.Workspace, missing: dict[str, Any]
) -> None:
    for host in (api.url, ""):
        error = await refusal(named(host=host, **missing))
        assert error.kind is ErrorKind.CONFIGURATION_INVALID
        assert OTHER_ID not in error.detail
    assert api.calls.keys() <= {Call.DISCOVERY}
    assert not other.calls
    assert not other.mints


async def test_a_named_workspace_without_a_host_has_none(other: emulator.Workspace) -> None:
    error = await refusal(named(token=SecretStr(PERSONAL_TOKEN)))
    assert error.kind is ErrorKind.CONFIGURATION_INVALID
    assert not other.calls


@pytest.mark.parametrize("way", ["service principal", "secret file", "token", "file-oidc"])
async def test_an_unnamed_workspace_whose_own_keys_are_complete_takes_nothing_else(
    api: emulator.Workspace, other: emulator.Workspace, tmp_path: Path, way: str
) -> None:
    # DATABRICKS_TOKEN or ARM_CLIENT_ID of another program made it "more than one authorization
    # method", although [workspace] said all that a login needs.
    file = tmp_path / "own"
    file.write_text(api.federation_token(CLIENT_ID) if way == "file-oidc" else CLIENT_SECRET)
    ways: dict[str, dict[str, Any]] = {
        "service principal": {"client_id": CLIENT_ID, "client_secret": SecretStr(CLIENT_SECRET)},
        "secret file": {"client_id": CLIENT_ID, "client_secret_file": str(file)},
        "token": {"token": SecretStr(PERSONAL_TOKEN)},
        "file-oidc": {
            "client_id": CLIENT_ID,
            "oidc_token_filepath": str(file),
            "auth_type": "file-oidc",
        },
    }
    settings = WorkspaceSettings(host=api.url, **ways[way])
    await Workspace(settings, CredentialsSettings(), version="0").mint(PRIMARY)
    assert [mint.identity for mint in api.mints] == [CLIENT_ID]
    assert not other.calls


async def test_an_unnamed_workspace_still_finds_what_is_not_set(
    other: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The environment does bite: where it may be looked at, it decides.
    for name in [name for name in os.environ if name.startswith(("ARM_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATABRICKS_AUTH_TYPE", "oauth-m2m")
    made = Workspace(WorkspaceSettings(), CredentialsSettings(), version="0")
    await made.mint(PRIMARY)
    assert [mint.identity for mint in other.mints] == [OTHER_ID]
