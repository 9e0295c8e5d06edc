"""Numbers in shared memory: slots, parked clients, ended connections and heartbeats of workers.

For: `listen.max_connections` and `catalogue.park_max` as bounds of all workers, a worker's load,
and whether it runs, without a message for any of them. Not for: what another process should be
notified of.

Invariants: each number has one writer, its worker, or the supervisor once the worker is dead. More
than a bound can never be taken: a worker first writes its own number, then reads all. Two that take
the last slot at the same moment may both be refused.
"""

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from proxy.errors import ProxyError
from proxy.session.slots import FULL

# Aligned to 8 bytes, a number is read and written in one piece on every machine that we know.
_NUMBER_BYTES: Final = 8

# A worker's loop beats this often. One that has not beaten for so long gets no connections.
BEAT_SECONDS: Final = 0.5
SILENT_SECONDS_MAX: Final = 2.0


class SharedCounters:
    """Four numbers for each worker, which are numbered from 1. Made before the processes fork."""

    def __init__(self, workers: int) -> None:
        numbers = memoryview(mmap.mmap(-1, 4 * workers * _NUMBER_BYTES)).cast("Q")
        self._slots, self._parked, self._ended, self._beats = (
            numbers[at * workers : (at + 1) * workers] for at in range(4)
        )

    @property
    def slots_used(self) -> int:
        """The slots that all workers use."""
        return sum(self._slots)

    def slots_of(self, worker_number: int) -> int:
        """Return the slots that a worker uses."""
        return self._slots[worker_number - 1]

    def add_slots(self, worker_number: int, change: int) -> None:
        """Change a worker's slots by this many."""
        self._slots[worker_number - 1] += change

    def share_parked(self, worker_number: int, parked: int) -> int:
        """Write how many clients a worker has parked. Return how many all workers have."""
        self._parked[worker_number - 1] = parked
        return sum(self._parked)

    def connections_ended(self, worker_number: int) -> int:
        """Return how many connections have ended since the worker was started."""
        return self._ended[worker_number - 1]

    def record_end(self, worker_number: int) -> None:
        """Count a connection of a worker that has ended."""
        self._ended[worker_number - 1] += 1

    def beat(self, worker_number: int) -> None:
        """Record that a worker's event loop runs."""
        # The clock is the same in all processes of a machine.
        self._beats[worker_number - 1] = time.monotonic_ns()

    def is_silent(self, worker_number: int) -> bool:
        """Return whether a worker's event loop has not run for SILENT_SECONDS_MAX."""
        elapsed = time.monotonic_ns() - self._beats[worker_number - 1]
        return elapsed > SILENT_SECONDS_MAX * 1e9

    def reset(self, worker_number: int) -> None:
        """Set the numbers of a dead worker to 0."""
        for numbers in (self._slots, self._parked, self._ended):
            numbers[worker_number - 1] = 0


class SharedSlots:
    """The slots of all workers, as one worker takes them."""

    def __init__(
        self,
        counters: SharedCounters,
        worker_number: int,
        slots_max: int,
        full: Callable[[], ProxyError] = FULL,
    ) -> None:
        """`full` makes the error for a client without a slot."""
        self._full = full
        self._counters = counters
        self._worker_number = worker_number
        self._slots_max = slots_max

    @property
    def used(self) -> int:
        """The slots that this worker uses."""
        return self._counters.slots_of(self._worker_number)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a slot while the block runs. Raises ProxyError when none is free."""
        self._counters.add_slots(self._worker_number, 1)
        try:
            if self._counters.slots_used > self._slots_max:
                raise self._full()
            yield
        finally:
            self._counters.add_slots(self._worker_number, -1)
