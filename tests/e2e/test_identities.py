"""Who logs in, with what, and where: every way that a configuration can name, end to end."""

import asyncio
from pathlib import Path

import psycopg
import pytest

from proxy.emulator.api import Call
from proxy.emulator.endpoints import Dialect, neon_error
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.workspace.single_flight import BACKOFF_SECONDS_MIN
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import Listening, libpq


async def who(proxy: Listening) -> str:
    """Log in and return the role."""
    async with await psycopg.AsyncConnection.connect(**libpq(proxy)) as connection:
        row = await (await connection.execute("SELECT current_user::text")).fetchone()
    assert row is not None
    return str(row[0])


async def refused(proxy: App) -> str:
    """Connect and return the reason of the refusal."""
    async with plain_client(proxy) as client:
        await client.send(startup())
        return (await client.error()).text(b"D").split()[0]


async def test_a_secret_in_a_file_is_rotated_without_a_restart(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "client-secret"
    file.write_text("first-not-real\n")
    lakebase.workspace.api.clients[lakebase.client_id] = "first-not-real"
    proxy = await start_process(
        workspace={"client_secret": "", "client_secret_file": str(file)},
        credentials={"token_max_age_seconds": 0},
        startup={"require": "none"},  # else the first mint and the first client may log in at once
    )
    assert await who(proxy) == lakebase.client_id
    logins = lakebase.workspace.calls[Call.TOKEN]
    assert await who(proxy) == lakebase.client_id
    assert lakebase.workspace.calls[Call.TOKEN] == logins == 1  # the same secret, the same login
    lakebase.workspace.api.clients[lakebase.client_id] = "second-not-real"
    file.write_text("second-not-real")
    assert await who(proxy) == lakebase.client_id
    assert lakebase.workspace.calls[Call.TOKEN] == 2
    assert "not-real" not in proxy.err + proxy.out


async def test_a_secret_that_was_rotated_too_late_is_taken_when_it_comes(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "client-secret"
    file.write_text("first-not-real")
    proxy = await start_proxy(
        workspace={"client_secret": "", "client_secret_file": str(file)},
    )
    assert await refused(proxy) == "reason=workspace_login_failed"
    file.write_text(lakebase.client_secret)
    await asyncio.sleep(BACKOFF_SECONDS_MIN)
    assert await who(proxy) == lakebase.client_id
    file.unlink()
    assert await who(proxy) == lakebase.client_id  # with the token that is there


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["absent", "empty", "not utf-8"])
async def test_a_secret_file_that_cannot_be_used_is_told_so(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "client-secret"
    if content is not None:
        file.write_bytes(content)
    workspace = {"client_secret": "", "client_secret_file": str(file)}
    proxy = await start_proxy(workspace=workspace)
    assert await refused(proxy) == "reason=workspace_configuration"


async def test_a_projected_token_is_exchanged_and_read_again(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "projected-token"
    file.write_text(lakebase.workspace.federation_token(lakebase.client_id))
    lakebase.workspace.api.workspace_token_seconds = 30  # shorter than what the SDK keeps
    proxy = await start_proxy(
        workspace={
            "client_secret": "",
            "auth_type": "file-oidc",
            "oidc_token_filepath": str(file),
        },
        credentials={"token_max_age_seconds": 0},
    )
    assert await who(proxy) == lakebase.client_id
    file.write_text(lakebase.workspace.federation_token(lakebase.client_id))
    assert await who(proxy) == lakebase.client_id
    assert len(lakebase.workspace.mints) == 2
    file.write_text("not-a-real-projected-token")
    # With the token that is still valid. The API is left alone for a minute then.
    for _ in range(2):
        assert await who(proxy) == lakebase.client_id
    assert proxy.metrics.value("token_mint_failures_total") == 1


async def test_a_token_in_a_variable_is_exchanged(
    start_proxy: StartProxy, lakebase: Lakebase, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = lakebase.workspace.federation_token(lakebase.client_id)
    monkeypatch.setenv("SOME_OIDC_TOKEN", token)
    proxy = await start_proxy(
        workspace={
            "client_secret": "",
            "auth_type": "env-oidc",
            "oidc_token_env": "SOME_OIDC_TOKEN",
        },
    )
    assert await who(proxy) == lakebase.client_id


PAT = {"client_id": "", "client_secret": "", "auth_type": "pat"}


async def test_a_personal_access_token_mints_and_says_who_it_is(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    workspace = {**PAT, "token": lakebase.personal_token}
    proxy = await start_proxy(workspace=workspace)
    assert await asyncio.gather(*(who(proxy) for _ in range(10))) == [lakebase.client_id] * 10
    calls = lakebase.workspace.calls
    assert (calls[Call.TOKEN], calls[Call.ME], calls[Call.CREDENTIAL]) == (0, 1, 1)


async def test_a_profile_file_is_enough(
    start_proxy: StartProxy,
    lakebase: Lakebase,
    tmp_path: Path,
) -> None:
    file = tmp_path / "profiles"
    file.write_text(
        f"[shop]\nhost = {lakebase.workspace_url}\nclient_id = {lakebase.client_id}\n"
        f"client_secret = {lakebase.client_secret}\n"
    )
    workspace = {"host": "", "client_id": "", "client_secret": "", "auth_type": ""}
    proxy = await start_proxy(workspace={**workspace, "profile": "shop", "config_file": str(file)})
    assert await who(proxy) == lakebase.client_id


async def test_a_group_role_is_logged_in_to_with_the_members_own_token(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    (group,) = lakebase["one"].endpoint.members
    proxy = await start_proxy(upstream={"user": group})
    assert await who(proxy) == group
    assert [mint.identity for mint in lakebase.workspace.mints] == [lakebase.client_id]


async def test_a_provisioned_instance_is_reached_by_its_own_calls(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    instance = lakebase["one"].instance
    proxy = await start_proxy(upstream={"endpoint": "", "instance": instance.name})
    assert await who(proxy) == lakebase.client_id
    calls = lakebase.workspace.calls
    assert (calls[Call.INSTANCE_CREDENTIAL], calls[Call.INSTANCE]) == (1, 1)
    assert (calls[Call.CREDENTIAL], calls[Call.RESOURCE]) == (0, 0)
    (record,) = lakebase.gateway.sessions
    assert (record.sni, record.endpoint) == (instance.host, instance)


async def test_an_instance_with_autoscaling_behind_its_name_is_served_the_same(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # Instances are upgraded in place: the name says nothing of the front end's dialect.
    instance = lakebase["one"].instance
    instance.dialect = Dialect.AUTOSCALING
    proxy = await start_proxy(upstream={"endpoint": "", "instance": instance.name})
    given = libpq(proxy, options="-c search_path=mine")
    async with await psycopg.AsyncConnection.connect(**given) as connection:
        shown = await connection.execute("SHOW search_path")
        assert await shown.fetchone() == ("mine",)
    instance.refuse(neon_error("OAuth: User is not authorized"), None)
    assert await refused(proxy) == "reason=token_rejected"


@pytest.mark.parametrize("face", ["endpoint", "instance"])
async def test_the_read_only_host_is_dialled_where_it_is_asked_for(
    start_proxy: StartProxy, lakebase: Lakebase, face: str
) -> None:
    reached = getattr(lakebase["one"], face)
    reached.readable_secondaries = True
    upstream = {"endpoint": "", face: reached.name, "read_only": True}
    proxy = await start_proxy(upstream=upstream)
    assert await who(proxy) == lakebase.client_id
    assert [record.sni for record in lakebase.gateway.sessions] == [reached.hosts["read_only_host"]]


async def test_a_read_only_host_that_is_off_or_missing_is_told_so(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    soon = {"read_only": True, "connect_timeout_seconds": 2}
    assert await refused(await start_proxy(upstream=soon)) == "reason=authorization_denied"
    endpoint.hidden_hosts = {"read_only_host"}
    assert await refused(await start_proxy(upstream=soon)) == "reason=upstream_starting"


async def test_a_native_role_is_served_through_a_pooled_host(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(lakebase.native_password + "\n")
    endpoint = lakebase["one"].endpoint
    proxy = await start_proxy(
        credentials={"password_file": str(file)},
        upstream={"endpoint": "", "host": endpoint.pooled_host, "user": lakebase.native_role},
    )
    assert await who(proxy) == lakebase.native_role
    (record,) = lakebase.gateway.sessions
    assert (record.sni, record.token) == (endpoint.pooled_host, None)
    assert lakebase.workspace.calls.total() == 0


async def test_a_token_is_tried_on_a_pooled_host_that_is_looked_up(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # It was a configuration error. Both kinds of pooled hosts have been documented.
    endpoint = lakebase["one"].endpoint
    proxy = await start_proxy(upstream={"pooled": True})
    assert await refused(proxy) == "reason=pooler_needs_password"
    endpoint.pooler_takes_tokens = True
    assert await who(proxy) == lakebase.client_id
    (record,) = lakebase.gateway.sessions
    assert record.sni == endpoint.pooled_host


async def test_a_pooled_host_gets_what_it_tracks_and_no_other_setting(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    lakebase["one"].endpoint.pooler_takes_tokens = True
    proxy = await start_proxy(upstream={"pooled": True})
    tracked = libpq(proxy, application_name="cron", options="-c TimeZone=Asia/Tokyo")
    async with await psycopg.AsyncConnection.connect(**tracked) as connection:
        shown = await connection.execute("SELECT current_setting('TimeZone')")
        assert await shown.fetchone() == ("Asia/Tokyo",)
    dialled = lakebase.gateway.accepted
    with pytest.raises(psycopg.OperationalError, match="reason=pooler_parameter search_path"):
        await psycopg.AsyncConnection.connect(**libpq(proxy, options="-c search_path=x"))
    assert lakebase.gateway.accepted == dialled


async def test_what_was_minted_and_asked_is_what_the_api_counted(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy()
    for _ in range(5):
        await who(proxy)
    assert proxy.metrics.value("tokens_minted_total") == len(lakebase.workspace.mints) == 1
    assert lakebase.workspace.calls[Call.RESOURCE] == 1
