"""Tokens as a workspace signs them: JWTs by their format, long, and valid for one purpose.

The signature is an HMAC with a key that this issuer generated, so that a token of another workspace
(another issuer) is recognized as foreign. This is not a JWT library: it reads its own tokens only.
"""

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

# Real tokens are reported to have 1 to 2 KB or more. This size detects buffers of 512, 1024 and
# 2048 bytes.
TOKEN_BYTES_MIN: Final = 2100

# The padding of a token, so that a piece of a token in the wrong place is recognized. Its length is
# a multiple of three bytes, so that it repeats in base64 as well.
_WATERMARK: Final = "not-a-real-token--"


class Purpose(Enum):
    """What a token is valid for; the `aud` claim."""

    WORKSPACE = "workspace"
    DATABASE = "database"
    FEDERATION = "federation"  # of an external issuer, exchanged for a workspace token


class TokenProblem(Enum):
    """Why a token is refused, as the Autoscaling front end words it."""

    NOT_A_JWT = "Provided authentication token is not a valid JWT encoding"
    UNKNOWN_KEY = "jwk not found"
    WRONG_AUDIENCE = "invalid JWT token audience"
    EXPIRED = "OAuth: User is not authorized"


class TokenRefused(Exception):
    """A token is refused; `problem` says why. The text never contains the token."""

    def __init__(self, problem: TokenProblem) -> None:
        super().__init__(problem.value)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Claims:
    """The contents of a valid token: its identity and its expiry in seconds since the epoch."""

    identity: str
    expires_at: float


class TokenIssuer:
    """Signs and checks the tokens of one workspace."""

    def __init__(self, workspace_id: str, clock: Callable[[], float]) -> None:
        """`clock` returns seconds since the epoch."""
        self._workspace_id = workspace_id
        self._clock = clock
        self._key = secrets.token_bytes(32)

    def issue(self, identity: str, purpose: Purpose, lifetime_seconds: float) -> str:
        """Return a new token. With a negative lifetime it has expired already."""
        now = self._clock()
        claims: dict[str, object] = {
            "sub": identity,
            "aud": purpose.value,
            "workspace": self._workspace_id,
            "iat": now,
            "exp": now + lifetime_seconds,
            "jti": secrets.token_hex(16),
        }
        # Three quarters of the size: base64 encodes three bytes as four.
        claims["pad"] = _WATERMARK * (TOKEN_BYTES_MIN * 3 // 4 // len(_WATERMARK) + 1)
        header = {"alg": "HS256", "typ": "JWT", "kid": self._workspace_id}
        signed = f"{_encoded(header)}.{_encoded(claims)}"
        return f"{signed}.{self._signature(signed)}"

    def inspect(self, token: str, purpose: Purpose) -> Claims:
        """Return the claims of a valid token. Raises TokenRefused."""
        signed, _, signature = token.rpartition(".")
        header, _, body = signed.partition(".")
        if not (header.startswith("eyJ") and body.startswith("eyJ") and signature):
            raise TokenRefused(TokenProblem.NOT_A_JWT)
        if not hmac.compare_digest(self._signature(signed).encode(), signature.encode()):
            raise TokenRefused(TokenProblem.UNKNOWN_KEY)
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if claims["aud"] != purpose.value:
            raise TokenRefused(TokenProblem.WRONG_AUDIENCE)
        if claims["exp"] <= self._clock():
            raise TokenRefused(TokenProblem.EXPIRED)
        return Claims(claims["sub"], claims["exp"])

    def _signature(self, signed: str) -> str:
        return _base64(hmac.digest(self._key, signed.encode(), "sha256"))


def fingerprint(token: str | bytes) -> str:
    """Return a short hash of a token. Records use it to identify tokens without storing them."""
    value = token.encode() if isinstance(token, str) else token
    return hashlib.sha256(value).hexdigest()[:16]


def watermarks() -> tuple[str, ...]:
    """Return the padding as it appears inside a token.

    Any 48 characters of the padding contain one of these; which one depends on the length of what
    precedes the padding.
    """
    twice, length = _WATERMARK * 2, len(_WATERMARK)
    return tuple(_base64(twice[start : start + length].encode()) for start in range(3))


def _encoded(part: Mapping[str, object]) -> str:
    return _base64(json.dumps(part, separators=(",", ":")).encode())


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
