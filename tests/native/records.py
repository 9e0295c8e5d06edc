"""TLS 1.3 records written by hand: what no TLS library lets its user send (RFC 8446).

For: a peer that floods with key updates or empty records, forges one, or says what it may not.
Take a server's secret out of its key log when the handshake is done and no ticket was sent; from
then on these are its records, and the library only reads.
"""

import hashlib
import hmac
import struct
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION: Final = 23
WARNING, FATAL = b"\1", b"\2"
CLOSE_NOTIFY, UNEXPECTED_MESSAGE, INTERNAL_ERROR = b"\0", b"\12", b"\120"
_KEY_UPDATE: Final = 24
_HASH: Final = hashlib.sha384  # that of TLS_AES_256_GCM_SHA384, which both sides prefer
_KEY_BYTES: Final = 32


def server_secret(key_log: Path) -> bytes:
    """Return the secret of what the server of the last handshake sends."""
    lines = [line.split() for line in key_log.read_text().splitlines()]
    return bytes.fromhex([line[2] for line in lines if line[0] == "SERVER_TRAFFIC_SECRET_0"][-1])


class Records:
    """One direction of a connection, from the first record after the handshake on."""

    def __init__(self, secret: bytes) -> None:
        self._begin(secret)

    def _begin(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = AESGCM(_expand(secret, b"key", _KEY_BYTES))
        self._nonce = int.from_bytes(_expand(secret, b"iv", 12), "big")
        self._number = 0

    def record(self, content: bytes, kind: int = APPLICATION) -> bytes:
        """Return a record."""
        header = struct.pack("!BHH", APPLICATION, 0x0303, len(content) + 1 + 16)
        nonce = (self._nonce ^ self._number).to_bytes(12, "big")
        self._number += 1
        return header + self._aead.encrypt(nonce, content + bytes((kind,)), header)

    def forged(self, content: bytes) -> bytes:
        """Return a record of which a bit is wrong."""
        record = bytearray(self.record(content))
        record[-1] ^= 1
        return bytes(record)

    def alert(self, level: bytes, description: bytes) -> bytes:
        """Return an alert."""
        return self.record(level + description, ALERT)

    def key_update(self, *, asks: bool) -> bytes:
        """Return a change of this direction's keys; it may ask for the other one's, too."""
        changed = self.record(struct.pack("!B3sB", _KEY_UPDATE, b"\0\0\1", asks), HANDSHAKE)
        self._begin(_expand(self._secret, b"traffic upd", _HASH().digest_size))
        return changed


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label without a context, up to one hash long."""
    name = b"tls13 " + label
    hashed = struct.pack("!HB", size, len(name)) + name + b"\0" + b"\1"
    return hmac.new(secret, hashed, _HASH).digest()[:size]
