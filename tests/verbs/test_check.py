"""`check` as a process of its own against the emulator: each step that fails, with its fix."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.certificates import Certificate
from proxy.emulator.cluster import Cluster
from proxy.emulator.endpoints import neon_error
from proxy.emulator.faults import Injection, Reply, Stage
from proxy.emulator.lakebase import SHARDS, Lakebase
from proxy.emulator.tokens import TokenIssuer
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from proxy.server.serving import serving
from proxy.verbs.endpoint_list import SHOWN_MAX
from proxy.wire.messages import ErrorResponse
from tests.support.proxy_process import ROOT, START_SECONDS_MAX, run_to_end, started_process
from tests.support.running import proxy_settings, proxy_values, toml

LISTENER = 'localhost:0 with no TLS (listen.tls = "self-signed" offers it)'
STEPS = ["configuration", "listener", "workspace login", "clock", "credential", "endpoint"]
STEPS += ["DNS", "TCP", "TLS", "Postgres login", "query"]
CANARY_SECRET = "canary-client-secret"
CANARY_PASSWORD = "canary-native-password"

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Checked:
    """What a process of `check` printed."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of the steps, without the note on tables that other tests have left."""
        assert "FAIL" not in self.out
        return [line for line in self.out.splitlines() if not line.startswith(" ")]

    @property
    def json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        assert self.out.count("\n") == 1
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


async def checked(
    lakebase: Lakebase,
    tmp_path: Path,
    *flags: str,
    **sections: Mapping[str, object],
) -> Checked:
    """Run `check`, and look for secrets in all that it printed."""
    config = tmp_path / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, sections)))
    # No byte code: nothing is to appear beside the sources while tests look at them.
    command = ("-B", "-m", "proxy", "check", "--config", str(config), *flags)
    code, out, err = await run_to_end(
        sys.executable, *command, environment={"PYTHONPATH": str(ROOT)}
    )
    for secret in (CANARY_SECRET, CANARY_PASSWORD, lakebase.client_secret, "eyJ"):
        assert secret not in out + err
    assert lakebase.personal_token not in out + err
    assert "Traceback" not in err
    return Checked(code, out, err)


