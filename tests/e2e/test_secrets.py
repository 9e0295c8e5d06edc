"""A canary in every place that holds a secret shows in no log line, metric, error or status.

The log level is debug. A token of the emulator begins with `eyJ`, so that is searched for as well.
What the log masks by its form would be found by its mask.
"""

import gc
import json
import re
import signal
from pathlib import Path

import pytest

from proxy.config import UPSTREAM
from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.endpoints import neon_error
from proxy.emulator.faults import Injection, Reply, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ProxyError
from proxy.server.serving import open_snapshot
from proxy.upstream.phases import ConnectPhase
from proxy.verbs.check import check
from proxy.verbs.check_report import Report, as_outcome
from proxy.wire.startup import V3_0, StartupMessage
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import Listening, LogLines, eventually, proxy_settings
from tests.support.secret_canaries import MASKED, look

CANARY_SECRET = "canary-client-secret"
CANARY_TOKEN = "canary-database-token"
CANARY_PASSWORD = "canary-native-password"
JWT_BEGINNING = "eyJ"


async def told(proxy: Listening) -> str:
    """Connect and return all that came, as text."""
    async with plain_client(proxy) as client:
        await client.send(startup())
        return (await client.receive()).decode(errors="replace")


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def assert_clean(*texts: str) -> None:
    for text in texts:
        for secret in (CANARY_SECRET, CANARY_TOKEN, CANARY_PASSWORD, JWT_BEGINNING):
            assert secret not in text
        assert not re.search(MASKED, text)


