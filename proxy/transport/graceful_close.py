"""The end of a connection that the other side shall notice properly.

Closing a socket with unread bytes in it makes the kernel send RST, which can overtake and destroy
what was written last: the very error that explains the close. So the end is: send what is
written, end our stream (with close_notify under TLS), read on and discard for a moment so that the
peer may end too, and only then close; all of it for a bounded time.
"""

import asyncio
from typing import Final

# A slow reader gets this long to take the last words.
FLUSH_SECONDS_MAX: Final = 30.0
# And then this long to end its own stream. Most do at once; an idle pooled client only looks at its
# connection when it needs it, and is not waited for.
LINGER_SECONDS: Final = 2.0


class _DiscardProtocol(asyncio.Protocol):
    """Reads a connection to its end and keeps nothing."""

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
) -> None:
    """Close, so that the peer gets all that was written and sees a clean end.

    Takes at most `flush_seconds` plus `linger_seconds`; then, or when cancelled, it aborts.
    """
    if transport.is_closing():
        return
    discard = _DiscardProtocol()
    transport.set_protocol(discard)
    try:
        transport.resume_reading()
        async with asyncio.timeout(flush_seconds):
            # Zero marks: resume_writing then means that all is written.
            transport.set_write_buffer_limits(high=0)
            if transport.get_write_buffer_size() > 0:
                await discard.flushed
        if not discard.is_lost:
            transport.write_eof()
        async with asyncio.timeout(linger_seconds):
            await discard.lost
    except TimeoutError:
        pass
    finally:
        if not discard.is_lost:  # asyncio's own transports cannot be aborted twice
            transport.abort()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
