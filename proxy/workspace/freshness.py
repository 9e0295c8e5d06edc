"""How fresh a token has to be: the whole rule, without a clock, a call or a wait.

A caller that needs a token uses the newest one, uses it while the next one is minted, or waits for
the next one.

For: `judge` and `is_fresh`. Not for: minting (`token_source`). Durations are in seconds; moments
are seconds since the epoch, on the wall clock.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from proxy.workspace.credential import Credential

# After this part of the time for which a token may be used, the next caller starts a refresh.
REFRESH_AT: Final = 0.5


class Need(Enum):
    """What a caller needs now."""

    USE = auto()
    USE_AND_REFRESH = auto()
    MINT = auto()


@dataclass(frozen=True, slots=True)
class Freshness:
    """The rule's two numbers, in seconds."""

    max_age_seconds: float
    expiry_margin_seconds: float


def is_valid(credential: Credential | None, now: float, freshness: Freshness) -> bool:
    """Return whether a credential is far enough from its expiry to be used, whatever its age."""
    return credential is not None and now < credential.expires_at - freshness.expiry_margin_seconds


def judge(credential: Credential | None, now: float, freshness: Freshness) -> Need:
    """Return what a caller does that asks now."""
    if credential is None or not is_valid(credential, now, freshness):
        return Need.MINT
    age = now - credential.requested_at
    if not 0 <= age <= freshness.max_age_seconds or freshness.max_age_seconds == 0:
        return Need.MINT  # also when the clock was set back: the age is then unknown
    lifetime = credential.expires_at - credential.requested_at
    usable = min(freshness.max_age_seconds, lifetime - freshness.expiry_margin_seconds)
    return Need.USE_AND_REFRESH if age > usable * REFRESH_AT else Need.USE


def is_fresh(credential: Credential, now: float, freshness: Freshness) -> bool:
    """Return whether a dial may still use the credential that it got some time ago.

    With a maximum age of 0 the credential was minted for this dial alone, and is good until it
    expires.
    """
    if freshness.max_age_seconds == 0:
        return is_valid(credential, now, freshness)
    return judge(credential, now, freshness) is not Need.MINT
