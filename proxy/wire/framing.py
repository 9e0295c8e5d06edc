"""Splitting a byte stream into whole messages: a type byte, a length, and the payload.

Used during a session's startup. A relayed session is not framed here.
"""

from typing import Final

from proxy.wire.messages import UINT32, Frame
from proxy.wire.violations import UpstreamViolation

_HEADER_BYTES: Final = 5
_PARAMETER_STATUS: Final = b"S"
_LENGTH_MIN: Final = 4  # the length counts itself


class MessageReader:
    """Buffers bytes and returns whole messages. Holds at most `limit` + 5 bytes plus one feed."""

    def __init__(self, limit: int) -> None:
        """`limit` is the longest payload accepted, in bytes."""
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append received bytes."""
        self._buffer += data

    def next(self) -> Frame | None:
        """Return the next whole message, or None until more bytes are fed.

        Raises UpstreamViolation for an invalid length, without waiting for the payload.
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

    def take_parameters(self) -> bytes:
        """Remove and return the whole ParameterStatus messages that come next, byte for byte.

        A startup has about fifteen in a row, and their contents are not needed here. A malformed
        one stays in the buffer: `next` returns it, and decoding reports what is wrong.
        """
        buffer, held_bytes, end = self._buffer, len(self._buffer), 0
        while buffer.startswith(_PARAMETER_STATUS, end) and end + _HEADER_BYTES <= held_bytes:
            (length,) = UINT32.unpack_from(buffer, end + 1)
            begin, following = end + _HEADER_BYTES, end + 1 + length
            if following > held_bytes or length > self._limit + _LENGTH_MIN:
                break
            # A name and a value, each terminated by a zero byte.
            if buffer.count(0, begin, following) != 2 or buffer[following - 1]:
                break
            end = following
        taken = bytes(buffer[:end])
        del buffer[:end]
        return taken

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the last whole message."""
        trailing = bytes(self._buffer)
        self._buffer.clear()
        return trailing
