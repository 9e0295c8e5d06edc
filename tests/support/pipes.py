"""A stream in memory that takes few bytes at a time, as a full socket does.

For: connecting sans-IO machines as sockets would, with backpressure and ends, and in any order of
reads and writes. Not for: asyncio. Invariant: no more than `limit` bytes are in transit.
"""

from typing import Final

PIPE_BYTES_MAX: Final = 8  # shorter than any startup packet, so that every one of them is cut


class Pipe:
    """One direction. What does not fit waits at the writer, in order."""

    def __init__(self, limit: int = PIPE_BYTES_MAX) -> None:
        self._limit = limit
        self._held = bytearray()
        self._waiting = bytearray()
        self._ended = False
        self.held_max = 0

    def write(self, content: bytes) -> None:
        """Take bytes: up to the limit they are in transit, the rest waits."""
        assert not self._ended, "a write after the end"
        self._waiting += content
        self._fill()

    def end(self) -> None:
        """End the stream. What was written before still arrives; a second end does nothing."""
        self._ended = True

    def read(self, count: int) -> bytes:
        """Return up to so many bytes, none if none are in transit; what waited moves up."""
        read = bytes(self._held[:count])
        del self._held[:count]
        self._fill()
        return read

    @property
    def ended(self) -> bool:
        """Whether the writer has ended it."""
        return self._ended

    @property
    def at_end(self) -> bool:
        """Whether the reader has read everything and nothing can follow."""
        return self._ended and not self._held and not self._waiting

    def _fill(self) -> None:
        room = self._limit - len(self._held)
        self._held += self._waiting[:room]
        del self._waiting[:room]
        self.held_max = max(self.held_max, len(self._held))


class Duplex:
    """Two peers' connection: a pipe each way. One may end while the other is still used."""

    def __init__(self, limit: int = PIPE_BYTES_MAX) -> None:
        self.there = Pipe(limit)
        self.back = Pipe(limit)
