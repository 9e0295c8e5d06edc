"""Mistakes that waiting does not correct: each is named at once, by the real SDK's own path.

They were reported as a workspace that cannot be reached, after the whole time for a token, or as an
internal error of the SDK that named neither the file nor the variable.
"""

import asyncio
import importlib
import os
import pwd
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
from pydantic import SecretStr

from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.emulator import workspace as emulator
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.lakebase import CLIENT_SECRET, PERSONAL_TOKEN
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace import resources
from proxy.workspace.client import Workspace
from proxy.workspace.login_settings import proxy_secrets
from tests.support.emulated_workspace import ENDPOINT

PRIMARY = resources.Endpoint(ENDPOINT)
# A mint that is refused before anything is sent.
AT_ONCE_SECONDS = 1.0
# Of a mint that works, on a machine that does something else as well.
TIMEOUT_SECONDS = 10.0


@pytest.fixture(scope="module", autouse=True)
def sdk_is_imported() -> None:
    """Import it once, so that its second is no part of what is measured."""
    for name in ("core", "service.postgres"):
        importlib.import_module(f"databricks.sdk.{name}")


def discovering(**settings: Any) -> Workspace:
    credentials = CredentialsSettings(mint_timeout_seconds=TIMEOUT_SECONDS)
    return Workspace(WorkspaceSettings(**settings), credentials, version="0")


async def told_at_once(made: Workspace) -> ProxyError:
    begun = time.monotonic()
    with pytest.raises(ProxyError) as refused:
        await made.mint(PRIMARY)
    assert time.monotonic() - begun < AT_ONCE_SECONDS
    answer = refused.value.response()
    assert answer.sqlstate == "28000"
    assert refused.value.reason == "workspace_configuration"
    for secret in ("not-real", CLIENT_SECRET, PERSONAL_TOKEN):
        assert secret not in f"{refused.value!r} {answer!r}"
    return refused.value


# -- the profile file ----------------------------------------------------------------------------

GOOD_PROFILE = "[DEFAULT]\nhost = {host}\ntoken = {token}\n"
BAD_PROFILES = {
    "no_section": ("host = {host}\ntoken = {token}\n", "line 1 stands before the first [PROFILE]"),
    "doubled_key": (
        "[DEFAULT]\nhost = {host}\ntoken = {token}\ntoken = {token}\n",
        "line 4 sets token of [DEFAULT] a second time",
    ),
    "doubled_section": (
        "[a]\nhost = {host}\n[a]\ntoken = {token}\n",
        "line 3 begins [a] a second time",
    ),
    "stray_line": ("[DEFAULT]\nhost = {host}\n{token}\n", "line 3 is not NAME = VALUE"),
    "not_utf8": ("[DEFAULT]\nhost = {host}\ntoken = caf\xe9\n", "the file is not UTF-8"),
    "quotes": (
        '[DEFAULT]\nhost = {host}\ntoken = "{token}"\n',
        "token of [DEFAULT]: the value is in quotes",
    ),
    "two_lines": (
        "[DEFAULT]\nhost = {host}\ntoken = {token}\n  not-real\n",
        "token of [DEFAULT]: the value has more than one line",
    ),
}


def write_profile(path: Path, text: str, host: str) -> str:
    path.write_bytes(text.format(host=host, token=PERSONAL_TOKEN).encode("latin-1"))
    return str(path)


@pytest.mark.parametrize("way", ["variable", "setting"])
@pytest.mark.parametrize("how", BAD_PROFILES)
async def test_a_profile_file_that_cannot_be_read_is_named_with_the_line(
    api: emulator.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, way: str
) -> None:
    text, why = BAD_PROFILES[how]
    path = write_profile(tmp_path / "profiles", text, api.url)
    if way == "variable":
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", path)
    error = await told_at_once(discovering(**({"config_file": path} if way == "setting" else {})))
    assert error.detail.startswith(path)
    assert why in error.detail
    assert not api.calls


