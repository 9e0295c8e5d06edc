"""The real databricks-sdk against the emulator's workspace: every REST error, and what hangs."""

import asyncio
import base64
import importlib
import json
import os
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
from pydantic import SecretStr

from proxy.blocking import THREADS_MAX
from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.emulator import faults
from proxy.emulator import workspace as emulator
from proxy.emulator.api import Call, ExpiryFormat
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.faults import HANG, Reply, api_error
from proxy.emulator.lakebase import CLIENT_SECRET, PERSONAL_TOKEN
from proxy.emulator.tokens import fingerprint
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace import resources
from proxy.workspace.client import Workspace
from tests.support.emulated_workspace import ENDPOINT
from tests.support.fake_clock import FakeClock

PRIMARY = resources.Endpoint(ENDPOINT)


@pytest.fixture(scope="module", autouse=True)
def sdk_is_imported() -> None:
    """Import it once, so that its second is no part of a deadline."""
    importlib.import_module("databricks.sdk.core")


def workspace(api: emulator.Workspace, timeout: float = 10, **settings: Any) -> Workspace:
    given = {"host": api.url, "client_id": CLIENT_ID, "client_secret": SecretStr(CLIENT_SECRET)}
    return Workspace(
        WorkspaceSettings(**{**given, **settings}),
        CredentialsSettings(mint_timeout_seconds=timeout),
        version="0",
    )


async def refusal(made: Workspace, name: str = ENDPOINT) -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        await made.mint(resources.Endpoint(name))
    return refused.value


def shows(error: ProxyError) -> str:
    """Return all texts of an error."""
    return f"{error!s} {error!r} {error.args!r} {error.detail} {error.response()!r}"


# -- what works ----------------------------------------------------------------------------------


async def test_a_service_principal_gets_a_credential(api: emulator.Workspace) -> None:
    credential = await workspace(api).mint(PRIMARY)
    (mint,) = api.mints
    assert fingerprint(credential.secret.reveal()) == mint.fingerprint
    assert (mint.identity, mint.name) == (CLIENT_ID, ENDPOINT)
    assert 3590 < credential.expires_at - credential.requested_at < 3601
    assert not credential.is_password


async def test_a_personal_access_token_is_used_where_it_is_given(api: emulator.Workspace) -> None:
    made = workspace(
        api, client_id="", client_secret=SecretStr(""), token=SecretStr(PERSONAL_TOKEN)
    )
    await made.mint(PRIMARY)
    assert api.calls[Call.TOKEN] == 0
    assert (await made.identity()).role == CLIENT_ID


