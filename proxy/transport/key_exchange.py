"""Which curve a TLS server insists on for the key exchange, seen once and kept for a while.

A TLS 1.3 client sends a key for the group that it guesses (X25519). A server that takes another
only asks for it with a HelloRetryRequest: a round trip, and a key pair more on both sides. That is
PostgreSQL until 17, whose `ssl_ecdh_curve` is prime256v1 alone.

Not for: deciding what is acceptable. The invariant: a curve is kept only after a handshake that
succeeded, whose transcript covers the request; so nobody but the server itself can choose it.
"""

import time
from collections.abc import Callable, Hashable
from typing import Final

# A server that has learnt better groups since shall be offered them again.
CURVE_SECONDS_MAX: Final = 3600.0
CURVES_MAX: Final = 256  # of servers; the one longest known makes room

# RFC 8446, sections 5.1 (record), 4 (handshake message) and 4.1.3 (ServerHello).
_HANDSHAKE_RECORD: Final = b"\x16"
_SERVER_HELLO: Final = b"\x02"
_RECORD_HEADER_BYTES: Final = 5  # type, version, length
_SESSION_ID_AT: Final = 38  # behind type, length, version and random
_CIPHER_AND_COMPRESSION_BYTES: Final = 3
_LENGTH_BYTES: Final = 2
_EXTENSION_HEADER_BYTES: Final = 4  # type, length
# The random that makes a ServerHello a HelloRetryRequest: SHA-256 of that word.
_RETRY_RANDOM: Final = bytes.fromhex(
    "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c"
)
_KEY_SHARE: Final = (51).to_bytes(2)
# Section 4.2.7, by the names that OpenSSL has for them.
_CURVES: Final = {
    b"\x00\x17": "prime256v1",
    b"\x00\x18": "secp384r1",
    b"\x00\x19": "secp521r1",
}


def asked_curve(received: bytes) -> str | None:
    """Return the curve that a HelloRetryRequest asks for, by the name OpenSSL gives it.

    `received` is what a server sends first. None for anything else: another message, another
    group, a part of a message.
    """
    if received[:1] != _HANDSHAKE_RECORD:
        return None
    record_bytes = int.from_bytes(received[3:_RECORD_HEADER_BYTES])
    message = received[_RECORD_HEADER_BYTES:][:record_bytes]
    if message[:1] != _SERVER_HELLO or message[6:_SESSION_ID_AT] != _RETRY_RANDOM:
        return None
    session_id_bytes = int.from_bytes(message[_SESSION_ID_AT : _SESSION_ID_AT + 1])
    at = _SESSION_ID_AT + 1 + session_id_bytes + _CIPHER_AND_COMPRESSION_BYTES + _LENGTH_BYTES
    while at + _EXTENSION_HEADER_BYTES <= len(message):  # each turn goes on by a header at least
        content_at = at + _EXTENSION_HEADER_BYTES
        content_bytes = int.from_bytes(message[at + 2 : content_at])
        if message[at : at + 2] == _KEY_SHARE:
            return _CURVES.get(message[content_at : content_at + content_bytes])
        at = content_at + content_bytes
    return None


class Curves:
    """What servers asked for, each for `CURVE_SECONDS_MAX`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[Hashable, tuple[str, float]] = {}  # and until when

    def find(self, server: Hashable) -> str | None:
        """Return the curve to begin with; None to begin as OpenSSL does."""
        curve, until = self._asked.get(server, (None, 0.0))
        return curve if curve is None or self._clock() < until else None

    def keep(self, server: Hashable, curve: str) -> None:
        """Begin with this curve from here on: a handshake in which it was asked for succeeded."""
        self.forget(server)
        if len(self._asked) >= CURVES_MAX:
            del self._asked[next(iter(self._asked))]
        self._asked[server] = curve, self._clock() + CURVE_SECONDS_MAX

    def forget(self, server: Hashable) -> None:
        """Begin as OpenSSL does: a connection failed, perhaps because of the curve."""
        self._asked.pop(server, None)
