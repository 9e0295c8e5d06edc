"""The alert rules against what a running proxy exposes, in a healthy hour and in each outage.

Each outage happens to a real proxy in front of the emulator, or of a catalogue and its shards, for
a moment between two scrapes; then Prometheus evaluates the rules as if it went on for minutes
(`tests/support/prometheus.py`). The times are those of docs/metrics.md. Debian has promtool in its
package `prometheus`.
"""

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import asyncpg
import pytest
import yaml

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.cluster import Cluster
from proxy.emulator.cluster import running as cluster_running
from proxy.emulator.lakebase import Lakebase
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import CancelRequest
from tests.e2e.test_blocked_log import be_refused, full_pipe, proxy_logging_to
from tests.support.admin_address import metrics_once
from tests.support.catalogue import Stores
from tests.support.client import plain_client, startup
from tests.support.map_outages import MAP_OUTAGES, running_with_map
from tests.support.outages import (
    CLIENTS_A_MINUTE,
    LOGIN_TRIGGER,
    OUTAGES,
    POOL,
    Outage,
    World,
    drain_does_not_end,
    loop_is_blocked,
    running,
    scrape,
    without_lag,
)
from tests.support.prometheus import ALERTS, ROOT, Alert, Expectations, Scrape, Timeline
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import (
    WAIT_SECONDS_MAX,
    all_over,
    asyncpg_arguments,
    proxy_values,
    toml,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("promtool") is None,
        reason="NOT TESTED: the rules by promtool; install Prometheus for it",
    ),
]

HEALTHY_MINUTES: Final = 10
ROW: Final = re.compile(r"^\| `(LakebaseProxy\w+)` \| (\d+) \|", re.MULTILINE)
WITHIN_MINUTES: Final = {
    name: int(minutes) for name, minutes in ROW.findall((ROOT / "docs" / "metrics.md").read_text())
}
OF_A_PROCESS: Final = {
    "LakebaseProxyAbsent",
    "LakebaseProxyDropsLogLines",
    "LakebaseProxyReloadFails",
    "LakebaseProxyWorkersDie",
}


def assert_told(
    timeline: Timeline, minutes: float, alerts: Sequence[Alert], directory: Path
) -> None:
    """Check that nothing fires before an outage, each alert in time, and no other at its end."""
    begins = timeline.minutes - minutes
    expected = Expectations([timeline])
    if begins:
        expected.exactly(begins - 0.5)
    for alert in alerts:
        expected.fires(begins + WITHIN_MINUTES[alert.name], alert)
    expected.exactly(begins + minutes - 0.5, *alerts)
    expected.assert_met(directory)


async def served(world: World, timeline: Timeline, *, with_lag: bool) -> Scrape:
    """Add healthy minutes, in which clients are served; return their last scrape."""
    before = await scrape(world.admin_port, with_lag=with_lag)
    await world.connects()
    await world.proxy.reconnect()
    await all_over(world.proxy, world.lakebase)
    after = await scrape(world.admin_port, with_lag=with_lag)
    timeline.add(HEALTHY_MINUTES, before, after)
    return after


@pytest.mark.parametrize("name", list(OUTAGES))
async def test_an_outage_is_told_in_time_and_nothing_else(
    lakebase: Lakebase, tmp_path: Path, name: str
) -> None:
    await assert_outage_is_told(OUTAGES[name], lakebase, tmp_path)


async def test_p50_a_login_trigger_is_told(tmp_path: Path) -> None:
    cluster = Cluster("newest", version=18)
    async with (
        cluster_running([cluster]),
        Lakebase(("newest",), clusters={"newest": cluster}) as lakebase,
    ):
        await assert_outage_is_told(LOGIN_TRIGGER, lakebase, tmp_path)


async def assert_outage_is_told(outage: Outage, lakebase: Lakebase, tmp_path: Path) -> None:
    """Check that an outage fires its alerts in time, after minutes in which none fires."""
    timeline = Timeline()
    with_lag = outage.happens is loop_is_blocked
    if outage.from_the_start:
        outage.breaks(lakebase)
    async with running(lakebase, outage.settings) as world:
        if outage.from_the_start:
            before = await scrape(world.admin_port)
        else:
            before = await served(world, timeline, with_lag=with_lag)
            outage.breaks(lakebase)
        await outage.happens(world)
        after = await scrape(world.admin_port, with_lag=with_lag)
        timeline.add(outage.minutes, before, after)
    assert_told(timeline, outage.minutes, outage.alerts, tmp_path)