async def test_a_byte_order_mark_before_a_profile_is_harmless(
    api: emulator.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_profile(tmp_path / "profiles", "\xef\xbb\xbf" + GOOD_PROFILE, api.url)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", path)
    await discovering().mint(PRIMARY)


async def test_a_default_profile_that_the_file_chooses_is_used(
    api: emulator.Workspace, tmp_path: Path
) -> None:
    text = "[__settings__]\ndefault_profile = shop\n[shop]\nhost = {host}\ntoken = {token}\n"
    path = write_profile(tmp_path / "profiles", text, api.url)
    await discovering(config_file=path).mint(PRIMARY)


async def test_a_profile_that_is_not_there_is_named(
    api: emulator.Workspace, tmp_path: Path
) -> None:
    path = write_profile(tmp_path / "profiles", GOOD_PROFILE, api.url)
    error = await told_at_once(discovering(config_file=path, profile="shop"))
    assert error.detail == f"{path}: it has no profile [shop]"
    missing = str(tmp_path / "none")
    error = await told_at_once(discovering(config_file=missing, profile="shop"))
    assert error.detail == f"{missing}: the file with the profile [shop] does not exist"


async def test_a_profile_without_a_home_directory_says_what_to_set(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A container's user without an entry in /etc/passwd: the SDK ended with a RuntimeError.
    def no_entry(_uid: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("DATABRICKS_CONFIG_FILE")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    error = await told_at_once(discovering(profile="shop"))
    assert "no home directory" in error.detail
    assert "DATABRICKS_CONFIG_FILE" in error.detail
    error = await told_at_once(discovering())
    assert error.kind is ErrorKind.CONFIGURATION_INVALID


# -- single values -------------------------------------------------------------------------------

BAD_VALUES = {
    "secret_in_two_lines": ("DATABRICKS_CLIENT_SECRET", "two\nlines-not-real", "one line"),
    "secret_in_quotes": ("DATABRICKS_CLIENT_SECRET", '"not-real"', "in quotes"),
    "secret_in_one_quote": ("DATABRICKS_CLIENT_SECRET", "not-real'", "in quotes"),
    "secret_of_letters_no_header_carries": ("DATABRICKS_CLIENT_SECRET", "not-real\u2013", "header"),
    "id_in_two_lines": ("DATABRICKS_CLIENT_ID", "two\nlines", "one line"),
    "id_in_quotes": ("DATABRICKS_CLIENT_ID", f"'{CLIENT_ID}'", "in quotes"),
    "id_of_letters_no_header_carries": ("DATABRICKS_CLIENT_ID", "\u0430\u0431", "header"),
    "host_with_a_path": ("DATABRICKS_HOST", "{host}/sql/warehouses", "has a path"),
    "host_with_a_query": ("DATABRICKS_HOST", "{host}/?a=b", "has a query"),
    "host_in_quotes": ("DATABRICKS_HOST", '"{host}"', "in quotes"),
    "host_of_another_scheme": ("DATABRICKS_HOST", "postgresql://dbc.example.com", "https://"),
    "host_with_a_blank": ("DATABRICKS_HOST", "dbc example.com", "host name"),
    "host_with_a_wrong_port": ("DATABRICKS_HOST", "https://dbc.example.com:4x", "no URL"),
    "host_with_a_password": ("DATABRICKS_HOST", "https://a:not-real@dbc.example.com", "password"),
}


def set_login(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", host)
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", CLIENT_ID)
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", CLIENT_SECRET)


@pytest.mark.parametrize("how", BAD_VALUES)
async def test_a_value_that_cannot_be_used_is_told_with_the_variable(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    variable, value, why = BAD_VALUES[how]
    set_login(monkeypatch, api.url)
    monkeypatch.setenv(variable, value.format(host=api.url))
    error = await told_at_once(discovering())
    assert error.detail.startswith(f"{variable}: ")
    assert why in error.detail
    assert not api.calls


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token", SecretStr("not\nreal")),
        ("token", SecretStr("'not-real'")),
        ("client_secret", SecretStr("not-real\u20ac")),
        ("client_id", "'quoted'"),
    ],
)
async def test_a_setting_that_cannot_be_used_is_told_with_its_key(name: str, value: object) -> None:
    settings = {"host": "https://dbc.example.com", name: value}
    assert (await told_at_once(discovering(**settings))).detail.startswith(f"workspace.{name}: ")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'"not-real"', "in quotes"),
        (b"two\nlines-not-real\n", "one line"),
        (b"not-real\xe2\x82\xac", "header"),
        (b"\xff\xfen\x00o\x00t\x00", "not UTF-8"),
        (b"\xef\xbb\xbf\n", "empty"),
    ],
)
async def test_a_secret_file_that_cannot_be_used_is_named(
    api: emulator.Workspace, tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    settings = {"host": api.url, "client_id": CLIENT_ID, "client_secret_file": str(path)}
    error = await told_at_once(discovering(**settings))
    assert error.detail.startswith("workspace.client_secret_file: ")
    assert why in error.detail


@pytest.mark.parametrize("before", ["", "\ufeff", " \n"])
async def test_what_is_harmless_around_a_value_is_removed(
    api: emulator.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", f"{before}{api.url}/?o=1234567890\r\n")
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", f"{before}{CLIENT_ID}\n")
    path = tmp_path / "secret"
    path.write_text(f"{before}{CLIENT_SECRET}\r\n", encoding="utf-8")
    await discovering(client_secret_file=str(path)).mint(PRIMARY)
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", f"{before}{CLIENT_SECRET} \n")
    await discovering().mint(PRIMARY)
    await discovering(host=f"{api.url}/").mint(PRIMARY)


async def test_two_kinds_of_login_are_told_as_two_and_not_as_none(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_login(monkeypatch, api.url)
    monkeypatch.setenv("DATABRICKS_TOKEN", PERSONAL_TOKEN)
    error = await told_at_once(discovering())
    hint = error.response().text(b"H")
    assert "Unset one" in hint
    assert "DATABRICKS_AUTH_TYPE" in hint
    monkeypatch.setenv("DATABRICKS_AUTH_TYPE", "pat")
    await discovering().mint(PRIMARY)


@pytest.mark.parametrize("content", [None, b" \n"])
async def test_the_token_file_of_file_oidc_that_is_not_there_is_named(
    api: emulator.Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    path = tmp_path / "oidc-token"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("DATABRICKS_OIDC_TOKEN_FILEPATH", str(path))
    for settings in ({}, {"auth_type": "file-oidc"}):
        error = await told_at_once(discovering(host=api.url, client_id=CLIENT_ID, **settings))
        assert error.detail.startswith("DATABRICKS_OIDC_TOKEN_FILEPATH: ")
        assert str(path) in error.detail


BAD_TOKENS = {
    "quotes": (b'"not-real"', "in quotes"),
    "two_lines": (b"not-real\nnot-real", "one line"),
    "utf_16": ("\ufeffnot-real".encode("utf-16-le"), "not UTF-8"),
}


@pytest.mark.parametrize("how", BAD_TOKENS)
async def test_a_token_of_file_oidc_that_cannot_be_sent_is_told_with_its_file(
    api: emulator.Workspace, tmp_path: Path, how: str
) -> None:
    # It was sent, or was told as an SDK without credentials.
    content, why = BAD_TOKENS[how]
    path = tmp_path / "oidc-token"
    path.write_bytes(content)
    settings = {"host": api.url, "client_id": CLIENT_ID, "oidc_token_filepath": str(path)}
    error = await told_at_once(discovering(**settings))
    assert error.detail.startswith("workspace.oidc_token_filepath: ")
    assert why in error.detail
    assert str(path) in error.detail


@pytest.mark.parametrize(
    ("token", "named"),
    [
        ("", "DATABRICKS_AUTH_TYPE: the variable DATABRICKS_OIDC_TOKEN is not set"),
        ("'not-real'", "DATABRICKS_OIDC_TOKEN: the value is in quotes"),
    ],
)
async def test_a_token_of_env_oidc_that_cannot_be_sent_is_told_with_its_variable(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch, token: str, named: str
) -> None:
    set_login(monkeypatch, api.url)
    monkeypatch.delenv("DATABRICKS_CLIENT_SECRET")
    monkeypatch.setenv("DATABRICKS_AUTH_TYPE", "env-oidc")
    monkeypatch.setenv("DATABRICKS_OIDC_TOKEN", token)
    assert (await told_at_once(discovering())).detail.startswith(named)


@pytest.mark.parametrize("kind", ["file-oidc", "env-oidc"])
async def test_blanks_and_a_byte_order_mark_around_an_identity_token_are_not_sent(
    api: emulator.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # The workspace refused the login, or the token was told as one that cannot be used.
    token = f"\ufeff {api.federation_token(CLIENT_ID)}\r\n"
    path = tmp_path / "oidc-token"
    path.write_text(token, encoding="utf-8", newline="")
    monkeypatch.setenv("SOME_TOKEN", token)
    places = {
        "file-oidc": ("oidc_token_filepath", str(path)),
        "env-oidc": ("oidc_token_env", "SOME_TOKEN"),
    }
    settings = dict([places[kind]], host=api.url, client_id=CLIENT_ID, auth_type=kind)
    await discovering(**settings).mint(PRIMARY)


async def test_an_auth_type_that_is_not_complete_says_what_it_needs(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_login(monkeypatch, api.url)
    monkeypatch.setenv("DATABRICKS_AUTH_TYPE", "pat")
    error = await told_at_once(discovering())
    assert "DATABRICKS_AUTH_TYPE" in error.detail
    assert "pat needs token" in error.detail


# -- the network's settings ----------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"no certificate"])
@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
async def test_a_ca_bundle_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv(variable, str(path))
    set_login(monkeypatch, "https://127.0.0.1:9")
    error = await told_at_once(discovering())
    assert error.detail.startswith(f"{variable}: {path}")


async def test_a_ca_file_of_the_workspace_that_is_gone_is_named(
    api: emulator.Workspace, tmp_path: Path
) -> None:
    # It was read by the library at the next request, and told as an API that cannot be reached.
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    secret = SecretStr(CLIENT_SECRET)
    made = discovering(
        host=api.url, client_id=CLIENT_ID, client_secret=secret, ssl_root_cert=str(path)
    )
    await made.mint(PRIMARY)
    path.unlink()
    error = await told_at_once(made)
    assert error.detail.startswith(f"workspace.ssl_root_cert: {path}")


async def test_a_socks_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_login(monkeypatch, "https://dbc.example.com")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    error = await told_at_once(discovering())
    assert error.detail.startswith("ALL_PROXY: a SOCKS proxy")


FROM_A_PROFILE = {
    "ca_bundle": ({"REQUESTS_CA_BUNDLE": "/nonexistent/ca.pem"}, "", "REQUESTS_CA_BUNDLE: "),
    "socks": ({"ALL_PROXY": "socks5://127.0.0.1:1080"}, "", "ALL_PROXY: "),
    "password": ({"HTTPS_PROXY": "http://user:not-real#x@127.0.0.1:9"}, "", "HTTPS_PROXY: "),
    "token_file": (
        *({}, "auth_type = file-oidc\noidc_token_filepath = /nonexistent/token\n"),
        "profile DEFAULT: /nonexistent/token",
    ),
}


@pytest.mark.parametrize("how", FROM_A_PROFILE)
async def test_what_is_checked_is_checked_for_a_host_of_a_profile_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # With the host in a profile none of this was checked: it was told as an API that cannot be
    # reached, and with a part of the HTTP proxy's password.
    variables, more, named = FROM_A_PROFILE[how]
    path = tmp_path / "profiles"
    path.write_text(f"[DEFAULT]\nhost = https://127.0.0.1:9\nclient_id = x\n{more}")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(path))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("NO_PROXY", "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (await told_at_once(discovering())).detail.startswith(named)


async def test_a_profile_file_that_is_a_pipe_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profiles"
    os.mkfifo(path)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(path))
    assert (await told_at_once(discovering())).detail == f"{path}: it is not a regular file"


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_blanks_and_newlines_around_an_http_proxys_url_are_removed(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    # A value that was read from a file ends with a newline: it was told as no URL.
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        set_login(monkeypatch, "https://dbc.example.com")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv(variable, f"\ufeff http://127.0.0.1:{port}\r\n")
        assert f"{variable}: the proxy refused" in (await told_at_once(discovering())).detail
    assert asked[0].startswith(b"CONNECT dbc.example.com:443 ")


async def test_an_http_proxy_of_blanks_alone_is_none(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_login(monkeypatch, api.url)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", " \n")
    await discovering().mint(PRIMARY)


async def test_a_port_of_a_proxy_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_login(monkeypatch, "https://dbc.example.com")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:99999")
    assert (await told_at_once(discovering())).detail.startswith("HTTPS_PROXY: ")


ODD_PASSWORDS = (
    *("p4ss#w0rd", "p4ss/w0rd", "p4ss?w0rd", "p4ss w0rd", "#p4ss:w0rd"),
    *("p4ss\\w0rd", "p4ss[w0rd", "p4ss]w0rd", "p4ss\u20acw0rd", "p4ss%E2%82%ACw0rd", "p4ss%0Aw0rd"),
)


@pytest.mark.parametrize("odd", ODD_PASSWORDS)
async def test_no_part_of_an_odd_proxy_password_is_shown(
    monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    # `#` and `/` end the host of a URL: the error named the rest of the password as host or port.
    set_login(monkeypatch, "https://dbc.example.com")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{odd}@127.0.0.1:9")
    error = await told_at_once(discovering())
    assert error.detail.startswith("HTTPS_PROXY: ")
    assert "p4ss" not in f"{error!r} {error.response()!r}"
    assert "w0rd" not in f"{error!r} {error.response()!r}"


@pytest.mark.parametrize("odd", ["p4ss@w0rd", "p4ss%23w0rd", "p4ss:w0rd", "p4ss%2Fw0rd"])
async def test_no_part_of_a_proxy_password_is_shown_when_the_proxy_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    set_login(monkeypatch, "https://dbc.example.com")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{odd}@127.0.0.1:9")
    credentials = CredentialsSettings(mint_timeout_seconds=1)
    with pytest.raises(ProxyError) as refused:
        await Workspace(WorkspaceSettings(), credentials, version="0").mint(PRIMARY)
    assert refused.value.kind is ErrorKind.API_UNREACHABLE
    assert "p4ss" not in f"{refused.value!r} {refused.value.response()!r}"
    assert {"p4ss", "w0rd"} <= proxy_secrets(os.environ) or "%" in odd


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (b"407 Proxy Authentication Required", "HTTPS_PROXY: the proxy refused its user"),
        (b"403 Forbidden", "HTTPS_PROXY: the proxy refused the connection to the workspace: 403"),
        (b"405 Not Here", "HTTPS_PROXY: the proxy refused the connection to the workspace: 405"),
        (b"200 OK", "HTTPS_PROXY: the server does not speak TLS"),
    ],
    ids=["wrong_password", "not_allowed", "no_tunnels", "no_tls"],
)
async def test_a_mistake_that_the_first_answer_shows_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, status: bytes, named: str
) -> None:
    # The SDK tried again for half of the time for a token: an API that cannot be reached.
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %s\r\n\r\n" % status)
        if await reader.read(1 << 16):  # a ClientHello
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        set_login(monkeypatch, "https://dbc.example.com")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:not-real@127.0.0.1:{port}")
        assert named in (await told_at_once(discovering())).detail


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"503 Service Unavailable"])
async def test_a_proxy_that_may_answer_otherwise_soon_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, status: bytes
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %s\r\n\r\n" % status)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        set_login(monkeypatch, "https://dbc.example.com")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        credentials = CredentialsSettings(mint_timeout_seconds=1)
        with pytest.raises(ProxyError) as refused:
            await Workspace(WorkspaceSettings(), credentials, version="0").mint(PRIMARY)
    assert refused.value.kind is ErrorKind.API_UNREACHABLE
