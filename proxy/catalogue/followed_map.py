"""The catalogue's map as one proxy follows it: loaded, looked up, kept current and saved.

For: putting the parts together. Not for: what each does (`feed`, `map_source`, `snapshot_keeper`),
or sessions. A reload of the configuration makes another one beside this, or keeps it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, unique
from functools import partial

from proxy.catalogue.catalogue_reader import OpenReader
from proxy.catalogue.feed import FATAL_KINDS, Feed, FeedCounts, FeedSettings, FeedState
from proxy.catalogue.lookups import LookupConnection
from proxy.catalogue.map_source import MapSource
from proxy.catalogue.map_state import MapState, Subscriber, Times
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.snapshot_file import CataloguePlace
from proxy.catalogue.snapshot_keeper import SnapshotKeeper
from proxy.config import Settings, ShardMapSettings
from proxy.errors import ErrorKind, ProxyError


def place_of(settings: Settings) -> CataloguePlace:
    """Return which catalogue it is, as the settings say it: a host may have to be looked up."""
    target = settings.target(settings.catalogue.target)
    where = target.host or target.endpoint or target.instance
    return CataloguePlace(where, target.port, target.database)


def check_map(configured: ShardMapSettings, found: CatalogueMap) -> None:
    """Raise ProxyError (MAP_MISMATCH) for a map that is not as it is configured."""
    differing = configured.differing(found.spec)
    if differing:
        keys = ", ".join(f"{key} is {value} there" for key, value in differing.items())
        raise ProxyError(ErrorKind.MAP_MISMATCH, f"shard map {found.name}: {keys}")


@unique
class MapProgress(StrEnum):
    """How far the map can be relied on."""

    LOADING = "loading"
    READY = "ready"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class MapStatus:
    """The map as `/status` shows it. What is not known yet is None."""

    name: str
    source: str
    """catalogue, or snapshot as long as the catalogue has not been reached."""
    kind: str | None
    key_type: str | None
    version: int | None
    mappings: int
    shards: int
    state: MapProgress
    feed: FeedState
    age_seconds: float | None
    """Since it was last known to be current."""


class FollowedMap:
    """One map. `run` it in a task for as long as it is used."""

    def __init__(
        self,
        settings: Settings,
        open_reader: OpenReader,
        times: Times,
        record_lookup: Callable[[str], None],
    ) -> None:
        """The settings route by a map in the catalogue. `record_lookup`: see `MapSource`."""
        name, catalogue = settings.catalogue_map, settings.catalogue
        check = partial(check_map, settings.shard_maps[name])
        self._restored = False
        self.state = MapState(name, times)
        self._lookups = LookupConnection(open_reader)
        self.source = MapSource(
            self.state,
            self._lookups,
            max_stale_seconds=None if catalogue.validate else catalogue.max_stale_seconds,
            record_lookup=record_lookup,
        )
        self._feed = Feed(
            self.state,
            open_reader,
            FeedSettings(catalogue.feed, catalogue.load == "eager", catalogue.poll_seconds),
            check,
        )
        file = catalogue.snapshot_file
        self._keeper = SnapshotKeeper(file, place_of(settings), self.state, check) if file else None

    async def run(self) -> None:
        """Follow the map until the task is cancelled, and save it then."""
        try:
            if self._keeper is not None:
                self._restored = await self._keeper.restore()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._lookups.run())
                tasks.create_task(self._feed.run())
                if self._keeper is not None:
                    tasks.create_task(self._keeper.run())
        finally:
            await self.source.close()
            if self._keeper is not None:
                await self._keeper.close()

    # -- for the server --------------------------------------------------------------------------

    async def first_try(self) -> ProxyError | None:
        """Wait for the first contact with the catalogue. Return its failure.

        Raises ProxyError for one that no time helps: the configuration does not fit the catalogue.
        """
        await self._feed.tried.wait()
        failure = self._feed.failure
        if failure is not None and failure.kind in FATAL_KINDS:
            raise failure.with_traceback(None)
        return failure

    async def wait_until_loaded(self) -> None:
        """Return when sessions can be served."""
        await self.state.loaded.wait()

    @property
    def is_loaded(self) -> bool:
        """Whether sessions can be served."""
        return self.state.loaded.is_set()

    @property
    def failure(self) -> ProxyError | None:
        """The reason why the catalogue cannot be followed now."""
        return self._feed.failure

    @property
    def feed_counts(self) -> FeedCounts:
        """The counts of the feed, for the metrics."""
        return self._feed.counts

    @property
    def age_seconds(self) -> float | None:
        """The time since the map was last known to be current, None before the first contact."""
        if not self._feed.has_succeeded:
            return None
        contact = self.state.contact
        if contact.feed_is_current:
            return 0.0
        return max(0.0, self.state.times.clock() - contact.answered_at)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call this for each change of mappings or shards, until what is returned is called."""
        return self.state.subscribe(subscriber)

    def status(self) -> MapStatus:
        """Return the map as it is now."""
        found, cache = self.state.map, self.state.cache
        return MapStatus(
            name=self.state.name,
            source="snapshot" if self._restored and not self._feed.has_succeeded else "catalogue",
            kind=None if found is None else found.spec.kind,
            key_type=None if found is None else found.spec.key_type,
            version=None if found is None else self.state.version,
            mappings=0 if cache is None else len(cache),
            shards=0 if cache is None else len(cache.shards),
            state=self._progress(),
            feed=self._feed.state,
            age_seconds=self.age_seconds,
        )

    def _progress(self) -> MapProgress:
        if not self.is_loaded:
            return MapProgress.LOADING
        contact = self.state.contact
        is_stale = contact.failed and not contact.feed_is_current
        return MapProgress.STALE if is_stale else MapProgress.READY
