"""The relay: opaque bytes in both directions until one side ends.

The contract: each read of one side is written to the other as it is, at once, in order; while
a side's send buffer is above its high-water mark the other side is not read. Each direction is
alone: neither waits for the other, since a client may pipeline large messages while the upstream
streams rows (W32). So at most `BUFFER_BYTES_MAX` plus one read is held for each direction,
and where lanes carry the reads, one read alone.

No payload is looked at; `wire/activity.py` walks the message headers, behind each write, so that a
session can be ended between two messages. What ends first is the cause of the session's end.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.session.direction import Direction
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.fast_path import LANE_BUFFER_BYTES_MAX, FastPath
from proxy.transport.graceful_close import LINGER_SECONDS, close_gracefully
from proxy.wire.activity import Activity
from proxy.wire.messages import ErrorResponse, Terminate

if TYPE_CHECKING:  # not there where it was not built
    from proxy.native.lanes import Lanes

BUFFER_BYTES_MAX: Final = 64 * 1024
# The time that an upstream gets to answer a cancel; if it says something, the next statement of a
# pipeline may have begun, and it is cancelled again, but not for longer than this in all.
CANCEL_ANSWER_SECONDS: Final = 0.25
CANCELS_SECONDS_MAX: Final = 10.0
# An idle timeout is looked for so often in its time: so much too late, at most, a session ends.
IDLE_POLLS: Final = 8
# And not more often than this, however short its time.
IDLE_POLL_SECONDS_MIN: Final = 0.05

_TERMINATE: Final = Terminate().encode()
_NO_PROTOCOL: Final = asyncio.Protocol()  # of a connection that is over


@dataclass(frozen=True, slots=True)
class _IdleEnd:
    """How a session is to end as soon as it is idle."""

    reason: EndReason
    error: bytes
    grace_seconds: float


class Relay:
    """One session's relay. Make it, hand both transports to its directions, await `run`.

    `cancel_query` cancels what the upstream is doing; it is awaited when the client has gone
    without having said Terminate.
    """

    def __init__(
        self,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        cancel_query: Callable[[], Awaitable[None]] | None = None,
        lanes: "Lanes | None" = None,
    ) -> None:
        self._client = client
        self._upstream = upstream
        self._cancel_query = cancel_query
        self._fast_path = FastPath.between(client, upstream, lanes)
        activity = Activity() if self._fast_path is None else self._fast_path.activity
        self._activity = activity
        self._idle_end: _IdleEnd | None = None
        self._grace_timer: asyncio.TimerHandle | None = None
        self._idle_poll_timer: asyncio.TimerHandle | None = None
        self._ended = ended = asyncio.get_running_loop().create_future()
        self.from_client = Direction(
            client,
            upstream,
            ended,
            activity.client_sent,
            closed=EndReason.CLIENT_CLOSED,
            lost=EndReason.CLIENT_LOST,
        )
        self.from_upstream = Direction(
            upstream,
            client,
            ended,
            activity.upstream_sent,
            closed=EndReason.UPSTREAM_CLOSED,
            lost=EndReason.UPSTREAM_LOST,
            watches_client=True,
        )
        self.from_client.reverse = self.from_upstream
        self.from_upstream.reverse = self.from_client
        self._high_water_bytes = BUFFER_BYTES_MAX
        if self._fast_path is not None:
            self._high_water_bytes = LANE_BUFFER_BYTES_MAX
        for transport in (client, upstream):
            transport.set_write_buffer_limits(high=self._high_water_bytes)

    @property
    def idle(self) -> bool:
        """Whether the session could end now without cutting an answer (W47)."""
        return self._activity.idle

    @property
    def over(self) -> bool:
        """Whether the session has ended; the rest is closing both sides."""
        return self._ended.done()

    # -- an end that the proxy wants -------------------------------------------------------------

    def end_when_idle(
        self, reason: EndReason, error: ErrorResponse, *, grace_seconds: float = 0
    ) -> None:
        """Send the client the error and close both sides, once the session was idle for the grace.

        What is asked for last holds. A session that never becomes idle goes on: cancel `run`.
        """
        self._close_lanes()
        self._idle_end = _IdleEnd(reason, error.encode(), grace_seconds)
        client_sent, upstream_sent = self._activity.client_sent, self._activity.upstream_sent
        self.from_client.on_read = lambda data: self._on_activity(client_sent, data)
        self.from_upstream.on_read = lambda data: self._on_activity(upstream_sent, data)
        self._on_activity(client_sent, b"")

    def end_after_idle(self, seconds: float, error: ErrorResponse) -> None:
        """Do the same as soon as the session was idle, and no byte came, for so long.

        It is up to an eighth later, or later by a few looks where its time is shorter than those.
        A byte costs nothing: only the counts are compared, now and then.
        """
        interval = max(seconds / IDLE_POLLS, IDLE_POLL_SECONDS_MIN)
        call_later = asyncio.get_running_loop().call_later
        received, quiet_polls = -1, -1

        def poll() -> None:
            nonlocal received, quiet_polls
            before, received = (
                received,
                self.from_client.received_bytes + self.from_upstream.received_bytes,
            )
            quiet_polls = quiet_polls + 1 if received == before else 0
            if quiet_polls >= IDLE_POLLS and self.idle:
                self.end_when_idle(EndReason.IDLE_TIMEOUT, error)
            else:
                self._idle_poll_timer = call_later(interval, poll)

        poll()

    def _on_activity(self, sent: Callable[[bytes], None], data: bytes) -> None:
        """Follow a read while the session is to end; the grace period starts again."""
        sent(data)
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        idle_end = self._idle_end
        assert idle_end is not None
        if not self.idle or self._ended.done():
            return
        if idle_end.grace_seconds:
            loop = asyncio.get_running_loop()
            self._grace_timer = loop.call_later(idle_end.grace_seconds, self._end_now, idle_end)
        else:
            self._end_now(idle_end)

    def _end_now(self, idle_end: _IdleEnd) -> None:
        """End the session, which is idle: from here on nothing is relayed."""
        if self._ended.done() or self._client.is_closing():
            return
        self._client.write(idle_end.error)
        self.from_client.stop_writing()
        self.from_upstream.stop_writing()
        if not self._upstream.is_closing():
            self._upstream.write(_TERMINATE)
        self._ended.set_result(idle_end.reason)

    # -- its run ---------------------------------------------------------------------------------

    async def run(self) -> RelayEnd:
        """Return when one side has ended and both are closed. Cancelling it cuts both."""
        try:
            for direction in (self.from_client, self.from_upstream):
                direction.pause_if_full(self._high_water_bytes)
            self._open_lanes()
            reason = await self._ended
            self._close_lanes()
            self._stop_timers()
            # What one side sent before its end is flushed to the other; PostgreSQL knows no
            # half-close, so the end of one is the end of both (W34).
            async with asyncio.TaskGroup() as closing:
                if reason in (EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST):
                    closing.create_task(close_gracefully(self._client, linger_seconds=0))
                    closing.create_task(self._close_upstream())
                else:
                    lost = reason in (EndReason.UPSTREAM_CLOSED, EndReason.UPSTREAM_LOST)
                    linger_seconds = 0 if lost else LINGER_SECONDS
                    closing.create_task(close_gracefully(self._client))
                    closing.create_task(
                        close_gracefully(self._upstream, linger_seconds=linger_seconds)
                    )
        finally:
            self._close_lanes()
            self._stop_timers()
            for transport in (self._client, self._upstream):
                transport.set_protocol(_NO_PROTOCOL)
                transport.abort()
            # They refer to each other: all that they hold would wait for the garbage collector.
            self.from_client.reverse = self.from_upstream.reverse = None
        return self.ended(reason)

    def _open_lanes(self) -> None:
        """Open the session's lanes, unless it is about to end."""
        closing = self._client.is_closing() or self._upstream.is_closing()
        if self._fast_path is None or closing or self._ended.done() or self._idle_end is not None:
            return
        self._fast_path.open(self.from_client, self.from_upstream)

    def _close_lanes(self) -> None:
        self.from_client.close_lane()
        self.from_upstream.close_lane()

    async def _close_upstream(self) -> None:
        """Close the upstream of a client that has gone, so that nothing works on for nobody (W35).

        A client that said Terminate wants what it asked for before. Any other one's upstream is
        cancelled first: a front end may forget the session, and its key, once its stream has ended.
        """
        self.from_upstream.stop_writing()
        if self._cancel_query is not None and not self._activity.terminated:
            with suppress(TimeoutError):
                async with asyncio.timeout(CANCELS_SECONDS_MAX):
                    await self._cancel_until_silent(self._cancel_query)
        await close_gracefully(self._upstream)

    async def _cancel_until_silent(self, cancel_query: Callable[[], Awaitable[None]]) -> None:
        """Cancel until a cancel changes nothing; where nothing runs, that is the first one."""
        answered = True
        while answered and not self._upstream.is_closing():
            self._upstream.resume_reading()  # it may have been paused for the client's sake
            before = self.from_upstream.received_bytes
            await cancel_query()
            await asyncio.sleep(CANCEL_ANSWER_SECONDS)
            answered = self.from_upstream.received_bytes > before

    def _stop_timers(self) -> None:
        for timer in (self._grace_timer, self._idle_poll_timer):
            if timer is not None:
                timer.cancel()

    def ended(self, reason: EndReason) -> RelayEnd:
        """Return the end for this reason, unless another one came first: that is the cause."""
        if self._ended.done() and not self._ended.cancelled():
            reason = self._ended.result()
        return RelayEnd(reason, self.from_client.received_bytes, self.from_upstream.received_bytes)