async def test_the_sdk_finds_what_is_not_set(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", api.url)
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", CLIENT_ID)
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", CLIENT_SECRET)
    made = workspace(api, host="", client_id="", client_secret=SecretStr(""))
    await made.mint(PRIMARY)
    assert (await made.identity()).role == CLIENT_ID


@pytest.mark.parametrize("form", list(ExpiryFormat))
async def test_an_expiry_is_understood_in_each_of_its_forms(
    api: emulator.Workspace, form: ExpiryFormat
) -> None:
    api.api.expiry_format = form
    credential = await workspace(api).mint(PRIMARY)
    assert 3590 < credential.expires_at - credential.requested_at < 3601


async def test_the_host_is_the_one_that_the_api_names(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    assert (await workspace(api).status(PRIMARY)).host == endpoint.host


async def test_an_endpoint_without_a_host_has_none(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    endpoint.hidden_hosts = set(endpoint.hosts)
    status = await workspace(api).status(PRIMARY)
    assert (status.state, status.host, status.disabled) == ("ACTIVE", "", False)


async def test_a_reply_without_a_status_is_no_crash(api: emulator.Workspace) -> None:
    api.fail(Call.RESOURCE, faults.EMPTY)
    status = await workspace(api).status(PRIMARY)
    assert (status.state, status.host, status.disabled) == ("unknown", "", False)


async def test_a_disabled_endpoint_says_so(api: emulator.Workspace, endpoint: Endpoint) -> None:
    endpoint.disabled = True
    assert (await workspace(api).status(PRIMARY)).disabled


async def test_a_person_without_a_name_is_told_to_set_the_user(api: emulator.Workspace) -> None:
    api.fail(Call.ME, faults.EMPTY)
    made = workspace(
        api, client_id="", client_secret=SecretStr(""), token=SecretStr(PERSONAL_TOKEN)
    )
    with pytest.raises(ProxyError, match=r"upstream\.user"):
        await made.identity()


async def test_one_client_serves_all_calls(api: emulator.Workspace) -> None:
    made = workspace(api)
    for _ in range(3):
        await made.mint(PRIMARY)
    assert (api.calls[Call.TOKEN], api.calls[Call.CREDENTIAL]) == (1, 3)


async def test_a_burst_of_mints_gets_a_token_each(api: emulator.Workspace) -> None:
    made = workspace(api)
    credentials = await asyncio.gather(*(made.mint(PRIMARY) for _ in range(40)))
    assert len({credential.secret.reveal() for credential in credentials}) == 40


# -- the table of REST errors --------------------------------------------------------------------

LOGIN_FAILED = ErrorKind.WORKSPACE_LOGIN_FAILED
NETWORK_DENIED = ErrorKind.WORKSPACE_NETWORK_DENIED
TABLE: list[tuple[str, Call, Reply, ErrorKind]] = [
    ("invalid_client", Call.TOKEN, faults.INVALID_CLIENT, ErrorKind.WORKSPACE_LOGIN_FAILED),
    ("401", Call.CREDENTIAL, faults.UNAUTHENTICATED, ErrorKind.WORKSPACE_LOGIN_FAILED),
    ("access", Call.CREDENTIAL, faults.ACCESS_MISSING, ErrorKind.WORKSPACE_ACCESS_MISSING),
    ("ip", Call.CREDENTIAL, faults.IP_BLOCKED, ErrorKind.IP_BLOCKED),
    ("pat", Call.CREDENTIAL, faults.PAT_SCOPE, ErrorKind.PAT_SCOPE),
    ("403", Call.CREDENTIAL, faults.PERMISSION_DENIED, ErrorKind.PERMISSION_DENIED),
    ("numeric", Call.CREDENTIAL, faults.NUMERIC_CODE, ErrorKind.PERMISSION_DENIED),
    (
        "400",
        Call.CREDENTIAL,
        api_error(400, "INVALID_PARAMETER_VALUE", "endpoint is not valid"),
        ErrorKind.ENDPOINT_INVALID,
    ),
    ("404", Call.CREDENTIAL, faults.NOT_FOUND, ErrorKind.ENDPOINT_NOT_FOUND),
    (
        "404_gone",
        Call.CREDENTIAL,
        api_error(404, "RESOURCE_DOES_NOT_EXIST", "no such endpoint"),
        ErrorKind.ENDPOINT_NOT_FOUND,
    ),
    (
        "ip_at_login",
        Call.TOKEN,
        Reply(403, b"Source IP is blocked by Databricks IP ACL", content_type="text/plain"),
        ErrorKind.IP_BLOCKED,
    ),
    # Whatever the word (RFC 6749, 5.2 has six), it was told as an API that cannot be reached.
    ("grant", Call.TOKEN, Reply(400, b'{"error":"invalid_grant"}'), LOGIN_FAILED),
    ("client", Call.TOKEN, Reply(401, b'{"error":"unauthorized_client"}'), LOGIN_FAILED),
    ("scope", Call.TOKEN, Reply(400, b'{"error":"invalid_scope"}'), LOGIN_FAILED),
    ("request", Call.TOKEN, Reply(400, b'{"error":"invalid_request"}'), LOGIN_FAILED),
    ("denied", Call.TOKEN, Reply(403, b'{"error":"access_denied"}'), LOGIN_FAILED),
    ("platform_403_at_login", Call.TOKEN, faults.PERMISSION_DENIED, LOGIN_FAILED),
    ("platform_ip_at_login", Call.TOKEN, faults.IP_BLOCKED, ErrorKind.IP_BLOCKED),
    ("ip_at_discovery", Call.DISCOVERY, faults.IP_BLOCKED, ErrorKind.IP_BLOCKED),
    ("page", Call.CREDENTIAL, faults.SIGN_IN_PAGE, ErrorKind.SIGN_IN_PAGE),
    ("page_at_login", Call.TOKEN, faults.SIGN_IN_PAGE, ErrorKind.SIGN_IN_PAGE),
    ("page_at_discovery", Call.DISCOVERY, faults.SIGN_IN_PAGE, ErrorKind.SIGN_IN_PAGE),
    ("network", Call.CREDENTIAL, faults.NETWORK_DENIED, NETWORK_DENIED),
    ("network_plain", Call.CREDENTIAL, faults.NETWORK_DENIED_PLAIN, NETWORK_DENIED),
    ("network_at_login", Call.TOKEN, faults.NETWORK_DENIED_PLAIN, NETWORK_DENIED),
    ("invalid_token", Call.CREDENTIAL, faults.INVALID_ACCESS_TOKEN, LOGIN_FAILED),
    ("409", Call.CREDENTIAL, faults.ABORTED, ErrorKind.API_BUSY),
    ("500", Call.CREDENTIAL, faults.INTERNAL, ErrorKind.API_ERROR),
    ("502", Call.CREDENTIAL, faults.BAD_GATEWAY, ErrorKind.API_ERROR),
    ("504", Call.CREDENTIAL, faults.GATEWAY_TIMEOUT, ErrorKind.API_ERROR),
    ("empty", Call.CREDENTIAL, faults.EMPTY, ErrorKind.CREDENTIAL_INVALID),
    ("not_json", Call.CREDENTIAL, faults.NOT_JSON, ErrorKind.API_UNREACHABLE),
    ("500_token", Call.TOKEN, faults.INTERNAL, ErrorKind.API_ERROR),
    ("429_token", Call.TOKEN, faults.THROTTLED, ErrorKind.API_THROTTLED),
    ("empty_token", Call.TOKEN, faults.EMPTY, ErrorKind.API_UNREACHABLE),
    ("not_json_token", Call.TOKEN, faults.NOT_JSON, ErrorKind.API_UNREACHABLE),
    ("404_discovery", Call.DISCOVERY, faults.NOT_FOUND, ErrorKind.NOT_A_WORKSPACE),
    ("429_discovery", Call.DISCOVERY, faults.THROTTLED, ErrorKind.API_THROTTLED),
    ("503_discovery", Call.DISCOVERY, faults.UNAVAILABLE, ErrorKind.API_ERROR),
    ("429_oidc", Call.OIDC, faults.THROTTLED, ErrorKind.API_THROTTLED),
    ("503_oidc", Call.OIDC, faults.UNAVAILABLE, ErrorKind.API_ERROR),
    ("404_oidc", Call.OIDC, faults.NOT_FOUND, ErrorKind.NOT_A_WORKSPACE),
    ("page_at_oidc", Call.OIDC, faults.SIGN_IN_PAGE, ErrorKind.SIGN_IN_PAGE),
    ("500_discovery", Call.DISCOVERY, faults.INTERNAL, ErrorKind.API_ERROR),
    ("empty_discovery", Call.DISCOVERY, faults.EMPTY, ErrorKind.API_UNREACHABLE),
]


@pytest.mark.parametrize(
    ("call", "fault", "kind"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
async def test_every_rest_error_has_its_kind_and_shows_no_secret_and_passes(
    api: emulator.Workspace, call: Call, fault: Reply, kind: ErrorKind
) -> None:
    api.fail(call, fault)
    made = workspace(api)
    error = await refusal(made)
    assert error.kind is kind
    assert CLIENT_SECRET not in shows(error)
    assert "eyJ" not in shows(error)
    assert "\n" not in error.detail
    assert "unknown: unknown" not in error.detail
    assert "None" not in error.detail  # "Invalid URL 'None'" is no help
    assert len(error.detail) <= 300
    api.clear_faults()
    await made.mint(PRIMARY)  # and when the cause is gone it works, with the same object


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (faults.THROTTLED, ErrorKind.API_THROTTLED),
        (faults.THROTTLED_NO_DELAY, ErrorKind.API_THROTTLED),
        (faults.UNAVAILABLE, ErrorKind.API_ERROR),
    ],
    ids=["429", "429_without_retry_after", "503"],
)
async def test_when_the_api_says_when_to_come_back_no_thread_sleeps_until_then(
    api: emulator.Workspace, fault: Reply, kind: ErrorKind
) -> None:
    # Each thread slept and tried again by itself, and a longer time ended in "no answer".
    api.fail(Call.CREDENTIAL, fault)
    made = workspace(api)
    error = await refusal(made)
    assert (error.kind, error.retry_after_seconds) == (kind, 1)
    assert api.calls[Call.CREDENTIAL] == 1
    api.clear_faults()
    await made.mint(PRIMARY)


@pytest.mark.parametrize("seconds", [14, 30, 3600])
@pytest.mark.parametrize("call", [Call.CREDENTIAL, Call.TOKEN, Call.OIDC])
async def test_a_long_retry_after_is_reported_at_once(
    api: emulator.Workspace, call: Call, seconds: int
) -> None:
    # The SDK slept through it, the call ended at its deadline, and the client heard of an API that
    # cannot be reached; a thread slept on.
    reply = api_error(429, "RESOURCE_EXHAUSTED", "Too many requests", Retry_After=str(seconds))
    api.fail(call, reply)
    begun = time.monotonic()
    error = await refusal(workspace(api, timeout=30))
    assert time.monotonic() - begun < 5
    assert (error.kind, error.retry_after_seconds) == (ErrorKind.API_THROTTLED, seconds)
    assert api.calls[call] == 1


async def test_a_refused_workspace_token_is_replaced_once(api: emulator.Workspace) -> None:
    # A 401 of the API does not make the SDK drop the workspace token that it has.
    made = workspace(api)
    await made.mint(PRIMARY)
    api.fail(Call.CREDENTIAL, faults.UNAUTHENTICATED, times=1)
    await made.mint(PRIMARY)
    assert api.calls[Call.TOKEN] == 2


async def test_only_a_refused_login_and_a_call_that_hangs_cost_the_client(
    api: emulator.Workspace,
) -> None:
    # Every failure did: each mint that failed was a login, too.
    made = workspace(api)
    await made.mint(PRIMARY)
    for fault in (faults.INTERNAL, faults.NOT_FOUND, faults.THROTTLED, faults.IP_BLOCKED):
        api.fail(Call.CREDENTIAL, fault, times=1)
        await refusal(made)
    await made.mint(PRIMARY)
    assert api.calls[Call.TOKEN] == 1


async def test_a_late_thread_does_not_bring_back_the_login_of_a_rotated_secret(
    api: emulator.Workspace, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text("old-not-real")
    api.api.clients[CLIENT_ID] = "old-not-real"
    made = workspace(api, client_secret=SecretStr(""), client_secret_file=str(file))
    api.fail(Call.DISCOVERY, HANG, times=1)
    late = asyncio.create_task(made.mint(PRIMARY))
    await api.called(Call.DISCOVERY)
    file.write_text("new-not-real")
    api.api.clients[CLIENT_ID] = "new-not-real"
    await made.mint(PRIMARY)
    api.clear_faults()
    await asyncio.wait([late])
    logins = api.calls[Call.TOKEN]
    await made.mint(PRIMARY)
    assert api.calls[Call.TOKEN] == logins


LATER = "2099-01-01T00:00:00Z"


@pytest.mark.parametrize(
    "body",
    [
        {"token": 5, "expire_time": LATER},
        {"token": ["x"], "expire_time": LATER},
        {"token": "\ud800", "expire_time": LATER},
        {"token": "not-a\0real-token", "expire_time": LATER},
        {"token": "not-a-real-token\n", "expire_time": LATER},
        {"token": "not-a-real-token", "expire_time": 5},
        {"token": "not-a-real-token", "expire_time": "99999-01-01T00:00:00Z"},
        ["x"],
        None,
        "x",
    ],
    ids=repr,
)
async def test_a_reply_that_makes_no_sense_is_a_failure_of_the_api_and_no_crash(
    api: emulator.Workspace, body: object
) -> None:
    # The session ended without an answer.
    api.fail(Call.CREDENTIAL, Reply(200, json.dumps(body).encode()))
    error = await refusal(workspace(api))
    assert error.kind in (ErrorKind.CREDENTIAL_INVALID, ErrorKind.API_UNREACHABLE)
    assert "not-a" not in shows(error)


@pytest.mark.parametrize("name", [5, "a\0b", "\ud800", ["x"]], ids=repr)
async def test_a_person_whose_name_is_no_text_is_a_failure_of_the_api(
    api: emulator.Workspace, name: object
) -> None:
    api.fail(Call.ME, Reply(200, json.dumps({"userName": name}).encode()))
    made = workspace(
        api, client_id="", client_secret=SecretStr(""), token=SecretStr(PERSONAL_TOKEN)
    )
    with pytest.raises(ProxyError) as refused:
        await made.identity()
    assert refused.value.kind is ErrorKind.API_REPLY_INVALID


def _echo(secret: str) -> Reply:
    body = {"error": "invalid_request", "error_description": f"bad client_secret={secret}"}
    return Reply(400, json.dumps(body).encode())


async def test_a_secret_that_the_other_side_repeats_is_masked(
    api: emulator.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    basic = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
    for secret in (CLIENT_SECRET, basic):
        api.fail(Call.TOKEN, _echo(secret), times=1)
        error = await refusal(workspace(api))
        assert "bad client_secret=********" in error.detail
        assert secret not in shows(error)
    # And one that the SDK itself has found.
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", CLIENT_SECRET)
    api.fail(Call.TOKEN, _echo(CLIENT_SECRET), times=1)
    error = await refusal(workspace(api, client_secret=SecretStr("")))
    assert "bad client_secret=********" in error.detail


async def test_a_token_that_the_api_repeats_is_masked(api: emulator.Workspace) -> None:
    made = workspace(
        api, client_id="", client_secret=SecretStr(""), token=SecretStr(PERSONAL_TOKEN)
    )
    api.fail(Call.CREDENTIAL, api_error(403, "PERMISSION_DENIED", f"not for {PERSONAL_TOKEN}!"))
    assert "not for ********!" in (await refusal(made)).detail


@pytest.mark.parametrize("seconds", [-1, 0])
async def test_an_expiry_in_the_past_is_a_credential_of_no_use(
    api: emulator.Workspace, seconds: float
) -> None:
    api.api.credential_seconds = seconds
    assert (await refusal(workspace(api))).kind is ErrorKind.CREDENTIAL_INVALID


async def test_the_uid_in_place_of_the_id_is_not_found(
    api: emulator.Workspace, endpoint: Endpoint
) -> None:
    name = ENDPOINT.replace("primary", endpoint.uid)
    assert (await refusal(workspace(api), name)).kind is ErrorKind.ENDPOINT_NOT_FOUND


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"client_secret": SecretStr("wrong-not-real")}, ErrorKind.WORKSPACE_LOGIN_FAILED),
        ({"token": SecretStr(PERSONAL_TOKEN)}, ErrorKind.TWO_LOGINS),
        (
            {"client_id": "", "client_secret": SecretStr("")},
            ErrorKind.CONFIGURATION_INVALID,
        ),
        (
            {"client_id": "", "client_secret": SecretStr(""), "token": SecretStr("wrong-not-real")},
            ErrorKind.WORKSPACE_LOGIN_FAILED,
        ),
        ({"auth_type": "no-such-type"}, ErrorKind.CONFIGURATION_MISTAKE),
        ({"profile": "no-such-profile"}, ErrorKind.CONFIGURATION_MISTAKE),
    ],
    ids=["wrong_secret", "two_ways", "no_way", "wrong_token", "auth_type", "profile"],
)
async def test_a_wrong_configuration_says_so_and_shows_no_secret(
    api: emulator.Workspace, settings: dict[str, Any], kind: ErrorKind
) -> None:
    error = await refusal(workspace(api, **settings))
    assert error.kind is kind
    assert not any(secret in shows(error) for secret in ("not-real", CLIENT_SECRET, PERSONAL_TOKEN))


async def test_a_login_of_the_cli_that_has_expired_is_no_api_that_cannot_be_reached(
    api: emulator.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "databricks"
    program.write_text("#!/bin/sh\necho 'Error: the refresh token is invalid' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    by_program: dict[str, Any] = {
        "auth_type": "databricks-cli",
        "client_id": "",
        "client_secret": SecretStr(""),
    }
    error = await refusal(workspace(api, **by_program))
    assert error.kind is ErrorKind.LOGIN_PROGRAM_FAILED
    assert "the refresh token is invalid" in error.detail


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (faults.INTERNAL, "HTTP 500 Internal error"),
        (faults.BAD_GATEWAY, "HTTP 502 502 Bad Gateway"),
        (faults.UNAVAILABLE, "HTTP 503 Try again"),
    ],
)
async def test_an_api_that_fails_is_told_with_its_status(
    api: emulator.Workspace, fault: Reply, status: str
) -> None:
    # It was "cannot be reached", with advice about HTTPS_PROXY, for a workspace that had answered.
    api.fail(Call.CREDENTIAL, fault)
    error = await refusal(workspace(api))
    assert (error.reason, error.detail) == ("api_error", status)
    assert "PROXY" not in error.response().text(b"H")


