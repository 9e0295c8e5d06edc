"""How late the event loop is: a timer that looks at the clock when it is called.

For: telling a busy proxy from a slow upstream. Not for: finding out what kept the loop busy.

Invariant: one timer, `SAMPLE_SECONDS` apart, and nothing of it is left when the block has ended. A
loop that is stuck is sampled once when it gets loose, with the whole time.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

# Often enough for a histogram to tell something a minute, too rare to show in a profile.
SAMPLE_SECONDS: Final = 0.5


@contextmanager
def sampling_lag(record: Callable[[float], None]) -> Iterator[None]:
    """Tell `lagged` again and again, while the block runs, how many seconds late the loop was."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None
    due = 0.0

    def sample() -> None:
        # Below zero where the timer's clock is coarser than this one.
        record(max(0.0, time.monotonic() - due))
        begin()

    def begin() -> None:
        nonlocal timer, due
        due = time.monotonic() + SAMPLE_SECONDS
        timer = loop.call_later(SAMPLE_SECONDS, sample)

    begin()
    try:
        yield
    finally:
        assert timer is not None
        timer.cancel()
