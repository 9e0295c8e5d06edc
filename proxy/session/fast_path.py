"""The fast path: compiled lanes that carry a session's reads from socket to socket.

For: sessions whose connections are plain or have the compiled TLS, where the relay was compiled. A
*lane* (`proxy/native/lanes.pyx`) takes an ordinary read from one socket, decrypts or encrypts it,
sends it to the other socket and counts it, without the transports. Not for: the end of a stream, an
error, or messages of TLS itself. At these the lane ends and hands back to Python
(`OpenLane.lane_ended`): transports and directions handle them as they do without lanes.

The invariant: while a lane is open the transport of its source does not read. What the kernel does
not take goes to the transport of the sink. The high-water mark of that is 0, so that the lane is
paused until all of it is sent, and the bytes stay in order.
"""

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from proxy import native
from proxy.session.direction import Direction
from proxy.transport.tls import TLSTransport

if TYPE_CHECKING:  # the modules may not be built
    from proxy.native.activity import Activity
    from proxy.native.lanes import Lanes
    from proxy.native.tls import TLSConnection

# The high-water mark of both transports while lanes are open.
LANE_BUFFER_BYTES_MAX: Final = 0


@contextmanager
def watched_lanes() -> "Iterator[Lanes | None]":
    """Watch lanes on the running loop while the block runs; yield None if they were not built.

    All lanes of a process are one descriptor of its loop. Raises OSError if none is left.
    """
    if not native.AVAILABLE:
        yield None
        return
    loop, lanes = asyncio.get_running_loop(), native.lanes.Lanes()
    loop.add_reader(lanes, lanes.run_ready)
    try:
        yield lanes
    finally:
        loop.remove_reader(lanes)
        lanes.close()


class FastPath:
    """What one session needs for its lanes: the set they are in, and the idle tracker."""

    __slots__ = ("activity", "lanes", "walks_ahead")

    def __init__(self, lanes: "Lanes", *, walks_ahead: bool = False) -> None:
        self.lanes = lanes
        self.walks_ahead = walks_ahead
        self.activity: Activity = native.activity.Activity(walks_ahead=walks_ahead)

    @classmethod
    def between(
        cls,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        lanes: "Lanes | None",
        *,
        walks_ahead: bool = False,
    ) -> "FastPath | None":
        """Return the fast path between two connections; None if they cannot have lanes."""
        if lanes is None or not (_can_have_lane(client) and _can_have_lane(upstream)):
            return None
        return cls(lanes, walks_ahead=walks_ahead)

    def open(self, from_client: Direction, from_upstream: Direction) -> None:
        """Open a lane for each direction, while neither transport is closing.

        If there is no descriptor left the transports go on reading.
        """
        with suppress(OSError):
            for direction in (from_client, from_upstream):
                is_upstream = direction is from_upstream
                direction.lane = OpenLane(direction, self, from_upstream=is_upstream)
                direction.source.pause_reading()


class OpenLane:
    """The open lane of one direction; the owner that a `native.lanes.Lane` calls."""

    __slots__ = ("_direction", "_lane")

    def __init__(self, direction: Direction, path: FastPath, *, from_upstream: bool) -> None:
        """Raises OSError if the kernel watches no more descriptors."""
        self._direction = direction
        source, source_tls = _plain_and_tls(direction.source)
        sink, sink_tls = _plain_and_tls(direction.sink)
        walks_ahead = path.walks_ahead and not from_upstream
        assert not (walks_ahead and source_tls), "a client has no compiled TLS"
        lane = native.lanes.AheadLane if walks_ahead else native.lanes.Lane
        self._lane = lane(
            path.lanes,
            _descriptor(source),
            _descriptor(sink),
            source_tls=source_tls,
            sink_tls=sink_tls,
            activity=path.activity,
            total=direction.total,
            from_upstream=from_upstream,
            owner=self,
            paused=direction.paused,
        )

    # -- what the direction calls ----------------------------------------------------------------

    @property
    def carried_bytes(self) -> int:
        """The plain bytes that the lane has carried."""
        return self._lane.carried_bytes

    def pause(self) -> None:
        """Stop reading the source."""
        self._lane.pause()

    def resume(self) -> None:
        """Read the source again."""
        self._lane.resume()

    def close(self) -> None:
        """Resume reading on the source's transport."""
        self._lane.close()
        direction = self._direction
        if not (direction.paused or direction.source.is_closing()):
            direction.source.resume_reading()

    # -- what the lane calls ---------------------------------------------------------------------

    def overflow(self, rest: bytes) -> None:
        """Write to the sink's transport what the kernel did not take."""
        sink, _ = _plain_and_tls(self._direction.sink)
        sink.write(rest)

    def client_left(self) -> None:
        """End the session: the client's Terminate was withheld from the upstream."""
        direction = self._direction
        direction.close_lane()
        direction.stop_writing()
        direction.end(direction.closed)

    def lane_ended(self, error: Exception | None) -> None:
        """Hand the connection back to its transports. `error` is what reading ended with."""
        direction = self._direction
        source = direction.source
        direction.close_lane()
        if isinstance(source, TLSTransport) and isinstance(error, ssl.SSLError | None):
            source.take_back(error)
        elif isinstance(error, ssl.SSLError):
            direction.stop_writing()  # the sink's TLS has failed
            direction.sink.abort()
        elif error is not None:
            if not isinstance(error, OSError):  # a bug: reported as a transport would
                report = {"message": "a lane has failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(report)
            source.abort()


def _can_have_lane(transport: asyncio.Transport) -> bool:
    """Return whether the transport is plain or has the compiled TLS."""
    return not isinstance(transport, TLSTransport) or transport.compiled is not None


def _plain_and_tls(
    transport: asyncio.Transport,
) -> "tuple[asyncio.Transport, TLSConnection | None]":
    """Return the plain transport, and the compiled TLS on it."""
    if isinstance(transport, TLSTransport):
        return transport.lower, transport.compiled
    return transport, None


def _descriptor(transport: asyncio.Transport) -> int:
    sock: socket.socket = transport.get_extra_info("socket")
    return sock.fileno()
