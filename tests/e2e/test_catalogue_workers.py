"""S61: several workers of one proxy with a map in the catalogue, as real processes."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from tests.e2e.test_catalogue_sessions import connect, ended, refusal
from tests.e2e.test_workers import worker_pids
from tests.support.admin_address import ask
from tests.support.catalogue import MAP, Stores
from tests.support.operator import Operator, Placed
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import eventually

pytestmark = pytest.mark.slow

WORKERS: Final = 2


def sidecar(stores: Stores, folder: Path, **sections: Any) -> Path:
    """Write the settings of a sidecar with workers, and return the file."""
    return stores.file(
        folder,
        stores.roles.session,
        listen={"workers": WORKERS},
        admin={"enabled": True},
        log={"format": "json"},
        **{"catalogue": {"park_timeout_seconds": 60}, **sections},
    )


@pytest_asyncio.fixture
async def proxy(operator: Operator, placed: Placed, tmp_path: Path) -> AsyncIterator[ProxyProcess]:
    file = sidecar(operator.stores, tmp_path)
    async with started_process("run", "--config", str(file)) as process:
        await process.serving()
        yield process


async def status(proxy: ProxyProcess) -> Any:
    port = proxy.events("serving")[0]["admin_port"]
    return json.loads((await ask(port, "/status")).body)


async def parked(proxy: ProxyProcess, clients: int) -> None:
    """Wait until so many clients are parked."""
    async with asyncio.timeout(20):
        while (await status(proxy))["shard_map"]["parked"] != clients:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_s61_workers_share_one_map_and_each_hears_of_changes(
    proxy: ProxyProcess, operator: Operator, placed: Placed
) -> None:
    live = [await connect(proxy) for _ in range(2 * WORKERS)]
    others = [await connect(proxy, "1000") for _ in range(WORKERS)]
    assert len({row["proxy"] for row in await operator.registered("one")}) == WORKERS
    to_catalogue = [
        record
        for record in operator.stores.lakebase.gateway.records
        if record.sni == operator.stores.host(MAP) and not record.closed
    ]
    assert len(to_catalogue) == 1, "the feed's; a look-up's would be one more"
    shown = (await status(proxy))["shard_map"]
    assert (shown["mappings"], shown["state"], shown["feed"]) == (2, "ready", "listening")
    # The shard does not end the sessions: each worker does.
    ending = [asyncio.ensure_future(ended(one)) for one in live]
    await operator.offline(placed, ends=False)
    await asyncio.gather(*ending)
    for one in others:
        assert await one.fetchval("select 1") == 1
        one.terminate()
    await eventually(
        lambda: (
            len([e for e in proxy.events("session ended") if e["reason"] == "mapping_moved"])
            == len(live)
        ),
        "every end is logged with its cause",
    )
    assert all("connection" in line for line in proxy.events("session ended"))
    # Parked in a worker, woken by the supervisor's feed.
    connecting = [asyncio.ensure_future(connect(proxy)) for _ in range(WORKERS)]
    await parked(proxy, WORKERS)
    await operator.online(placed)
    for one in await asyncio.gather(*connecting):
        one.terminate()


@pytest.mark.parametrize("feed", ["listen", "off"])
async def test_s61_workers_together_have_two_connections_to_the_catalogue_at_most(
    operator: Operator, placed: Placed, tmp_path: Path, feed: str
) -> None:
    for low in range(2000, 2040):
        await operator.add(str(-low), str(1 - low), "one")
    catalogue = {"load": "lazy", "feed": feed}
    file = sidecar(operator.stores, tmp_path, catalogue=catalogue)
    most = 0

    def open_now() -> int:
        host, records = operator.stores.host(MAP), operator.stores.lakebase.gateway.records
        return sum(one.sni == host and not one.closed for one in records)

    async with started_process("run", "--config", str(file)) as proxy:
        await proxy.serving()
        for first in range(2000, 2040, 10):
            # Keys that no worker knows: each is looked up.
            keys = [str(-low) for low in range(first, first + 10)]
            connecting = [asyncio.ensure_future(connect(proxy, key)) for key in keys]
            while not all(one.done() for one in connecting):
                most = max(most, open_now())
                await asyncio.sleep(0.005)
            for one in await asyncio.gather(*connecting):
                one.terminate()
        assert most == (2 if feed == "listen" else 1)
        kept = 1 if feed == "listen" else 0
        await eventually(lambda: open_now() == kept, "what is idle is closed", 20)


async def test_s61_worker_that_died_and_came_again_routes_and_is_told(
    proxy: ProxyProcess, operator: Operator, placed: Placed
) -> None:
    (await connect(proxy)).terminate()
    for pid in worker_pids(proxy):
        os.kill(pid, signal.SIGKILL)
    await eventually(
        lambda: len(proxy.events("worker serves")) == 2 * WORKERS, "the workers are replaced"
    )
    live = [await connect(proxy) for _ in range(WORKERS)]
    moved = await operator.move(placed, "two", ends=False)
    ending = [asyncio.ensure_future(ended(one)) for one in live]
    await asyncio.gather(*ending)
    again = await connect(proxy)
    pid = await again.fetchval("select pg_backend_pid()")
    assert pid in [row["pid"] for row in await operator.registered(moved.shard)]
    again.terminate()
    error = await refusal(proxy, "500")
    assert error.sqlstate == "3D000"


async def test_s46_s64_clients_parked_in_workers_leave_stay_and_are_told(
    proxy: ProxyProcess, operator: Operator, placed: Placed
) -> None:
    await operator.offline(placed)
    connecting = [asyncio.ensure_future(connect(proxy)) for _ in range(2 * WORKERS)]
    await parked(proxy, 2 * WORKERS)
    for one in connecting[:WORKERS]:
        one.cancel()
    await parked(proxy, WORKERS)
    proxy.send(signal.SIGHUP)
    await eventually(lambda: proxy.events("reloaded"), "reloaded")
    await parked(proxy, WORKERS)
    proxy.send(signal.SIGTERM)
    for answer in await asyncio.gather(*connecting[WORKERS:], return_exceptions=True):
        assert getattr(answer, "sqlstate", "") == "57P01", answer
    assert await proxy.ended() == 0


async def test_s64_park_max_is_of_all_workers_together(
    operator: Operator, placed: Placed, tmp_path: Path
) -> None:
    """Each worker had its part, rounded up: 3 were 4, and 1 a worker where all came to one."""
    file = sidecar(operator.stores, tmp_path, catalogue={"park_timeout_seconds": 60, "park_max": 3})
    async with started_process("run", "--config", str(file)) as proxy:
        await proxy.serving()
        await operator.offline(placed)
        connecting = [asyncio.ensure_future(connect(proxy)) for _ in range(3)]
        await parked(proxy, 3)
        error = await refusal(proxy)
        assert error.sqlstate == "57P03"
        (await connect(proxy, "1000")).terminate()
        connecting.pop().cancel()
        await parked(proxy, 2)
        connecting.append(asyncio.ensure_future(connect(proxy)))
        await parked(proxy, 3)
        await operator.online(placed)
        for one in await asyncio.gather(*connecting):
            one.terminate()


async def test_s62_clients_parked_in_workers_are_routed_anew_by_another_map(
    proxy: ProxyProcess, operator: Operator, placed: Placed, tmp_path: Path
) -> None:
    await operator.offline(placed)
    connecting = [asyncio.ensure_future(connect(proxy)) for _ in range(2 * WORKERS)]
    await parked(proxy, 2 * WORKERS)
    # Of another type of keys: what the parked clients have of theirs means something else in it.
    other = Operator(operator.stores, MapSpec(Kind.RANGE, KeyType.TEXT), name="others")
    await other.register()
    await other.add("5", "6", "two")
    sections: dict[str, Any] = {
        "routing": {"shard_map": "others"},
        "shard_maps.others": {"catalogue": True},
    }
    sidecar(operator.stores, tmp_path, **sections)
    proxy.send(signal.SIGHUP)
    for one in await asyncio.gather(*connecting):
        pid = await one.fetchval("select pg_backend_pid()")
        assert pid in [row["pid"] for row in await operator.registered("two")]
        one.terminate()
    await parked(proxy, 0)
