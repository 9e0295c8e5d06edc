"""Closing a connection so that the peer receives everything and sees a clean end.

If a socket is closed while it has unread bytes, the kernel sends RST, and the peer may lose what
was written last: often the error that explains the close. So the close has four steps: send the
write buffer; end our stream, with close_notify under TLS; read and discard for a moment, so that
the peer can end its stream too; close. Each wait is bounded; a peer that pauses in its result is no
dead peer, so the first bound counts from the last progress.
"""

import asyncio
from typing import Final

from proxy.transport.sockets import end_stream, reset_on_close

# How long a reader may pause before it reads the next part of the write buffer.
FLUSH_SECONDS_MAX: Final = 300.0
# How long the peer may take after that to end its own stream. Most peers end it at once. An idle
# client in a pool checks its connection only when it needs it, and is not waited for.
LINGER_SECONDS: Final = 2.0


class _DiscardProtocol(asyncio.Protocol):
    """Reads a connection to its end and discards the data."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.flushed: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.is_lost = False  # the future may be cancelled instead

    def resume_writing(self) -> None:
        _resolve(self.flushed)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        _resolve(self.flushed)
        _resolve(self.lost)


async def close_gracefully(
    transport: asyncio.Transport,
    *,
    flush_seconds: float = FLUSH_SECONDS_MAX,
    linger_seconds: float = LINGER_SECONDS,
    resets: bool = False,
) -> bool:
    """Close the transport after sending its write buffer and ending the stream.

    Abort it after `flush_seconds` without progress, after `linger_seconds`, or if cancelled. Return
    false in the first case: the peer was cut before everything was sent. `resets` cuts it by RST,
    which it notices even if it does not read.
    """
    if transport.is_closing():
        return True
    discard = _DiscardProtocol()
    flushed = False
    transport.set_protocol(discard)
    try:
        transport.resume_reading()
        await _flush(transport, discard, flush_seconds)
        flushed = True
        if not discard.is_lost:
            end_stream(transport)
        async with asyncio.timeout(linger_seconds):
            await discard.lost
    except TimeoutError:
        pass
    finally:
        if resets and not flushed and not discard.is_lost:
            reset_on_close(transport)
        if not discard.is_lost:  # asyncio's own transports cannot be aborted twice
            transport.abort()
    return flushed


async def _flush(
    transport: asyncio.Transport, discard: _DiscardProtocol, seconds_max: float
) -> None:
    """Wait until the write buffer is empty. Raises TimeoutError where it does not get smaller."""
    # With a high-water mark of 0, resume_writing means that the write buffer is empty.
    transport.set_write_buffer_limits(high=0)
    left_bytes = transport.get_write_buffer_size()
    while left_bytes and not discard.flushed.done():
        await asyncio.wait((discard.flushed,), timeout=seconds_max)
        before, left_bytes = left_bytes, transport.get_write_buffer_size()
        if left_bytes >= before and not discard.flushed.done():
            raise TimeoutError


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
