"""SCRAM-SHA-256 for native roles, by scramp, with bounds that a hostile server cannot pass.

RFC 5802, RFC 7677; PostgreSQL documentation, "SASL Authentication". No channel binding: TLS ends at
a front end on the way (W28).
"""

import re
from typing import Final

from scramp import ScramClient, ScramException

from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret

SCRAM_SHA_256: Final = b"SCRAM-SHA-256"
# PostgreSQL's default is 4096. scramp's own bound, ten million, would let a hostile server keep the
# event loop busy for seconds (CVE-2026-6665); this one costs about 50 ms.
ITERATIONS_MAX: Final = 100_000
NONCE_BYTES_MAX: Final = 1024
_COUNT: Final = re.compile(rb"[1-9][0-9]{0,6}")


class Scram:
    """One SCRAM exchange, in the order of its methods. Each raises ProxyError."""

    def __init__(self, mechanisms: tuple[bytes, ...], password: Secret) -> None:
        if SCRAM_SHA_256 not in mechanisms:
            offered = b", ".join(mechanisms).decode("ascii", "backslashreplace")
            raise ProxyError(ErrorKind.UNSUPPORTED_AUTH, f"SASL with {offered or 'nothing'}")
        try:
            text = password.reveal().decode()
        except UnicodeDecodeError:
            raise ProxyError(ErrorKind.PASSWORD_FILE_UNREADABLE, "it is not UTF-8") from None
        # PostgreSQL takes the user from the StartupMessage and ignores the one in here.
        self._client = ScramClient([SCRAM_SHA_256.decode()], "*", text)

    def first(self) -> bytes:
        """Return the client's first message."""
        message: str = self._client.get_client_first()
        return message.encode()

    def proof(self, challenge: bytes) -> bytes:
        """Return the client's final message in answer to the server's challenge."""
        _check_bounds(challenge)
        try:
            self._client.set_server_first(challenge.decode())
            message: str = self._client.get_client_final()
        except (ScramException, ValueError) as error:
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, "a malformed SCRAM challenge") from error
        return message.encode()

    def check(self, proof: bytes) -> None:
        """Check that the server knows the password too."""
        try:
            self._client.set_server_final(proof.decode())
        except (ScramException, ValueError) as error:
            detail = "the server's SCRAM proof is wrong"
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, detail) from error


def _check_bounds(challenge: bytes) -> None:
    for attribute in challenge.split(b","):
        name, _, value = attribute.partition(b"=")
        too_long = name == b"r" and len(value) > NONCE_BYTES_MAX
        # Looked at as text first: int() of a huge number is an attack, and of another an error.
        too_many = name == b"i" and (not _COUNT.fullmatch(value) or int(value) > ITERATIONS_MAX)
        if too_long or too_many:
            raise ProxyError(ErrorKind.UPSTREAM_PROTOCOL, "a SCRAM challenge beyond its bounds")
