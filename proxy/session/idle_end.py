"""The end of a relayed session by the proxy when it is idle: in a drain, and after an idle timeout.

For: waiting until an error falls into no answer. Not for: which sessions end, and why (`drain`).

Invariant: while a session is busy it does not end.
"""

import asyncio
from typing import Final

from proxy.session.end_reason import EndReason
from proxy.session.relay import Relay
from proxy.wire.messages import ErrorResponse

# Polls within one idle timeout: a session ends at most one poll too late.
IDLE_POLLS: Final = 8
# The shortest time between two polls.
IDLE_POLL_SECONDS_MIN: Final = 0.05


class IdleEnd:
    """Ends a relayed session with an error when it is idle, so that no answer is lost (W47)."""

    __slots__ = ("_error", "_grace_seconds", "_grace_timer", "_poll_timer", "_reason", "_relay")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._reason = EndReason.SHUTDOWN
        self._error = b""
        self._grace_seconds = 0.0
        self._grace_timer: asyncio.TimerHandle | None = None
        self._poll_timer: asyncio.TimerHandle | None = None

    def when_idle(
        self, reason: EndReason, error: ErrorResponse, *, grace_seconds: float = 0
    ) -> None:
        """End the session when it has been idle for the grace period. The last call counts.

        A session that never becomes idle does not end.
        """
        self._reason, self._error = reason, error.encode()
        self._grace_seconds = grace_seconds
        self._relay.follow_reads(self._on_activity)
        self._on_activity()

    def after_idle(self, seconds: float, error: ErrorResponse) -> None:
        """End the session when it has been idle, and received no byte, for this time.

        It may end one poll later. The byte counts are compared at each poll, so that a byte costs
        nothing.
        """
        interval = max(seconds / IDLE_POLLS, IDLE_POLL_SECONDS_MIN)
        call_later = asyncio.get_running_loop().call_later
        relay, quiet_polls = self._relay, 0
        carried = relay.carried()

        def poll() -> None:
            nonlocal carried, quiet_polls
            if relay.over:
                return
            before, carried = carried, relay.carried()
            quiet_polls = quiet_polls + 1 if carried == before else 0
            if quiet_polls >= IDLE_POLLS and relay.idle:
                self.when_idle(EndReason.IDLE_TIMEOUT, error)
            else:
                self._poll_timer = call_later(interval, poll)

        self._poll_timer = call_later(interval, poll)

    def close(self) -> None:
        """Stop the timers."""
        for timer in (self._grace_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()

    def _on_activity(self) -> None:
        """Start the grace period; start it again after each read."""
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        if self._relay.over or not self._relay.may_end:
            return
        if self._grace_seconds:
            loop = asyncio.get_running_loop()
            self._grace_timer = loop.call_later(self._grace_seconds, self._end_now)
        else:
            self._end_now()

    def _end_now(self) -> None:
        self._relay.end(self._reason, self._error)
