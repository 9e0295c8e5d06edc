"""The shard map in the catalogue, as the process that keeps it serves it to sessions.

For: connecting the map that is followed (`catalogue.followed_map`) with its upstream, the metrics
and `/status`. Not for: which map is in force (`catalogue_maps`), or routing (`snapshot`).

Invariant: a service serves one map of one catalogue with the same settings for its whole life. A
reload keeps it, or exchanges it for another that is loaded.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from proxy.catalogue.admitting_opener import MapSource
from proxy.catalogue.bounds import given_key, lookup_facts
from proxy.catalogue.catalogue_reader import open_reader
from proxy.catalogue.followed_map import FollowedMap
from proxy.catalogue.map_state import Change, Subscriber, Times
from proxy.catalogue.model import Connect, Located
from proxy.config import ConfigurationError, Problem, Settings, UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.observe.shard_map_metrics import MAPPING_CHANGED, RELOADED, SHARD_CHANGED
from proxy.observe.status import CatalogueFacts, ShardMapStatus
from proxy.routing.router import mapping_not_found
from proxy.routing.shard_map import MapKeys
from proxy.upstream.upstreams import Upstream

# Settings of [catalogue] that are not the map's: another value needs no other service.
_OF_SESSIONS: Final = frozenset(
    ("park_timeout_seconds", "park_max", "shard_hosts", "shard_hostaddr", "allow_unvalidated")
)

ServiceKey = tuple[str, tuple[tuple[str, object], ...], UpstreamSettings]


def key_of(settings: Settings) -> ServiceKey:
    """Return what a service depends on: with the same, a reload keeps it."""
    catalogue = settings.catalogue
    values = tuple((name, value) for name, value in catalogue if name not in _OF_SESSIONS)
    shard_map = settings.shard_maps[settings.catalogue_map]
    spec = ("spec", (shard_map.kind, shard_map.key_type, shard_map.normalise))
    return settings.catalogue_map, (*values, spec), settings.target(catalogue.target)


class CatalogueService:
    """The map of one configuration; `run` keeps it current."""

    def __init__(
        self, settings: Settings, upstream: Upstream, connect: Connect, metrics: Metrics
    ) -> None:
        """`upstream` is the catalogue's; `connect` opens connections through it."""
        self.key = key_of(settings)
        self.name = settings.catalogue_map
        self._upstream = upstream
        self._metrics = metrics
        self._validate = settings.catalogue.validate
        self._is_eager = settings.catalogue.load == "eager"
        self._followed = FollowedMap(
            settings,
            open_reader(connect, upstream, metrics.shard_maps.queried),
            Times(asyncio.get_running_loop().time, random.random, asyncio.sleep),
            self._record_lookup,
        )
        self._keys: MapKeys | None = None
        self._gaps = 0
        self._followed.subscribe(self._count)

    # -- for sessions ----------------------------------------------------------------------------

    @property
    def source(self) -> MapSource:
        """The source of mappings."""
        return self._followed.source

    @property
    def keys(self) -> MapKeys | None:
        """The reader of the map's keys; None while their type is not known."""
        known = self._followed.state.map
        if known is None or not self._followed.is_loaded:
            return None
        if self._keys is None or self._keys.spec != known.spec:
            self._keys = MapKeys(known.spec)
        return self._keys

    async def wait_for_keys(self, seconds: float) -> MapKeys:
        """Return it when the map is loaded.

        Raises ProxyError after this time, or at once if the catalogue's credential is refused.
        """
        try:
            async with asyncio.timeout(seconds):
                failure = await self._followed.first_try()
                if failure is not None and failure.final and not self._followed.is_loaded:
                    raise failure.with_traceback(None)
                await self._followed.wait_until_loaded()
        except TimeoutError:
            raise self._unloaded() from None
        if (keys := self.keys) is None:
            raise ProxyError(ErrorKind.CATALOGUE_MAP_MISSING, self.name)
        return keys

    async def locate(self, map_id: UUID, routing_keys: Sequence[bytes]) -> Sequence[Located | None]:
        """Return where live sessions' keys are now. Raises ProxyError if that is not known."""
        known = self._followed.state.map
        if known is None or known.map_id != map_id:
            raise ProxyError(ErrorKind.CATALOGUE_MAP_MISSING, "a map of an earlier configuration")
        return [await self._locate(key) for key in routing_keys]

    def look_up(self, text: str) -> dict[str, object]:
        """Return where a key leads, as far as it is known; nothing is asked for it.

        Raises ProxyError: what a key is refused for, MAPPING_NOT_FOUND, CATALOGUE_UNREACHABLE.
        """
        if (keys := self.keys) is None:
            raise self._unloaded()
        key = given_key(keys, text)
        located = self._followed.source.peek(keys.routing_key(key))
        if located is None:
            raise mapping_not_found(self.name, key)
        return {"map": self.name, **lookup_facts(keys.spec, key, located)}

    async def host(self) -> str:
        """Return the host of the catalogue. Raises ProxyError."""
        return (await self._upstream.address_lookup.target()).host

    def shard_ids(self) -> frozenset[UUID] | None:
        """Return the shards of the map, None if not all are known."""
        cache = self._followed.state.cache
        return frozenset(cache.shards) if cache is not None and self._is_eager else None

    def shard_names(self) -> list[str]:
        """Return the names of the shards that are known."""
        cache = self._followed.state.cache
        return [] if cache is None else [shard.name for shard in cache.shards.values()]

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call this for each change, until what is returned is called."""
        return self._followed.subscribe(subscriber)

    # -- running ---------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether sessions can be routed: the map is loaded, or restored, or need not be."""
        return self._followed.is_loaded

    async def run(self) -> None:
        """Keep the map current, until cancelled."""
        with self._upstream.use:
            await self._followed.run()

    async def first_outcome(self) -> None:
        """Return when the catalogue has been asked once, whether it could be reached or not.

        Raises ConfigurationError if it answers that this map cannot be served.
        """
        try:
            await self._followed.first_try()
        except ProxyError as error:
            raise self._refusal(error) from None

    async def wait_loaded(self, seconds: float) -> None:
        """Return when the map is loaded. Raises ConfigurationError after this time."""
        try:
            async with asyncio.timeout(seconds):
                await self.first_outcome()
                await self._followed.wait_until_loaded()
        except TimeoutError:
            raise self._refusal(self._unloaded()) from None

    def _unloaded(self) -> ProxyError:
        failure = self._followed.failure
        if failure is not None:
            return failure.with_traceback(None)
        return ProxyError(ErrorKind.CATALOGUE_UNREACHABLE, "the map is not loaded yet")

    def _refusal(self, error: ProxyError) -> ConfigurationError:
        """Return a sentence for the person who starts the proxy."""
        hint = error.response().text(b"H")
        text = ". ".join(filter(None, (error.kind.value.message, error.detail, hint)))
        return ConfigurationError([Problem(f"shard_maps.{self.name}.catalogue", text)])

    # -- what operators see ----------------------------------------------------------------------

    def status(self, parked: int) -> ShardMapStatus:
        """Return what `/status` shows."""
        now = self._followed.status()
        return ShardMapStatus(
            name=now.name,
            source=now.source,
            kind=now.kind or "",
            key_type=now.key_type or "",
            version=now.version,
            mappings=now.mappings,
            shards=now.shards,
            state=now.state,
            feed=now.feed,
            age_seconds=None if now.age_seconds is None else round(now.age_seconds, 3),
            validate=self._validate,
            parked=parked,
        )

    def facts(self) -> CatalogueFacts:
        """Return what else metrics show."""
        cache = self._followed.state.cache
        operations = 0 if cache is None else len(cache.operations())
        return CatalogueFacts(operations, self._followed.source.backoff_seconds)

    # -- inside ----------------------------------------------------------------------------------

    async def _locate(self, routing_key: bytes) -> Located | None:
        source = self._followed.source
        try:
            return source.peek(routing_key) or await source.find(routing_key)
        except ProxyError as error:
            if error.kind is ErrorKind.MAPPING_NOT_FOUND:
                return None
            raise

    def _record_lookup(self, result: str) -> None:
        self._metrics.key_looked_up(self.name, result)

    def _count(self, change: Change) -> None:
        """Count a change, and the shards that there are now."""
        counts, cache = self._metrics.shard_maps, self._followed.state.cache
        if change.mapping_ids is None:
            counts.changed(self.name, RELOADED)
        elif change.mapping_ids:
            counts.changed(self.name, MAPPING_CHANGED, len(change.mapping_ids))
        if change.shard_ids:
            counts.changed(self.name, SHARD_CHANGED, len(change.shard_ids))
        gaps = self._followed.feed_counts.gaps
        counts.feed_had_gaps(gaps - self._gaps)
        self._gaps = gaps
        names = None
        if cache is not None and (change.mapping_ids is None or change.shard_ids):
            names = sorted(f"{self.name}/{shard.name}" for shard in cache.shards.values())
        self._metrics.configure_shards(self.name, 0 if cache is None else len(cache), names)
