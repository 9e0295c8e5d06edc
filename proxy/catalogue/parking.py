"""Clients that wait while their mapping is offline, or for the map to say where their key is.

For: how many may be parked, for how long, and what wakes them. Not for: what they do then
(`admitting_opener`).

The invariants: a parked client holds a slot of `listen.max_connections` and nothing upstream; no
more than `park_max` are parked, in all processes of the proxy together.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum, unique
from math import inf
from typing import Final, Protocol
from uuid import UUID

from proxy.errors import ProxyError
from proxy.upstream.upstreams import RouteReplaced

# Without a word of the feed the mapping is asked for this often; once for all that wait for it.
LOOK_SECONDS: Final = 1.0
# Between two parked clients whose wait is over. A process opens about 500 sessions a second: all at
# once would only slow each other down, and those that came first would be served no sooner.
TURN_SECONDS: Final = 0.002


@unique
class ParkResult(StrEnum):
    """How the wait of a client ended, as the metrics show it."""

    SERVED = "served"
    TIMED_OUT = "timed_out"
    FULL = "full"
    FAILED = "failed"
    REROUTED = "rerouted"  # by another map, which a reload has brought
    LEFT = "left"  # the client, or the proxy drains


class ParkMetrics(Protocol):
    """Where parked clients are counted."""

    def parked(self, now: int) -> None:
        """Show how many clients wait now."""

    def park_ended(self, result: str) -> None:
        """Count a wait that has ended."""


class Parking:
    """The clients of this process that wait. `park_max` and `seconds_max` may change later."""

    def __init__(
        self,
        park_max: int,
        seconds_max: float,
        metrics: ParkMetrics,
        share: Callable[[int], int] = lambda parked: parked,
    ) -> None:
        """`share` publishes this process's number, and returns that of all processes."""
        self.park_max = park_max
        self.seconds_max = seconds_max
        self._metrics = metrics
        self._share = share
        self._waiting: dict[asyncio.Future[None], tuple[float, UUID, UUID]] = {}
        self._asked_at: dict[UUID, float] = {}  # by mapping, while clients are parked
        self._parked = 0
        self._last_turn = -inf
        self._routing: set[asyncio.Timeout] = set()

    def __len__(self) -> int:
        return self._parked

    @contextmanager
    def waiting(
        self, seconds: float, refusal: ProxyError
    ) -> Iterator[Callable[[ParkResult], None]]:
        """Count a parked client while the block runs; yield what sets the result of the wait.

        Raises the refusal if no time is left, or too many wait.
        """
        result = ParkResult.FULL

        def set_result(value: ParkResult) -> None:
            nonlocal result
            result = value

        all_parked = self._count(1)
        try:
            if all_parked > self.park_max or seconds <= 0:
                raise refusal
            result = ParkResult.LEFT
            yield set_result
        finally:
            self._count(-1)
            if not self._parked:
                self._asked_at.clear()
            self._metrics.park_ended(result)

    def _count(self, change: int) -> int:
        """Count clients of this process. Return how many are parked in all processes."""
        self._parked += change
        self._metrics.parked(self._parked)
        return self._share(self._parked)

    @asynccontextmanager
    async def routing(self) -> AsyncIterator[None]:
        """Run the block, in which a map is waited for; cancel it if the map is exchanged.

        Raises RouteReplaced then.
        """
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._routing.add(scope)
                yield
        except TimeoutError:
            raise RouteReplaced from None
        finally:
            self._routing.discard(scope)

    async def wait(self, mapping_id: UUID, shard_id: UUID, seconds: float, *, until: float) -> bool:
        """Return when the mapping or the shard has changed, after LOOK_SECONDS at the latest.

        `until` is when the client's time is over: those with the earliest are woken first. True:
        the catalogue is to be asked by this client, for all that wait for the mapping.
        """
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[None] = loop.create_future()
        self._waiting[changed] = until, mapping_id, shard_id
        self._asked_at.setdefault(mapping_id, loop.time())
        try:
            async with asyncio.timeout(min(seconds, LOOK_SECONDS)):
                await changed
            return False
        except TimeoutError:
            asked_at = self._asked_at[mapping_id]
            # The timers of those that began together are not exact.
            is_due = loop.time() - asked_at >= 0.9 * LOOK_SECONDS
            if is_due:
                self._asked_at[mapping_id] = loop.time()
            return is_due
        finally:
            del self._waiting[changed]

    def changed(
        self, mapping_ids: Collection[UUID] | None, shard_ids: Collection[UUID] = ()
    ) -> None:
        """Wake the clients that wait for one of these, in order; None: all clients."""
        meant = [
            (until, waiting)
            for waiting, (until, mapping_id, shard_id) in self._waiting.items()
            if mapping_ids is None or mapping_id in mapping_ids or shard_id in shard_ids
        ]
        for _, waiting in sorted(meant, key=lambda one: one[0]):
            if not waiting.done():
                waiting.set_result(None)

    def exchanged(self) -> None:
        """Wake all clients: a reload has exchanged the map, and they are routed anew."""
        self.changed(None)
        now = asyncio.get_running_loop().time()
        while self._routing:
            self._routing.pop().reschedule(now)

    async def turn(self) -> None:
        """Return when the next client may go on: in the order of the calls, TURN_SECONDS apart."""
        now = asyncio.get_running_loop().time()
        self._last_turn = max(now, self._last_turn + TURN_SECONDS)
        await asyncio.sleep(self._last_turn - now)
