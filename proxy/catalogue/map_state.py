"""What a proxy knows of its map, and who is told when that changes.

For: one place through which every change goes, be it of the feed, a look-up or a verdict.
Pure but for the clock, which is an argument. Not for: asking the catalogue.

Invariant: a change is known before anyone is told. What was read before a change that was heard of
meanwhile is not kept.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC
from typing import Final
from uuid import UUID

from proxy.catalogue.cache import REMOVED_MAX, Build, MappingCache
from proxy.catalogue.model import CatalogueMap, Located, Mapping, Shard, Sleep
from proxy.catalogue.table_builder import BAD_ROWS_MAX, BadRow, fault_of_bounds
from proxy.errors import ErrorKind, ProxyError

# Keys without a mapping that are remembered, and for how long: a client that asks again and again
# for one asks the catalogue once a second.
MISSES_MAX: Final = 10_000
MISS_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """What is not as it was: mappings and shards by their ids; None: any may have changed."""

    mapping_ids: frozenset[UUID] | None = frozenset()
    shard_ids: frozenset[UUID] = frozenset()


EVERYTHING: Final = Change(None)
CHANGE_WORDS: Final = ("inserted", "removed", "shards", "reloaded")

Subscriber = Callable[[Change], None]


@dataclass(slots=True)
class Contact:
    """When the catalogue last answered, and since when it does not."""

    answered_at: float
    failed: bool = False
    feed_is_current: bool = False
    """Whether the feed hears of every change as it comes."""

    def answered(self, now: float) -> None:
        """Record an answer."""
        self.answered_at, self.failed = now, False


@dataclass(frozen=True, slots=True)
class Times:
    """What a test has of its own: the event loop's time, a random number from 0 to 1, a wait."""

    clock: Callable[[], float]
    jitter: Callable[[], float]
    sleep: Sleep


@dataclass(slots=True, eq=False)
class Flight:
    """A question that is under way, and what has changed since it was asked."""

    changed: set[UUID] = field(default_factory=set)
    everything: bool = False

    def add(self, change: Change) -> None:
        """Record a change."""
        ids = change.mapping_ids
        if ids is None or len(self.changed) + len(ids) > REMOVED_MAX:
            self.everything = True
        else:
            self.changed |= ids

    def is_outdated(self, mapping_ids: Iterable[UUID]) -> bool:
        """Return whether one of these mappings has changed meanwhile."""
        return self.everything or not self.changed.isdisjoint(mapping_ids)


