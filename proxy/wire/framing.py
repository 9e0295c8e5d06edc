"""Cutting a byte stream into whole messages: a type byte, a length, and the payload.

Used while a session starts. A relayed session is never framed here.
"""

from typing import Final

from proxy.wire.messages import UINT32, Frame
from proxy.wire.violations import UpstreamViolation

_HEADER_BYTES: Final = 5
_LENGTH_MIN: Final = 4  # the length counts itself


class MessageReader:
    """Collects bytes and gives out whole messages. Holds at most `limit` + 5 and what was fed."""

    def __init__(self, limit: int) -> None:
        """`limit` is the longest payload taken, in bytes."""
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add bytes as they arrived."""
        self._buffer += data

    def next(self) -> Frame | None:
        """Return the next whole message, or None until more bytes are fed.

        Raises UpstreamViolation for an impossible length, before waiting for its bytes.
        """
        if len(self._buffer) < _HEADER_BYTES:
            return None
        (length,) = UINT32.unpack_from(self._buffer, 1)
        if not _LENGTH_MIN <= length <= self._limit + _LENGTH_MIN:
            raise UpstreamViolation(f"a message length of {length}, outside 4 to {self._limit + 4}")
        end = 1 + length
        if len(self._buffer) < end:
            return None
        frame = Frame(bytes(self._buffer[:1]), bytes(self._buffer[_HEADER_BYTES:end]))
        del self._buffer[:end]
        return frame

    def trailing_data(self) -> bytes:
        """Take out the bytes behind the last whole message."""
        trailing = bytes(self._buffer)
        self._buffer.clear()
        return trailing
