"""Sessions that are dialled ahead of clients, in the background.

For: the dial of a spare session, of which there is one at a time for each key, and the back-off
after one that failed. Not for: whether one is wanted (`pool`).

Invariant: a spare begins with a client, never by itself, so that a database without clients sleeps
(P36). It takes no slot of `connects_max` that a client waits for (P37).
"""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Protocol

from proxy.errors import ProxyError
from proxy.pool.policy import SpareBackoff
from proxy.pool.pool_counts import PoolCounts, SpareResult
from proxy.upstream.dialer import Dialer
from proxy.upstream.upstream_session import Prepared, UpstreamSession
from proxy.wire.startup import StartupMessage
from proxy.wire.violations import ClientViolation


class SpareOwner(Protocol):
    """The pool of the spares."""

    def wants_spare(self, key: Prepared) -> bool:
        """Return whether there are too few idle sessions of this key, and room for one."""

    def spare_begins(self) -> int:
        """Reserve room for a spare. Return the number of reconnects so far."""

    def spare_ended(self, opened: UpstreamSession | None, generation: int) -> None:
        """Keep a spare, or release the room of one that failed."""


class Spares:
    """The spares of one pool."""

    def __init__(
        self,
        owner: SpareOwner,
        dialer: Dialer,
        counts: PoolCounts,
        clock: Callable[[], float],
    ) -> None:
        self._owner = owner
        self._dialer = dialer
        self._counts = counts
        self._clock = clock
        self._backoff = SpareBackoff[Prepared]()
        self._tasks: dict[Prepared, asyncio.Task[None]] = {}
        # Not that of the client after which a spare begins: its log lines are not that client's.
        self._context = contextvars.copy_context()

    def begin(self, key: Prepared, client: StartupMessage, fallback: StartupMessage | None) -> None:
        """Dial a session ahead for the next client of this kind, if one is wanted."""
        wanted = key not in self._tasks and self._owner.wants_spare(key)
        if wanted and self._backoff.allows(key, self._clock()):
            self._tasks[key] = asyncio.get_running_loop().create_task(
                self._run(key, client, fallback), name="spare", context=self._context.copy()
            )

    def close(self) -> None:
        """Cancel the dials. None begins after that, as none is wanted."""
        for task in self._tasks.values():
            task.cancel()

    def clear(self) -> None:
        """Forget what failed."""
        self._backoff = SpareBackoff()

    async def _run(
        self, key: Prepared, client: StartupMessage, fallback: StartupMessage | None
    ) -> None:
        """Dial until there are enough, one at a time."""
        try:
            while self._owner.wants_spare(key) and await self._dial(key, client, fallback):
                pass
        finally:
            del self._tasks[key]

    async def _dial(
        self, key: Prepared, client: StartupMessage, fallback: StartupMessage | None
    ) -> bool:
        """Dial one. Return whether it is there."""
        generation = self._owner.spare_begins()
        opened, result = None, SpareResult.FAILED
        try:
            opened = await self._dialer.dial_ahead(client, fallback)
            result = SpareResult.NO_SLOT if opened is None else SpareResult.OPENED
        except (ProxyError, ClientViolation):
            self._backoff.failed(key, self._clock())  # no client's error
        finally:
            self._owner.spare_ended(opened, generation)
        self._counts.spare_ended(result)
        if opened is not None:
            self._backoff.succeeded(key)
        return opened is not None
