"""One direction of a relay: from the transport that it is the protocol of to the other one.

The contract: each read of the source is written to the sink as it is, at once, in order; while the
sink's send buffer is above its high-water mark the source is not read.

Where the relay was compiled a lane carries the ordinary reads from socket to socket, past both
transports. What is not ordinary ends the lane, and is met here, as it is without one.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from proxy import native
from proxy.session.end_reason import EndReason
from proxy.transport.sockets import has_hung_up
from proxy.transport.tls import TLSTransport

if TYPE_CHECKING:  # not there where it was not built
    from proxy.native.activity import Activity
    from proxy.native.lanes import Lane, Lanes
    from proxy.native.tls import TLSConnection

# While the upstream takes nothing the client is not read, so its end is not seen but polled for.
CLIENT_POLL_SECONDS: Final = 5.0


class Direction(asyncio.Protocol):
    """Takes what `source` receives and writes it to `sink`; the protocol of `source`.

    `on_read` is called with each read after its write. The direction from the upstream has
    `watches_client`: while the upstream takes nothing, it polls whether the client is there.

    Both directions are of this very class: what runs for each read is then specialised by the
    interpreter, which it gives up where the class of `self` changes from call to call.
    """

    __slots__ = (
        "_ended",
        "_lane",
        "_poll_timer",
        "_received_bytes",
        "_sink",
        "_source",
        "_watches_client",
        "_write",
        "closed",
        "lost",
        "on_read",
        "paused",
        "reverse",
    )

    reverse: "Direction"  # the other direction, which writes to our source

    def __init__(
        self,
        source: asyncio.Transport,
        sink: asyncio.Transport,
        ended: asyncio.Future[EndReason],
        on_read: Callable[[bytes], None],
        *,
        closed: EndReason,
        lost: EndReason,
        watches_client: bool = False,
    ) -> None:
        self.on_read = on_read
        self.closed = closed
        self.lost = lost
        self._received_bytes = 0
        self._source = source
        self._sink = sink
        self._write: Callable[[bytes], None] = sink.write
        self._ended = ended
        self._watches_client = watches_client
        self._poll_timer: asyncio.TimerHandle | None = None
        self.paused = False
        self._lane: Lane | None = None

    @property
    def received_bytes(self) -> int:
        """The bytes that came from the source, and went to the sink unless that was lost."""
        return self._received_bytes + (0 if self._lane is None else self._lane.carried_bytes)

    # -- the protocol ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        # Names of their own: Python 3.11 is slow to call what an attribute holds.
        write, on_read = self._write, self.on_read
        write(data)
        self._received_bytes += len(data)
        on_read(data)

    def pause_if_full(self, high_water_bytes: int) -> None:
        """Take note that our source was full before this was its protocol: it says so once."""
        if not self.reverse.paused and self._source.get_write_buffer_size() > high_water_bytes:
            self.pause_writing()

    def pause_writing(self) -> None:
        # Our source takes no more of what comes from the sink.
        self.reverse.pause()
        if self._watches_client:
            self._schedule_poll()

    def resume_writing(self) -> None:
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        self.reverse.resume()

    def eof_received(self) -> bool:
        self.end(self.closed)
        return True  # what was written to the source is still to be flushed

    def connection_lost(self, exc: Exception | None) -> None:
        # A lane must not touch a descriptor that is closed once this returns.
        self.close_lane()
        self.reverse.close_lane()
        self.reverse.stop_writing()
        self.end(self.lost)

    # -- reading ---------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop reading the source: the sink takes nothing."""
        self.paused = True
        if self._lane is not None:
            self._lane.pause()
        elif not self._source.is_closing():
            self._source.pause_reading()

    def resume(self) -> None:
        """Read the source again."""
        self.paused = False
        if self._lane is not None:
            self._lane.resume()
        elif not self._source.is_closing():
            self._source.resume_reading()

    def open_lane(self, lanes: "Lanes", activity: "Activity") -> None:
        """Have the source's ordinary reads carried by a lane, past its transport and this object.

        Both transports are plain, or have compiled TLS; neither is closing. Raises OSError where
        the kernel watches no more descriptors; the transport reads on then.
        """
        (source, source_tls), (sink, sink_tls) = (
            _plain_and_tls(self._source),
            _plain_and_tls(self._sink),
        )
        lane = native.lanes.Lane(
            lanes,
            _descriptor(source),
            _descriptor(sink),
            source_tls=source_tls,
            sink_tls=sink_tls,
            activity=activity,
            from_upstream=self._watches_client,
            owner=self,
            paused=self.paused,
        )
        self._lane = lane
        self._source.pause_reading()

    def close_lane(self) -> None:
        """Have the transport read its socket itself again."""
        lane, self._lane = self._lane, None
        if lane is None:
            return
        lane.close()
        self._received_bytes += lane.carried_bytes
        if not (self.paused or self._source.is_closing()):
            self._source.resume_reading()

    def overflow(self, rest: bytes) -> None:
        """Have the sink's socket take later what it did not take from the lane."""
        _plain_and_tls(self._sink)[0].write(rest)

    def lane_ended(self, error: Exception | None) -> None:
        """Go on where the lane has met what is not ordinary."""
        self.close_lane()
        if isinstance(self._source, TLSTransport) and isinstance(error, ssl.SSLError | None):
            self._source.take_back(error)
        elif isinstance(error, ssl.SSLError):
            self.stop_writing()  # the sink's TLS has failed already
            self._sink.abort()
        elif error is not None:
            if not isinstance(error, OSError):  # a bug, of which a transport would tell as well
                told = {"message": "a lane has failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(told)
            self._source.abort()

    # -- writing ---------------------------------------------------------------------------------

    def stop_writing(self) -> None:
        """Drop what still arrives: the sink is lost, and writing to it is an error."""
        self._write = _drop

    def end(self, reason: EndReason) -> None:
        """Note why the session ends; only the first cause counts."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def _schedule_poll(self) -> None:
        self._poll_timer = asyncio.get_running_loop().call_later(
            CLIENT_POLL_SECONDS, self._poll_client
        )

    def _poll_client(self) -> None:
        if self._ended.done():
            return
        if self._sink.is_closing() or has_hung_up(self._sink):
            self.end(EndReason.CLIENT_LOST)
        else:
            self._schedule_poll()


def _plain_and_tls(
    transport: asyncio.Transport,
) -> "tuple[asyncio.Transport, TLSConnection | None]":
    """Return the plain transport, and the compiled TLS on it."""
    if isinstance(transport, TLSTransport):
        return transport.lower, transport.compiled
    return transport, None


def can_have_lane(transport: asyncio.Transport) -> bool:
    """Whether a lane can read it: it is plain, or its TLS is the compiled one."""
    return not isinstance(transport, TLSTransport) or transport.compiled is not None


def _descriptor(transport: asyncio.Transport) -> int:
    sock: socket.socket = transport.get_extra_info("socket")
    return sock.fileno()


def _drop(data: bytes) -> None:
    """Take the place of a lost transport's `write`."""
