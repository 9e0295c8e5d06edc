"""A proxy with few descriptors: it serves what it can, tells the rest, and stays healthy."""

import asyncio
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.server.file_limit import FILES_RESERVED
from tests.support.admin_address import ask
from tests.support.client import plain_client, startup
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import proxy_values, toml

pytestmark = pytest.mark.slow

FILES_MAX = 256
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
    return "refused" if b"C53" in answer else "nothing"


@pytest.mark.parametrize("workers", [1, 2])
async def test_when_descriptors_run_short_clients_are_told_and_probes_are_answered(
    lakebase: Lakebase, tmp_path: Path, workers: int
) -> None:
    # Slots were given until no descriptor was left: 62 of 200 clients were closed without a word,
    # /liveness was not answered, and each lost connection had its own line in the log.
    config = tmp_path / "proxy.toml"
    listen = {"port": 0, "workers": workers}
    admin = {"enabled": True, "port": 0}
    config.write_text(toml(proxy_values(lakebase, {"listen": listen, "admin": admin})))
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(
            started_process("run", "--config", str(config), python=LIMITED)
        )
        await proxy.serving()
        slots = (FILES_MAX - FILES_RESERVED) // 2 * workers
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
        assert last["reason"] == "too_many_connections"
        assert f"limit of open files allows {slots} sessions" in last["detail"]
        lines = [line for line in proxy.lines if line["level"] in ("warning", "error")]
        others = [line for line in lines if line["event"] != "session refused"]
        assert len(others) <= 2 + workers, others