@pytest.mark.parametrize("name", list(MAP_OUTAGES))
async def test_an_outage_of_a_map_in_a_catalogue_is_told(
    stores: Stores, tmp_path: Path, name: str
) -> None:
    outage, timeline = MAP_OUTAGES[name], Timeline()
    async with running_with_map(stores) as world:
        first = await scrape(world.admin_port)
        await world.connects()
        await world.all_over()
        before = await scrape(world.admin_port)
        timeline.add(HEALTHY_MINUTES, first, before)
        await outage.happens(world, tmp_path)
        await world.all_over()
        after = await scrape(world.admin_port)
        timeline.add(outage.minutes, before, after)
    assert_told(timeline, outage.minutes, outage.alerts, tmp_path)


def test_no_proxy_that_is_scraped_is_told(tmp_path: Path) -> None:
    # No series at all: what a proxy exposes does not matter here.
    expected = Expectations([])
    absent = Alert("LakebaseProxyAbsent")
    expected.exactly(WITHIN_MINUTES[absent.name], absent)
    expected.assert_met(tmp_path)


def test_each_alert_has_its_outage_and_its_time() -> None:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    names = {rule["alert"] for group in groups for rule in group["rules"]}
    assert names == WITHIN_MINUTES.keys()
    alerts = [outage.alerts for outage in OUTAGES.values()]
    alerts += [outage.alerts for outage in MAP_OUTAGES.values()]
    happen = {alert.name for some in (*alerts, LOGIN_TRIGGER.alerts) for alert in some}
    assert happen | OF_A_PROCESS == names


# -- a healthy hour ------------------------------------------------------------------------------


async def a_minute_of_health(world: World) -> None:
    """Do what healthy applications and their neighbours do in a minute."""
    proxy, endpoint = world.proxy, world.lakebase["one"].endpoint
    await world.connects()
    for _ in range(CLIENTS_A_MINUTE):
        await (await asyncpg.connect(**asyncpg_arguments(proxy))).close()
    await world.connect(dbname="absent")  # clients' mistakes
    await world.connect(sslmode="require")
    await world.connect(options="-c nonsense=1")
    for first in (b"", b"GET / HTTP/1.1\r\n\r\n", startup()[:9]):  # probes and scans
        async with plain_client(proxy) as client:
            await client.send(first)
    async with plain_client(proxy) as client:
        key = await client.start_up()
        assert key is not None
        async with plain_client(proxy) as canceller:
            await canceller.send(CancelRequest(key.pid, key.key).encode())
            await canceller.receive_rest()
        client.reset()
    endpoint.refuse(ErrorResponse.fatal("57P03", "the database system is starting up"))
    await world.connect()  # it is tried again
    await proxy.reconnect()
    await all_over(proxy, world.lakebase)


async def a_failover(world: World) -> None:
    async with AsyncExitStack() as clients:
        for _ in range(CLIENTS_A_MINUTE):
            client = await clients.enter_async_context(plain_client(world.proxy))
            await client.start_up()
        world.lakebase["one"].endpoint.end_sessions()
        await all_over(world.proxy, world.lakebase)
    world.lakebase.workspace.fail(Call.CREDENTIAL, faults.UNAVAILABLE, times=1)
    await world.connects()


async def a_drain(world: World) -> None:
    """Begin to drain with sessions, and let a client come too late."""
    await world.hold_sessions(CLIENTS_A_MINUTE)
    async with plain_client(world.proxy) as late:
        await drain_does_not_end(world)
        await late.receive_rest()


