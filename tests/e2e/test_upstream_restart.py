"""An upstream that restarts: what is waited for, and what programs make of the answer."""

import asyncio

import psycopg

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.proxy_process import run_to_end
from tests.support.running import USER, libpq, psql_path

# Three tries took half a second, then every client had an error.
RESTART_SECONDS = 1.5


async def test_pg_isready_says_rejecting_connections(proxy: App, lakebase: Lakebase) -> None:
    # With 08001 it said "accepting connections".
    await lakebase.gateway.refuse_connections()
    where = ("-h", proxy.listen_host, "-p", str(proxy.listen_port), "-U", USER, "-t", "20")
    code, out, _ = await run_to_end(psql_path().with_name("pg_isready"), *where)
    assert (code, out.strip().endswith("rejecting connections")) == (1, True)


async def test_libpq_goes_on_to_its_next_host(start_proxy: StartProxy, lakebase: Lakebase) -> None:
    # With 08001 libpq stopped at the first host.
    unreachable = await start_proxy(upstream={"host": "no-such-host.invalid", "hostaddr": ""})
    proxy = await start_proxy()
    hosts = {
        "host": f"{unreachable.listen_host},{proxy.listen_host}",
        "port": f"{unreachable.listen_port},{proxy.listen_port}",
    }
    async with await psycopg.AsyncConnection.connect(**libpq(proxy, **hosts)) as connection:
        assert connection.info.port == proxy.listen_port


async def test_a_port_that_refuses_for_some_seconds_is_waited_for(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(upstream={"connect_retry_seconds": 30})
    await lakebase.gateway.refuse_connections()
    connecting = asyncio.create_task(psycopg.AsyncConnection.connect(**libpq(proxy)))
    try:
        done, _ = await asyncio.wait([connecting], timeout=RESTART_SECONDS)
        assert not done, "the client was refused while the upstream restarted"
        await lakebase.gateway.accept_connections()
        async with await connecting as connection:
            assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)
    finally:
        connecting.cancel()


async def test_a_login_that_hangs_once_is_tried_again_within_the_connect_timeout(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # A login to a database that wakes took the whole connect timeout, and failed.
    proxy = await start_proxy(upstream={"connect_timeout_seconds": 4})
    lakebase.gateway.inject(Stage.AUTHENTICATED, Injection.HANG, times=1)
    async with await psycopg.AsyncConnection.connect(**libpq(proxy)) as connection:
        assert (await (await connection.execute("SELECT 1")).fetchone()) == (1,)
    assert lakebase.gateway.accepted == 2
