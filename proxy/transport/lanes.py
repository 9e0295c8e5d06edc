"""The compiled relay's lanes on an event loop, where they were built.

A lane carries a session's reads from socket to socket (`proxy/native/lanes.pyx`); all lanes of a
process are one descriptor that its loop watches.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from proxy import native

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes


@contextmanager
def watched_lanes() -> "Iterator[Lanes | None]":
    """Have the running loop carry lanes while the block runs; None where they were not built.

    Raises OSError when there is no descriptor left.
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
