"""Sessions that are dialled ahead of clients, in the background.

For: the dial of a spare session, of which there is one at a time for each key, and the back-off
after one that failed. Not for: whether one is wanted (`pool`).

Invariant: a spare begins with a client, never by itself, so that a database without clients sleeps
(P36). It takes no slot of `connects_max` that a client waits for (P37).
"""

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import replace

from proxy.errors import ProxyError
from proxy.pool.kept_sessions import KeptSessions
from proxy.pool.policy import SpareBackoff
from proxy.pool.pool_counts import SpareResult
from proxy.upstream.dialer import Dialer
from proxy.upstream.upstream_session import Prepared
from proxy.wire.startup import StartupMessage
from proxy.wire.violations import ClientViolation


class Spares:
    """The spares of one pool."""

    def __init__(self, kept: KeptSessions, dialer: Dialer, clock: Callable[[], float]) -> None:
        self._kept = kept
        self._dialer = dialer
        self._clock = clock
        self._backoff = SpareBackoff[Prepared]()
        self._tasks: dict[Prepared, asyncio.Task[None]] = {}
        # Not that of the client after which a spare begins: its log lines are not that client's.
        self._context = contextvars.copy_context()

    def begin(self, key: Prepared, client: StartupMessage, fallback: StartupMessage | None) -> None:
        """Dial a session ahead for the next client of this kind, if one is wanted."""
        wanted = key not in self._tasks and self._kept.wants_spare(key)
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
        """Dial until there are enough, one at a time, or one is not kept."""
        try:
            while self._kept.wants_spare(key) and await self._dial(key, client, fallback):
                pass
        finally:
            del self._tasks[key]

    async def _dial(
        self, key: Prepared, client: StartupMessage, fallback: StartupMessage | None
    ) -> bool:
        """Dial one. Return whether it is kept: after a reconnect it is not (P46).

        One that was not, as it is too old or has sent something, would be followed by another.
        """
        generation = self._kept.generation
        if not self._kept.reserve():
            return False
        opened, result = None, SpareResult.FAILED
        try:
            opened = await self._dialer.dial_ahead(client, fallback)
            result = SpareResult.NO_SLOT if opened is None else SpareResult.OPENED
        except (ProxyError, ClientViolation):
            self._backoff.failed(key, self._clock())  # no client's error
        finally:
            if opened is None:
                self._kept.dial_ended()
        self._kept.counts.spare_ended(result)
        if opened is None:
            return False
        self._backoff.succeeded(key)
        session = self._kept.dialled(opened, generation, returns=True)
        session.used = False
        replace(opened, lease=session).put_back()
        return not session.is_over