async def test_no_secret_of_a_working_or_failing_proxy_is_ever_shown(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    lakebase.workspace.api.clients[lakebase.client_id] = CANARY_SECRET
    proxy = await start_proxy(
        workspace={"client_secret": CANARY_SECRET},
        credentials={"token_max_age_seconds": 0},
    )
    said = [await told(proxy)]
    lakebase["one"].endpoint.refuse(neon_error("jwk not found"), 2)
    said.append(await told(proxy))
    expiry = "2099-01-01T00:00:00Z"
    reply = json.dumps({"token": CANARY_TOKEN, "expire_time": expiry}).encode()
    lakebase.workspace.fail(Call.CREDENTIAL, Reply(200, reply), times=2)
    said.append(await told(proxy))
    lakebase.workspace.clear_faults()
    for failure in (faults.PERMISSION_DENIED, faults.UNAUTHENTICATED, faults.NOT_FOUND):
        lakebase.workspace.fail(Call.CREDENTIAL, failure, times=4)
        said.append(await told(proxy))
        lakebase.workspace.clear_faults()
    lakebase.workspace.api.clients.clear()
    said.append(await told(proxy))
    assert_clean(*said, log.getvalue(), proxy.metrics.exposition().decode(), repr(proxy))
    refusals = log.events("session refused")
    assert len(refusals) >= 5
    assert {line["reason"] for line in refusals} >= {"token_rejected", "not_a_token"}


async def test_no_cancel_key_is_ever_shown(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    proxy = await start_proxy()
    async with plain_client(proxy) as client:
        key = await client.start_up()
        assert key is not None
        shown = repr(proxy.cancel_keys) + repr(proxy) + repr(key)
    await eventually(lambda: log.events("session ended"), "its closing line")
    secret = key.key.reveal()
    for spelled in (secret.hex(), str(int.from_bytes(secret, "big")), repr(secret)[2:-1]):
        assert spelled not in log.getvalue() + shown


async def test_a_native_password_is_used_and_never_shown(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, tmp_path: Path
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.native_login = True
    endpoint.native_passwords[lakebase.native_role] = CANARY_PASSWORD
    file = tmp_path / "password"
    file.write_text(CANARY_PASSWORD + "\n")
    proxy = await start_proxy(
        credentials={"password_file": str(file)}, upstream={"user": lakebase.native_role}
    )
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("SELECT current_user")
        assert lakebase.native_role.encode() in await client.receive()
    assert lakebase.workspace.mints == []
    endpoint.native_passwords[lakebase.native_role] = "another-not-real-password"
    said = await told(proxy)
    assert "28" in said
    assert_clean(said, log.getvalue(), proxy.metrics.exposition().decode())


CANARY_PAT = "dapi-canary-personal-token"
CANARY_FEDERATION = "canary-projected-token"


async def test_no_secret_of_any_way_to_log_in_to_the_workspace_is_ever_shown(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, tmp_path: Path
) -> None:
    secret, projected = tmp_path / "secret", tmp_path / "projected"
    secret.write_text(CANARY_SECRET)
    projected.write_text(CANARY_FEDERATION)
    unset = {"client_id": "", "client_secret": "", "auth_type": ""}
    logins: list[dict[str, object]] = [
        {"client_secret": "", "client_secret_file": str(secret)},
        {**unset, "auth_type": "pat", "token": CANARY_PAT},
        {"client_secret": "", "auth_type": "file-oidc", "oidc_token_filepath": str(projected)},
        {"auth_type": "", "client_secret": CANARY_SECRET, "token": CANARY_PAT},  # two at once
        {"client_secret": "", "azure_client_secret": CANARY_SECRET, "auth_type": "azure-client"},
    ]
    shown = []
    for login in logins:
        settings = proxy_settings(lakebase, workspace=login)
        proxy = await start_proxy(workspace=login, credentials={"mint_timeout_seconds": 5})
        shown.append(await told(proxy))
        assert "reason=workspace_" in shown[-1]
        shown += [repr(settings), repr(proxy), proxy.metrics.exposition().decode()]
        async with open_snapshot(settings, unheard) as snapshot:
            upstream = snapshot.upstreams[UPSTREAM]
            for failing in (upstream.credentials.fresh(), upstream.workspace.identity()):
                with pytest.raises(ProxyError) as refused:
                    await failing
                shown += [repr(refused.value), str(refused.value), repr(refused.value.response())]
            parts = (
                upstream.workspace,
                upstream.credentials,
                upstream.address_lookup,
                upstream.dialer,
            )
            shown += [repr(upstream), *(repr(vars(part)) for part in parts)]
        await check(settings, report := Report())
        for step in report.steps:
            shown += [repr(step), as_outcome(step)]
    everything = [*shown, log.getvalue()]
    assert_clean(*everything)
    for text in everything:
        assert CANARY_PAT not in text
        assert CANARY_FEDERATION not in text
    assert sorted(names_in(tmp_path)) == ["projected", "secret"]


async def test_no_token_is_in_what_works(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    settings = proxy_settings(lakebase)
    shown = []
    async with open_snapshot(settings, unheard) as snapshot:
        upstream = snapshot.upstreams[UPSTREAM]
        credential = await upstream.credentials.fresh()
        session = await upstream.dialer.dial(StartupMessage(V3_0, ((b"user", b"x"),)))
        shown += [repr(credential), repr(session), repr(await upstream.workspace.identity())]
        parts = (upstream.workspace, upstream.credentials, upstream.address_lookup, upstream.dialer)
        shown += [repr(upstream), *(repr(vars(part)) for part in parts)]
        session.stream.transport.abort()
    await check(settings, report := Report())
    for step in report.steps:
        assert step.ok, step
        shown += [repr(step), as_outcome(step)]
    assert_clean(*shown, log.getvalue())


def unheard(target: str, phase: ConnectPhase | None, seconds: float) -> None:
    """Take no interest in how long a dial took."""


def shown_by_live_objects() -> dict[str, str]:
    """Return what each object of the proxy in this process says of itself, by its class."""
    shown: dict[str, str] = {}
    for found in gc.get_objects():
        module = str(type(found).__module__)
        if module.startswith("proxy.") and not module.startswith("proxy.emulator"):
            name = f"{module}.{type(found).__qualname__}"
            shown[name] = shown.get(name, "") + repr(found)
    return shown


async def test_no_live_object_of_a_proxy_at_work_shows_a_secret_in_its_repr(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.native_login = True
    endpoint.native_passwords[lakebase.native_role] = CANARY_PASSWORD
    file = tmp_path / "password"
    file.write_text(CANARY_PASSWORD)
    tokens = await start_proxy()
    password = await start_proxy(
        credentials={"password_file": str(file)}, upstream={"user": lakebase.native_role}
    )
    async with plain_client(tokens) as one, plain_client(password) as two:
        for client in (one, two):
            await client.start_up()
        lakebase.gateway.inject(Stage.PASSWORD, Injection.HANG)
        async with plain_client(tokens) as waiting:
            await waiting.send(startup())
            # A login that hears nothing more: all of its objects are alive.
            login = "proxy.upstream.login.Login"
            await eventually(lambda: login in shown_by_live_objects(), "the third login")
            shown = shown_by_live_objects()
    holding = ("wire.secret.Secret", "workspace.credential.Credential", "config.settings.Settings")
    assert {f"proxy.{name}" for name in holding} <= shown.keys()
    for name, text in shown.items():
        look(f"the repr of {name}", text)
        assert_clean(text)


@pytest.mark.slow
async def test_the_process_writes_no_secret_to_any_stream_or_file(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase.workspace.api.clients[lakebase.client_id] = CANARY_SECRET
    proxy = await start_process(
        workspace={"client_secret": CANARY_SECRET},
        log={"level": "debug"},
        credentials={"token_max_age_seconds": 0},
    )
    said = [await told(proxy)]
    lakebase["one"].endpoint.refuse(neon_error("jwk not found"), 2)
    said.append(await told(proxy))
    lakebase.workspace.api.clients.clear()
    said.append(await told(proxy))
    proxy.send(signal.SIGINT)
    assert await proxy.ended() in (0, 3)
    assert_clean(*said, proxy.out, proxy.err)
    assert names_in(tmp_path) == ["proxy.toml"]
