"""psql through the proxy: the guide's expected output, and how many tokens that took."""

import asyncio
import time

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.proxy_process import run_to_end
from tests.support.running import Listening, eventually, psql_path
from tests.support.sharding import TABLE, sharded

GUIDE_QUERY = "SELECT current_user, current_database()"


async def psql(proxy: Listening, sql: str, *options: str) -> str:
    where = ("-h", proxy.listen_host, "-p", str(proxy.listen_port))
    whom = ("-X", "-U", "anyone", "-d", "databricks_postgres")
    code, out, err = await run_to_end(psql_path(), *where, *whom, *options, "-At", "-c", sql)
    assert (code, err) == (0, "")
    return out.strip()


async def test_psql_without_a_password_prints_the_client_id_and_the_database(
    proxy: App, lakebase: Lakebase
) -> None:
    assert await psql(proxy, GUIDE_QUERY) == f"{lakebase.client_id}|databricks_postgres"


async def test_the_token_that_let_it_in_was_minted_for_it(proxy: App, lakebase: Lakebase) -> None:
    before = len(lakebase.workspace.mints)
    await psql(proxy, "SELECT 1")
    (mint,) = lakebase.workspace.mints[before:]
    (record,) = lakebase.gateway.sessions
    assert record.token == mint.fingerprint
    assert record.identity == mint.identity == lakebase.client_id
    assert record.secure
    assert record.sni == lakebase["one"].endpoint.host


async def test_a_second_run_within_the_maximum_age_mints_nothing(
    proxy: App, lakebase: Lakebase
) -> None:
    await psql(proxy, GUIDE_QUERY)
    await psql(proxy, GUIDE_QUERY)
    assert len(lakebase.workspace.mints) == 1
    first, second = lakebase.gateway.sessions
    assert first.token == second.token


async def test_a_second_run_with_too_old_a_token_mints_one_more(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(credentials={"token_max_age_seconds": 0.2})
    await psql(proxy, GUIDE_QUERY)
    minted_before = time.monotonic()
    await eventually(lambda: time.monotonic() - minted_before > 0.2, "the token is too old")
    await psql(proxy, GUIDE_QUERY)
    assert len(lakebase.workspace.mints) == 2
    first, second = lakebase.gateway.sessions
    assert first.token != second.token


async def test_every_run_mints_when_the_maximum_age_is_zero(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(credentials={"token_max_age_seconds": 0})
    await psql(proxy, GUIDE_QUERY)
    await psql(proxy, GUIDE_QUERY)
    assert len(lakebase.workspace.mints) == 2


async def test_a_key_in_the_databases_name_does_not_survive_a_connect_to_another(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    where = f"host={proxy.listen_host} port={proxy.listen_port} user=anyone sslmode=disable"
    other = ("-c", r"\c other", "-c", TABLE)
    in_name, in_options, again = await asyncio.gather(
        run_to_end(psql_path(), "-AtqX", f"{where} dbname=app@1500", *other),
        run_to_end(psql_path(), "-AtqX", f"{where} dbname=app options='-c shard_key=1500'", *other),
        run_to_end(psql_path(), "-AtqX", f"{where} dbname=app@7", "-c", r"\c a@1500", "-c", TABLE),
    )
    assert in_name[:2] == (1, "")  # a script ends there; a person keeps the session before
    assert "key_missing" in in_name[2]
    assert in_options[:2] == again[:2] == (0, f"{lakebase.shards[1].name}\n")


async def test_a_client_that_names_no_database_gets_the_default_one(proxy: App) -> None:
    # libpq sends the user's name then.
    where = ("-h", proxy.listen_host, "-p", str(proxy.listen_port), "-U", "anyone")
    sql = "SELECT current_database()"
    _, out, _ = await run_to_end(psql_path(), "-X", *where, "-At", "-c", sql)
    assert out.strip() == "databricks_postgres"