class MapState:
    """The map of this proxy: None until it is known which the catalogue has."""

    def __init__(self, name: str, times: Times) -> None:
        """`name` is that of the map in the catalogue."""
        self.name = name
        self.times = times
        self.contact = Contact(times.clock())
        self.loaded = asyncio.Event()
        """Set when the map is known, with `load = "eager"` all of it."""
        self.map: CatalogueMap | None = None
        self.cache: MappingCache | None = None
        self.version = 0
        """The version that the cache is of, by the notifications: any of them may be forged."""
        self.read_version = 0
        """The version that the cache certainly is of: it was read in the catalogue."""
        self.is_lost = False
        """Whether the catalogue has lost the map, and not got it back from its shards yet."""
        self.change_counts = Counter[str]()
        """What became of the cache: by the words of CHANGE_WORDS."""
        self._bad: dict[UUID, BadRow] = {}
        self._bad_tables: dict[UUID, str] = {}
        self._misses: dict[bytes, float] = {}
        self._flights: set[Flight] = set()
        self._subscribers: list[Subscriber] = []

    # -- who is told -----------------------------------------------------------------------------

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call this for each change, from now until what is returned is called."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def _changed(self, change: Change) -> None:
        self._misses.clear()
        for flight in self._flights:
            flight.add(change)
        for subscriber in tuple(self._subscribers):
            subscriber(change)

    # -- what is known ---------------------------------------------------------------------------

    def find(self, routing_key: bytes) -> Located | None:
        """Return where a routing key is, as far as it is known."""
        return None if self.cache is None else self.cache.find(routing_key)

    def by_id(self, mapping_id: UUID) -> Mapping | None:
        """Return a mapping by its id, as far as it is known."""
        return None if self.cache is None else self.cache.by_id(mapping_id)

    def is_missed(self, routing_key: bytes) -> bool:
        """Return whether the catalogue has just said that no mapping covers a key."""
        until = self._misses.get(routing_key)
        return until is not None and self.times.clock() < until

    def refusal(self, shard: Shard) -> ProxyError | None:
        """Return why a shard is refused: the catalogue has rows of it that cannot be right."""
        if shard.fault:
            return ProxyError(ErrorKind.SHARD_ROW_INVALID, f"shard {shard.name}: {shard.fault}")
        if not self._bad and not self._bad_tables:
            return None
        rows = (row.reason for row in self._bad.values() if shard.shard_id in row.shard_ids)
        reason = self._bad_tables.get(shard.shard_id) or next(rows, None)
        if reason is None:
            return None
        return ProxyError(ErrorKind.SHARD_ROW_INVALID, f"a mapping of shard {shard.name}: {reason}")

    # -- the whole map ---------------------------------------------------------------------------

    def checked(self, found: CatalogueMap | None) -> CatalogueMap:
        """Return the map that the catalogue has, if it can be taken up.

        One that is missing although mappings of it are known was lost: what is known is kept. A
        version below 1 is that of a map which does not have its mappings back.

        Raises ProxyError: CATALOGUE_MAP_MISSING, CATALOGUE_UNREACHABLE.
        """
        known = self.map
        if found is not None and found.version < 1:
            self.is_lost = True
            detail = f"shard map {self.name} does not have its mappings back from its shards"
            raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE, detail)
        if found is None and self.cache is not None and len(self.cache):
            self.is_lost = True
        elif known is not None and (found is None or found.map_id != known.map_id):
            self.drop()
        if found is None:
            raise ProxyError(ErrorKind.CATALOGUE_MAP_MISSING, f"shard map {self.name}")
        return found

    def start(self, found: CatalogueMap) -> MappingCache:
        """Take up a map. It has nothing yet, unless it is the same as before."""
        cache, known = self.cache, self.map
        self.map, self.is_lost = found, False
        if (
            cache is None
            or known is None
            or (known.map_id, known.spec) != (found.map_id, found.spec)
        ):
            self.cache = cache = MappingCache(found.map_id, found.spec)
            self.version = self.read_version = 0
            self._bad, self._bad_tables = {}, {}
            if known is not None:
                self._changed(EVERYTHING)
        return cache

    def restore(self, found: CatalogueMap, build: Build, shards: Iterable[Shard]) -> None:
        """Take a map that was saved, with all of its rows."""
        cache = self.start(found)
        cache.adopt(build)
        self._take(build, shards, found.version)
        self.loaded.set()

    def drop(self) -> None:
        """Forget the map: the catalogue has it no more."""
        self.map = self.cache = None
        self.version = self.read_version = 0
        self._changed(EVERYTHING)

    def exchange(self, build: Build, shards: Iterable[Shard], version: int) -> bool:
        """Take what was read of the whole map. Return whether it was still wanted."""
        assert self.cache is not None
        if not self.cache.exchange(build):
            return False
        self._take(build, shards, version)
        return True

    def _take(self, build: Build, shards: Iterable[Shard], version: int) -> None:
        assert self.cache is not None
        self.cache.set_shards({shard.shard_id: shard for shard in shards})
        self.version = self.read_version = version
        bad = build.builder.bad
        self._bad = {row.mapping_id: row for row in bad}
        # More than can be listed: their shards are refused until the map is read again.
        self._bad_tables = dict(build.builder.refused) if len(bad) >= BAD_ROWS_MAX else {}
        self.change_counts["reloaded"] += 1
        self._changed(EVERYTHING)

    def reloaded(self, version: int) -> None:
        """Record that all that is known was read again, at this version."""
        self.version = self.read_version = version
        self.change_counts["reloaded"] += 1
        self._changed(EVERYTHING)

    # -- single changes --------------------------------------------------------------------------

    def set_shards(self, shards: Iterable[Shard]) -> None:
        """Take all shards of the map. No mapping is touched."""
        if self.cache is None:
            return
        before = dict(self.cache.shards)
        after = {shard.shard_id: shard for shard in shards}
        ids = before.keys() | after.keys()
        changed = frozenset(one for one in ids if before.get(one) != after.get(one))
        if changed:
            self.cache.set_shards(after)
            self.change_counts["shards"] += 1
            self._changed(Change(shard_ids=changed))

    def set_mappings(self, asked: Iterable[UUID], found: Iterable[Mapping]) -> None:
        """Take the rows of these ids; an id without a row is that of a removed mapping.

        A forged notification may name those of another map: they are none here.
        """
        if self.cache is None:
            return
        changed: set[UUID] = set()
        rows = {row.mapping_id: row for row in found if row.map_id == self.cache.map_id}
        for mapping_id in asked:
            if mapping_id not in rows and self._remove(mapping_id):
                changed.add(mapping_id)
        for row in rows.values():
            changed |= self._insert(row)
        # Even if nothing changed here: what the notification was of may be on its way.
        self._changed(_change_of(changed, asked))

    def set_located(self, found: Located, flight: Flight) -> bool:
        """Take what a look-up found. Return whether that is still so, as far as it is known."""
        if self.cache is None or flight.is_outdated([found.mapping.mapping_id]):
            return False
        shard = found.shard
        changed_shards: set[UUID] = set()
        if self.cache.shards.get(shard.shard_id) != shard:
            self.cache.set_shards({**self.cache.shards, shard.shard_id: shard})
            changed_shards.add(shard.shard_id)
            self.change_counts["shards"] += 1
        changed = self._insert(found.mapping)
        if changed or changed_shards:
            self._changed(_change_of(changed, (), changed_shards))
        return True

    def set_missing(self, routing_key: bytes, flight: Flight) -> bool:
        """Take that no mapping covers a key. Return whether that is still so."""
        if self.cache is None or flight.everything or flight.changed:
            return False
        removed = self.cache.remove_at(routing_key)
        self.change_counts["removed"] += len(removed)
        if removed:
            self._changed(_change_of(removed))
        if len(self._misses) >= MISSES_MAX:
            del self._misses[next(iter(self._misses))]
        self._misses.pop(routing_key, None)
        self._misses[routing_key] = self.times.clock() + MISS_SECONDS
        return True

    @contextmanager
    def flight(self) -> Iterator[Flight]:
        """Yield a flight, which knows of the changes while the block runs."""
        flight = Flight()
        self._flights.add(flight)
        try:
            yield flight
        finally:
            self._flights.discard(flight)

    def _insert(self, row: Mapping) -> set[UUID]:
        """Take one row, and return the ids of the mappings that are not as they were."""
        assert self.cache is not None
        row = _normal(row)
        self._bad.pop(row.mapping_id, None)
        fault = fault_of_bounds(self.cache.spec, row.lo, row.hi)
        if fault:
            if len(self._bad) < BAD_ROWS_MAX:
                self._bad[row.mapping_id] = BadRow(row.mapping_id, (row.shard_id,), fault)
            self.cache.remove(row.mapping_id)
            return {row.mapping_id}
        if self.cache.by_id(row.mapping_id) == row:
            return set()
        replaced = {row.mapping_id, *self.cache.insert(row)}
        self.change_counts["inserted"] += 1
        self.change_counts["removed"] += len(replaced) - 1
        return replaced

    def _remove(self, mapping_id: UUID) -> bool:
        assert self.cache is not None
        self._bad.pop(mapping_id, None)
        is_removed = self.cache.remove(mapping_id)
        self.change_counts["removed"] += is_removed
        return is_removed


def _normal(row: Mapping) -> Mapping:
    """Return a row as the cache keeps it: without an operator's lock, which is nothing to sessions.

    The driver has infinity as a time without a zone.
    """
    drain_until = row.drain_until
    if drain_until is not None and drain_until.tzinfo is None:
        drain_until = drain_until.replace(tzinfo=UTC)
    return replace(row, locked=False, drain_until=drain_until)


def _change_of(
    changed: Iterable[UUID], asked: Iterable[UUID] = (), shard_ids: Iterable[UUID] = ()
) -> Change:
    ids = frozenset((*changed, *asked))
    return Change(None if len(ids) >= REMOVED_MAX else ids, frozenset(shard_ids))
