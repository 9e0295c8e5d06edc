"""The last failures, for whoever looks at the status: a few, each with how often it came.

For: "what is going wrong now" without a search through the log. Not for: details; those are in the
log, with the connection's id.

Invariants: at most `FAILURES_MAX` are kept; and each is made of words of closed lists alone (a
reason, a SQLSTATE, a configured target, the sentences of `ErrorKind`), never of what a client or
an upstream said, so that no secret can get here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from proxy.errors import ErrorKind

# What a person reads at a glance; an older kind of failure makes room for a new one.
RECENT_ERRORS_MAX: Final = 20

_SQLSTATE: Final = re.compile(r"[0-9A-Z]{5}", re.ASCII)
# Of kinds that share a word, the first: it is the most common one.
_ROWS: Final = {kind.value.reason: kind.value for kind in reversed(ErrorKind)}
# The role is not shown here, nor what it is: the demo's and most others are this.
_ANY_ROLE: Final = {"user": "ROLE", "identity": "SERVICE_PRINCIPAL"}

# A failure that nobody is told of with an ErrorResponse.
CANCEL_NOT_DELIVERED: Final = "cancel_not_delivered"
_SENTENCES: Final = {CANCEL_NOT_DELIVERED: "a cancel request did not reach the upstream"}


@dataclass(frozen=True, slots=True)
class RecentError:
    """One kind of failure at one target: when it last came (seconds since 1970), and how often.

    `target` is empty where the failure was none of a target's.
    """

    at: float
    reason: str
    sqlstate: str
    target: str
    count: int
    message: str
    hint: str


class RecentErrors:
    """The last failures of one proxy. `clock` is the wall clock, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._latest: dict[tuple[str, str, str], RecentError] = {}

    def record(self, reason: str, sqlstate: str = "", target: str = "") -> None:
        """Remember a failure. `reason` and `target` are words of closed lists.

        Without a SQLSTATE, or with a malformed one, the reason's own is shown.
        """
        row = _ROWS.get(reason)
        if not _SQLSTATE.fullmatch(sqlstate):
            sqlstate = row.sqlstate if row else ""
        message = row.message if row else _SENTENCES.get(reason, "")
        hint = row.hint.format(**_ANY_ROLE) if row else ""
        cause = (reason, sqlstate, target)
        before = self._latest.pop(cause, None)
        failure = before or RecentError(0, reason, sqlstate, target, 0, message, hint)
        # The newest stands last.
        self._latest[cause] = replace(failure, at=self._clock(), count=failure.count + 1)
        if len(self._latest) > RECENT_ERRORS_MAX:
            del self._latest[next(iter(self._latest))]

    def latest(self) -> list[RecentError]:
        """Return them, the newest first."""
        return list(reversed(self._latest.values()))
