"""The guide's variables beside other sources: they name one database of one workspace, or nothing.

A platform sets them for the database of its own workspace. What a file, a flag or a variable of
ours says of another must not be completed by them: a token would be sent to a foreign host.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.config import UpstreamSettings
from tests.support.configuring import ENDPOINT, ENDPOINT_EU, loaded, written

HOST = "ep-x.database.example.com"
GUIDE = {"ENDPOINT_NAME": ENDPOINT, "PGHOST": HOST, "PGUSER": "app", "PGPORT": "5433"}
WORKSPACE_B = '[workspaces.b]\nhost = "https://b.example.com"\ntoken = "not-a-real-token"\n'


def where(upstream: UpstreamSettings) -> dict[str, str]:
    keys = ("endpoint", "instance", "host", "hostaddr", "user")
    return {key: getattr(upstream, key) for key in keys if getattr(upstream, key)}


@pytest.mark.parametrize(
    ("toml", "found"),
    [
        (f'endpoint = "{ENDPOINT_EU}"', {"endpoint": ENDPOINT_EU, "user": "app"}),
        ('instance = "eu"', {"instance": "eu", "user": "app"}),
        (f'workspace = "b"\nendpoint = "{ENDPOINT_EU}"', {"endpoint": ENDPOINT_EU}),
        ('workspace = "b"\ninstance = "eu"\nuser = "group"', {"instance": "eu", "user": "group"}),
        ('workspace = ""\nport = 5433', {"endpoint": ENDPOINT, "host": HOST, "user": "app"}),
        ('database = "shop"', {"endpoint": ENDPOINT, "host": HOST, "user": "app"}),
        (
            'hostaddr = "192.0.2.1"',
            {"endpoint": ENDPOINT, "host": HOST, "hostaddr": "192.0.2.1", "user": "app"},
        ),
    ],
)
def test_a_file_with_an_address_replaces_the_guides_address(
    tmp_path: Path, toml: str, found: Mapping[str, str]
) -> None:
    argv = written(tmp_path, f"{WORKSPACE_B}[upstream]\n{toml}\n")
    upstream = loaded(argv, GUIDE, dials=True).settings.upstream
    assert where(upstream) == found
    assert upstream.port == (5432 if upstream.workspace else 5433)


@pytest.mark.parametrize("flag", ["--upstream.endpoint", "LAKEBASE_PROXY_UPSTREAM__ENDPOINT"])
def test_a_flag_or_a_variable_with_an_address_replaces_it_as_well(flag: str) -> None:
    is_flag = flag.startswith("--")
    argv = [flag, ENDPOINT_EU] if is_flag else []
    environ = GUIDE if is_flag else {**GUIDE, flag: ENDPOINT_EU}
    assert where(loaded(argv, environ).settings.upstream) == {
        "endpoint": ENDPOINT_EU,
        "user": "app",
    }


def test_a_flag_without_an_address_leaves_the_guides_address() -> None:
    found = where(loaded(["--upstream.database", "shop"], GUIDE).settings.upstream)
    assert found == {"endpoint": ENDPOINT, "host": HOST, "user": "app"}


def test_a_configured_host_still_uses_the_guides_endpoint(tmp_path: Path) -> None:
    argv = written(tmp_path, '[upstream]\nhost = "private.example.com"\n')
    found = where(loaded(argv, GUIDE, dials=True).settings.upstream)
    assert found == {"endpoint": ENDPOINT, "host": "private.example.com", "user": "app"}


def test_a_target_in_another_workspace_does_not_inherit_the_role(tmp_path: Path) -> None:
    targets = (
        f'[targets.eu]\nworkspace = "b"\nendpoint = "{ENDPOINT_EU}"\n'
        f'[targets.own]\nworkspace = "b"\nendpoint = "{ENDPOINT_EU}"\nuser = "group"\n'
        f'[targets.here]\nendpoint = "{ENDPOINT_EU}"\n'
    )
    settings = loaded(written(tmp_path, WORKSPACE_B + targets), GUIDE, dials=True).settings
    users = {name: settings.target(name).user for name in settings.target_names()}
    assert users == {"upstream": "app", "eu": "", "own": "group", "here": "app"}
