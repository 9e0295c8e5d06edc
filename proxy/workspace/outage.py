"""Whether the workspace API fails: since when, why, and whether new clients wait for it.

A client without a valid token waits for a mint. Once the API has failed for some seconds that wait
is of no use, and new clients are refused at once, with the last failure (a circuit breaker). Calls
go on meanwhile, one at a time, and the first that succeeds ends the outage.

A 429 is no outage: the API works, and those who wait are served in turn.

For: the state, and its log lines. Not for: when the next call is made (`single_flight.Backoff`).
"""

import re
import time
from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.workspace.resources import OF_ONE_RESOURCE
from proxy.workspace.single_flight import is_transient

# The API fails for a moment now and then; clients wait as long as this.
OUTAGE_SECONDS: Final = 5.0
# Without any call for this time the outage counts as over.
STALE_SECONDS: Final = 60.0

_STATUS: Final = re.compile(r"HTTP \d+")

_log = get_logger(__name__)


class ApiCall(Enum):
    """What fails. Without a host or a role no client is served, so that look-ups count as well.

    `IDENTITY` is the look-up of the role. `READ` is of the password file.
    """

    MINT = "mint"
    LOOK_UP = "look-up"
    IDENTITY = "identity"
    READ = "read"


class Words(NamedTuple):
    """The log events of an outage's begin and end."""

    fails: str
    works: str


_API: Final = Words("the workspace API fails", "the workspace API works again")


class Outage:
    """The failures in a row of the calls for one account."""

    def __init__(
        self, name: str, clock: Callable[[], float] = time.time, words: Words | None = _API
    ) -> None:
        """`name` is the account's. `clock` returns seconds since the epoch.

        Without `words` nothing is logged: another process does so.
        """
        self.name = name
        self._words = words
        self._clock = clock
        self._last_at = 0.0
        self._tries = 0
        self._logged = ("", "")
        self._failing: dict[ApiCall, float] = {}  # when they failed last
        self.since: float | None = None
        """When the first call failed, in seconds since the epoch; None while the API works."""
        self.failure: ProxyError | None = None
        """The last failure of the outage."""

    @property
    def failing_seconds(self) -> float:
        """The time for which the API has failed; 0 while it works."""
        return 0.0 if self.since is None else max(0.0, self._clock() - self.since)

    def refusal(self) -> ProxyError | None:
        """Return the failure for a new client without a valid token; None if it waits for a mint.

        A permanent failure ends a wait by itself.
        """
        if self.failure is None or not is_transient(self.failure):
            return None
        is_stale = self._clock() - self._last_at > STALE_SECONDS
        if is_stale or self.failing_seconds <= OUTAGE_SECONDS:
            return None
        return ProxyError(self.failure.kind, self.failure.detail, final=True)

    def record_failure(self, call: ApiCall, failure: ProxyError, backoff_seconds: float) -> None:
        """Record a failed call; log the first one, and each that fails in another way.

        A look-up that fails for its own resource concerns that target alone.
        """
        if failure.kind is ErrorKind.API_THROTTLED:
            return
        if call is ApiCall.LOOK_UP and failure.kind in OF_ONE_RESOURCE:
            return
        now = self._clock()
        self._failing[call] = now
        if self.since is None:
            self.since = now
        self._tries += 1
        self._last_at, self.failure = now, failure
        status = _STATUS.search(failure.detail)
        cause = (failure.reason, status.group() if status else "")
        if cause != self._logged and self._words is not None:
            self._logged = cause
            _log.warning(
                self._words.fails,
                workspace=self.name,
                call=call.value,
                reason=failure.reason,
                detail=failure.detail,
                hint=failure.kind.value.hint,
                tries=self._tries,
                failing_seconds=round(now - self.since, 1),
                backoff_seconds=round(backoff_seconds, 1),
            )

    def record_success(self, call: ApiCall) -> None:
        """Record a call that succeeded; log it if it ends an outage.

        A mint does so as well when no look-up has failed for some time: perhaps none is made.
        """
        self._failing.pop(call, None)
        if call is ApiCall.MINT:
            oldest = self._clock() - STALE_SECONDS
            self._failing = {one: at for one, at in self._failing.items() if at >= oldest}
        if self.since is None or self._failing:
            return
        seconds = round(self.failing_seconds, 1)
        tries, self._tries = self._tries, 0
        self.since, self.failure, self._logged = None, None, ("", "")
        if self._words is None:
            return
        _log.info(
            self._words.works,
            workspace=self.name,
            failed_seconds=seconds,
            tries=tries,
        )
