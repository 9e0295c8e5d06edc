"""A proxy with few descriptors: it serves what it can, tells the rest, and stays healthy."""

import asyncio
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.observe.admin_access import CONNECTIONS_MAX
from proxy.server.file_limit import API_FILES, OWN_FILES
from proxy.wire.messages import BackendKeyData
from proxy.wire.startup import CancelRequest
from tests.support.admin_address import LOOPBACK, ask
from tests.support.client import Client, plain_client, startup
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import eventually, proxy_values, toml

pytestmark = pytest.mark.slow

FILES_MAX = 256
SLOTS = 47  # of one process with that limit
CLIENTS = 200
LIMITED = ("sh", "-c", f'ulimit -n {FILES_MAX}; exec "$@"', "sh", sys.executable)


async def outcome(proxy: ProxyProcess, stack: AsyncExitStack) -> str:
    """Connect a client that stays. Return what it is answered: ok, refused, or nothing."""
    try:
        client = await stack.enter_async_context(plain_client(proxy))
        await client.send(startup())
        answer = await client.receive()
    except ConnectionError:
        return "nothing"
    if answer[:1] == b"R":
        return "ok"
    return "refused" if b"C53000" in answer else "nothing"


async def limited_proxy(
    lakebase: Lakebase, directory: Path, stack: AsyncExitStack, workers: int
) -> ProxyProcess:
    """Start a proxy with few descriptors, and an admin address."""
    config = directory / "proxy.toml"
    sections: dict[str, dict[str, object]] = {
        "listen": {"port": 0, "workers": workers},
        "admin": {"enabled": True, "port": 0},
        "credentials": {"token_max_age_seconds": 0},  # each session asks the workspace
    }
    config.write_text(toml(proxy_values(lakebase, sections)))
    proxy = await stack.enter_async_context(
        started_process("run", "--config", str(config), python=LIMITED)
    )
    await proxy.serving()
    assert proxy.open_files() <= OWN_FILES + API_FILES
    return proxy


@pytest.mark.parametrize("workers", [1, 2])
async def test_when_descriptors_run_short_clients_are_told_and_probes_are_answered(
    lakebase: Lakebase, tmp_path: Path, workers: int
) -> None:
    # Slots were given until no descriptor was left: 62 of 200 clients were closed without a word,
    # /liveness was not answered, and each lost connection had its own line in the log.
    async with AsyncExitStack() as stack:
        proxy = await limited_proxy(lakebase, tmp_path, stack, workers)
        slots = SLOTS * workers
        async with asyncio.timeout(60):
            asked = [outcome(proxy, stack) for _ in range(CLIENTS)]
            outcomes = Counter(await asyncio.gather(*asked))
            # Those that came at the same moment and were refused can come again.
            for _ in range(slots - outcomes["ok"]):
                assert await outcome(proxy, stack) == "ok"
            assert await outcome(proxy, stack) == "refused"
        assert outcomes["nothing"] <= CLIENTS // 20, outcomes
        assert (await ask(proxy.events("serving")[0]["admin_port"], "/liveness")).status == 200
        last = proxy.events("session refused")[-1]
        assert last["reason"] == "out_of_resources"
        assert f"limit of open files allows {slots} sessions" in last["detail"]
        lines = [line for line in proxy.lines if line["level"] in ("warning", "error")]
        others = [line for line in lines if line["event"] != "session refused"]
        assert len(others) <= 2 + workers, others


async def busy_client(proxy: ProxyProcess, stack: AsyncExitStack) -> tuple[Client, BackendKeyData]:
    """Return a client whose query runs, and its key."""
    client = await stack.enter_async_context(plain_client(proxy))
    key = await client.start_up()
    assert key is not None
    await client.query("SELECT pg_sleep(600)")
    return client, key


def running(lakebase: Lakebase) -> int:
    """Return how many of these queries run."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    return int(lakebase["one"].cluster.execute(sql))


async def cancel(proxy: ProxyProcess, key: BackendKeyData) -> None:
    """Send a CancelRequest and wait until it is delivered."""
    async with plain_client(proxy) as client:
        await client.send(CancelRequest(key.pid, key.key).encode())
        assert await client.receive_rest() == b""


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_full_proxy_delivers_every_cancel_and_asks_the_workspace(
    lakebase: Lakebase, tmp_path: Path, workers: int
) -> None:
    # When descriptors had run out, no cancel was delivered and no token was minted.
    async with AsyncExitStack() as stack:
        proxy = await limited_proxy(lakebase, tmp_path, stack, workers)
        port = int(proxy.events("serving")[0]["admin_port"])
        for _ in range(CONNECTIONS_MAX):
            _, writer = await asyncio.open_connection(LOOPBACK, port)
            stack.callback(writer.close)
        busy = [await busy_client(proxy, stack) for _ in range(SLOTS * workers)]
        assert await outcome(proxy, stack) == "refused"
        await eventually(lambda: running(lakebase) == len(busy), "all queries run", 60)
        async with asyncio.timeout(60):
            await asyncio.gather(*(cancel(proxy, key) for _, key in busy))
            for client, _ in busy:
                assert (await client.error()).sqlstate == "57014"
        minted = len(lakebase.workspace.mints)
        busy[0][0].abort()
        async with asyncio.timeout(10):
            while await outcome(proxy, stack) != "ok":
                pass
        assert len(lakebase.workspace.mints) > minted
        assert (await ask(port, "/liveness")).status == 200
