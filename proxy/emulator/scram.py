"""The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), for native roles and pooled hosts.

Implemented here because libpq sends an empty user name, which the library that this package already
depends on does not accept. There is no channel binding: Lakebase's front end terminates TLS too. It
checks only what an emulator must check.
"""

import base64
import hashlib
import hmac
import secrets
from typing import Final

MECHANISM: Final = "SCRAM-SHA-256"
ITERATIONS: Final = 4096  # PostgreSQL's own default


class ScramRefused(Exception):
    """The client does not know the password, or broke the SCRAM protocol."""


class ScramServer:
    """One exchange: `first`, then `final`."""

    def __init__(self, password: str) -> None:
        self._salt = secrets.token_bytes(16)
        self._salted = hashlib.pbkdf2_hmac("sha256", password.encode(), self._salt, ITERATIONS)
        self._client_first = ""
        self._server_first = ""

    def first(self, message: str) -> str:
        """Return the server-first-message for a client-first-message. Raises ScramRefused."""
        flag, _, rest = message.partition(",")
        _, _, self._client_first = rest.partition(",")
        nonce = _attribute(self._client_first, "r")
        if flag not in ("n", "y") or not nonce:
            raise ScramRefused("not a client-first-message")
        nonce += secrets.token_urlsafe(18)
        salt = base64.b64encode(self._salt).decode()
        self._server_first = f"r={nonce},s={salt},i={ITERATIONS}"
        return self._server_first

    def final(self, message: str) -> str:
        """Return the server-final-message for a client-final-message. Raises ScramRefused."""
        without_proof, _, proof = message.rpartition(",p=")
        if _attribute(without_proof, "r") != _attribute(self._server_first, "r"):
            raise ScramRefused("another exchange's nonce")
        exchange = f"{self._client_first},{self._server_first},{without_proof}".encode()
        client_key = self._mac(self._salted, b"Client Key")
        stored_key = hashlib.sha256(client_key).digest()
        signature = self._mac(stored_key, exchange)
        expected = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        if not hmac.compare_digest(base64.b64encode(expected), proof.encode()):
            raise ScramRefused("a wrong proof")
        server_key = self._mac(self._salted, b"Server Key")
        return "v=" + base64.b64encode(self._mac(server_key, exchange)).decode()

    @staticmethod
    def _mac(key: bytes, message: bytes) -> bytes:
        return hmac.digest(key, message, "sha256")


def _attribute(message: str, name: str) -> str:
    parts = (part.partition("=") for part in message.split(","))
    return next((value for key, _, value in parts if key == name), "")
