"""One direction of a relay: the protocol of one transport, which writes to the other one.

The contract: each read of the source is written to the sink unchanged, at once, in order. While the
sink's send buffer is above its high-water mark the source is not read.
"""

import asyncio
from array import array
from collections.abc import Callable
from typing import Final, Protocol

from proxy.session.end_reason import EndReason
from proxy.transport.sockets import is_reset

# While the upstream takes nothing the client is not read, so that its loss has to be polled for.
CLIENT_POLL_SECONDS: Final = 5.0


class SourceLane(Protocol):
    """Reads a direction's source in place of its transport (`fast_path`)."""

    @property
    def carried_bytes(self) -> int: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None:
        """Resume reading on the transport."""


def never() -> bool:
    """Return false: the end of one side ends the relay."""
    return False


class Direction(asyncio.Protocol):
    """The protocol of `source`, which writes what it receives to `sink`.

    Each read is added to `total`, an array of one number that the directions of a target share.
    `on_read` is called with each read after its write; `write` is `sink.write` if it is None. The
    direction from the upstream has `watches_client`: while the upstream takes nothing, it polls
    whether the client is lost. One that has ended its stream is not: what it sent before the end
    is delivered.

    `goes_on` is asked when the source ends: whether the relay continues until the sink ends.

    Both directions are of one class: the interpreter specialises the code that runs for each read,
    and would stop doing so if the class of `self` changed from call to call.
    """

    __slots__ = (
        "_ended",
        "_poll_timer",
        "_received_bytes",
        "_watches_client",
        "_write",
        "at_end",
        "closed",
        "goes_on",
        "lane",
        "lost",
        "on_read",
        "paused",
        "reverse",
        "sink",
        "source",
        "total",
    )

    def __init__(
        self,
        source: asyncio.Transport,
        sink: asyncio.Transport,
        ended: asyncio.Future[EndReason],
        total: "array[int]",
        on_read: Callable[[bytes], None],
        *,
        closed: EndReason,
        lost: EndReason,
        goes_on: Callable[[], bool] = never,
        watches_client: bool = False,
        write: Callable[[bytes], None] | None = None,
    ) -> None:
        self.source = source
        self.sink = sink
        self.total = total
        self.on_read = on_read
        self.closed = closed
        self.lost = lost
        self.goes_on = goes_on
        self.paused = False
        self.at_end = False
        """Whether the source has ended its stream, or is lost."""
        self.reverse: Direction | None = None
        """The other direction, which writes to our source; None before and after the relay."""
        self.lane: SourceLane | None = None
        self._ended = ended
        self._received_bytes = 0
        self._write: Callable[[bytes], None] = write or sink.write
        self._watches_client = watches_client
        self._poll_timer: asyncio.TimerHandle | None = None

    @property
    def received_bytes(self) -> int:
        """The bytes received from the source; all of them went to the sink unless it was lost."""
        return self._received_bytes + (0 if self.lane is None else self.lane.carried_bytes)

    # -- the protocol ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        # Local names: Python 3.11 is slow to call the value of an attribute.
        write, on_read = self._write, self.on_read
        write(data)
        size = len(data)
        self._received_bytes += size
        self.total[0] += size
        on_read(data)

    def pause_if_full(self, high_water_bytes: int) -> None:
        """Pause the reverse direction if our source is full already.

        A transport calls `pause_writing` once: the protocol before this one may have had the call.
        """
        reverse = self.reverse
        assert reverse is not None
        if not reverse.paused and self.source.get_write_buffer_size() > high_water_bytes:
            self.pause_writing()

    def pause_writing(self) -> None:
        # Our source takes no more of what the reverse direction reads from our sink.
        assert self.reverse is not None
        self.reverse.pause()
        if self._watches_client:
            self._schedule_poll()

    def resume_writing(self) -> None:
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        assert self.reverse is not None
        self.reverse.resume()

    def eof_received(self) -> bool:
        self.at_end = True
        if not self.goes_on():
            self.end(self.closed)
        return True  # keep the source open: what was written to it has to be flushed

    def connection_lost(self, exc: Exception | None) -> None:
        self.at_end = True
        reverse = self.reverse
        assert reverse is not None
        # A lane must not touch a descriptor that is closed once this returns.
        self.close_lane()
        reverse.close_lane()
        reverse.stop_writing()
        if self.goes_on():
            reverse.resume()  # what still arrives for the source is read and discarded
        else:
            self.end(self.lost)

    # -- reading ---------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop reading the source, because the sink takes nothing."""
        self.paused = True
        if self.lane is not None:
            self.lane.pause()
        elif not self.source.is_closing():
            self.source.pause_reading()

    def resume(self) -> None:
        """Read the source again."""
        self.paused = False
        if self.lane is not None:
            self.lane.resume()
        elif not self.source.is_closing():
            self.source.resume_reading()

    def close_lane(self) -> None:
        """Close the lane, if there is one: the transport reads again. Count what it carried."""
        lane, self.lane = self.lane, None
        if lane is not None:
            lane.close()
            self._received_bytes += lane.carried_bytes

    # -- writing ---------------------------------------------------------------------------------

    def stop_writing(self) -> None:
        """Discard what still arrives: the sink is lost, and writing to it is an error."""
        self._write = _drop

    def end(self, reason: EndReason) -> None:
        """Set why the session ends. Only the first cause counts."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def _schedule_poll(self) -> None:
        self._poll_timer = asyncio.get_running_loop().call_later(
            CLIENT_POLL_SECONDS, self._poll_client
        )

    def _poll_client(self) -> None:
        if self._ended.done():
            return
        if not (self.sink.is_closing() or is_reset(self.sink)):
            self._schedule_poll()
        elif self.reverse is None or not self.reverse.goes_on():
            self.end(EndReason.CLIENT_LOST)


def _drop(data: bytes) -> None:
    """Discard a write to a lost transport."""
