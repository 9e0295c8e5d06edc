"""A page of memory that all processes of a proxy see: who has how many places and connections.

For: `listen.max_connections` as a bound of the whole, and knowing a worker's load, without a
message for either. Not for: anything that one would want to be told of.

Invariants: each number has one writer, its worker (the supervisor once that is dead). More places
than there are can never be taken: a worker first writes its own, then reads all. Two that take the
last one at the same moment may both be refused.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from proxy.errors import ErrorKind, ProxyError

# A number is 8 bytes, aligned: read and written in one piece on every machine that we know.
_NUMBER_BYTES: Final = 8


class SharedCounters:
    """Two numbers for each worker_number of a worker. Made before the processes fork."""

    def __init__(self, workers: int) -> None:
        numbers = memoryview(mmap.mmap(-1, 2 * workers * _NUMBER_BYTES)).cast("Q")
        self._slots, self._ended = numbers[:workers], numbers[workers:]

    @property
    def slots_taken(self) -> int:
        """The places that all workers have taken."""
        return sum(self._slots)

    def slots_of(self, worker_number: int) -> int:
        """Return the places that a worker has taken."""
        return self._slots[worker_number]

    def take(self, worker_number: int, change: int) -> None:
        """Change the places of one worker by so many."""
        self._slots[worker_number] += change

    def ended(self, worker_number: int) -> int:
        """Return how many connections have ended since the worker began."""
        return self._ended[worker_number]

    def end(self, worker_number: int) -> None:
        """Note that a connection of a worker has ended."""
        self._ended[worker_number] += 1

    def clear(self, worker_number: int) -> None:
        """Forget a worker that is dead."""
        self._slots[worker_number] = self._ended[worker_number] = 0


class SharedSlots:
    """The places of all, as one worker takes them."""

    def __init__(self, counters: SharedCounters, worker_number: int, slots_max: int) -> None:
        self._counters = counters
        self._worker_number = worker_number
        self._places_max = slots_max

    @property
    def taken(self) -> int:
        """The places that this worker has taken."""
        return self._counters.slots_of(self._worker_number)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place while the block runs. Raises ProxyError when none is free."""
        self._counters.take(self._worker_number, 1)
        try:
            if self._counters.slots_taken > self._places_max:
                raise ProxyError(ErrorKind.TOO_MANY_CONNECTIONS)
            yield
        finally:
            self._counters.take(self._worker_number, -1)
