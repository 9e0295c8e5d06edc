"""A credential for one login to an upstream: a token, or a native role's password."""

from dataclasses import dataclass

from proxy.wire.secret import Secret


@dataclass(frozen=True, slots=True)
class Credential:
    """What is sent as the password. Both times are seconds since the epoch, on the wall clock."""

    secret: Secret
    requested_at: float
    expires_at: float
    is_password: bool = False
    """Whether it is a native role's password: it answers SCRAM too, and does not expire."""
