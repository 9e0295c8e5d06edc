"""The curve that a TLS server requires for the key exchange, remembered for a while.

A TLS 1.3 client sends a key share for the group that it guesses (X25519). A server that accepts
another group only asks for it with a HelloRetryRequest, which costs a round trip and another key
pair on both sides. PostgreSQL up to 17 is such a server (`ssl_ecdh_curve` is prime256v1). Without
this module, connecting to it takes 6 % longer on one machine, and 15 % at a distance of 1 ms.

Not for: deciding which curves are acceptable. The invariant: a curve is recorded only after a
handshake that succeeded, whose transcript covers the request, so only the server can choose it.
"""

import time
from collections.abc import Callable, Hashable
from typing import Final

# Then all groups are offered again: the server may support better ones by now.
CURVE_SECONDS_MAX: Final = 3600.0
CURVES_MAX: Final = 256  # servers; the one recorded first is removed

# RFC 8446, sections 5.1 (record), 4 (handshake message) and 4.1.3 (ServerHello).
_HANDSHAKE_RECORD: Final = b"\x16"
_SERVER_HELLO: Final = b"\x02"
_RECORD_HEADER_BYTES: Final = 5  # type, version, length
_SESSION_ID_AT: Final = 38  # after type, length, version and random
_CIPHER_AND_COMPRESSION_BYTES: Final = 3
_LENGTH_BYTES: Final = 2
_EXTENSION_HEADER_BYTES: Final = 4  # type, length
# The random of a HelloRetryRequest: SHA-256 of "HelloRetryRequest".
_RETRY_RANDOM: Final = bytes.fromhex(
    "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c"
)
_KEY_SHARE: Final = (51).to_bytes(2)
# Section 4.2.7, with the names that OpenSSL uses.
_CURVES: Final = {
    b"\x00\x17": "prime256v1",
    b"\x00\x18": "secp384r1",
    b"\x00\x19": "secp521r1",
}


def asked_curve(received: bytes) -> str | None:
    """Return the curve that a HelloRetryRequest asks for, by OpenSSL's name.

    `received` is the first data from a server. Return None for anything else: another message,
    another group, a part of a message.
    """
    if received[:1] != _HANDSHAKE_RECORD:
        return None
    record_bytes = int.from_bytes(received[3:_RECORD_HEADER_BYTES])
    message = received[_RECORD_HEADER_BYTES:][:record_bytes]
    if message[:1] != _SERVER_HELLO or message[6:_SESSION_ID_AT] != _RETRY_RANDOM:
        return None
    session_id_bytes = int.from_bytes(message[_SESSION_ID_AT : _SESSION_ID_AT + 1])
    at = _SESSION_ID_AT + 1 + session_id_bytes + _CIPHER_AND_COMPRESSION_BYTES + _LENGTH_BYTES
    while at + _EXTENSION_HEADER_BYTES <= len(message):  # each turn advances by at least a header
        content_at = at + _EXTENSION_HEADER_BYTES
        content_bytes = int.from_bytes(message[at + 2 : content_at])
        if message[at : at + 2] == _KEY_SHARE:
            return _CURVES.get(message[content_at : content_at + content_bytes])
        at = content_at + content_bytes
    return None


class Curves:
    """The curves that servers asked for, each kept for `CURVE_SECONDS_MAX`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[Hashable, tuple[str, float]] = {}  # and its expiry

    def find(self, server: Hashable) -> str | None:
        """Return the curve to offer; None to offer OpenSSL's default groups."""
        curve, until = self._asked.get(server, (None, 0.0))
        return curve if curve is None or self._clock() < until else None

    def keep(self, server: Hashable, curve: str) -> None:
        """Record the curve that the server asked for in a handshake that succeeded."""
        self.invalidate(server)
        if len(self._asked) >= CURVES_MAX:
            del self._asked[next(iter(self._asked))]
        self._asked[server] = curve, self._clock() + CURVE_SECONDS_MAX

    def invalidate(self, server: Hashable) -> None:
        """Remove the server's curve: a connection failed, perhaps because of it."""
        self._asked.pop(server, None)
