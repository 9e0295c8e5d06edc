"""The client's side of SCRAM-SHA-256, for native roles, with bounds no hostile server can pass.

RFC 5802, RFC 7677; PostgreSQL documentation, "SASL Authentication". No channel binding: TLS ends at
a front end on the way (W28). Written out because a library's client takes no password that SASLprep
refuses, and PostgreSQL takes any.

Invariant: a server learns of the password only what the proof shows to one who knows it.
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
# More would let a hostile server keep the event loop busy for seconds (CVE-2026-6665); this many
# cost about 50 ms.
ITERATIONS_MAX: Final = 100_000
NONCE_BYTES_MAX: Final = 1024
_OWN_NONCE_BYTES: Final = 18  # as libpq has it
_NO_BINDING: Final = b"n,,"
# The server's first message; nothing may follow, as libpq has it. The count is looked at as text
# first: int() of a huge number is an attack.
_CHALLENGE: Final = re.compile(rb"r=([!-+\--~]+),s=([A-Za-z0-9+/]+={0,2}),i=([1-9][0-9]{0,8})")


class Scram:
    """One SCRAM exchange, in the order of its methods. Each raises ProxyError."""

    def __init__(self, mechanisms: tuple[bytes, ...], password: Secret) -> None:
        if SCRAM_SHA_256 not in mechanisms:
            offered = b", ".join(mechanisms).decode("ascii", "backslashreplace")
            raise ProxyError(ErrorKind.UNSUPPORTED_AUTH, f"SASL with {offered or 'nothing'}")
        self._password = _saslprep(password)
        self._nonce = secrets.token_urlsafe(_OWN_NONCE_BYTES).encode()
        # PostgreSQL takes the user from the StartupMessage and ignores the one in here.
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
        """Check that the server knows the password too."""
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
    """Return the password as PostgreSQL hashes it: by SASLprep, or as it is where that refuses."""
    try:
        text = password.reveal().decode()
    except UnicodeDecodeError:
        raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, "it is not UTF-8") from None
    if text.isascii():
        return password  # which SASLprep leaves alone, or refuses
    # Of some megabytes, for passwords that hardly anybody has.
    from scramp import ScramException  # noqa: PLC0415
    from scramp.utils import saslprep  # noqa: PLC0415

    try:
        return Secret(saslprep(text).encode() or password.reveal())
    except ScramException:
        return password


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")
