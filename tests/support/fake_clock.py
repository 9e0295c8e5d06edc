"""A wall clock that stands still until a test moves it, or something sleeps by it."""

import asyncio


class FakeClock:
    """Returns seconds since the epoch when called, as `time.time` does."""

    def __init__(self, now: float = 1_790_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        """Move on, or back with a negative number."""
        self.now += seconds

    async def sleep(self, seconds: float) -> None:
        """Return when so much is over, in no time; those that sleep together sleep once."""
        until = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, until)
