"""Parameters that change while a client has a pooled session: the next client must not get it (P22).

The reset reports what it changes itself. What changed under the client was reported to it, and is
reported once only.
"""

from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProxy
from tests.support.pool_clients import both_relays, pooling, retired, settled, visit, visitor
from tests.support.running import eventually


@both_relays
async def test_p22_a_session_whose_server_was_demoted_under_its_client_is_retired(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated=accelerated))
    async with visitor(proxy) as client:
        first = await client.enter()
        lakebase["one"].endpoint.promote_another()
        assert await client.value("SELECT 1") == "1"
        await client.leave()
    await eventually(lambda: retired(proxy) == {"parameter_changed": 1}, "it is retired")
    assert await visit(proxy) != first


@both_relays
async def test_p22_a_default_that_changed_under_a_client_retires_its_session(
    start_proxy: StartProxy, lakebase: Lakebase, *, accelerated: bool
) -> None:
    proxy, cluster = await start_proxy(**pooling(accelerated=accelerated)), lakebase["one"].cluster
    try:
        async with visitor(proxy) as client:
            first = await client.enter()
            cluster.execute("ALTER SYSTEM SET intervalstyle = 'iso_8601'; SELECT pg_reload_conf()")
            while await client.value("SHOW intervalstyle") != "iso_8601":
                pass  # the server reads its configuration between two statements
            await client.leave()
        await eventually(lambda: retired(proxy) == {"parameter_changed": 1}, "it is retired")
        assert await visit(proxy) != first
    finally:
        cluster.execute("ALTER SYSTEM RESET intervalstyle; SELECT pg_reload_conf()")


@both_relays
async def test_p22_what_a_client_set_itself_is_no_change(
    start_proxy: StartProxy, *, accelerated: bool
) -> None:
    proxy, pids = await start_proxy(**pooling(accelerated=accelerated)), set()
    for sql in (
        "SET intervalstyle = 'sql_standard'",
        "SET TimeZone = 'CET'; SET TimeZone = 'UTC'; SET application_name = 'x'",
        "SET client_encoding = 'LATIN1'; RESET client_encoding",
        "BEGIN; SET LOCAL DateStyle = 'German'; COMMIT",
    ):
        async with visitor(proxy) as client:
            pids.add(await client.enter())
            await client.value(sql)
            await client.leave()
        await settled(proxy, idle=1)
    assert (len(pids), retired(proxy)) == (1, {})
