"""Where shard keys are, for sessions: the cache, and the catalogue where the cache does not know.

For: `find`, and what a session that was refused or not reached asks. Not for: opening sessions
(`admitting_opener`), or hearing of changes (`feed`).

The invariants: a key that is known costs no wait. What many want at once is asked once: one
look-up a key, one refresh a mapping. While the catalogue cannot be reached, what is known is
served; without validation for `max_stale_seconds` only.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID

from proxy.catalogue.lookups import LookupConnection
from proxy.catalogue.map_state import MapState
from proxy.catalogue.model import Located
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.router import LookupResult, mapping_not_found
from proxy.workspace.single_flight import PendingCalls, SingleFlight

# Between two tries of a client whose key is not known while the catalogue cannot be reached.
RETRY_SECONDS: Final = (0.1, 5.0)
# What is known to be offline is asked for again this often, and its client waits for so long.
OFFLINE_ASK_SECONDS: Final = 1.0
# After a failed dial the mapping is refreshed once, and then not for so long; it doubles.
DIAL_BACKOFF_SECONDS: Final = (5.0, 30.0)
# Mappings whose back-off or last question is remembered.
REMEMBERED_MAX: Final = 10_000
# A look-up whose answer is outdated when it comes is asked again.
OUTDATED_MAX: Final = 3

K = TypeVar("K")
V = TypeVar("V")

_RETRIED: Final = frozenset({ErrorKind.CATALOGUE_UNREACHABLE})


@dataclass(slots=True)
class _DialBackoff:
    until: float
    seconds: float


class MapSource:
    """Finds mappings. `run` its connection in a task; `close` it when that has ended."""

    def __init__(
        self,
        state: MapState,
        lookups: LookupConnection,
        *,
        max_stale_seconds: float | None,
        record_lookup: Callable[[str], None],
    ) -> None:
        """`max_stale_seconds` is None for a map whose sessions are validated.

        `record_lookup` counts results: hit, miss, negative.
        """
        self._state = state
        self._lookups = lookups
        self._clock, self._times = state.times.clock, state.times
        self._max_stale_seconds = max_stale_seconds
        self._record_lookup = record_lookup
        self._pending = PendingCalls()
        self._by_key: dict[bytes, SingleFlight[Located | None]] = {}
        self._by_mapping: dict[UUID, SingleFlight[Located | None]] = {}
        self._asked_at: dict[UUID, float] = {}
        self._backoffs: dict[UUID, _DialBackoff] = {}

    async def close(self) -> None:
        """Refuse the look-ups that are under way. Those that wait for one are not cancelled."""
        self._lookups.close()
        await self._pending.finish()

    # -- for sessions ----------------------------------------------------------------------------

    async def find(self, routing_key: bytes, *, deadline: float | None = None) -> Located:
        """Return where a routing key is; the mapping may be offline.

        A catalogue that cannot be reached is tried again until the deadline, by the clock.

        Raises ProxyError: MAPPING_NOT_FOUND, CATALOGUE_UNREACHABLE, CATALOGUE_STALE,
        SHARD_ROW_INVALID, CATALOGUE_REFUSED, STORE_VERSION.
        """
        located = self._state.find(routing_key)
        if located is None:
            await self._within(deadline, self._state.loaded.wait())
            located = self._state.find(routing_key)
        if located is None:
            return self._checked(await self._find_unknown(routing_key, deadline), routing_key)
        self._record_lookup(LookupResult.HIT)
        if located.is_offline:
            located = await self._ask_again(routing_key, located)
        return self._checked(located, routing_key)

    def peek(self, routing_key: bytes) -> Located | None:
        """Return where a routing key is, as far as it is known; nothing is asked or counted."""
        return self._state.find(routing_key)

    async def refresh(self, routing_key: bytes, stale: Located) -> Located:
        """Return where a key is now, by the catalogue: a shard refused what was known.

        Raises ProxyError as `find` does.
        """
        return self._checked(await self._refreshed(routing_key, stale), routing_key)

    async def dial_failed(self, routing_key: bytes, located: Located) -> Located:
        """Return where a key is after its shard could not be reached.

        The catalogue is asked once, and then not for a while. Raises ProxyError as `find` does.
        """
        mapping_id, now = located.mapping.mapping_id, self._clock()
        backoff = self._backoffs.get(mapping_id)
        if backoff is not None and now < backoff.until:
            return self._checked(self._state.find(routing_key) or located, routing_key)
        first, last = DIAL_BACKOFF_SECONDS
        seconds = first if backoff is None else min(last, 2 * backoff.seconds)
        _remember(self._backoffs, mapping_id, _DialBackoff(now + seconds, seconds))
        return await self.refresh(routing_key, located)

    def dial_succeeded(self, located: Located) -> None:
        """Record that the shard of a mapping was reached."""
        if self._backoffs:
            self._backoffs.pop(located.mapping.mapping_id, None)

    @property
    def backoff_seconds(self) -> float:
        """The longest back-off after failed dials that lasts now, 0 if there is none."""
        now = self._clock()
        return max((one.seconds for one in self._backoffs.values() if one.until > now), default=0.0)

    # -- asking ----------------------------------------------------------------------------------

    def _checked(self, located: Located | None, routing_key: bytes) -> Located:
        """Return what may be served. Raises ProxyError."""
        if located is None:
            raise mapping_not_found(self._state.name, routing_key)
        refusal = self._state.refusal(located.shard)
        if refusal is not None:
            raise refusal
        if self._max_stale_seconds is not None and self._is_stale(self._max_stale_seconds):
            raise ProxyError(ErrorKind.CATALOGUE_STALE, f"shard map {self._state.name}")
        return located

    def _is_stale(self, seconds_max: float) -> bool:
        contact = self._state.contact
        if contact.feed_is_current or not contact.failed:
            return False
        return self._clock() - contact.answered_at > seconds_max

    async def _find_unknown(self, routing_key: bytes, deadline: float | None) -> Located | None:
        if self._state.is_missed(routing_key):
            self._record_lookup(LookupResult.NEGATIVE)
            return None
        self._record_lookup(LookupResult.MISS)
        delay, last = RETRY_SECONDS
        while True:  # bounded by the deadline
            try:
                return await self._within(deadline, self._look_up(routing_key).result())
            except ProxyError as error:
                if deadline is None or error.kind not in _RETRIED:
                    raise
                seconds = delay * self._times.jitter()
                if self._clock() + seconds >= deadline:
                    raise
            await self._times.sleep(seconds)
            delay = min(last, 2 * delay)

    async def _within(self, deadline: float | None, answer: Awaitable[V]) -> V:
        """Return the answer. Raises CATALOGUE_UNREACHABLE if there is none by the deadline."""
        seconds = None if deadline is None else max(0.0, deadline - self._clock())
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            detail = "the catalogue did not answer in the time that a session has to start"
            raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE, detail) from None

    async def _ask_again(self, routing_key: bytes, located: Located) -> Located | None:
        """Return whether what is known to be offline still is; the same if nothing is heard."""
        mapping_id, now = located.mapping.mapping_id, self._clock()
        asked_at = self._asked_at.get(mapping_id)
        if asked_at is not None and now < asked_at + OFFLINE_ASK_SECONDS:
            return located
        _remember(self._asked_at, mapping_id, now)
        try:
            return await self._within(
                now + OFFLINE_ASK_SECONDS, self._refreshed(routing_key, located)
            )
        except ProxyError:
            return located

    async def _refreshed(self, routing_key: bytes, stale: Located) -> Located | None:
        """Return where a key is by the catalogue: one question for all sessions of a mapping."""
        mapping_id = stale.mapping.mapping_id
        flight = self._flight_of(self._by_mapping, mapping_id, routing_key, "refresh")
        found = await flight.result()
        if found is not None and found.mapping.covers(routing_key):
            return found
        # Another key of the mapping was asked for, and is elsewhere than this one.
        return await self._look_up(routing_key, "refresh").result()

    def _look_up(self, routing_key: bytes, purpose: str = "lookup") -> SingleFlight[Located | None]:
        return self._flight_of(self._by_key, routing_key, routing_key, purpose)

    def _flight_of(
        self, flights: "dict[K, SingleFlight[Located | None]]", by: "K", key: bytes, purpose: str
    ) -> SingleFlight[Located | None]:
        flight = flights.get(by)
        if flight is None:

            async def call() -> Located | None:
                try:
                    return await self._asked(key, purpose)
                finally:
                    flights.pop(by, None)

            flight = flights[by] = SingleFlight(call, self._pending)
        return flight

    async def _asked(self, routing_key: bytes, purpose: str) -> Located | None:
        """Ask the catalogue, and keep the answer. Raises ProxyError."""
        found = None
        for _ in range(OUTDATED_MAX):
            with self._state.flight() as flight:
                found = await self._ask_once(routing_key, purpose)
                if found is None:
                    is_kept = self._state.set_missing(routing_key, flight)
                else:
                    is_kept = self._state.set_located(found, flight)
            if is_kept:
                break
        return found

    async def _ask_once(self, routing_key: bytes, purpose: str) -> Located | None:
        if self._state.map is None:
            raise ProxyError(ErrorKind.CATALOGUE_MAP_MISSING, f"shard map {self._state.name}")
        map_id = self._state.map.map_id
        ask = self._lookups.ask_unknown if purpose == "lookup" else self._lookups.ask
        contact = self._state.contact
        try:
            found = await ask(lambda reader: reader.locate(map_id, routing_key, purpose))
            if found is None and self._state.is_lost:
                detail = f"the catalogue has lost the shard map {self._state.name}"
                raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE, detail)
        except ProxyError:
            contact.failed = True
            raise
        contact.answered(self._clock())
        return found


def _remember(kept: dict[UUID, V], mapping_id: UUID, value: V) -> None:
    """Keep a value for a mapping; the oldest goes where there are too many."""
    if mapping_id not in kept and len(kept) >= REMEMBERED_MAX:
        del kept[next(iter(kept))]
    kept[mapping_id] = value