@pytest.mark.parametrize("fault", [faults.UNAUTHENTICATED, faults.INVALID_ACCESS_TOKEN])
async def test_a_workspace_token_that_is_refused_leads_to_a_new_login(
    api: emulator.Workspace, fault: Reply
) -> None:
    # After 403 "Invalid access token" the token was used again until it would have expired.
    made = workspace(api)
    await made.mint(PRIMARY)
    api.fail(Call.CREDENTIAL, fault, times=1)
    await made.mint(PRIMARY)
    assert api.calls[Call.TOKEN] == 2


async def test_an_instance_that_does_not_exist_is_told_as_an_instance(
    api: emulator.Workspace,
) -> None:
    # The advice was about an endpoint's id and uid, which an instance does not have.
    for call in (workspace(api).mint, workspace(api).status):
        with pytest.raises(ProxyError) as refused:
            await call(resources.Instance("no-such-instance"))
        assert refused.value.reason == "endpoint_not_found"
        answer = refused.value.response()
        assert "instance" in answer.text(b"M")
        assert "upstream.instance" in answer.text(b"H")
        assert "uid" not in answer.text(b"H")


@pytest.mark.parametrize("hours", [1, 24, -1, -24])
async def test_a_clock_that_is_wrong_by_an_hour_is_told_at_once(
    api: emulator.Workspace, hours: int
) -> None:
    # Ahead, each new token seemed to have expired: 57P03 after the whole time for one. Behind,
    # nothing was said, and a token that had expired an hour before was sent in an outage.
    error = await refusal(workspace_at(api, hours * 3600))
    assert (error.kind, error.response().sqlstate) == (ErrorKind.CLOCK_OFF, "28000")
    word = "ahead of" if hours > 0 else "behind"
    assert f"s {word} the workspace's" in error.detail


