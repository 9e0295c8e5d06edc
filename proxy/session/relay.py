"""The relay: opaque bytes in both directions until one side ends.

The contract: each read of one side is written to the other as it is, at once, in order; while
a side's send buffer is above its high-water mark the other side is not read. Each direction is
alone: neither waits for the other, since a client may pipeline large messages while the upstream
streams rows (W32). So at most `BUFFER_BYTES_MAX` plus one read is held for each direction.

Nothing is parsed; only the last bytes of each read are kept, for the moment when a client goes.
What ends first is the cause of the session's end.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final

from proxy.transport.closing import close_gracefully
from proxy.transport.sockets import has_hung_up
from proxy.wire.messages import Terminate

BUFFER_BYTES_MAX: Final = 64 * 1024
# While the upstream takes nothing the client is not read, so its end is not seen but looked for.
LOOK_SECONDS: Final = 5.0
# The time that an upstream gets to answer a cancel; if it says something, the next statement of a
# pipeline may have begun, and it is cancelled again, but not for longer than this in all.
CANCEL_ANSWER_SECONDS: Final = 0.25
ABANDON_SECONDS_MAX: Final = 10.0

_TERMINATE: Final = Terminate().encode()


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

    __slots__ = ("_ended", "_sink", "_write", "back", "closed", "lost", "received_bytes", "tail")

    back: "_Direction"  # the other direction, which writes to our source

    def __init__(
        self,
        sink: asyncio.Transport,
        ended: asyncio.Future[EndReason],
        *,
        closed: EndReason,
        lost: EndReason,
    ) -> None:
        self.received_bytes = 0
        self.tail = b""
        self.closed = closed
        self.lost = lost
        self._sink = sink
        self._write: Callable[[bytes], None] = sink.write
        self._ended = ended

    def data_received(self, data: bytes) -> None:
        self._write(data)
        self.received_bytes += len(data)
        self.tail = data[-len(_TERMINATE) :]

    def pause_writing(self) -> None:
        # Our source takes no more of what comes from the sink.
        if not self._sink.is_closing():
            self._sink.pause_reading()

    def resume_writing(self) -> None:
        if not self._sink.is_closing():
            self._sink.resume_reading()

    def eof_received(self) -> bool:
        self.end(self.closed)
        return True  # what was written to the source is still to be flushed

    def connection_lost(self, exc: Exception | None) -> None:
        self.back.stop_writing()
        self.end(self.lost)

    def stop_writing(self) -> None:
        """Drop what still arrives: the sink is lost, and writing to it is an error."""
        self._write = _drop

    def end(self, reason: EndReason) -> None:
        """Note why the session ends; only the first cause counts."""
        if not self._ended.done():
            self._ended.set_result(reason)


class _FromUpstream(_Direction):
    """The direction of the upstream's bytes. While it takes none, it looks after the client."""

    __slots__ = ("_look",)

    _look: asyncio.TimerHandle

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_for_client)

    def resume_writing(self) -> None:
        self._look.cancel()
        super().resume_writing()

    def _look_for_client(self) -> None:
        if self._ended.done():
            return
        if self._sink.is_closing() or has_hung_up(self._sink):
            self.end(EndReason.CLIENT_LOST)
        else:
            self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_for_client)


def _drop(data: bytes) -> None:
    """Take the place of a lost transport's `write`."""


class Relay:
    """One session's relay. Make it, hand both transports to its directions, await `run`.

    `abandon` cancels what the upstream is doing; it is awaited when the client has gone without
    having said Terminate.
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
        self._ended: asyncio.Future[EndReason] = asyncio.get_running_loop().create_future()
        self.from_client = _Direction(
            upstream, self._ended, closed=EndReason.CLIENT_CLOSED, lost=EndReason.CLIENT_LOST
        )
        self.from_upstream = _FromUpstream(
            client, self._ended, closed=EndReason.UPSTREAM_CLOSED, lost=EndReason.UPSTREAM_LOST
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
            async with asyncio.TaskGroup() as closing:
                if reason in (EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST):
                    closing.create_task(close_gracefully(self._client, linger_seconds=0))
                    closing.create_task(self._leave_upstream())
                else:
                    closing.create_task(close_gracefully(self._client))
                    closing.create_task(close_gracefully(self._upstream, linger_seconds=0))
        finally:
            self._client.abort()
            self._upstream.abort()
        return self.ended(reason)

    async def _leave_upstream(self) -> None:
        """Close the upstream of a client that has gone, so that nothing works on for nobody (W35).

        A client that said Terminate wants what it asked for before. Any other one's upstream is
        cancelled first: a front end may forget the session, and its key, once its stream has ended.
        """
        self.from_upstream.stop_writing()
        if self._abandon is not None and self.from_client.tail != _TERMINATE:
            with suppress(TimeoutError):
                async with asyncio.timeout(ABANDON_SECONDS_MAX):
                    await self._cancel_all(self._abandon)
        await close_gracefully(self._upstream)

    async def _cancel_all(self, abandon: Callable[[], Awaitable[None]]) -> None:
        """Cancel until a cancel changes nothing; where nothing runs, that is the first one."""
        answered = True
        while answered and not self._upstream.is_closing():
            self._upstream.resume_reading()  # it may have been paused for the client's sake
            before = self.from_upstream.received_bytes
            await abandon()
            await asyncio.sleep(CANCEL_ANSWER_SECONDS)
            answered = self.from_upstream.received_bytes > before

    def ended(self, reason: EndReason) -> RelayEnd:
        """Return the end for this reason, unless another one came first: that is the cause."""
        if self._ended.done() and not self._ended.cancelled():
            reason = self._ended.result()
        return RelayEnd(reason, self.from_client.received_bytes, self.from_upstream.received_bytes)