async def test_all_steps_pass_and_the_last_line_says_who_and_where(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    found = await checked(lakebase, tmp_path)
    assert (found.code, found.err) == (EXIT_OK, "")
    lines = found.lines
    assert [line[:15].strip() for line in lines] == STEPS
    line_form = re.compile(r".{15} \(at most \d+ s\) +ok +\d+ ms  .*")
    assert all(line_form.fullmatch(line) for line in lines)
    assert f"as {lakebase.client_id}, by oauth-m2m, at {lakebase.workspace_url}" in lines[2]
    assert lines[3].endswith((" s ahead of the workspace's", " s behind the workspace's"))
    assert "a token 0." in lines[4]
    assert "valid for 60 min more" in lines[4]
    assert f"ACTIVE, host {lakebase['one'].endpoint.host}" in lines[5]
    assert lines[-1].endswith(
        f"current_user {lakebase.client_id}, current_database databricks_postgres"
    )


async def test_the_login_says_which_host_address_tls_certificate_and_server_it_found(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    endpoint = lakebase["one"].endpoint
    found = await checked(lakebase, tmp_path, "--json")
    login = found.json["steps"][STEPS.index("Postgres login")]["text"]
    assert f"{endpoint.host}:{lakebase.port} at 127.0.0.1, TLSv1.3, " in login
    assert re.search(
        r"certificate valid until \w+ +\d+ [0-9:]+ \d{4} GMT, PostgreSQL 1[5-9]", login
    )
    assert "transaction mode" not in login


async def test_a_pooled_host_says_what_transaction_mode_breaks(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase["one"].endpoint.pooler_takes_tokens = True
    found = await checked(lakebase, tmp_path, "--json", upstream={"pooled": True})
    assert found.code == EXIT_OK
    login = found.json["steps"][STEPS.index("Postgres login")]["text"]
    assert "transaction mode: no LISTEN, session SET, temporary tables" in login


async def test_a_line_begins_with_its_bound_when_the_step_begins(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # Nothing was printed for half a minute, and it was not clear what was waited for.
    lakebase.gateway.inject(Stage.AUTHENTICATED, Injection.HANG)
    config = tmp_path / "proxy.toml"
    values = proxy_values(lakebase, {"upstream": {"connect_timeout_seconds": 50}})
    config.write_text(toml(values))
    async with started_process("check", "--config", str(config)) as process:
        await process.printed("Postgres login  (at most 50 s)")
        *passed, open_line = process.out.splitlines()
        assert [line[:15].strip() for line in passed] == STEPS[: STEPS.index("Postgres login")]
        assert " ms " not in open_line


async def test_a_workspace_that_refuses_is_told_within_five_seconds(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # The SDK tried again for half a minute.
    await lakebase.workspace.refuse_connections()
    started_at = time.monotonic()
    found = await checked(lakebase, tmp_path, "--json")
    seconds = time.monotonic() - started_at
    failed = found.json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("workspace login", "api_unreachable")
    assert seconds < 5
    assert "refused" in failed["text"].lower()


# An HTTP proxy that refuses each request.
async def _refuse_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    writer.close()


REFUSED = ("profile", "environment", "named", "named_profile", "proxy_refuses", "proxy_is_closed")


@pytest.mark.parametrize("how", REFUSED)
async def test_a_workspace_that_refuses_is_told_soon_wherever_its_host_comes_from(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int, how: str
) -> None:
    # Only workspace.host and DATABRICKS_HOST without an HTTP proxy were looked at; elsewhere the
    # SDK tried again for half a minute.
    closed = f"http://127.0.0.1:{unused_tcp_port}"
    login = f"host = {closed}\nclient_id = shop\nclient_secret = not-a-real-secret\n"
    profiles = tmp_path / "profiles"
    profiles.write_text(f"[DEFAULT]\n{login}")
    none = {"host": "", "client_id": "", "client_secret": "", "auth_type": ""}
    own = {"client_id": "shop", "client_secret": "not-a-real-secret"}
    sections: dict[str, dict[str, object]] = {"workspace": {**none}}
    environment = {"PYTHONPATH": str(ROOT)}
    async with await asyncio.start_server(_refuse_request, "127.0.0.1", 0) as http_proxy:
        port = http_proxy.sockets[0].getsockname()[1]
        match how:
            case "profile":
                sections["workspace"] |= {"config_file": str(profiles), "profile": "DEFAULT"}
            case "environment":
                sections["workspace"] |= own
                environment["DATABRICKS_HOST"] = closed
            case "named" | "named_profile":
                sections["upstream"] = {"workspace": "shop"}
                profile = {"config_file": str(profiles), "profile": "DEFAULT"}
                named = {"host": closed, **own} if how == "named" else profile
                sections["workspaces.shop"] = {**named}
                sections["workspace"]["host"] = lakebase.workspace_url  # another one, which works
            case _:
                sections["workspace"] |= {"host": "https://dbc.example.com", **own}
                port = port if how == "proxy_refuses" else unused_tcp_port
                environment["HTTPS_PROXY"] = f"http://user:{CANARY_PASSWORD}@127.0.0.1:{port}"
        config = tmp_path / "proxy.toml"
        config.write_text(toml(proxy_values(lakebase, sections)))
        command = ("-B", "-m", "proxy", "check", "--config", str(config), "--json")
        code, out, err = await run_to_end(sys.executable, *command, environment=environment)
    failed = json.loads(out)["steps"][-1]
    assert (code, failed["name"], failed["reason"]) == (1, "workspace login", "api_unreachable")
    assert failed["seconds"] < 5
    assert "refused" in failed["text"].lower() or "503" in failed["text"]
    assert CANARY_PASSWORD not in out + err


async def test_the_listener_and_a_running_proxy_are_named(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # It said nothing of the side that applications connect to.
    found = await checked(lakebase, tmp_path, "--json")
    assert found.json["steps"][1]["text"].startswith(f"{LISTENER}, no admin address")
    async with serving(proxy_settings(lakebase, admin={"enabled": True})) as app:
        assert app.admin is not None
        admin = {"enabled": True, "port": app.admin.port}
        found = await checked(lakebase, tmp_path, "--json", admin=admin)
    assert found.json["steps"][1]["text"] == f"{LISTENER}, a proxy runs and is ready"
    found = await checked(lakebase, tmp_path, "--json", admin=admin)
    assert found.json["steps"][1]["text"] == f"{LISTENER}, no proxy runs"
    found = await checked(lakebase, tmp_path, "--json", listen={"port": 0, "tls": "self-signed"})
    assert "localhost:0 with TLS (self-signed), " in found.json["steps"][1]["text"]


async def test_a_disabled_endpoint_is_read_even_where_the_host_is_set(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # It was found out by the login, or not at all.
    endpoint = lakebase["one"].endpoint
    endpoint.disabled = True
    found = await checked(lakebase, tmp_path, "--json", upstream={"host": endpoint.host})
    failed = found.json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("endpoint", "endpoint_disabled")
    assert failed["fix"] == "Enable it in the project."


async def test_json_has_the_same_for_machines(lakebase: Lakebase, tmp_path: Path) -> None:
    found = await checked(lakebase, tmp_path, "--json")
    assert (found.code, found.err) == (EXIT_OK, "")
    assert found.json["ok"] is True
    steps = found.json["steps"]
    assert [step["name"] for step in steps] == STEPS
    for step in steps:
        assert step.keys() == {
            *("name", "target", "ok", "seconds", "text"),
            *("reason", "sqlstate", "fix", "note"),
        }
        assert step["target"] == "upstream"
        assert step["ok"] is True
        assert step["seconds"] >= 0
        assert step["reason"] == step["sqlstate"] == step["fix"] == ""


async def test_a_native_password_is_checked_without_any_token(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.native_login = True
    endpoint.native_passwords[lakebase.native_role] = CANARY_PASSWORD
    file = tmp_path / "password"
    file.write_text(CANARY_PASSWORD)
    upstream = {"user": lakebase.native_role, "host": endpoint.host, "endpoint": ""}
    found = await checked(
        lakebase, tmp_path, credentials={"password_file": str(file)}, upstream=upstream
    )
    assert found.code == EXIT_OK
    lines = found.lines
    assert [line[:15].strip() for line in lines] == [*STEPS[:2], *STEPS[6:]]
    assert "with a native password" in lines[0]
    assert f"current_user {lakebase.native_role}, " in lines[-1]
    assert lakebase.workspace.calls.total() == 0
    file.write_text("another-not-real-password")
    found = await checked(
        *(lakebase, tmp_path, "--json"),
        credentials={"password_file": str(file)},
        upstream=upstream,
    )
    assert found.code == EXIT_FAILURE
    assert found.json["steps"][-1]["name"] == "Postgres login"


async def test_a_password_file_that_cannot_be_read_is_a_failed_credential(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # It was shown as a TCP connection that failed, which was never tried.
    found = await checked(
        *(lakebase, tmp_path, "--json"),
        credentials={"password_file": str(tmp_path / "absent")},
        upstream={"user": lakebase.native_role, "host": lakebase["one"].endpoint.host},
    )
    assert found.code == EXIT_FAILURE
    failed = found.json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("credential", "password_file_unreadable")


async def test_a_personal_access_token_in_place_of_the_password_is_named(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(lakebase.personal_token)
    found = await checked(
        *(lakebase, tmp_path, "--json"),
        credentials={"password_file": str(file)},
        upstream={"user": lakebase.client_id, "host": lakebase["one"].endpoint.host},
    )
    assert found.code == EXIT_FAILURE
    failed = found.json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("Postgres login", "not_a_token")
    assert "personal access token or a password was used" in failed["fix"]


async def test_a_provisioned_instance_is_checked_as_well(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    instance = lakebase["one"].instance
    upstream = {"endpoint": "", "instance": instance.name}
    found = await checked(lakebase, tmp_path, upstream=upstream)
    assert found.code == EXIT_OK
    assert f"AVAILABLE, host {instance.host}" in found.out
    assert lakebase.workspace.calls[Call.INSTANCE_CREDENTIAL] == 2  # the query's proxy has its own


Break = Callable[[Lakebase], Awaitable[None] | None]


def _nothing(_: Lakebase) -> None:
    pass


def _fail(call: Call, reply: Reply) -> Break:
    return lambda lakebase: lakebase.workspace.fail(call, reply)


def _wrong_secret(lakebase: Lakebase) -> None:
    lakebase.workspace.api.clients[lakebase.client_id] = "another-not-real-secret"


def _another_certificate(lakebase: Lakebase) -> None:
    lakebase.gateway.certificate = Certificate.UNTRUSTED


def _expired_certificate(lakebase: Lakebase) -> None:
    lakebase.gateway.certificate = Certificate.EXPIRED


def _certificate_of_another(lakebase: Lakebase) -> None:
    lakebase.gateway.certificate = Certificate.WRONG_NAME


def _endpoint_elsewhere(lakebase: Lakebase) -> None:
    lakebase.workspace.api.endpoints.clear()


def _unknown_client(lakebase: Lakebase) -> None:
    lakebase.workspace.api.clients.clear()


IP_BLOCKED_TEXT = Reply(
    403, b"Source IP address: 192.0.2.7 is blocked by Databricks IP ACL", content_type="text/plain"
)


def _network_denied(lakebase: Lakebase) -> None:
    text = "Source IP address: 192.0.2.7 is blocked by Databricks IP ACL for workspace: 123"
    lakebase["one"].endpoint.refuse(ErrorResponse.fatal("28000", text), None)


def _another_workspace(lakebase: Lakebase) -> None:
    lakebase.gateway.issuer = TokenIssuer("another-workspace", time.time)


def _clock(seconds: float) -> Break:
    """Set the workspace's clock ahead of ours by this much, or behind it if negative."""

    def break_world(lakebase: Lakebase) -> None:
        lakebase.workspace.api.credential_seconds = 3600 + seconds

    return break_world


def _not_a_token(lakebase: Lakebase) -> None:
    reply = {"token": lakebase.personal_token, "expire_time": "2099-01-01T00:00:00Z"}
    in_an_hour = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    body = json.dumps({**reply, "expire_time": in_an_hour}).encode()
    lakebase.workspace.fail(Call.CREDENTIAL, Reply(200, body))


def _asleep(lakebase: Lakebase) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds, endpoint.wake_timeout_seconds = 600, 0.5


def _role_missing(lakebase: Lakebase) -> None:
    text = f"password authentication failed for user '{lakebase.client_id}'"
    lakebase["one"].endpoint.refuse(neon_error(text), None)


SHORT: dict[str, dict[str, object]] = {
    "credentials": {"mint_timeout_seconds": 6},  # the SDK is imported within it
    "upstream": {"connect_timeout_seconds": 3},
}


@dataclass(frozen=True, slots=True)
class Case:
    """How the emulator is broken, which step reports it, and with which fix."""

    name: str
    break_world: Break
    step: str
    reason: str
    fix: str  # a part of it
    text: str = ""  # a part of it
    settings: dict[str, dict[str, object]] = field(default_factory=dict)


CASES = (
    Case(
        *("wrong secret", _wrong_secret, "workspace login", "workspace_login_failed"),
        "Are client id and secret right and not expired?",
    ),
    Case(
        *("no way to log in", _nothing, "workspace login", "workspace_configuration"),
        *("Set DATABRICKS_HOST, DATABRICKS_CLIENT_ID", ""),
        {"workspace": {"client_id": "", "client_secret": "", "auth_type": ""}},
    ),
    Case(
        *("workspace not there", _nothing, "workspace login", "api_unreachable"),
        *("Is workspace.host right and reachable", ""),
        {**SHORT, "workspace": {"host": "http://127.0.0.1:1"}},
    ),
    Case(
        *("no workspace access", _fail(Call.CREDENTIAL, faults.ACCESS_MISSING), "credential"),
        *("workspace_access_missing", "Workspace access entitlement", "is disabled for users"),
    ),
    Case(
        *("IP access list", _fail(Call.CREDENTIAL, faults.IP_BLOCKED), "credential"),
        *("ip_blocked", "a new token will not help", "192.0.2.7 is blocked"),
    ),
    Case(
        *("another workspace", _endpoint_elsewhere, "credential", "endpoint_not_found"),
        "Is workspace.host the workspace that it belongs to?",
    ),
    Case(
        *("a workspace that does not know us", _unknown_client, "workspace login"),
        *("workspace_login_failed", "Is it the right workspace host?"),
    ),
    Case(
        *("not a workspace", _fail(Call.DISCOVERY, faults.NOT_JSON), "workspace login"),
        *("api_unreachable", "Is workspace.host right", "does not say where to log in"),
    ),
    Case(
        *("IP access list at the login", _fail(Call.TOKEN, IP_BLOCKED_TEXT), "workspace login"),
        *("ip_blocked", "a new token will not help"),
    ),
    Case(
        *("IP access list of the database", _network_denied, "Postgres login", "network_denied"),
        *("Check the workspace's IP access list", "is blocked by Databricks IP ACL"),
    ),
    Case(
        *("expired certificate", _expired_certificate, "TLS", "upstream_certificate"),
        *("Is there an intercepting proxy?", "expired"),
    ),
    Case(
        *("certificate of another host", _certificate_of_another, "TLS", "upstream_certificate"),
        *("Is there an intercepting proxy?", "ostname mismatch"),
    ),
    Case(
        *("uid for id", _nothing, "credential", "endpoint_not_found", "not its uid (ep-...)"),
        settings={"upstream": {"endpoint": "projects/demo-one/branches/production/endpoints/ep-x"}},
    ),
    Case(
        *("clock far behind", _clock(+1800), "credential", "credential_invalid"),
        *("Check this machine's clock", "by this machine's clock"),
    ),
    Case(
        *("clock far ahead", _clock(-3400), "credential", "credential_invalid"),
        *("Check this machine's clock", "by this machine's clock"),
    ),
    Case(
        *("clock an hour ahead", _clock(-3700), "credential", "credential_invalid"),
        *("Check this machine's clock", "", SHORT),
    ),
    Case(
        *("no host", _fail(Call.RESOURCE, faults.EMPTY), "endpoint", "upstream_starting"),
        "Try again",
    ),
    Case(
        *("unknown name", _nothing, "DNS", "upstream_dns", "Does the resolver work?", "invalid"),
        {"upstream": {"host": "no-such-host.invalid", "hostaddr": ""}},
    ),
    Case(
        *("wrong port", _nothing, "TCP", "upstream_unreachable", "Check firewall", ":1: "),
        {"upstream": {"port": 1}},
    ),
    Case(
        *("unknown authority", _another_certificate, "TLS", "upstream_certificate"),
        "Name its CA in upstream.ssl_root_cert",
    ),
    Case(
        *("token of another workspace", _another_workspace, "Postgres login", "token_rejected"),
        *("A token of another workspace?", "jwk not found"),
    ),
    Case(
        *("not a token", _not_a_token, "Postgres login", "not_a_token"),
        "an OAuth role needs a minted credential",
    ),
    Case(
        *("role missing", _role_missing, "Postgres login", "token_rejected"),
        "SELECT databricks_create_role('5ca1ab1e-",
    ),
    Case(
        *("another identity's role", _nothing, "Postgres login", "token_rejected"),
        *("Is upstream.user the identity of the token", "OAuth: User is not authorized"),
        {"upstream": {"user": "ada@example.com"}},
    ),
    Case(
        *("database missing", _nothing, "Postgres login", "database_missing"),
        *("default database is databricks_postgres", "nowhere"),
        {"upstream": {"database": "nowhere"}},
    ),
    Case(
        *("asleep", _asleep, "Postgres login", "upstream_starting", "Try again", "", SHORT),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_the_first_step_that_fails_is_the_last_and_says_how_to_fix_it(
    lakebase: Lakebase, tmp_path: Path, case: Case
) -> None:
    broken = case.break_world(lakebase)
    if broken is not None:
        await broken
    found = await checked(lakebase, tmp_path, "--json", **case.settings)
    assert (found.code, found.json["ok"]) == (EXIT_FAILURE, False)
    *passed, failed = found.json["steps"]
    assert (failed["name"], failed["ok"], failed["reason"]) == (case.step, False, case.reason)
    assert case.fix in failed["fix"]
    assert case.text in failed["text"]
    assert len(failed["sqlstate"]) == 5
    assert [step["name"] for step in passed] == STEPS[: STEPS.index(case.step)]
    assert all(step["ok"] for step in passed)


@pytest.mark.parametrize(
    ("their_clock", "text"),
    [(+600, "s behind the workspace's"), (-600, "s ahead of the workspace's")],
    ids=["ours is behind", "ours is ahead"],
)
async def test_a_clock_that_is_off_is_told_so_whatever_the_tokens_life_looks_like(
    clusters: Mapping[str, Cluster], tmp_path: Path, their_clock: float, text: str
) -> None:
    # A token of an hour that seems to have fifty minutes left looks like any other.
    async with Lakebase(clusters=clusters, clock=lambda: time.time() + their_clock) as lakebase:
        found = await checked(lakebase, tmp_path, "--json")
    assert found.code == EXIT_FAILURE
    failed = found.json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("clock", "workspace_configuration")
    assert text in failed["text"]
    assert 595 <= int(re.findall(r"it is (\d+) s", failed["text"])[0]) <= 605
    assert "Set this machine's clock" in failed["fix"]


async def test_a_workspace_that_does_not_say_the_time_is_no_failure(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # The document is asked for at the start, too, where its absence is no failure of a PAT.
    lakebase.workspace.fail(Call.DISCOVERY, faults.NOT_FOUND)
    workspace = {"client_id": "", "client_secret": "", "auth_type": "pat"}
    found = await checked(
        lakebase, tmp_path, workspace={**workspace, "token": lakebase.personal_token}
    )
    assert found.code == EXIT_OK
    assert "the workspace does not say what time it is" in found.lines[3]


async def test_for_people_a_failure_has_its_fix_below_it(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    _wrong_secret(lakebase)
    found = await checked(lakebase, tmp_path)
    assert found.code == EXIT_FAILURE
    *_, line, words, fix = found.out.splitlines()
    assert re.match(r"workspace login \(at most 30 s\) +FAIL ", line)
    assert words == "      SQLSTATE 28000, reason=workspace_login_failed"
    assert fix.startswith("      fix: Are client id and secret right")


async def test_a_secret_from_a_file_and_from_the_environment_is_not_shown(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(CANARY_SECRET + "\n")
    lakebase.workspace.api.clients[lakebase.client_id] = CANARY_SECRET
    workspace = {"client_secret": "", "client_secret_file": str(file)}
    assert (await checked(lakebase, tmp_path, workspace=workspace)).code == EXIT_OK
    lakebase.workspace.api.clients.clear()
    assert (await checked(lakebase, tmp_path, workspace=workspace)).code == EXIT_FAILURE
    file.unlink()
    found = await checked(lakebase, tmp_path, "--json", workspace=workspace)
    assert found.json["steps"][-1]["name"] == "workspace login"
    assert "client_secret_file: No such file" in found.json["steps"][-1]["text"]


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["people", "machines"])
async def test_a_configuration_error_exits_with_2_and_prints_nothing_else(
    lakebase: Lakebase, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    found = await checked(lakebase, tmp_path, *flags, upstream={"port": 0})
    assert (found.code, found.out) == (EXIT_USAGE, "")
    assert "upstream.port" in found.err
    pem = str(tmp_path / "absent.pem")
    found = await checked(lakebase, tmp_path, *flags, upstream={"ssl_root_cert": pem})
    assert (found.code, found.out) == (EXIT_USAGE, "")
    assert "upstream.ssl_root_cert" in found.err


async def test_without_an_endpoint_those_that_the_login_sees_are_named(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    api = lakebase.workspace.api
    for number in range(SHOWN_MAX):
        more = copy(api.endpoints[0])
        more.name = f"projects/zoo/branches/production/endpoints/e{number}"
        api.endpoints.append(more)
    found = await checked(lakebase, tmp_path, upstream={"endpoint": ""})
    assert (found.code, found.out) == (EXIT_USAGE, "")
    _, problem, *names, last = found.err.splitlines()
    assert problem.startswith("  upstream.endpoint (file ")
    assert problem.endswith(" (or upstream.instance); there is")
    assert len(names) == SHOWN_MAX
    assert [f"    {shard.endpoint.name}" for shard in lakebase.shards] == names[: len(SHARDS)]
    assert last == "    and more"


async def test_why_endpoints_could_not_be_listed_is_told_within_the_bound(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    _wrong_secret(lakebase)
    found = await checked(lakebase, tmp_path, "--json", upstream={"endpoint": ""})
    assert (found.code, found.out) == (EXIT_USAGE, "")
    assert "required, because tokens are issued for an endpoint" in found.err
    assert "The endpoints could not be listed: " in found.err
    assert "(workspace_login_failed)" in found.err
    lakebase.workspace.fail(Call.TOKEN, faults.HANG)
    short = {"mint_timeout_seconds": 1}
    found = await checked(lakebase, tmp_path, upstream={"endpoint": ""}, credentials=short)
    assert (found.code, found.out) == (EXIT_USAGE, "")
    assert "could not be listed: " in found.err
    # What is wrong in what is set is said alone, and nothing is asked.
    wrong = {"endpoint": "", "port": 0}
    found = await checked(lakebase, tmp_path, upstream=wrong, credentials=short)
    assert (found.code, "listed" in found.err) == (EXIT_USAGE, False)


async def test_grants_that_are_missing_on_schema_public_are_a_note(
    lakebase: Lakebase, tmp_path: Path, scratch_database: str
) -> None:
    upstream = {"database": scratch_database}
    found = await checked(lakebase, tmp_path, "--json", upstream=upstream)
    assert (found.code, found.json["steps"][-1]["note"]) == (EXIT_OK, "")
    lakebase["one"].endpoint.cluster.execute(
        "ALTER SCHEMA public OWNER TO postgres; CREATE TABLE orders (n int)",
        database=scratch_database,
    )
    found = await checked(lakebase, tmp_path, upstream=upstream)
    assert found.code == EXIT_OK
    role = f'"{lakebase.client_id}"'
    *_, first, schema, tables = found.out.splitlines()
    assert first.startswith(
        "      note: the role lacks CREATE on schema public and may not read or"
    )
    assert first.endswith(" write 1 table there (orders); if it needs to, the owner runs:")
    assert (schema, tables) == (
        f"      GRANT USAGE, CREATE ON SCHEMA public TO {role};",
        f"      GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};",
    )


async def test_the_guides_environment_alone_is_enough(lakebase: Lakebase, tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": str(ROOT),
        "DATABRICKS_HOST": lakebase.workspace_url,
        "DATABRICKS_CLIENT_ID": lakebase.client_id,
        "DATABRICKS_CLIENT_SECRET": lakebase.client_secret,
        "DATABRICKS_CONFIG_FILE": os.devnull,
        "ENDPOINT_NAME": lakebase["one"].endpoint.name,
        "PGHOST": lakebase["one"].endpoint.host,
        "PGPORT": str(lakebase.port),
        "PGDATABASE": "databricks_postgres",
        "PGUSER": lakebase.client_id,
        "PGSSLMODE": "require",
        # What only the emulator needs.
        "LAKEBASE_PROXY_UPSTREAM__HOSTADDR": lakebase.host_address,
        "LAKEBASE_PROXY_UPSTREAM__SSL_ROOT_CERT": str(lakebase.ca_file),
    }
    command = ("-B", "-m", "proxy", "check")
    code, out, err = await run_to_end(sys.executable, *command, environment=environment)
    assert (code, err) == (EXIT_OK, "")
    expected = f"current_user {lakebase.client_id}, current_database databricks_postgres"
    assert f"{expected}\n" in out
    assert lakebase.client_secret not in out


async def test_a_client_that_may_be_anyone_is_checked_as_the_tokens_identity(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # As the user of the machine, whom no token lets in, it always failed.
    found = await checked(lakebase, tmp_path, upstream={"user": "*"})
    assert found.code == EXIT_OK
    assert f"current_user {lakebase.client_id}, " in found.lines[-1]


async def test_what_the_environment_says_to_drivers_is_not_for_the_last_step(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    names = ("PGTARGETSESSIONATTRS", "PGSSLNEGOTIATION", "PGGSSLIB", "PGSERVICE", "PGPASSWORD")
    nonsense = {"PGSSLMODE": "verify-full", **dict.fromkeys(names, "nonsense")}
    config = tmp_path / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, {})))
    command = ("-B", "-m", "proxy", "check", "--config", str(config))
    environment = {"PYTHONPATH": str(ROOT), **nonsense}
    code, _, err = await run_to_end(sys.executable, *command, environment=environment)
    assert (code, err) == (EXIT_OK, "")


async def test_who_interrupts_it_is_not_told_that_all_is_well(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase.workspace.fail(Call.TOKEN, faults.HANG)
    config = tmp_path / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, {})))
    async with started_process("check", "--config", str(config)) as process:
        await lakebase.workspace.called(Call.TOKEN)
        process.send(signal.SIGINT)
        assert await process.ended() == EXIT_FAILURE
    assert process.err == "lakebase-auth-proxy: check was interrupted\n"


async def test_a_refusal_of_the_last_step_has_its_own_reason_and_fix(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # It was "startup_refused", XX000, without a fix, and three lines long.
    checking = asyncio.create_task(checked(lakebase, tmp_path, "--json"))
    await lakebase.gateway.until(lambda: len(lakebase.gateway.sessions) == 1, START_SECONDS_MAX)
    full = ErrorResponse.fatal("53300", "sorry, too many clients already")
    lakebase["one"].endpoint.refuse(full, None)
    failed = (await checking).json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("query", "upstream_full")
    assert failed["sqlstate"] == "53300"
    assert failed["text"] == "sorry, too many clients already"
    assert "Use more CU" in failed["fix"]


async def test_a_refusal_of_the_last_step_by_the_proxy_itself_is_told_the_same_way(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    checking = asyncio.create_task(checked(lakebase, tmp_path, "--json"))
    await lakebase.gateway.until(lambda: len(lakebase.gateway.sessions) == 1, START_SECONDS_MAX)
    lakebase.workspace.fail(Call.CREDENTIAL, faults.IP_BLOCKED)
    failed = (await checking).json["steps"][-1]
    assert (failed["name"], failed["reason"]) == ("query", "ip_blocked")
    assert (failed["sqlstate"], "\n" in failed["text"]) == ("28000", False)
    assert "192.0.2.7 is blocked" in failed["text"]
    assert "a new token will not help" in failed["fix"]


async def test_what_postgres_itself_says_is_said_once(lakebase: Lakebase, tmp_path: Path) -> None:
    upstream = {"endpoint": "", "instance": lakebase["one"].instance.name, "database": "nowhere"}
    found = await checked(lakebase, tmp_path, upstream=upstream)
    assert found.code == EXIT_FAILURE
    assert found.out.count('database "nowhere" does not exist') == 1


async def test_where_nothing_can_be_advised_there_is_no_empty_fix(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase.gateway.inject(Stage.STARTUP, b"Zgarbage")
    found = await checked(lakebase, tmp_path, **SHORT)
    assert found.out.endswith("SQLSTATE 08006, reason=upstream_protocol\n")


# -- every target --------------------------------------------------------------------------------


def _two_targets(lakebase: Lakebase) -> dict[str, dict[str, object]]:
    return {
        "upstream": {"endpoint": "", "hostaddr": ""},
        **{
            f"targets.{shard}": {
                "endpoint": lakebase[shard].endpoint.name,
                "hostaddr": lakebase.host_address,
            }
            for shard in ("one", "two")
        },
    }


async def test_every_target_is_checked_under_its_name(lakebase: Lakebase, tmp_path: Path) -> None:
    found = await checked(lakebase, tmp_path, "--all-shards", **_two_targets(lakebase))
    assert (found.code, found.err) == (EXIT_OK, "")
    lines = found.lines
    assert [line for line in lines if " ok   " not in line] == ["target one", "target two"]
    assert lines[0] == "target one"
    assert lines[len(STEPS) + 1] == "target two"
    assert len(lines) == 2 * (len(STEPS) + 1)
    assert lakebase["two"].endpoint.host in lines[len(STEPS) + 7]


@pytest.mark.parametrize("broken", ["one", "two"])
async def test_a_target_that_fails_ends_its_own_steps_alone(
    lakebase: Lakebase, tmp_path: Path, broken: str
) -> None:
    lakebase[broken].endpoint.disabled = True
    found = await checked(lakebase, tmp_path, "--all-shards", "--json", **_two_targets(lakebase))
    assert (found.code, found.json["ok"]) == (EXIT_FAILURE, False)
    names: dict[str, list[str]] = {"one": [], "two": []}
    for step in found.json["steps"]:
        names[step["target"]].append(step["name"])
    served = "two" if broken == "one" else "one"
    assert names[served] == STEPS
    assert names[broken] == STEPS[: len(names[broken])]
    failed = [step for step in found.json["steps"] if not step["ok"]]
    assert [(step["target"], step["reason"]) for step in failed] == [(broken, "endpoint_disabled")]
    found = await checked(lakebase, tmp_path, "--all-shards", **_two_targets(lakebase))
    assert found.code == EXIT_FAILURE
    below = {"one": 0, "two": 1}[broken]
    parts = re.split(r"^target (?:one|two)$", found.out, flags=re.MULTILINE)[1:]
    assert ["FAIL" in part for part in parts] == [below == 0, below == 1]
    assert "fix: Enable it in the project." in parts[below]


async def test_without_the_flag_one_target_is_checked_and_not_named(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase["two"].endpoint.disabled = True
    found = await checked(lakebase, tmp_path, **_two_targets(lakebase))
    assert (found.code, "target" in found.out) == (EXIT_OK, False)