@pytest.mark.parametrize("minutes", [30, -30])
async def test_a_clock_that_is_wrong_by_less_fails_no_login(
    api: emulator.Workspace, minutes: int
) -> None:
    await workspace_at(api, minutes * 60).mint(PRIMARY)


def workspace_at(api: emulator.Workspace, ahead_seconds: float) -> Workspace:
    """Return a workspace on a machine whose clock is ahead by so much."""
    settings = WorkspaceSettings(
        host=api.url, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    clock = FakeClock(time.time() + ahead_seconds)
    return Workspace(settings, CredentialsSettings(), version="0", clock=clock)


# -- what hangs or is not there ------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n"])
async def test_a_secret_file_that_is_empty_says_so(
    api: emulator.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    # The SDK took the environment's secret in its place, without a word.
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", CLIENT_SECRET)
    file = tmp_path / "secret"
    file.write_bytes(content)
    made = workspace(api, client_secret=SecretStr(""), client_secret_file=str(file))
    error = await refusal(made)
    assert error.kind is ErrorKind.CONFIGURATION_MISTAKE
    assert error.detail == "workspace.client_secret_file: the file is empty"


@pytest.mark.parametrize("call", [Call.DISCOVERY, Call.OIDC, Call.TOKEN, Call.CREDENTIAL])
async def test_a_call_that_hangs_ends_at_the_deadline_and_the_next_one_works(
    api: emulator.Workspace, call: Call
) -> None:
    api.fail(call, HANG)
    made = workspace(api, timeout=0.3)
    error = await refusal(made)
    assert error.kind is ErrorKind.API_UNREACHABLE
    assert "0.3 seconds" in error.detail
    # It still hangs, in the SDK's lock; a new client does not wait for it.
    api._faults.clear()
    await workspace(api).mint(PRIMARY)
    await _patiently(made)
    api.clear_faults()


async def _patiently(made: Workspace) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                await made.mint(PRIMARY)
            except ProxyError:  # a busy machine may need longer than this short deadline
                continue
            return


@pytest.mark.slow
@pytest.mark.parametrize("call", [Call.DISCOVERY, Call.OIDC, Call.TOKEN, Call.CREDENTIAL])
async def test_calls_that_never_return_end_and_cost_nothing_once_the_api_is_well(
    api: emulator.Workspace, call: Call
) -> None:
    # Eight logins that never returned, and nothing was minted until a restart: the SDK's login
    # request has no time limit, and its discovery one of five minutes.
    before = set(threading.enumerate())
    api.fail(call, HANG, times=THREADS_MAX)
    made = workspace(api, timeout=0.5)
    asking = [made.mint(PRIMARY) for _ in range(THREADS_MAX)]
    async with asyncio.timeout(5):
        await asyncio.gather(*asking, return_exceptions=True)
    await _patiently(made)
    here = set(threading.enumerate()) - before
    for thread in (thread for thread in here if thread.name == "databricks-sdk"):
        await asyncio.to_thread(thread.join, 15)
        assert not thread.is_alive()


async def test_a_call_that_gets_no_thread_says_that_the_api_is_unreachable(
    api: emulator.Workspace,
) -> None:
    made = workspace(api, timeout=0.1)
    release = threading.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(THREADS_MAX):
            tasks.create_task(made._blocking_calls.run(release.wait, 5))
        await asyncio.sleep(0)
        with pytest.raises(ProxyError) as refused:
            await made.mint(PRIMARY)
        release.set()
    assert refused.value.kind is ErrorKind.API_UNREACHABLE
    assert "earlier calls have not ended" in refused.value.detail


async def _silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def test_a_workspace_whose_certificate_does_not_verify_is_told_so_at_once() -> None:
    # It was said not to tell where to log in, after half of the time for a token.
    certificate = trustme.CA().issue_cert("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    async with await asyncio.start_server(_silent, "127.0.0.1", ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        begun = time.monotonic()
        host = f"https://localhost:{port}"
        secret, token = SecretStr(CLIENT_SECRET), SecretStr(PERSONAL_TOKEN)
        for settings in (
            WorkspaceSettings(host=host, client_id=CLIENT_ID, client_secret=secret),
            WorkspaceSettings(host=host, token=token),
        ):
            error = await refusal(Workspace(settings, CredentialsSettings(), version="0"))
            assert error.kind is ErrorKind.WORKSPACE_CERTIFICATE
            assert "REQUESTS_CA_BUNDLE" in error.response().text(b"H")
        assert time.monotonic() - begun < 5


async def test_a_workspace_whose_authority_is_named_is_trusted(tmp_path: Path) -> None:
    # Only an environment variable of the SDK's library could name it.
    authority, reached = trustme.CA(), asyncio.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", ssl=context) as server:
        settings = WorkspaceSettings(
            host=f"https://localhost:{server.sockets[0].getsockname()[1]}",
            token=SecretStr(PERSONAL_TOKEN),
            ssl_root_cert=str(ca_file),
        )
        credentials = CredentialsSettings(mint_timeout_seconds=2)
        error = await refusal(Workspace(settings, credentials, version="0"))
        assert error.kind is ErrorKind.API_UNREACHABLE
        assert reached.is_set()


async def test_one_that_gives_up_while_a_call_hangs_is_gone_at_once(
    api: emulator.Workspace,
) -> None:
    api.fail(Call.TOKEN, HANG)
    asking = asyncio.create_task(workspace(api).mint(PRIMARY))
    await api.called(Call.TOKEN)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    api.clear_faults()


async def test_a_workspace_that_is_not_there_is_unreachable_and_then_back(
    api: emulator.Workspace,
) -> None:
    made = workspace(api, timeout=0.5)
    await api.refuse_connections()
    assert (await refusal(made)).kind is ErrorKind.API_UNREACHABLE
    await api.accept_connections()
    await _patiently(made)


async def test_the_time_of_a_request_is_taken_before_it_is_made(api: emulator.Workspace) -> None:
    clock = FakeClock(time.time())
    settings = WorkspaceSettings(
        host=api.url, client_id=CLIENT_ID, client_secret=SecretStr(CLIENT_SECRET)
    )
    made = Workspace(settings, CredentialsSettings(), version="0", clock=clock)
    begun = clock()
    api.fail(Call.CREDENTIAL, HANG)
    minting = asyncio.create_task(made.mint(PRIMARY))
    await api.called(Call.CREDENTIAL)
    clock.move(-500)
    api.clear_faults()
    assert (await minting).requested_at == begun
