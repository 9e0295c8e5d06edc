"""How fresh a token is: the whole rule, without a clock, a call or a wait.

A token that is asked for is used, used and renewed behind the asker's back, or replaced first.

For: `judge`. Not for: minting (`credentials`). All times are in seconds; moments are since the
epoch, on the wall clock.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from proxy.workspace.client import Credential

# At this part of the time for which it may be used a token that is asked for is renewed.
REFRESH_AT: Final = 0.5


class Need(Enum):
    """What an asker's moment calls for."""

    USE = auto()
    USE_AND_REFRESH = auto()
    MINT = auto()


@dataclass(frozen=True, slots=True)
class Freshness:
    """The rule's two numbers, in seconds."""

    max_age_seconds: float
    expiry_margin_seconds: float


def is_valid(credential: Credential | None, now: float, freshness: Freshness) -> bool:
    """Whether the credential may be shown at all: far enough from its expiry, whatever its age."""
    return credential is not None and now < credential.expires_at - freshness.expiry_margin_seconds


def judge(credential: Credential | None, now: float, freshness: Freshness) -> Need:
    """Return what to do for one who asks now."""
    if credential is None or not is_valid(credential, now, freshness):
        return Need.MINT
    age = now - credential.requested_at
    if not 0 <= age <= freshness.max_age_seconds or freshness.max_age_seconds == 0:
        return Need.MINT  # also when the clock was set back: the age is then unknown
    life = credential.expires_at - credential.requested_at
    usable = min(freshness.max_age_seconds, life - freshness.expiry_margin_seconds)
    return Need.USE_AND_REFRESH if age > usable * REFRESH_AT else Need.USE
