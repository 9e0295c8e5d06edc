"""The lag of the event loop, on a real loop that is really blocked."""

import asyncio
import time

import pytest

from proxy.observe.loop_lag import SAMPLE_SECONDS, sampling_lag

STUCK_SECONDS = 0.3


@pytest.mark.slow
async def test_a_blocked_loop_is_sampled_once_with_the_whole_time() -> None:
    samples: asyncio.Queue[float] = asyncio.Queue()
    with sampling_lag(samples.put_nowait):
        async with asyncio.timeout(5):
            at_rest = await samples.get()
            asyncio.get_running_loop().call_later(SAMPLE_SECONDS - 0.05, hold_up)
            stuck = await samples.get()
    assert 0 <= at_rest < STUCK_SECONDS / 2
    assert STUCK_SECONDS / 2 < stuck < STUCK_SECONDS * 3


def hold_up() -> None:
    """Keep the loop busy, as a long computation would."""
    until = time.monotonic() + STUCK_SECONDS
    while time.monotonic() < until:
        pass


async def test_nothing_is_left_when_the_block_has_ended() -> None:
    samples: list[float] = []
    with sampling_lag(samples.append):
        pass
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(SAMPLE_SECONDS * 1.2, done.set)
    async with asyncio.timeout(5):
        await done.wait()
    assert samples == []
