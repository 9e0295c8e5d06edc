"""The client side of SCRAM-SHA-256, for native roles, with bounds against a hostile server.

RFC 5802, RFC 7677; PostgreSQL documentation, "SASL Authentication". No channel binding, because TLS
ends at a front end (W28). Written here because libraries refuse passwords that SASLprep refuses,
and PostgreSQL accepts them.

Invariant: the proof does not reveal the password to a server that does not know it.
"""

import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode
from typing import Final

from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret

SCRAM_SHA_256: Final = b"SCRAM-SHA-256"
ITERATIONS_MIN: Final = 4096  # RFC 7677, section 4; PostgreSQL's default
# With more, a hostile server could keep the event loop busy for seconds (CVE-2026-6665). This many
# take about 50 ms.
ITERATIONS_MAX: Final = 100_000
NONCE_BYTES_MAX: Final = 1024
_OWN_NONCE_BYTES: Final = 18  # as libpq has it
_NO_BINDING: Final = b"n,,"
# The server's first message; nothing may follow, as in libpq. The count's digits are bounded here,
# because int() of a huge number takes long.
_CHALLENGE: Final = re.compile(rb"r=([!-+\--~]+),s=([A-Za-z0-9+/]+={0,2}),i=([1-9][0-9]{0,8})")


class Scram:
    """One SCRAM exchange; call the methods in their order. Each raises ProxyError."""

    def __init__(self, mechanisms: tuple[bytes, ...], password: Secret) -> None:
        if SCRAM_SHA_256 not in mechanisms:
            offered = b", ".join(mechanisms).decode("ascii", "backslashreplace")
            raise ProxyError(ErrorKind.UNSUPPORTED_AUTH, f"SASL with {offered or 'nothing'}")
        self._password = _saslprep(password)
        self._nonce = secrets.token_urlsafe(_OWN_NONCE_BYTES).encode()
        # PostgreSQL takes the user from the StartupMessage and ignores this one.
        self._first_bare = b"n=*,r=" + self._nonce
        self._answer = b""

    def client_first(self) -> bytes:
        """Return the client's first message."""
        return _NO_BINDING + self._first_bare

    def client_final(self, challenge: bytes) -> bytes:
        """Return the client's final message in answer to the server's challenge."""
        nonce, salt, iterations = self._parse(challenge)
        salted = hashlib.pbkdf2_hmac("sha256", self._password.reveal(), salt, iterations)
        final = b"c=" + b64encode(_NO_BINDING) + b",r=" + nonce
        auth_message = b",".join((self._first_bare, challenge, final))
        client_key = _mac(salted, b"Client Key")
        signature = _mac(hashlib.sha256(client_key).digest(), auth_message)
        proof = bytes(one ^ other for one, other in zip(client_key, signature, strict=True))
        self._answer = b"v=" + b64encode(_mac(_mac(salted, b"Server Key"), auth_message))
        return final + b",p=" + b64encode(proof)

    def verify_server(self, answer: bytes) -> None:
        """Verify that the server knows the password too. Raises ProxyError."""
        if not self._answer or not hmac.compare_digest(answer, self._answer):
            detail = "the server's SCRAM proof is wrong"
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, detail)

    def _parse(self, challenge: bytes) -> tuple[bytes, bytes, int]:
        found = _CHALLENGE.fullmatch(challenge)
        if found is None:
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, "a malformed SCRAM challenge")
        nonce, salt, count = found.groups()
        if len(nonce) > NONCE_BYTES_MAX or not ITERATIONS_MIN <= int(count) <= ITERATIONS_MAX:
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, "a SCRAM challenge beyond its bounds")
        if not nonce.startswith(self._nonce) or nonce == self._nonce:
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, "a SCRAM challenge with a foreign nonce")
        try:
            return nonce, b64decode(salt, validate=True), int(count)
        except ValueError as error:
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, "a malformed SCRAM challenge") from error


def _saslprep(password: Secret) -> Secret:
    """Return the password as PostgreSQL hashes it: after SASLprep, or unchanged if that refuses."""
    try:
        text = password.reveal().decode()
    except UnicodeDecodeError:
        raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, "the password is not UTF-8") from None
    if text.isascii():
        return password  # SASLprep does not change it, or refuses it
    # A library of some megabytes, for passwords that are rare.
    from scramp import ScramException  # noqa: PLC0415
    from scramp.utils import saslprep  # noqa: PLC0415

    try:
        return Secret(saslprep(text).encode() or password.reveal())
    except ScramException:
        return password


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")