async def test_in_a_healthy_hour_no_alert_fires(lakebase: Lakebase, tmp_path: Path) -> None:
    one, two = Timeline(), Timeline(begins_at_minute=39)
    async with running(lakebase, {}) as world:
        before = await scrape(world.admin_port)
        happens = (a_minute_of_health, a_failover, a_minute_of_health, a_drain)
        for minutes, happening in zip((18, 1, 20, 1), happens, strict=True):
            await happening(world)
            after = await scrape(world.admin_port)
            one.add(minutes, before, after)
            before = after
            world.proxy.reload(world.proxy.settings)
    async with running(lakebase, {"upstream": POOL}) as world:  # the next one of a rollout
        before = await scrape(world.admin_port, "b")
        await a_minute_of_health(world)
        two.add(21, before, await scrape(world.admin_port, "b"))
    expected = Expectations([one, two])
    for minute in range(60):
        expected.exactly(minute)
    expected.assert_met(tmp_path)


# -- outages of a process ------------------------------------------------------------------------


@asynccontextmanager
async def process(
    lakebase: Lakebase, directory: Path, port: int, **sections: Mapping[str, object]
) -> AsyncIterator[ProxyProcess]:
    file = directory / "proxy.toml"
    admin = {"admin": {"enabled": True, "port": port}}
    file.write_text(toml(proxy_values(lakebase, {**admin, **sections})))
    async with started_process("run", "--config", str(file)) as proxy:
        await proxy.serving()
        yield proxy


async def until_more(port: int, name: str, before: Scrape) -> Scrape:
    """Return the scrape in which a counter is higher than before."""
    (series,) = [one for one in before.values if one.startswith(f"lakebase_proxy_{name}")]
    text = await metrics_once(
        port, lambda text: Scrape.of(text).values[series] > before.values[series]
    )
    return Scrape.of(without_lag(text))


async def test_a_log_that_nothing_reads_is_told(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int
) -> None:
    port, timeline = unused_tcp_port, Timeline()
    reader, writer = full_pipe()
    with ExitStack() as descriptors:
        descriptors.callback(os.close, reader)
        descriptors.callback(os.close, writer)
        async with proxy_logging_to(writer, lakebase, tmp_path, admin_port=port) as proxy:
            before = after = await scrape(port)
            timeline.add(HEALTHY_MINUTES, before, before)
            async with asyncio.timeout(3 * WAIT_SECONDS_MAX):
                while not dropped(after):
                    await asyncio.gather(*(be_refused(proxy) for _ in range(100)))
                    after = await scrape(port)
    # A hundred refusals at a time are of the test alone: what is told is that lines are lost.
    timeline.add(5, before, replace(before, values={**before.values, **dropped(after)}))
    assert_told(timeline, 5, (Alert("LakebaseProxyDropsLogLines"),), tmp_path)


def dropped(scraped: Scrape) -> dict[str, float]:
    """Return the series of dropped lines, if there are any."""
    name = "lakebase_proxy_log_lines_dropped_total"
    return {one: n for one, n in scraped.values.items() if one.startswith(name) and n}


async def test_a_reload_that_fails_is_told(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int
) -> None:
    timeline = Timeline()
    async with process(lakebase, tmp_path, unused_tcp_port) as proxy:
        before = await scrape(unused_tcp_port)
        timeline.add(HEALTHY_MINUTES, before, before)
        (tmp_path / "proxy.toml").write_text("[listen]\nport = 99999\n")
        proxy.send(signal.SIGHUP)
        after = await until_more(unused_tcp_port, "reload_failures_total", before)
        timeline.add(5, before, after)
    assert_told(timeline, 5, (Alert("LakebaseProxyReloadFails"),), tmp_path)


async def test_a_worker_that_was_killed_is_told(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int
) -> None:
    timeline = Timeline()
    listen = {"port": 0, "workers": 2}
    async with process(lakebase, tmp_path, unused_tcp_port, listen=listen) as proxy:
        before = await scrape(unused_tcp_port)
        timeline.add(HEALTHY_MINUTES, before, before)
        os.kill(proxy.events("worker serves")[0]["pid"], signal.SIGKILL)
        after = await until_more(unused_tcp_port, "worker_deaths_total", before)
        timeline.add(5, before, after)
    assert_told(timeline, 5, (Alert("LakebaseProxyWorkersDie"),), tmp_path)
