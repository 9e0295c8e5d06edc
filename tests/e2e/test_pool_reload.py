"""What a reload and another host do to a pool's sessions, dials and waiting clients (P44, P45)."""

import asyncio
from pathlib import Path

import pytest

from proxy.config import ConfigurationError
from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProxy
from tests.support.pooling import (
    PID,
    count,
    pooling,
    retired,
    settled,
    states,
    taken,
    visit,
    visitor,
)
from tests.support.running import eventually, proxy_settings


async def test_p44_a_reload_that_failed_does_not_keep_the_next_one_from_closing_a_pool(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    # The upstreams of the configuration that was refused held the pool for ever.
    proxy = await start_proxy(**pooling(pool_size_max=3))
    await visit(proxy)
    await settled(proxy, idle=1)
    (tmp_path / "broken.pem").write_text("broken")
    pair = {key: str(tmp_path / "broken.pem") for key in ("tls_certificate", "tls_key")}
    for sections in (pooling(pool_size_max=3), pooling(pool_size_max=4)):
        with pytest.raises(ConfigurationError):
            proxy.reload(proxy_settings(lakebase, listen=pair, **sections))
    (row,) = proxy.metrics.pools.rows()
    assert row.present.size_max == 3
    proxy.reload(proxy_settings(lakebase))
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "nothing is kept")


async def test_p44_an_upstream_that_is_configured_as_before_keeps_its_pool(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    pid = await visit(proxy)
    await settled(proxy, idle=1)
    proxy.reload(proxy_settings(lakebase, log={"level": "debug"}, **pooling()))
    assert await visit(proxy) == pid


async def test_p44_one_that_changes_in_any_key_closes_its_sessions(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as busy:
        first = await busy.enter()
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        proxy.reload(proxy_settings(lakebase, **pooling(pool_idle_max=5)))
        await eventually(lambda: states(proxy) == {"in_use": 1}, "the idle one is closed")
        assert await visit(proxy) != first
        assert await busy.value(PID) == first
        await busy.leave()
        await settled(proxy, idle=1)
    assert retired(proxy) == {"reconfigured": 2}
    proxy.reload(proxy_settings(lakebase))
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "nothing is kept")
    assert await visit(proxy) != await visit(proxy)


async def test_p45_sessions_of_another_host_are_retired(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**pooling())
    async with visitor(proxy) as busy:
        await busy.enter()
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        upstream = proxy.snapshot.upstreams["upstream"]
        before = upstream.address_lookup.known_target
        lakebase["one"].endpoint.hosts = lakebase["two"].endpoint.hosts
        upstream.address_lookup.invalidate_host()
        await upstream.address_lookup.target()
        assert upstream.address_lookup.known_target != before
        await visit(proxy)
        await settled(proxy, idle=1, in_use=1)
        assert retired(proxy) == {"reconfigured": 1}
        await busy.leave()
    await eventually(lambda: retired(proxy) == {"reconfigured": 2}, "both are")


async def test_p44_clients_that_wait_are_served_by_the_configuration_that_a_reload_made(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # They stayed in the queue of the pool before, and dialled its host.
    proxy = await start_proxy(**pooling(pool_size_max=1))
    async with visitor(proxy) as holder, visitor(proxy) as late:
        await holder.enter()
        entering = asyncio.create_task(late.enter())
        await eventually(lambda: count(proxy, "waiting") == 1, "it waits")
        two = lakebase["two"].endpoint
        changed = pooling(pool_size_max=1, endpoint=two.name)
        proxy.reload(proxy_settings(lakebase, **changed))
        await entering
        assert [record.endpoint for record in lakebase.gateway.records if record.ready] == [
            lakebase["one"].endpoint,
            two,
        ]
        # The session of the pool before lasts as long as its client: docs/pooling.md says so.
        assert (states(proxy), count(proxy, "waiting")) == ({"in_use": 2}, 0)
        assert await holder.value("SELECT 1") == "1"
        await holder.leave()
        await late.leave()
    await settled(proxy, idle=1)
    assert retired(proxy) == {"reconfigured": 1}


async def test_p44_sessions_that_are_reset_or_dialled_meanwhile_are_not_kept(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy, gateway = await start_proxy(**pooling()), lakebase.gateway
    gateway.inject(Stage.RESET, Injection.HANG, times=1)
    await visit(proxy)
    await eventually(lambda: states(proxy) == {"resetting": 1}, "its reset hangs")
    gateway.inject(Stage.PASSWORD, Injection.HANG, times=1)
    async with visitor(proxy) as client:
        entering = asyncio.create_task(client.enter())
        await gateway.until(lambda: len(gateway.records) > 1 and bool(gateway.records[1].token))
        proxy.reload(proxy_settings(lakebase, **pooling(pool_idle_max=5)))
        await eventually(lambda: states(proxy) == {"dialling": 1}, "the reset one is closed")
        gateway.clear_faults()
        pid = await entering
        assert states(proxy) == {"in_use": 1}
        await client.leave()
    await eventually(lambda: states(proxy) == {}, "the dialled one is closed")
    assert await visit(proxy) != pid
    await settled(proxy, idle=1)
    assert retired(proxy) == {"reconfigured": 1}, "the other one was never to be kept"


async def test_p45_a_dial_to_the_host_before_that_ends_late_retires_no_good_session(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy, gateway = await start_proxy(**pooling()), lakebase.gateway
    gateway.inject(Stage.PASSWORD, Injection.HANG, times=1)
    async with visitor(proxy) as slow, visitor(proxy) as good:
        entering = asyncio.create_task(slow.enter())
        await gateway.until(lambda: bool(gateway.records and gateway.records[0].token))
        lookup = proxy.snapshot.upstreams["upstream"].address_lookup
        lakebase["one"].endpoint.hosts = lakebase["two"].endpoint.hosts
        lookup.invalidate_host()
        await lookup.target()
        pid = await good.enter()
        await good.leave()
        await eventually(lambda: states(proxy) == {"idle": 1, "dialling": 1}, "it is idle")
        gateway.clear_faults()
        await entering
        assert await visit(proxy) == pid
        await settled(proxy, idle=1, in_use=1)
        assert retired(proxy) == {}
        await slow.leave()
    await eventually(lambda: retired(proxy) == {"reconfigured": 1}, "it is retired")
    assert await visit(proxy) == pid
    assert taken(proxy) == {"dialled": 2, "reused": 2}
