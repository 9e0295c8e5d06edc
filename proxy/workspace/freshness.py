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

# A 429 before a proxy's second token makes the accepted age 7.5 times as long as set, or as the
# first token was waited for: a fleet may be starting. Set to a minute it is renewed at 225 s, and
# takes no token from a fleet that could have had its first ones after 200 s.
START_FACTOR: Final = 7.5
# With the second token the start is over, and the age is at most 3.5 times as long as set: tokens
# are renewed when 105 s old, and those below 180 s outlast 55 minutes of an outage (their hour less
# the margin). Those that were waited for longer keep that multiple of their wait.
STARTED_FACTOR: Final = 3.5
# Afterwards each 429 lengthens it by half. A success shortens it by a share that grows with the
# age, so that the ages of a fleet become alike, and with the successes in a row, so that an age
# that is right is kept for long. While the limit is too low, they balance at a few 429s in a
# hundred calls.
LENGTHEN_FACTOR: Final = 1.5
SHORTEN_SHARE_A_SECOND: Final = 1 / 100_000
SHORTEN_SHARE_A_SUCCESS: Final = 1 / 5_000
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
        self._tokens = 0
        self._successes_in_a_row = 0
        self._waits_since: float | None = None  # the first 429, until the first token
        self._waited_seconds = 0.0
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

        Calls that ran together are one 429.
        """
        self._successes_in_a_row = 0
        longer = self.seconds if self._tokens == 0 else self.seconds * LENGTHEN_FACTOR
        if self._tokens == 0:
            if self._waits_since is None or now < self._waits_since:
                self._waits_since = now
            self._waited_seconds = now - self._waits_since
        if self._tokens < 2:
            longer = max(longer, self._started_at_least(START_FACTOR))
        valid_seconds = lifetime_seconds - self._configured.expiry_margin_seconds
        self._accept(min(max(longer, LENGTHENED_SECONDS_MIN), valid_seconds))

    def shorten(self) -> None:
        """Accept a little less after a mint that succeeded, at least the age that is set."""
        self._tokens += 1
        self._successes_in_a_row += 1
        shorter = self.seconds * (
            1
            - self.seconds * SHORTEN_SHARE_A_SECOND
            - self._successes_in_a_row * SHORTEN_SHARE_A_SUCCESS
        )
        if self._tokens == 2:
            shorter = min(shorter, self._started_at_least(STARTED_FACTOR))
        self._accept(shorter if shorter >= LENGTHENED_SECONDS_MIN else 0.0)

    def _started_at_least(self, factor: float) -> float:
        """Return the age for a fleet that starts: it renews no token while others wait so long."""
        return max(self._configured.max_age_seconds * factor, self._waited_seconds * START_FACTOR)

    def _accept(self, seconds: float) -> None:
        seconds = max(self._configured.max_age_seconds, seconds)
        self.freshness = replace(self._configured, max_age_seconds=seconds)


def renewal_delay(valid_seconds: float, *, throttled: bool) -> Delay:
    """Return the back-off of a renewal while a token is held that is valid for so long.

    It ends before the token does, at a random time: a fleet that lost the API together must not
    come back together when its tokens expire. After a 429 it does not grow: the accepted age does,
    and a token must not be several back-offs old when an outage begins.
    """
    random_seconds_max = RENEWAL_SECONDS_MIN if throttled else RENEWAL_RANDOM_SECONDS_MAX
    longest = min(random_seconds_max, max(0.0, valid_seconds - RENEWAL_SECONDS_MIN))
    return Delay(
        min(RENEWAL_SECONDS_MIN, longest),
        longest,
        sure_seconds=RENEWAL_SECONDS_MIN,
        retry_after_seconds_max=RENEWAL_RETRY_AFTER_SECONDS_MAX,
    )
