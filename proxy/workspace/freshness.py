"""How fresh a token has to be: the whole rule, without a clock, a call or a wait.

A caller that needs a token uses the newest one, uses it while the next one is minted, or waits for
the next one.

A workspace that limits the rate of mints needs older tokens accepted: see `AcceptedAge`. A renewal
is not urgent while a valid token is held, and a fleet of proxies must not take the API's limit from
those that hold none: see `renewal_delay`.

For: `judge`, `is_fresh` and the two above. Not for: minting (`token_source`). Durations are in
seconds; moments are seconds since the epoch, on the wall clock.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from proxy.workspace.credential import Credential
from proxy.workspace.single_flight import Delay

# After this part of the time for which a token may be used, the next caller starts a refresh.
REFRESH_AT: Final = 0.5

# The back-off of a renewal: one call a minute is the most that a proxy with a valid token makes
# while the API fails. It grows to ten minutes, so that the calls of a fleet come back over as long.
RENEWAL_SECONDS_MIN: Final = 60.0
RENEWAL_RANDOM_SECONDS_MAX: Final = 540.0
RENEWAL_RETRY_AFTER_SECONDS_MAX: Final = 600.0

# The first 429 doubles the accepted age. Before a proxy's second token it makes it eight times as
# long: a fleet may be starting, and renewals wait until all of it has had a first token. Several in
# a row make it at least eight times as long as they have lasted. Each mint that succeeds shortens
# it by a twentieth: while the limit is too low for the fleet, that and the doubling balance when
# about one call in fifteen is a 429.
LENGTHEN_FACTOR: Final = 2.0
START_FACTOR: Final = 8.0
SHORTAGE_FACTOR: Final = 8.0
SHORTEN_FACTOR: Final = 0.95
# From an age of 0 it is lengthened to this, and shortened from less than this to the age set.
LENGTHENED_SECONDS_MIN: Final = 60.0

# The back-off of a first mint after a 429. The first one is short, because a few proxies may have
# called at once. It grows to a length at which the calls of a fleet that starts are a few times the
# limit, the last proxies get a token soon after the others, and clients can wait for the next call.
THROTTLED_DELAY: Final = Delay(4.0, 32.0, sure_share=0.6, growth=5.0)


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


class AcceptedAge:
    """The age up to which a token is used: as set, and longer while the API answers 429."""

    def __init__(self, freshness: Freshness) -> None:
        """Accept what `freshness` says."""
        self._configured = freshness
        self._short_since: float | None = None  # the first of the 429s in a row
        self._successes = 0
        self.freshness = freshness

    @property
    def seconds(self) -> float:
        """The age that is accepted now."""
        return self.freshness.max_age_seconds

    @property
    def lengthened(self) -> bool:
        """Whether it is longer than set."""
        return self.seconds > self._configured.max_age_seconds

    def lengthen(self, now: float, lifetime_seconds: float) -> None:
        """Accept older tokens after a 429, at most as old as a token is valid.

        A multiple of the age at the first of several in a row; later ones show how long the API is
        short of tokens, and what many proxies wait for so long cannot be renewed more often.
        """
        if self._short_since is None or now < self._short_since:
            self._short_since = now
            factor = START_FACTOR if self._successes < 2 else LENGTHEN_FACTOR
            longer = max(self.seconds * factor, LENGTHENED_SECONDS_MIN)
        else:
            longer = max(self.seconds, (now - self._short_since) * SHORTAGE_FACTOR)
        valid_seconds = lifetime_seconds - self._configured.expiry_margin_seconds
        self._accept(max(self._configured.max_age_seconds, min(longer, valid_seconds)))

    def shorten(self) -> None:
        """Accept a little less after a mint that succeeded, at least the age that is set."""
        self._short_since = None
        self._successes += 1
        shorter = self.seconds * SHORTEN_FACTOR
        if shorter < LENGTHENED_SECONDS_MIN:
            shorter = 0.0
        self._accept(max(self._configured.max_age_seconds, shorter))

    def _accept(self, seconds: float) -> None:
        self.freshness = replace(self._configured, max_age_seconds=seconds)


def renewal_delay(valid_seconds: float) -> Delay:
    """Return the back-off of a renewal while a token is held that is valid for so long.

    It ends before the token does, at a random time: a fleet that lost the API together must not
    come back together when its tokens expire.
    """
    longest = min(RENEWAL_RANDOM_SECONDS_MAX, max(0.0, valid_seconds - RENEWAL_SECONDS_MIN))
    return Delay(
        min(RENEWAL_SECONDS_MIN, longest),
        longest,
        sure_seconds=RENEWAL_SECONDS_MIN,
        retry_after_seconds_max=RENEWAL_RETRY_AFTER_SECONDS_MAX,
    )
