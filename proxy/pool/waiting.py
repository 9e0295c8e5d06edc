"""The clients that wait for a session of a pool: for one in its reset, for room, or for a slot.

For: who gets a session that is free, and who may dial. Not for: bounds (`pool`).

The invariants: a client is given one thing, a session or the right to dial. What was given to one
that does not take it comes back to the pool. Clients that wait for room are served in order.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from proxy.pool.pooled_session import PooledSession
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstream_session import Prepared

T = TypeVar("T")
W = TypeVar("W", bound="Waiter")


class Waiter:
    """One client that waits. `key` is None for one that no kept session can serve."""

    __slots__ = ("_woken", "key", "may_dial", "session", "waits")

    def __init__(self, key: Prepared | None) -> None:
        self.key = key
        self.waits = True
        self.session: PooledSession | None = None
        self.may_dial = False
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def give(self, session: PooledSession | None) -> None:
        """Pass it a session, or room to dial. Call it while `waits` is true."""
        self.session, self.may_dial = session, session is None
        self.wake()

    async def wait(self, seconds: float) -> None:
        """Return when it was woken, or after this time."""
        timer = asyncio.get_running_loop().call_later(seconds, self.wake)
        try:
            await self._woken
        finally:
            timer.cancel()
            self.waits = False

    def wake(self) -> None:
        """End its wait; it was given what it has."""
        self.waits = False
        if not self._woken.done():
            self._woken.set_result(None)


class DialWaiter(Waiter):
    """A client whose dial may have to wait for a slot of `connects_max`: a session ends it then."""

    __slots__ = ("_phases", "_scope")

    def __init__(self, key: Prepared | None, phases: DialPhases) -> None:
        super().__init__(key)
        self._phases = phases
        self._scope: asyncio.Timeout | None = None

    @property
    def is_in_queue(self) -> bool:
        """Whether nothing is done for it at present."""
        return self.waits and self._phases.waits_for_slot

    def give(self, session: PooledSession | None) -> None:
        """Pass it a session, and end its dial."""
        super().give(session)
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def unless_given(self, dial: Coroutine[None, None, T]) -> T | None:
        """Return what a dial returns; None if a session was given before."""
        with suppress(TimeoutError):  # the dial itself raises none
            async with asyncio.timeout(None) as self._scope:
                return await dial
        return None


class WaitingClients:
    """Those of one pool, each in the order in which they came."""

    def __init__(self) -> None:
        self._for_room: dict[Waiter, None] = {}
        self._for_reset: dict[Prepared, dict[Waiter, None]] = {}
        self._dialling: dict[Prepared, dict[DialWaiter, None]] = {}

    def __len__(self) -> int:
        """The clients that wait for room."""
        return len(self._for_room)

    @contextmanager
    def for_room(self, waiter: Waiter) -> Iterator[None]:
        """Register a client that waits for room while the block runs, last in the queue."""
        self._for_room[waiter] = None
        try:
            yield
        finally:
            self._for_room.pop(waiter, None)

    @contextmanager
    def for_reset(self, waiter: Waiter, key: Prepared) -> Iterator[None]:
        """Register a client that waits for a session of this key in its reset."""
        with _registered(self._for_reset, key, waiter):
            yield

    @contextmanager
    def dialling(self, waiter: DialWaiter, key: Prepared) -> Iterator[None]:
        """Register a client whose dial may have to wait for a slot."""
        with _registered(self._dialling, key, waiter):
            yield

    def reset_waiters(self, key: Prepared) -> int:
        """Return how many wait for a session of this key that is in its reset."""
        return len(self._for_reset.get(key, ()))

    # -- who is next -----------------------------------------------------------------------------

    def next_for_reset(self, key: Prepared) -> Waiter | None:
        """Return and remove the first that waits for a session of this key in its reset."""
        return _first(self._for_reset.get(key))

    def next_for_room(self) -> Waiter | None:
        """Return and remove the first that waits for room."""
        return _first(self._for_room)

    def next_dial(self, key: Prepared) -> DialWaiter | None:
        """Return the first dial for this key that waits for a slot."""
        return next((one for one in self._dialling.get(key, ()) if one.is_in_queue), None)

    def stop(self, *, all_waits: bool) -> None:
        """Wake those that wait for a session in its reset: there will be none. Or all that wait."""
        for queue in [*self._for_reset.values(), *([self._for_room] if all_waits else ())]:
            while (waiter := _first(queue)) is not None:
                waiter.wake()


@contextmanager
def _registered(known: dict[Prepared, dict[W, None]], key: Prepared, waiter: W) -> Iterator[None]:
    known.setdefault(key, {})[waiter] = None
    try:
        yield
    finally:
        waiter.waits = False
        of_key = known.get(key, {})  # the last of those that were given something has removed it
        of_key.pop(waiter, None)
        if not of_key:
            known.pop(key, None)


def _first(queue: dict[Waiter, None] | None) -> Waiter | None:
    """Return and remove the first that still waits."""
    while queue:
        waiter = next(iter(queue))
        del queue[waiter]
        if waiter.waits:
            return waiter
    return None
