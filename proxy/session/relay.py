"""The relay: opaque bytes in both directions until one side ends.

The contract: each read of one side is written to the other unchanged, at once, in order. While a
side's send buffer is above its high-water mark the other side is not read. The directions are
independent, since a client may pipeline large messages while the upstream streams rows (W32). So at
most `BUFFER_BYTES_MAX` plus one read is buffered for each direction; with lanes, one read.

No payload is parsed. `wire/activity.py` walks the message headers after each write, so that a
session can be ended between two messages. What ends first is the reason of the session's end.

Where the relay keeps its upstream for the next client, the headers of the client are walked before
each write: a Terminate that comes while nothing is owed is not sent, and the client alone is closed
(P12 to P16). What is owed, or in doubt, ends both as ever.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from proxy.observe.target_stats import ByteTotals
from proxy.pool.pool_counts import RetireReason
from proxy.session.direction import Direction, never
from proxy.session.end_reason import (
    CLIENT_LEFT,
    DISCONNECTS,
    RETIRED_BY,
    UPSTREAM_ENDS,
    EndReason,
    RelayEnd,
)
from proxy.session.fast_path import LANE_BUFFER_BYTES_MAX, FastPath
from proxy.transport.graceful_close import FLUSH_SECONDS_MAX, LINGER_SECONDS, close_gracefully
from proxy.wire.activity import Activity
from proxy.wire.messages import Terminate

if TYPE_CHECKING:  # the module may not be built
    from proxy.native.lanes import Lanes

BUFFER_BYTES_MAX: Final = 64 * 1024
# The time for an upstream to answer a cancel. After an answer the next statement of a pipeline may
# have begun, so the cancel is repeated.
CANCEL_ANSWER_SECONDS: Final = 0.25
# The bound on all these cancels together, and the wait for those of other sessions.
CANCELS_SECONDS_MAX: Final = 30.0

# How long the upstream of a client that has disconnected may take nothing before it is reset: while
# it waits for a lock it notices no other end of its client.
UPSTREAM_FLUSH_SECONDS: Final = 30.0
LOST_CLIENT_FLUSH_SECONDS: Final = 1.0
# How long the statements before a Terminate may run when the client has gone: as long as a front
# end keeps an idle connection. PostgreSQL itself sets no bound.
TERMINATED_SECONDS_MAX: Final = 24 * 3600.0

_TERMINATE: Final = Terminate().encode()
_IGNORING: Final = asyncio.Protocol()  # the protocol of connections whose relay is over


class Relay:
    """One session's relay. Create it, give both transports its directions, await `run`.

    `cancel_query` cancels what the upstream is running; it is awaited when the client has
    disconnected without a Terminate, with `cancels_copy_only` in the middle of COPY data only.
    After the upstream's end a client is cut when it has read nothing for `flush_seconds_max`. The
    session's lanes are opened after `reads_before_lanes` of both sides. Reads add to `totals`.

    With `keeps_upstream` the upstream's connection is not closed when its client leaves and nothing
    is owed: then the end is `kept`. The caller gives the connection its next protocol before it
    suspends: until then what arrives is dropped.
    """

    def __init__(
        self,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        cancel_query: Callable[[], Awaitable[None]] | None = None,
        lanes: "Lanes | None" = None,
        flush_seconds_max: float = FLUSH_SECONDS_MAX,
        *,
        cancels_copy_only: bool = False,
        keeps_upstream: bool = False,
        reads_before_lanes: int = 0,
        totals: ByteTotals | None = None,
    ) -> None:
        totals = totals or ByteTotals()
        self._client = client
        self._keeps_upstream = keeps_upstream
        self._kept = False
        self._retired: RetireReason | None = None
        self._cancels_copy_only = cancels_copy_only
        self._flush_seconds_max = flush_seconds_max
        self._upstream = upstream
        self._cancel_query = cancel_query
        path = FastPath.between(client, upstream, lanes, walks_ahead=keeps_upstream)
        activity = Activity(walks_ahead=keeps_upstream) if path is None else path.activity
        self._fast_path, self._activity = path, activity
        self._reads_before_lanes = 0 if path is None else reads_before_lanes
        on_client_read = _ignore if keeps_upstream else activity.client_sent
        self._on_client_read: Callable[[bytes], None] = on_client_read
        self._ended = ended = asyncio.get_running_loop().create_future()
        self.from_client = Direction(
            client,
            upstream,
            ended,
            totals.client_bytes,
            on_client_read,
            closed=EndReason.CLIENT_CLOSED,
            lost=EndReason.CLIENT_LOST,
            goes_on=self._finishes_statements,
            write=self._send_ahead if keeps_upstream else None,
        )
        self.from_upstream = Direction(
            upstream,
            client,
            ended,
            totals.upstream_bytes,
            activity.upstream_sent,
            closed=EndReason.UPSTREAM_CLOSED,
            lost=EndReason.UPSTREAM_LOST,
            watches_client=True,
        )
        self.from_client.reverse = self.from_upstream
        self.from_upstream.reverse = self.from_client
        self._terminated_timer: asyncio.TimerHandle | None = None
        self._cut = False  # the client was cut before it had read everything
        self._dropped = False  # by `drop`
        self._high_water_bytes = BUFFER_BYTES_MAX if path is None else LANE_BUFFER_BYTES_MAX
        for transport in (client, upstream):
            transport.set_write_buffer_limits(high=self._high_water_bytes)

    @property
    def idle(self) -> bool:
        """Whether the session could end now without losing an answer (W47)."""
        return self._activity.idle

    @property
    def may_end(self) -> bool:
        """Whether a drain may end the session now: it is idle, or an idle replication stream."""
        return self._activity.idle or self._activity.streaming

    @property
    def in_transaction(self) -> bool:
        """Whether the client is between two statements of a transaction."""
        return self._activity.in_transaction

    @property
    def over(self) -> bool:
        """Whether the session has ended. Both sides may still be closing."""
        return self._ended.done()

    def carried(self) -> tuple[int, int]:
        """Return the bytes received so far from the client, and from the upstream."""
        return self.from_client.received_bytes, self.from_upstream.received_bytes

    # -- an end by the proxy; `drain` decides when -----------------------------------------------

    def follow_reads(self, on_read: Callable[[], None]) -> None:
        """Call `on_read` after each read from now on. The session's lanes close for good."""
        self._close_lanes()
        self._fast_path = None
        self._report_reads(on_read)

    def end(self, reason: EndReason, error: bytes) -> None:
        """Send the client this error and end the session. Nothing is relayed any more.

        Call it while the session is idle. Does nothing if the session has ended already.
        """
        if self._ended.done() or self._client.is_closing():
            return
        self._client.write(error)
        self.from_client.stop_writing()
        self.from_upstream.stop_writing()
        if not (self._keeps_upstream and reason in CLIENT_LEFT):
            self._terminate_upstream()
        self._ended.set_result(reason)

    def drop(self, reason: EndReason) -> None:
        """End the session within what it does: no error, and what runs upstream is cancelled.

        Does nothing if the session has ended already.
        """
        if not self._ended.done():
            self._dropped = True
            self.from_client.stop_writing()
            self.from_upstream.stop_writing()
            self._ended.set_result(reason)

    # -- its run ---------------------------------------------------------------------------------

    async def run(self) -> RelayEnd:
        """Relay until one side has ended, and close both. If cancelled, abort both."""
        try:
            for direction in (self.from_client, self.from_upstream):
                direction.pause_if_full(self._high_water_bytes)
            if self._reads_before_lanes:
                self._report_reads(self._count_read)
            else:
                self._open_lanes()
            reason = await self._ended
            self._close_lanes()
            if self._keeps_upstream:
                await self._close_client_alone(reason)
            if not self._kept:
                await self._close_both(reason)
        finally:
            self._close_lanes()
            for transport in (self._client, self._upstream):
                transport.set_protocol(_IGNORING)
                if transport is self._client or not self._kept:
                    transport.abort()
            # They refer to each other: what they hold would wait for the garbage collector.
            self.from_client.reverse = self.from_upstream.reverse = None
            self.from_client.goes_on = never
            self.from_client.on_read = self.from_upstream.on_read = _ignore
            self.from_client.stop_writing()
            if self._terminated_timer is not None:
                self._terminated_timer.cancel()
        return self.ended(reason)

    def ended(self, reason: EndReason) -> RelayEnd:
        """Return the end, by this reason unless there was another one before.

        After a client's Terminate either side may close first, and the session is completed. But an
        upstream that ends within an answer has ended it: drivers say Terminate after a FATAL, too.
        """
        if self._ended.done() and not self._ended.cancelled():
            reason = self._ended.result()
        activity = self._activity
        if self._cut:
            reason = EndReason.CLIENT_NOT_READING
        elif reason in UPSTREAM_ENDS and activity.awaits_answer:
            pass
        elif reason in DISCONNECTS and activity.terminated:
            reason = EndReason.CLIENT_CLOSED
        retired = self._retired
        if self._keeps_upstream and not self._kept and retired is None:
            retired = RETIRED_BY.get(reason, RetireReason.BUSY)
        return RelayEnd(
            reason,
            *self.carried(),
            kept=self._kept,
            reported=activity.reported or b"",
            retired=retired,
        )

    def _open_lanes(self) -> None:
        """Open the session's lanes, unless it is about to end."""
        if self._fast_path is None or self._ended.done():
            return
        directions = (self.from_client, self.from_upstream)
        if not any(one.at_end or one.source.is_closing() for one in directions):
            self._fast_path.open(*directions)

    def _count_read(self) -> None:
        """Open the lanes when enough was read that they are worth their while."""
        self._reads_before_lanes -= 1
        if not self._reads_before_lanes:
            # Not within a read: TLS may not have delivered all of it yet.
            asyncio.get_running_loop().call_soon(self._open_lanes)

    def _report_reads(self, on_read: Callable[[], None]) -> None:
        """Call `on_read` after each read that no lane carries."""
        self.from_client.on_read = partial(_follow, self._on_client_read, on_read)
        self.from_upstream.on_read = partial(_follow, self._activity.upstream_sent, on_read)

    def _close_lanes(self) -> None:
        self.from_client.close_lane()
        self.from_upstream.close_lane()

    async def _close_both(self, reason: EndReason) -> None:
        """Flush to each side what the other one sent before the end, and close.

        PostgreSQL has no half-close: the end of one side is the end of both (W34).
        """
        async with asyncio.TaskGroup() as closing:
            if self._dropped:
                self._client.abort()
                closing.create_task(self._close_upstream(EndReason.CLIENT_LOST))
            elif reason in (EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST):
                closing.create_task(close_gracefully(self._client, linger_seconds=0))
                closing.create_task(self._close_upstream(reason))
            else:
                ended = reason in (EndReason.UPSTREAM_CLOSED, EndReason.UPSTREAM_LOST)
                linger_seconds = 0 if ended else LINGER_SECONDS
                closing.create_task(self._close_client())
                closing.create_task(close_gracefully(self._upstream, linger_seconds=linger_seconds))

    async def _close_client(self) -> None:
        """Send the client what the upstream sent before its end, and close."""
        self._cut = self._client.get_write_buffer_size() > 0  # where a drain cancels this
        seconds = self._flush_seconds_max
        self._cut = not await close_gracefully(self._client, flush_seconds=seconds)

    def _finishes_statements(self) -> bool:
        """Return whether the upstream still runs what the client sent before its Terminate.

        PostgreSQL runs that, whatever became of the client, and ends by itself.
        """
        activity = self._activity
        if not activity.terminated or activity.withheld or self._upstream.is_closing():
            return False
        if self._terminated_timer is None:
            self._terminated_timer = asyncio.get_running_loop().call_later(
                TERMINATED_SECONDS_MAX, self.from_client.end, EndReason.CLIENT_CLOSED
            )
        return True

    # -- an upstream that is kept ----------------------------------------------------------------

    def _send_ahead(self, data: bytes) -> None:
        """Send what the client has sent, but for a Terminate while nothing is owed: it ends."""
        if ahead := self._activity.client_ahead(data):
            self._upstream.write(ahead)
        if self._activity.withheld:
            self.from_client.stop_writing()
            self.from_client.end(EndReason.CLIENT_CLOSED)

    async def _close_client_alone(self, reason: EndReason) -> None:
        """Close the client, and keep its upstream if that can serve another one.

        If not, what was withheld from it is sent, so that it can be closed as ever.
        """
        retired = self._why_retired(reason)
        if retired is None:
            # Until it has another protocol, an end of it must be noticed.
            self.from_upstream.stop_writing()
            self.from_upstream.resume()
            if reason is EndReason.IDLE_TIMEOUT:
                await self._close_client()
            elif self._activity.withheld and not self._client.get_write_buffer_size():
                self._client.close()  # it has said goodbye, and has got everything
            else:
                await close_gracefully(self._client, linger_seconds=0)
            retired = self._why_retired(reason)
            if retired is None and self._upstream.get_write_buffer_size():
                retired = RetireReason.BUSY  # it takes nothing, though nothing is owed (P16)
        self._retired, self._kept = retired, retired is None
        if self._kept:
            self._upstream.set_write_buffer_limits()
        elif self._activity.withheld or reason is EndReason.IDLE_TIMEOUT:
            self._terminate_upstream()

    def _why_retired(self, reason: EndReason) -> RetireReason | None:
        """Return why the upstream session cannot serve another client now; None if it can."""
        activity, upstream = self._activity, self._upstream
        if reason not in CLIENT_LEFT:
            # An upstream ends because of a Terminate that was sent: something was owed (P14).
            was_busy = activity.terminated and not activity.withheld and reason in UPSTREAM_ENDS
            return RetireReason.BUSY if was_busy else RETIRED_BY[reason]
        if upstream.is_closing() or self.from_upstream.at_end:
            return RetireReason.UPSTREAM_ENDED
        if activity.reported is None:
            return RetireReason.PARAMETER_CHANGED  # or not: there were too many to tell
        return None if activity.reusable else RetireReason.BUSY

    def _terminate_upstream(self) -> None:
        """Send a Terminate of our own, unless the connection is closing."""
        if not self._upstream.is_closing():
            self._upstream.write(_TERMINATE)

    # -- the upstream of a client that has disconnected ------------------------------------------

    async def _close_upstream(self, reason: EndReason) -> None:
        """Close the upstream of a client that has disconnected, and cancel its query (W35).

        The cancel comes before the close: a front end may drop the session, and its key, at the
        end of the stream.
        """
        self.from_upstream.stop_writing()
        if self._cancel_query is not None and self._may_cancel():
            with suppress(TimeoutError):
                async with asyncio.timeout(CANCELS_SECONDS_MAX):
                    await self._cancel_until_silent(self._cancel_query)
        is_lost = reason is EndReason.CLIENT_LOST
        flush_seconds = LOST_CLIENT_FLUSH_SECONDS if is_lost else UPSTREAM_FLUSH_SECONDS
        await close_gracefully(self._upstream, flush_seconds=flush_seconds, resets=True)

    def _may_cancel(self) -> bool:
        """Return whether what the upstream runs is cancelled, and not only its connection closed.

        After a Terminate it is not: the client wants what it asked for before. COPY data may be
        stuck behind a lock, where a front end notices no close, and cannot be committing.
        """
        if self._activity.terminated:
            return False
        return self._activity.copying or not self._cancels_copy_only

    async def _cancel_until_silent(self, cancel_query: Callable[[], Awaitable[None]]) -> None:
        """Send cancels until one has no answer or nothing runs; at least one."""
        answered = True
        while answered and not self._upstream.is_closing():
            self._upstream.resume_reading()  # it may be paused because the client did not read
            before = self.from_upstream.received_bytes
            await cancel_query()
            await asyncio.sleep(CANCEL_ANSWER_SECONDS)
            answered = self.from_upstream.received_bytes > before and not self._activity.idle


def _ignore(data: bytes) -> None:
    """Ignore a read that was walked before it was sent."""


def _follow(sent: Callable[[bytes], None], on_read: Callable[[], None], data: bytes) -> None:
    """Track a read, then report it."""
    sent(data)
    on_read()
