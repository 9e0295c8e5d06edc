"""Whether and when a dial is retried. Pure: no clock, no sleep; randomness is an argument."""

from collections.abc import Callable
from typing import Final

from proxy.errors import Disposition, ProxyError

# Full jitter: each delay is a random part of a ceiling that doubles.
RETRIES_MAX: Final = 2  # three tries
RETRY_CEILING_SECONDS: Final = (0.2, 2.0)  # first and last
# A port that refuses while its server restarts, or resets. Retried for this long.
CONNECT_RETRY_SECONDS: Final = 30.0
# For a database that wakes up or a front end that is overloaded, until the dial's time is over.
WAIT_CEILING_SECONDS: Final = (0.5, 8.0)
_DOUBLINGS_MAX: Final = 10  # beyond both last ceilings; 2.0 ** n overflows above 1023


class Retry:
    """The retries of one dial. `jitter` returns a number from 0 to 1.

    A connection that was refused or reset is tried again for `connect_retry_seconds`, counted from
    the first time.
    """

    def __init__(
        self,
        jitter: Callable[[], float],
        connect_retry_seconds: float = CONNECT_RETRY_SECONDS,
    ) -> None:
        self._jitter = jitter
        self._connect_retry_seconds = connect_retry_seconds
        self._first_reconnect_at: float | None = None
        self._tries = 0
        self._retries = 0
        self._reminted = False

    def delay(self, error: ProxyError, *, from_cache: bool, now: float) -> float | None:
        """Return the seconds to wait before the next try, or None if there is none.

        `from_cache`: a cached token was refused, and the next try would use another. `now` is in
        seconds of any clock that does not go back.
        """
        self._tries += 1
        match error.kind.value.disposition:
            case Disposition.WAIT:
                return self._backoff(*WAIT_CEILING_SECONDS)
            case Disposition.RECONNECT:
                if self._first_reconnect_at is None:
                    self._first_reconnect_at = now
                left = self._first_reconnect_at + self._connect_retry_seconds - now
                return min(left, self._backoff(*RETRY_CEILING_SECONDS)) if left > 0 else None
            case Disposition.RETRY | Disposition.RETRY_ONCE as disposition:
                allowed = RETRIES_MAX if disposition is Disposition.RETRY else 1
                self._retries += 1
                if self._retries > allowed:
                    return None
                return self._backoff(*RETRY_CEILING_SECONDS)
            case Disposition.REMINT:
                again = from_cache and not self._reminted
                self._reminted = True
                return 0.0 if again else None
            case Disposition.FAIL:
                return None

    def _backoff(self, first: float, last: float) -> float:
        ceiling = min(last, first * 2.0 ** min(self._tries - 1, _DOUBLINGS_MAX))
        return ceiling * self._jitter()
