"""The relay: opaque bytes in both directions until one side ends.

The contract: each read of one side is written to the other as it is, at once, in order; while
a side's send buffer is above its high-water mark the other side is not read. Each direction is
alone: neither waits for the other, since a client may pipeline large messages while the upstream
streams rows (W32). So at most `BUFFER_BYTES_MAX` plus one read is held for each direction.

No byte waits for being understood: message headers are read off what has been written already, only
to know whether the session is idle. What ends first is the cause of the session's end.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final

from proxy.transport.closing import LINGER_SECONDS, close_gracefully
from proxy.wire.activity import Activity

BUFFER_BYTES_MAX: Final = 64 * 1024


@unique
class EndReason(StrEnum):
    """The first cause of a session's end."""

    CLIENT_CLOSED = "client_closed"
    CLIENT_LOST = "client_lost"
    UPSTREAM_CLOSED = "upstream_closed"
    UPSTREAM_LOST = "upstream_lost"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class RelayEnd:
    """How a relay ended, and the bytes that it carried."""

    reason: EndReason
    client_bytes: int
    upstream_bytes: int


class _Direction(asyncio.Protocol):
    """Takes what `source` receives and writes it to `sink`; the protocol of `source`."""

    __slots__ = ("_ended", "_note", "_sink", "_write", "back", "closed", "lost", "received_bytes")

    back: "_Direction"
    """The other direction, which writes to our source."""

    def __init__(
        self,
        sink: asyncio.Transport,
        note: Callable[[bytes], None],
        ended: asyncio.Future[EndReason],
        closed: EndReason,
        lost: EndReason,
    ) -> None:
        self.received_bytes = 0
        self._note = note
        self.closed = closed
        self.lost = lost
        self._sink = sink
        self._write: Callable[[bytes], None] = sink.write
        self._ended = ended

    def data_received(self, data: bytes) -> None:
        self._write(data)
        self.received_bytes += len(data)
        self._note(data)

    def pause_writing(self) -> None:
        # Our source takes no more of what comes from the sink.
        if not self._sink.is_closing():
            self._sink.pause_reading()

    def resume_writing(self) -> None:
        if not self._sink.is_closing():
            self._sink.resume_reading()

    def eof_received(self) -> bool:
        self._end(self.closed)
        return True  # what was written to the source is still to be flushed

    def connection_lost(self, exc: Exception | None) -> None:
        self.back.stop_writing()
        self._end(self.lost)

    def stop_writing(self) -> None:
        """Drop what still arrives: the sink is lost, and writing to it is an error."""
        self._write = _drop

    def _end(self, reason: EndReason) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)


def _drop(data: bytes) -> None:
    """Take the place of a lost transport's `write`."""


class Relay:
    """One session's relay. Make it, hand both transports to its directions, await `run`.

    `abandon` is awaited when the client has gone and left the upstream at work, before that is
    closed: here its query is cancelled.
    """

    def __init__(
        self,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        abandon: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._client = client
        self._upstream = upstream
        self._abandon = abandon
        self.activity = Activity()
        self._ended: asyncio.Future[EndReason] = asyncio.get_running_loop().create_future()
        self.from_client = _Direction(
            upstream,
            self.activity.client_sent,
            self._ended,
            EndReason.CLIENT_CLOSED,
            EndReason.CLIENT_LOST,
        )
        self.from_upstream = _Direction(
            client,
            self.activity.upstream_sent,
            self._ended,
            EndReason.UPSTREAM_CLOSED,
            EndReason.UPSTREAM_LOST,
        )
        self.from_client.back = self.from_upstream
        self.from_upstream.back = self.from_client
        for transport in (client, upstream):
            transport.set_write_buffer_limits(high=BUFFER_BYTES_MAX)

    async def run(self) -> RelayEnd:
        """Return when one side has ended and both are closed. Cancelling it cuts both."""
        try:
            reason = await self._ended
            # What one side sent before its end is flushed to the other; PostgreSQL knows no
            # half-close, so the end of one is the end of both (W34).
            client_ended = reason in (EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST)
            if client_ended:
                await self._leave()
            async with asyncio.TaskGroup() as closing:
                for transport, ended in (
                    (self._client, client_ended),
                    (self._upstream, not client_ended),
                ):
                    # The side that has ended its stream will not end it again: no lingering.
                    linger_seconds = 0.0 if ended else LINGER_SECONDS
                    closing.create_task(close_gracefully(transport, linger_seconds=linger_seconds))
        finally:
            self._client.abort()
            self._upstream.abort()
        return self.ended(reason)

    async def _leave(self) -> None:
        """The client has gone. One that said Terminate wants what it asked for before (W35)."""
        self.from_upstream.stop_writing()
        activity = self.activity
        if self._abandon is not None and activity.busy and not activity.terminated:
            await self._abandon()

    def ended(self, reason: EndReason) -> RelayEnd:
        """Return the end for this reason, unless another one came first: that is the cause."""
        if self._ended.done() and not self._ended.cancelled():
            reason = self._ended.result()
        return RelayEnd(reason, self.from_client.received_bytes, self.from_upstream.received_bytes)
