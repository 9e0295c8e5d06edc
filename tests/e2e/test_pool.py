"""Sessions of a pool, from one client to the next, on both relays."""

import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.e2e.test_psql import psql
from tests.support.running import LogLines, eventually

PID = "SELECT pg_backend_pid()"


def pooling(accelerated: bool = True, **upstream: object) -> dict[str, dict[str, object]]:
    """Return the sections of a proxy that pools."""
    return {"upstream": {"pool": "session", "accelerated": accelerated, **upstream}}


def sessions(proxy: App, state: str) -> int:
    """Return how many sessions of the pool are in this state."""
    return int(proxy.metrics.value("pool_sessions", state=state))


async def idle(proxy: App, count: int) -> None:
    """Wait until so many sessions are idle and none is in another state."""
    await eventually(
        lambda: (
            sessions(proxy, "idle") == count
            and not sessions(proxy, "resetting")
            and not sessions(proxy, "dialling")
        ),
        f"{count} are idle",
    )


both_relays = pytest.mark.parametrize("accelerated", [True, False], ids=["compiled", "python"])


@both_relays
async def test_two_clients_have_one_backend(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, *, accelerated: bool
) -> None:
    proxy = await start_proxy(**pooling(accelerated, pool_spare_min=0))
    pids = []
    for _ in range(3):
        pids.append(await psql(proxy, PID))
        await idle(proxy, 1)
    assert len(set(pids)) == 1
    assert len(lakebase.gateway.sessions) == 1
    assert log.above_info() == []
