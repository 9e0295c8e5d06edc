"""The lag of the event loop: how late it runs a timer.

For: distinguishing a busy proxy from a slow upstream. Not for: finding out what blocks the loop.

Invariant: one timer every `SAMPLE_SECONDS`, which is cancelled at the end of the block. A loop that
was blocked yields one sample afterwards, with the whole time.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

# Often enough for a useful histogram per minute, too rare to show in a profile.
SAMPLE_SECONDS: Final = 0.5


@contextmanager
def sampling_lag(record: Callable[[float], None]) -> Iterator[None]:
    """Call `record` every `SAMPLE_SECONDS` while the block runs, with the lag in seconds."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None
    due = 0.0

    def sample() -> None:
        # It would be negative if the timer's clock is coarser than this one.
        record(max(0.0, time.monotonic() - due))
        start()

    def start() -> None:
        nonlocal timer, due
        due = time.monotonic() + SAMPLE_SECONDS
        timer = loop.call_later(SAMPLE_SECONDS, sample)

    start()
    try:
        yield
    finally:
        assert timer is not None
        timer.cancel()
