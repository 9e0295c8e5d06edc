"""The gateway, with drivers: logins, dialects, parameters, suspend and wake, limits, cancel."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from proxy.emulator.certificates import Certificate
from proxy.emulator.cluster import GROUP, PERSON, Cluster
from proxy.emulator.endpoints import Endpoint, SessionEnd, neon_error
from proxy.emulator.lakebase import Lakebase, Shard
from proxy.emulator.streams import EndedBy
from proxy.emulator.tokens import Purpose, TokenIssuer, fingerprint
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import SSLRequest
from tests.support.client import Client, startup
from tests.support.loops import LOOPS, NewLoop, run

CONNECT_SECONDS_MAX = 10


@contextlib.asynccontextmanager
async def direct(
    lakebase: Lakebase, endpoint: Endpoint, **overrides: str
) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
    parameters: dict[str, Any] = {**lakebase.direct(endpoint), **overrides}
    connecting = psycopg.AsyncConnection.connect(**parameters, autocommit=True)
    async with asyncio.timeout(CONNECT_SECONDS_MAX):
        connection = await connecting
    try:
        yield connection
    finally:
        await connection.close()


async def one_row(connection: psycopg.AsyncConnection[tuple[Any, ...]], sql: str) -> Any:
    cursor = await connection.execute(sql.encode())
    return await cursor.fetchone()


async def refusal(lakebase: Lakebase, endpoint: Endpoint, **overrides: str) -> str:
    """Return the text of the error that refuses a login, as libpq shows it."""
    with pytest.raises(psycopg.OperationalError) as refused:
        async with direct(lakebase, endpoint, **overrides):
            pass
    return str(refused.value)


class _NamingContext(ssl.SSLContext):
    """Sets the name for SNI and verification. asyncpg cannot dial an address under another name."""

    name = ""

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return super().wrap_bio(*arguments, **{**options, "server_hostname": self.name})


@pytest.fixture
def shard(lakebase: Lakebase) -> Shard:
    return lakebase["one"]


async def test_a_token_opens_every_shard_of_its_workspace(lakebase: Lakebase) -> None:
    token = lakebase.token()
    for shard in lakebase.shards:
        for face in (shard.endpoint, shard.instance):
            async with direct(lakebase, face, password=token) as connection:
                row = await one_row(connection, "SELECT current_user, name FROM shard_identity")
                assert row == (lakebase.client_id, shard.name)
    assert {record.token for record in lakebase.gateway.sessions} == {fingerprint(token)}
    assert lakebase.gateway.accepted == 4


async def test_asyncpg_logs_in(lakebase: Lakebase, shard: Shard) -> None:
    context = _NamingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(lakebase.ca_file)
    context.name = shard.endpoint.host
    connection = await asyncpg.connect(
        host=lakebase.host_address,
        port=lakebase.port,
        user=lakebase.client_id,
        password=lakebase.token(),
        database=lakebase.database,
        ssl=context,
    )
    assert await connection.fetchval("SELECT name FROM shard_identity") == "one"
    await connection.close()


async def test_a_session_ends_with_close_notify_and_is_recorded(
    lakebase: Lakebase, shard: Shard
) -> None:
    async with direct(lakebase, shard.endpoint, application_name="recorded") as connection:
        (pid,) = await one_row(connection, "SELECT pg_backend_pid()")
        assert lakebase.gateway.open_sessions == 1
    (record,) = lakebase.gateway.sessions
    await lakebase.gateway.until(lambda: record.closed)
    assert record.ended_by is EndedBy.CLOSE_NOTIFY
    assert record.parameter(b"application_name") == b"recorded"
    assert (record.sni, record.real_pid) == (shard.endpoint.host, pid)
    assert record.identity == lakebase.client_id
    assert lakebase.gateway.open_sessions == 0


# -- certificates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        (Certificate.WRONG_NAME, "does not match host name"),
        (Certificate.EXPIRED, "certificate verify failed"),
        (Certificate.UNTRUSTED, "certificate verify failed"),
    ],
)
async def test_a_bad_certificate_is_refused_by_the_client(
    lakebase: Lakebase, shard: Shard, certificate: Certificate, text: str
) -> None:
    lakebase.gateway.certificate = certificate
    assert text in await refusal(lakebase, shard.endpoint)
    lakebase.gateway.certificate = Certificate.GOOD
    async with direct(lakebase, shard.endpoint):
        pass


async def test_one_of_several_addresses_is_dead(lakebase: Lakebase, shard: Shard) -> None:
    async with direct(
        lakebase,
        shard.endpoint,
        host=f"{shard.endpoint.host},{shard.endpoint.host}",
        hostaddr=f"{lakebase.dead_address},{lakebase.host_address}",
    ) as connection:
        assert await one_row(connection, "SELECT 1") == (1,)


async def test_a_host_that_no_endpoint_serves_cannot_be_found(
    lakebase: Lakebase, shard: Shard
) -> None:
    host = "ep-unknown-00000000.database.eu-west-1.cloud.databricks.com"
    assert "endpoint cannot be found" in await refusal(lakebase, shard.endpoint, host=host)


# -- tokens --------------------------------------------------------------------------------------


def _bad_tokens(lakebase: Lakebase) -> dict[str, str]:
    stranger = TokenIssuer("elsewhere", lambda: 2e9)
    return {
        "is not a valid JWT encoding": lakebase.personal_token,
        "jwk not found": stranger.issue(lakebase.client_id, Purpose.DATABASE, 3600),
        "invalid JWT token audience": lakebase.workspace.api.issuer.issue(
            lakebase.client_id, Purpose.WORKSPACE, 3600
        ),
    }


@pytest.mark.parametrize("misfit", [True, False])
async def test_a_token_that_expired_or_misfits_is_not_authorized(
    lakebase: Lakebase, shard: Shard, misfit: bool
) -> None:
    token = lakebase.token(PERSON) if misfit else lakebase.token(lifetime_seconds=-1)
    shown = await refusal(lakebase, shard.endpoint, password=token)
    assert "ERROR:  OAuth: User is not authorized" in shown
    shown = await refusal(lakebase, shard.instance, password=token)
    text = "did not match the security label" if misfit else "Invalid authorization for databricks"
    assert text in shown


async def test_each_bad_token_has_its_text(lakebase: Lakebase, shard: Shard) -> None:
    for text, token in _bad_tokens(lakebase).items():
        shown = await refusal(lakebase, shard.endpoint, password=token)
        assert text in shown
        assert shown.count("ERROR:") == 1
        assert token not in shown


async def test_a_bad_token_on_a_provisioned_instance_is_a_wrong_password(
    lakebase: Lakebase, shard: Shard
) -> None:
    token = TokenIssuer("elsewhere", lambda: 2e9).issue(lakebase.client_id, Purpose.DATABASE, 3600)
    shown = await refusal(lakebase, shard.instance, password=token)
    assert f'FATAL:  password authentication failed for user "{lakebase.client_id}"' in shown


async def test_a_role_that_does_not_exist(lakebase: Lakebase, shard: Shard) -> None:
    """The error is the same whether or not the token is that of the missing role."""
    for identity in ("other@example.com", lakebase.client_id):
        login = {"user": "other@example.com", "password": lakebase.token(identity)}
        shown = await refusal(lakebase, shard.endpoint, **login)
        assert "ERROR:  password authentication failed for user 'other@example.com'" in shown
        shown = await refusal(lakebase, shard.instance, **login)
        assert 'FATAL:  password authentication failed for user "other@example.com"' in shown


async def test_a_member_logs_in_as_the_group_and_a_stranger_does_not(
    lakebase: Lakebase, shard: Shard
) -> None:
    for member in (lakebase.client_id, PERSON):
        login = {"user": GROUP, "password": lakebase.token(member)}
        async with direct(lakebase, shard.endpoint, **login) as connection:
            assert await one_row(connection, "SELECT current_user") == (GROUP,)
    token = lakebase.token("stranger@example.com")
    shown = await refusal(lakebase, shard.endpoint, user=GROUP, password=token)
    assert "User is not authorized" in shown


async def test_expiry_never_ends_an_open_session(clusters: Any) -> None:
    class Clock:
        now = 1_700_000_000.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    async with Lakebase(clusters=clusters, clock=clock) as lakebase:
        token = lakebase.token()
        endpoint = lakebase["one"].endpoint
        async with direct(lakebase, endpoint, password=token) as connection:
            clock.now += 3601
            assert "not authorized" in await refusal(lakebase, endpoint, password=token)
            assert await one_row(connection, "SELECT 1") == (1,)


async def test_the_next_login_can_be_refused_with_any_text(
    lakebase: Lakebase, shard: Shard
) -> None:
    shard.endpoint.refuse(neon_error("Failed to acquire permit to connect to the database"))
    shard.endpoint.refuse(ErrorResponse.fatal("XX000", "Internal error. (reference: 1)"))
    assert "acquire permit" in await refusal(lakebase, shard.endpoint)
    assert "Internal error." in await refusal(lakebase, shard.endpoint)
    async with direct(lakebase, shard.endpoint):
        pass
    texts = [record.refusal for record in lakebase.gateway.records]
    assert texts[1:] == ["Internal error. (reference: 1)", None]


# -- pooled hosts and native roles ---------------------------------------------------------------


async def test_a_pooled_host_takes_native_passwords_only(lakebase: Lakebase, shard: Shard) -> None:
    pooled = {"host": shard.endpoint.pooled_host}
    native = {"user": lakebase.native_role, "password": lakebase.native_password}
    async with direct(lakebase, shard.endpoint, **pooled, **native) as connection:
        assert await one_row(connection, "SELECT current_user") == (lakebase.native_role,)
    for _ in range(5):
        shown = await refusal(lakebase, shard.endpoint, **pooled)
        assert "FATAL:  SASL authentication failed" in shown
    assert "Too many connections attempts" in await refusal(lakebase, shard.endpoint, **pooled)


async def test_a_pooled_host_can_take_tokens(lakebase: Lakebase, shard: Shard) -> None:
    shard.endpoint.pooler_takes_tokens = True
    pooled = {"host": shard.endpoint.pooled_host}
    async with direct(lakebase, shard.endpoint, **pooled) as connection:
        assert await one_row(connection, "SELECT current_user") == (lakebase.client_id,)
    native = {"user": lakebase.native_role, "password": lakebase.native_password}
    async with direct(lakebase, shard.endpoint, **pooled, **native) as connection:
        assert await one_row(connection, "SELECT current_user") == (lakebase.native_role,)


async def test_a_pooled_host_refuses_settings_in_options(lakebase: Lakebase, shard: Shard) -> None:
    shown = await refusal(
        lakebase, shard.endpoint, host=shard.endpoint.pooled_host, options="-c work_mem=5MB"
    )
    assert "unsupported startup parameter in options: work_mem" in shown


async def test_a_native_role_logs_in_where_that_is_enabled(
    lakebase: Lakebase, shard: Shard
) -> None:
    native = {"user": lakebase.native_role, "password": lakebase.native_password}
    assert "login is disabled" in await refusal(lakebase, shard.endpoint, **native)
    shard.endpoint.native_login = True
    async with direct(lakebase, shard.endpoint, **native, require_auth="scram-sha-256"):
        pass
    wrong = {**native, "password": "not-the-password"}
    assert "password authentication failed" in await refusal(lakebase, shard.endpoint, **wrong)


# -- parameters and Postgres' own answers ---------------------------------------------------------


async def test_autoscaling_drops_startup_pairs_and_forces_utf8(
    lakebase: Lakebase, shard: Shard
) -> None:
    async with direct(
        lakebase, shard.endpoint, client_encoding="LATIN1", options="-c statement_timeout=7s"
    ) as connection:
        assert connection.info.parameter_status("client_encoding") == "UTF8"
        assert await one_row(connection, "SHOW statement_timeout") == ("7s",)
    (record,) = lakebase.gateway.sessions
    assert record.parameter(b"client_encoding") == b"LATIN1"


async def test_provisioned_passes_startup_pairs(lakebase: Lakebase, shard: Shard) -> None:
    async with direct(lakebase, shard.instance, client_encoding="LATIN1") as connection:
        assert connection.info.parameter_status("client_encoding") == "LATIN1"


async def test_words_for_the_front_end_do_not_reach_postgres(
    lakebase: Lakebase, shard: Shard
) -> None:
    own = f"endpoint={shard.endpoint.uid} neon_proxy_params_compat:true -c work_mem=5MB"
    async with direct(
        lakebase, shard.endpoint, options=own, client_encoding="LATIN1"
    ) as connection:
        assert await one_row(connection, "SHOW work_mem") == ("5MB",)
    shown = await refusal(lakebase, shard.endpoint, options="project=ep-another-00000000")
    assert "Inconsistent project name inferred from SNI" in shown


async def test_postgres_own_login_error_loses_its_sqlstate_in_one_dialect(
    lakebase: Lakebase, shard: Shard
) -> None:
    text = 'database "missing" does not exist'
    assert f"ERROR:  {text}" in await refusal(lakebase, shard.endpoint, dbname="missing")
    assert f"FATAL:  {text}" in await refusal(lakebase, shard.instance, dbname="missing")


async def test_an_error_in_a_session_is_postgres_own(lakebase: Lakebase, shard: Shard) -> None:
    async with direct(lakebase, shard.endpoint) as connection:
        with pytest.raises(psycopg.errors.UndefinedTable):
            await connection.execute("SELECT * FROM no_such_table")


# -- states and limits ---------------------------------------------------------------------------


async def test_a_disabled_endpoint_refuses_every_login(lakebase: Lakebase, shard: Shard) -> None:
    shard.endpoint.disabled = True
    assert "endpoint is disabled" in await refusal(lakebase, shard.endpoint)


async def test_readable_secondaries_are_off_until_enabled(lakebase: Lakebase, shard: Shard) -> None:
    host = shard.endpoint.hosts["read_only_host"]
    shown = await refusal(lakebase, shard.endpoint, host=host)
    assert "External authorization failed." in shown
    shard.endpoint.readable_secondaries = True
    async with direct(lakebase, shard.endpoint, host=host):
        pass


async def test_a_login_wakes_a_sleeping_compute(lakebase: Lakebase, shard: Shard) -> None:
    shard.endpoint.suspend()
    shard.endpoint.wake_seconds = 0.2
    assert shard.endpoint.state == "IDLE"
    async with direct(lakebase, shard.endpoint):
        assert (shard.endpoint.state, shard.endpoint.wakes) == ("ACTIVE", 1)


async def test_a_compute_that_wakes_slowly_says_so_until_it_is_awake(
    lakebase: Lakebase, shard: Shard
) -> None:
    for face, text, state in (
        (shard.endpoint, "Couldn't connect to compute node", "INIT"),
        (shard.instance, "the database system is starting up", "STARTING"),
    ):
        face.suspend()
        face.wake_seconds, face.wake_timeout_seconds = 0.4, 0.01
        assert text in await refusal(lakebase, face)
        assert face.state == state
        face.wake_timeout_seconds = 5
        async with direct(lakebase, face):
            pass
        assert face.wakes == 1


async def test_an_idle_session_does_not_keep_a_compute_awake(
    lakebase: Lakebase, shard: Shard
) -> None:
    shard.endpoint.suspend_after_seconds = 0.2
    async with direct(lakebase, shard.endpoint) as connection:
        await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)
        assert shard.endpoint.state == "IDLE"
        with pytest.raises(psycopg.errors.AdminShutdown):
            await connection.execute("SELECT 1")


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (SessionEnd.ADMIN_SHUTDOWN, psycopg.errors.AdminShutdown),
        (SessionEnd.END_OF_FILE, psycopg.OperationalError),
        (SessionEnd.RESET, psycopg.OperationalError),
    ],
)
async def test_a_failover_ends_sessions_in_any_of_three_ways(
    lakebase: Lakebase, shard: Shard, ending: SessionEnd, kind: type[Exception]
) -> None:
    async with direct(lakebase, shard.endpoint) as connection:
        shard.endpoint.fail_over(0.1, ending)
        with pytest.raises(kind):
            await connection.execute("SELECT pg_sleep(10)")
    async with direct(lakebase, shard.endpoint):
        assert shard.endpoint.wakes == 0


async def test_connections_are_limited_in_number_and_rate(lakebase: Lakebase, shard: Shard) -> None:
    shard.endpoint.sessions_max = 1
    async with direct(lakebase, shard.endpoint):
        shown = await refusal(lakebase, shard.endpoint)
        assert "remaining connection slots are reserved" in shown
    await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)
    shard.endpoint.connects_per_second_max = 0
    assert "Too many connections attempts" in await refusal(lakebase, shard.endpoint)


async def test_idle_and_old_sessions_are_ended(lakebase: Lakebase, shard: Shard) -> None:
    shard.endpoint.idle_seconds_max = 0.1
    async with direct(lakebase, shard.endpoint) as connection:
        await lakebase.gateway.until(lambda: lakebase.gateway.open_sessions == 0)
        with pytest.raises(psycopg.OperationalError):
            await connection.execute("SELECT 1")
    shard.instance.lifetime_seconds_max = 0.1
    async with direct(lakebase, shard.instance) as connection:
        with pytest.raises(psycopg.errors.AdminShutdown):
            await connection.execute("SELECT pg_sleep(10)")


async def test_a_closed_port_refuses_and_sessions_go_on(lakebase: Lakebase, shard: Shard) -> None:
    async with direct(lakebase, shard.endpoint) as connection:
        await lakebase.gateway.refuse_connections()
        assert "refused" in (await refusal(lakebase, shard.endpoint)).lower()
        assert await one_row(connection, "SELECT 1") == (1,)
        await lakebase.gateway.accept_connections()
        async with direct(lakebase, shard.endpoint):
            pass


# -- cancel and bulk -----------------------------------------------------------------------------


async def test_the_key_shown_is_not_postgres_own_unless_told(
    lakebase: Lakebase, shard: Shard
) -> None:
    async with direct(lakebase, shard.endpoint) as connection:
        (pid,) = await one_row(connection, "SELECT pg_backend_pid()")
        assert connection.info.backend_pid != pid
    shard.endpoint.passes_real_key = True
    async with direct(lakebase, shard.endpoint) as connection:
        (pid,) = await one_row(connection, "SELECT pg_backend_pid()")
        assert connection.info.backend_pid == pid


async def test_a_driver_cancels_its_query(lakebase: Lakebase, shard: Shard) -> None:
    async with direct(lakebase, shard.endpoint) as connection:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            query = group.create_task(_cancelled_query(connection))
            record = lakebase.gateway.sessions[0]
            await _until_active(shard, record.real_pid)
            await connection.cancel_safe()
        assert query.result()
        assert await one_row(connection, "SELECT 1") == (1,)
    (cancel,) = lakebase.gateway.cancels
    assert cancel.cancel_known


async def test_200_megabytes_pass_each_way_and_memory_stays_flat(
    lakebase: Lakebase, shard: Shard, scratch_database: str
) -> None:
    rows, line = 200_000, b"x" * 999 + b"\n"
    async with direct(lakebase, shard.endpoint, dbname=scratch_database) as connection:
        await connection.execute("CREATE UNLOGGED TABLE bulk (line text)")
        before = _resident_bytes()
        peak = before
        async with connection.cursor() as cursor:
            async with cursor.copy("COPY bulk FROM STDIN") as copy:
                for _ in range(rows // 200):
                    await copy.write(line * 200)
                    peak = max(peak, _resident_bytes())
            received = 0
            async with cursor.copy("COPY bulk TO STDOUT") as copy:
                async for chunk in copy:
                    received += len(chunk)
                    if received % (1 << 20) < len(chunk):
                        peak = max(peak, _resident_bytes())
    assert received == rows * len(line)
    assert peak - before < 24 * 1024 * 1024


async def _cancelled_query(connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> bool:
    with pytest.raises(psycopg.errors.QueryCanceled):
        await connection.execute("SELECT pg_sleep(30)")
    return True


async def _until_active(shard: Shard, pid: int | None) -> None:
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
    while await asyncio.to_thread(shard.cluster.execute, sql) != "1":
        pass


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@LOOPS
@pytest.mark.parametrize("packet", [b"", SSLRequest().encode(), startup(), b"garbage!"])
@pytest.mark.parametrize("way", ["close", "reset"])
def test_a_client_that_hangs_up_first_leaves_no_traceback(
    clusters: Mapping[str, Cluster], new_loop: NewLoop, packet: bytes, way: str
) -> None:
    # asyncio printed "Unhandled exception in client_connected_cb" for each client that hung up:
    # what is sent to a client that has closed is answered by RST, and then write_eof raises
    # ENOTCONN, where uvloop's does nothing.
    async def story() -> None:
        async with Lakebase(clusters=clusters) as lakebase:
            gateway = lakebase.gateway
            client = await Client.connect(("127.0.0.1", gateway.port))
            await client.send(packet)
            getattr(client, way)()
            await gateway.until(lambda: bool(gateway.records) and gateway.records[-1].closed)

    run(new_loop, story)
