"""The most recent errors, for the status page: a bounded list, each with how often it occurred.

For: seeing what is wrong now without searching the log. Not for: details; the log has them, with
the connection's id.

Invariants: at most `RECENT_ERRORS_MAX` are kept. Each consists only of words from closed lists (a
reason, a SQLSTATE, a configured target) and of the proxy's own sentences, never of what a client or
an upstream sent, so that no secret can get here.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Final

from proxy.errors import ErrorKind

# Enough for a failure at each of some dozens of targets. A new kind of error replaces the oldest.
RECENT_ERRORS_MAX: Final = 50

# After so long without it, an error that occurs again is a new one.
QUIET_SECONDS: Final = 300.0

_SQLSTATE: Final = re.compile(r"[0-9A-Z]{5}", re.ASCII)
# Several kinds may share a reason. The first one is the most common, and is shown.
_ROWS: Final = {kind.value.reason: kind.value for kind in reversed(ErrorKind)}
# A hint may name the role; here it is not known. Most roles are service principals.
ANY_ROLE: Final = {"user": "ROLE", "identity": "SERVICE_PRINCIPAL"}


@dataclass(frozen=True, slots=True)
class RecentError:
    """One kind of error at one target.

    `at` is when it occurred last, in seconds since 1970, and `since` the first time after
    `QUIET_SECONDS` without it. `target` is empty for an error that concerns no target.
    """

    at: float
    reason: str
    sqlstate: str
    target: str
    count: int
    message: str
    hint: str
    since: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """The fields by which two errors are counted as one."""
        return self.reason, self.sqlstate, self.target

    def as_dict(self, now: float) -> dict[str, object]:
        """Return it as `/status` shows it at `now`, with its time in UTC and its age."""
        times = {"at": iso_time(self.at), "since": iso_time(self.since)}
        return {**asdict(self), **times, "age_seconds": max(0.0, now - self.at)}


def iso_time(seconds: float) -> str:
    """Return seconds since 1970 as a time in UTC, in ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


class RecentErrors:
    """The most recent errors of one process. `clock` is the wall clock, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._errors: dict[tuple[str, str, str], RecentError] = {}  # the newest is the last

    def record(
        self, reason: str, sqlstate: str = "", target: str = "", *, message: str = ""
    ) -> None:
        """Record an error. `reason` and `target` are words of closed lists.

        A SQLSTATE that is absent or malformed is replaced by that of the reason. `message` is for
        a reason that `ErrorKind` does not have.
        """
        row = _ROWS.get(reason)
        if not _SQLSTATE.fullmatch(sqlstate):
            sqlstate = row.sqlstate if row else ""
        message = row.message if row else message
        hint = row.hint.format(**ANY_ROLE) if row else ""
        now = self._clock()
        reason = str(reason)  # it may be of an enum
        error = RecentError(now, reason, sqlstate, target, 1, message, hint, now)
        if before := self._errors.pop(error.key, None):
            since = before.since if now - before.at < QUIET_SECONDS else now
            error = replace(error, count=before.count + 1, since=since)
        self._errors[error.key] = error
        if len(self._errors) > RECENT_ERRORS_MAX:
            del self._errors[next(iter(self._errors))]

    def latest(self) -> list[RecentError]:
        """Return the errors, the newest first."""
        return list(reversed(self._errors.values()))
