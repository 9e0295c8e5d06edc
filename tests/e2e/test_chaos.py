"""Sessions with traffic both ways that end in every way at every moment, from a printed seed.

Whatever happens: nothing is logged above info, nothing is left, and the next client is served.
"""

import asyncio
import random

import pytest

from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import Terminate
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.running import LogLines, all_over, nothing_left

SESSIONS = 60
AT_ONCE = 12
ENDS = [how for how in SessionEnd if how is not SessionEnd.SILENCE]  # in that one a client waits


async def traffic(client: Client, dice: random.Random) -> None:
    """Send queries and read answers, out of step with each other, until a random end."""
    rows = dice.choice((1, 100, 3000))
    text = "y" * dice.choice((1, 1000, 10_000))
    content = query(f"SELECT repeat('x', 1000), '{text[:10]}' FROM generate_series(1, {rows})")
    content += query(f"SELECT length('{text}')")
    await client.send(startup() + content * dice.randrange(3))
    for _ in range(dice.randrange(6)):
        await client.receive()
        if dice.random() < 0.3:
            await client.send(content[: dice.randrange(len(content))])


async def session(proxy: App, lakebase: Lakebase, seed: int) -> None:
    dice = random.Random(seed)
    try:
        async with asyncio.timeout(2), plain_client(proxy) as client:
            try:
                async with asyncio.timeout(dice.random() * 0.1):
                    await traffic(client, dice)
            except TimeoutError:
                pass
            match dice.randrange(5):
                case 0:
                    client.reset()
                case 1:
                    await client.send(Terminate().encode())
                case 2:
                    lakebase["one"].endpoint.end_sessions(dice.choice(ENDS))
                case 3:
                    await client.receive()
                case _:
                    pass
    except (TimeoutError, ConnectionError, BrokenPipeError):
        pass  # of its own doing


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_sessions_that_end_anyhow_leave_nothing_and_log_nothing_above_info(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, seed: int
) -> None:
    lakebase.gateway.close_delay_seconds = 0.05
    proxy = await start_proxy()
    async with plain_client(proxy) as warm:
        await warm.start_up()
    await all_over(proxy, lakebase)
    async with nothing_left():
        seeds = iter(range(seed * SESSIONS, (seed + 1) * SESSIONS))

        async def worker() -> None:
            for number in seeds:
                await session(proxy, lakebase, number)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(worker())
        await all_over(proxy, lakebase)
    assert log.above_info() == []
    assert len(proxy.cancel_keys) == 0
    async with plain_client(proxy) as client:
        await client.start_up()
