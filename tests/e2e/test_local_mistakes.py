"""Mistakes on this machine, which no waiting corrects, through a real proxy process and one client.

The client waited for half a minute, and was told of a workspace that cannot be reached.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.lakebase import CLIENT_SECRET, PERSONAL_TOKEN, Lakebase
from tests.support.proxy_process import START_SECONDS_MAX, ProxyProcess, started_process
from tests.support.running import asyncpg_arguments, eventually, proxy_values, toml

pytestmark = pytest.mark.slow

# Milliseconds where the machine does nothing else.
ANSWER_SECONDS_MAX = 5.0
ANYWHERE = "https://dbc.example.com"  # no request is sent there
NO_LOGIN = {"host": "", "client_id": "", "client_secret": "", "auth_type": ""}
PROFILES = "{directory}/profiles"

Break = Callable[[Lakebase, pytest.MonkeyPatch], None]


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong, and what the answer names. Values may contain {host} and {directory}."""

    name: str
    named: str
    variables: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None  # of the file `profiles`
    break_world: Break | None = None
    homeless: bool = False


def _login(**more: str) -> dict[str, str]:
    own = {"HOST": "{host}", "CLIENT_ID": CLIENT_ID, "CLIENT_SECRET": CLIENT_SECRET, **more}
    return {f"DATABRICKS_{name}": value for name, value in own.items()}


def _profile(name: str, why: str, content: bytes) -> Mistake:
    variables = {"DATABRICKS_CONFIG_FILE": PROFILES}
    return Mistake(f"profile: {name}", f"{PROFILES}: {why}", variables, content)


def _value(name: str, variable: str, value: str) -> Mistake:
    return Mistake(name, f"DATABRICKS_{variable}: ", _login(**{variable: value}))


def _clock(ahead_seconds: float) -> Break:
    """Set the workspace's clock so that this machine's is ahead by so much."""

    def break_world(lakebase: Lakebase, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(lakebase.workspace, "_clock", lambda: time.time() - ahead_seconds)
        lakebase.workspace.api.credential_seconds = 3600 - ahead_seconds

    return break_world


def _sign_in_page(lakebase: Lakebase, _: pytest.MonkeyPatch) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, faults.SIGN_IN_PAGE)


MISTAKES = (
    _profile("no section", "line 1 stands before", b"host = x\n"),
    _profile("doubled key", "line 3 sets host of [DEFAULT]", b"[DEFAULT]\nhost = x\nhost = x\n"),
    _profile("stray line", "line 2 is not NAME = VALUE", b"[DEFAULT]\nstray\n"),
    _profile("not UTF-8", "the file is not UTF-8", b"[DEFAULT]\nhost = caf\xe9\n"),
    _profile("UTF-16", "the file is not UTF-8", "\ufeff[DEFAULT]\n".encode("utf-16-le")),
    Mistake(
        *("no home directory", "DATABRICKS_CONFIG_FILE"),
        {"DATABRICKS_CONFIG_PROFILE": "shop", "DATABRICKS_CONFIG_FILE": ""},
        homeless=True,
    ),
    Mistake(
        *("CA bundle", "REQUESTS_CA_BUNDLE: {directory}/absent.pem"),
        {**_login(HOST=ANYWHERE), "REQUESTS_CA_BUNDLE": "{directory}/absent.pem"},
    ),
    _value("secret in two lines", "CLIENT_SECRET", "two\nlines"),
    _value("secret in quotes", "CLIENT_SECRET", '"quoted"'),
    _value("id in quotes", "CLIENT_ID", f"'{CLIENT_ID}'"),
    _value("host with a path", "HOST", "{host}/sql/warehouses"),
    _value("host with a query", "HOST", "{host}/?a=b"),
    _value("host in quotes", "HOST", '"{host}"'),
    Mistake(
        *("SOCKS proxy", "ALL_PROXY: "),
        {**_login(HOST=ANYWHERE), "ALL_PROXY": "socks5://127.0.0.1:1080"},
    ),
    Mistake("both logins", "DATABRICKS_AUTH_TYPE", _login(TOKEN=PERSONAL_TOKEN)),
    Mistake(
        *("token file", "DATABRICKS_OIDC_TOKEN_FILEPATH: {directory}/absent"),
        {
            **_login(CLIENT_SECRET="", AUTH_TYPE="file-oidc"),
            "DATABRICKS_OIDC_TOKEN_FILEPATH": "{directory}/absent",
        },
    ),
    Mistake("sign-in page", "own address", _login(), break_world=_sign_in_page),
    Mistake("clock ahead", "this machine's clock", _login(), break_world=_clock(3600)),
    Mistake("clock behind", "this machine's clock", _login(), break_world=_clock(-3600)),
)

# A container's user without an entry in /etc/passwd.
HOMELESS = """
import os, pwd, runpy, sys

def no_entry(uid):
    raise KeyError(uid)

pwd.getpwuid = no_entry
del os.environ["HOME"]
runpy.run_module("proxy", run_name="__main__", alter_sys=True)
"""


@asynccontextmanager
async def mistaken(
    mistake: Mistake, lakebase: Lakebase, directory: Path
) -> AsyncIterator[ProxyProcess]:
    """Run a proxy with the mistake. Its first mint has failed when the block begins."""
    config = directory / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, {"workspace": NO_LOGIN})))
    if mistake.content is not None:
        (directory / "profiles").write_bytes(mistake.content)
    given = {
        name: value.format(host=lakebase.workspace_url, directory=directory)
        for name, value in {"HOME": str(directory), **mistake.variables}.items()
    }
    program = ("-c", HOMELESS) if mistake.homeless else ("-m", "proxy")
    arguments = ("run", "--config", str(config))
    async with started_process(*arguments, environment=given, program=program) as proxy:
        await proxy.serving()
        no_token = "no token yet; /startup fails until there is one"
        await eventually(lambda: proxy.events(no_token), "its first mint", START_SECONDS_MAX)
        yield proxy


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.name)
async def test_a_mistake_on_this_machine_is_told_to_the_client_at_once_and_by_name(
    lakebase: Lakebase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Mistake,
) -> None:
    if mistake.break_world is not None:
        mistake.break_world(lakebase, monkeypatch)
    async with mistaken(mistake, lakebase, tmp_path) as proxy:
        begun = time.monotonic()
        with pytest.raises(asyncpg.PostgresError) as refused:
            async with asyncio.timeout(START_SECONDS_MAX):
                await asyncpg.connect(**asyncpg_arguments(proxy))
        seconds = time.monotonic() - begun
    error = refused.value
    assert error.sqlstate == "28000"
    assert (error.detail or "").startswith("reason=workspace_configuration")
    named = mistake.named.format(host=lakebase.workspace_url, directory=tmp_path)
    assert named in f"{error} {error.detail} {error.hint}"
    assert seconds < ANSWER_SECONDS_MAX
