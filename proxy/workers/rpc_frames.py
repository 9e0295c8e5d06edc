"""What goes over the channel between supervisor and worker: frames of JSON, and errors in them.

For: bytes to messages and back. Not for: sockets, or what a message asks for (`channel`).

Invariant: a frame is bounded, and a peer that sends a longer one is broken. Both ends are forked
from one image, so there is no version. Secrets may be inside: the socket pair has no name and no
other holder, and nothing here is logged.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any, Final

from proxy.errors import ErrorKind, ProxyError

# The largest are settings with their mappings inside; larger maps are better kept in a file.
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024

# A connection is given away as its descriptor and this, its number in the log.
NUMBER_BYTES: Final = 8

_LENGTH: Final = struct.Struct("!I")

Message = dict[str, Any]


class MessageTooLong(Exception):
    """A message over MESSAGE_BYTES_MAX."""


def encode(message: Message) -> bytes:
    """Return a message as a frame. Raises MessageTooLong."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MESSAGE_BYTES_MAX:
        raise MessageTooLong(f"{len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes bytes as they come and gives messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, received: bytes) -> Iterator[Message]:
        """Yield the messages that are complete now. Raises MessageTooLong."""
        self._held += received
        while len(self._held) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held)
            if length > MESSAGE_BYTES_MAX:
                raise MessageTooLong(f"{length} bytes")
            end = _LENGTH.size + length
            if len(self._held) < end:
                return
            body = bytes(self._held[_LENGTH.size : end])
            del self._held[:end]
            yield json.loads(body)


def error_as_dict(error: ProxyError) -> Message:
    """Return what a ProxyError of this machine is made of; an upstream's own never gets here."""
    return {
        "kind": error.kind.name,
        "detail": error.detail,
        "retry_after_seconds": error.retry_after_seconds,
    }


def error_from_dict(content: Message) -> ProxyError:
    """Return the ProxyError that `error_as_dict` was given."""
    return ProxyError(
        ErrorKind[content["kind"]],
        content["detail"],
        retry_after_seconds=content["retry_after_seconds"],
    )
