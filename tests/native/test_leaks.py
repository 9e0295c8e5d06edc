"""Ended sessions leave neither memory nor descriptors."""

import gc
import os
from pathlib import Path
from typing import Final

from tests.native.relayed import relayed
from tests.support.running import eventually
from tests.transport.peers import Contexts, resident_bytes

# A long run by hand: NATIVE_SESSIONS=2000.
SESSIONS: Final = int(os.environ.get("NATIVE_SESSIONS", "500"))
MIB: Final = 1024 * 1024


async def test_sessions_that_are_over_leave_neither_memory_nor_descriptors(tls: Contexts) -> None:
    content = b"x" * 100_000
    await sessions(tls, 100, content)
    descriptors, resident = open_descriptors(), resident_bytes()
    await sessions(tls, SESSIONS, content)
    # An event loop closes a socket a turn after its transport.
    await eventually(lambda: open_descriptors() <= descriptors, "all descriptors are closed")
    # A session that was kept would be some 30 KiB, and its TLS as much again.
    assert resident_bytes() - resident < 8 * MIB  # in which an allocator has its ups and downs


async def sessions(tls: Contexts, count: int, content: bytes) -> None:
    """Run sessions one by one, each with another end than the one before."""
    for number in range(count):
        async with relayed(tls=tls) as setting:
            await setting.client.send(content)
            assert await setting.upstream.receive_exactly(len(content)) == content
            await setting.upstream.send(content)
            assert await setting.client.receive_exactly(len(content)) == content
            if number % 3 == 0:
                setting.client.reset()
                assert await setting.upstream.receive_rest() == b""
                setting.upstream.abort()
                await setting.end()
            elif number % 3 == 1:
                setting.upstream.reset()
                await setting.client.receive_rest()
                setting.client.abort()
                await setting.end()
    gc.collect()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
