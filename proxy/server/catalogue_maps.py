"""The catalogue's map of a running proxy: started, told to the sessions, exchanged by a reload.

For: which service is in force, its task, and who hears of its changes. Not for: the map itself
(`catalogue_service`).

Invariant: a proxy without a map in a catalogue opens no port and starts no task for it.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final
from uuid import UUID

from proxy.catalogue.map_state import EVERYTHING, Change
from proxy.catalogue.model import Located
from proxy.catalogue.parking import Parking
from proxy.config import Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.observe.status import CatalogueFacts, ShardMapStatus
from proxy.server.catalogue_service import CatalogueService, key_of
from proxy.server.map_service import MapService
from proxy.server.snapshot import CatalogueWiring, ConfigSnapshot
from proxy.session.cancel import CancelForwarder, CancelKeys
from proxy.session.mapped_sessions import MappedSessions
from proxy.session.private_listener import PrivateListener
from proxy.upstream.upstreams import Upstreams

# A reload that brings another catalogue or map waits this long for it, then fails.
LOAD_SECONDS_MAX: Final = 60.0
# Before a task of ours that failed by a bug runs again.
_RESTART_SECONDS: Final = 5.0

_log = get_logger(__name__)


def proxy_name() -> str:
    """Return this process's name in the registry of the shards: host and process id."""
    return f"{socket.gethostname()[:63]}/{os.getpid()}"


class CatalogueMaps:
    """The map in force, if it is in a catalogue."""

    def __init__(
        self,
        metrics: Metrics,
        cancel_keys: CancelKeys,
        cancels: CancelForwarder,
        share_parked: Callable[[int], int],
        elsewhere: Callable[[Settings, Metrics], MapService] | None = None,
    ) -> None:
        """`elsewhere` returns the map that another process keeps, in a worker.

        `share_parked`: see `Parking`.
        """
        self._share_parked = share_parked
        self._metrics = metrics
        self._listener = PrivateListener(cancel_keys, cancels)
        self._elsewhere = elsewhere
        self.mapped_sessions = MappedSessions(self._locate, self._refresh)
        self._parking: Parking | None = None
        self._snapshot: ConfigSnapshot | None = None
        self._service: MapService | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._subscribers: list[Callable[[Change], None]] = []
        self._stack: AsyncExitStack | None = None
        self._listening = False
        self._tasks: dict[object, asyncio.Task[None]] = {}

    def find(self, settings: Settings, upstreams: Upstreams) -> tuple[MapService, CatalogueWiring]:
        """Return the map of these settings: the one in force, or one that is not running yet."""
        catalogue = settings.catalogue
        if self._parking is None:
            self._parking = Parking(0, 0.0, self._metrics.shard_maps, self._share_parked)
        wiring = CatalogueWiring(
            self._parking, self._metrics.shard_maps, proxy_name(), lambda: self._service
        )
        if self._elsewhere is not None:
            return self._elsewhere(settings, self._metrics), wiring
        present = self._service
        if isinstance(present, CatalogueService) and present.key == key_of(settings):
            return present, wiring
        target = upstreams[catalogue.target].unpooled()
        return CatalogueService(settings, target, self._listener.connect, self._metrics), wiring

    @property
    def service(self) -> MapService | None:
        """The map in force."""
        return self._service

    def subscribe(self, subscriber: Callable[[Change], None]) -> None:
        """Call this for each change of the map in force, whichever that is, from now on."""
        self._subscribers.append(subscriber)

    def shard_names(self) -> list[str]:
        """Return the names of the shards that are known here."""
        service = self._service
        return service.shard_names() if isinstance(service, CatalogueService) else []

    # -- running ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the map in force current while the block runs."""
        async with AsyncExitStack() as stack:
            self._stack = stack
            try:
                if isinstance(self._service, CatalogueService):
                    await self.start(self._service)
                self._follow_sessions()
                yield
            finally:
                self._stack = None
                await self._stop(*self._tasks)
                self.mapped_sessions.close()

    async def start(self, service: CatalogueService) -> None:
        """Start a map, unless it runs. Raises OSError if there is no port for its driver."""
        if self._stack is None or service in self._tasks:
            return
        if not self._listening:
            self._listening = True
            await self._stack.enter_async_context(self._listener)
        self._spawn(service, service.run)

    async def load(self, service: MapService | None) -> None:
        """Start the map of a configuration that is to be in force, and wait until it is loaded.

        Raises ConfigurationError; the map is stopped then.
        """
        if not isinstance(service, CatalogueService) or service in self._tasks:
            return
        await self.start(service)
        try:
            await service.wait_loaded(LOAD_SECONDS_MAX)
        except BaseException:
            await self._stop(service)
            raise

    def use(self, snapshot: ConfigSnapshot) -> None:
        """Serve by this configuration's map from now on."""
        settings, service = snapshot.settings, snapshot.map_service
        self._snapshot = snapshot
        if self._parking is not None:
            self._parking.park_max = settings.park_max
            self._parking.seconds_max = settings.catalogue.park_timeout_seconds
        if service is self._service:
            return
        before, self._service = self._service, service
        if self._parking is not None:
            self._parking.exchanged()
        self._unsubscribe()
        self._unsubscribe = lambda: None
        if before in self._tasks:
            self._tasks.pop(before).cancel()
        if service is not None:
            self._unsubscribe = service.subscribe(self._changed)
            self._follow_sessions()
            if before is not None and isinstance(service, CatalogueService):
                self._changed(EVERYTHING)  # the one before may not have heard of all changes

    async def first_outcome(self) -> None:
        """Return when the catalogue has been asked once. Raises ConfigurationError, as it does."""
        if isinstance(self._service, CatalogueService):
            await self._service.first_outcome()

    # -- what operators see ----------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether sessions can be routed, as far as it depends on a catalogue."""
        return self._service is None or self._service.loaded

    def status(self) -> ShardMapStatus | None:
        """Return the state of the map that this process keeps, if it keeps one."""
        if not isinstance(self._service, CatalogueService):
            return None
        return self._service.status(0 if self._parking is None else len(self._parking))

    def look_up(self, key: str) -> Mapping[str, object]:
        """Return where a key leads, as far as it is known. Raises ProxyError."""
        if not isinstance(self._service, CatalogueService):
            raise ProxyError(ErrorKind.MAP_MISSING, "the proxy routes by no map in a catalogue")
        return self._service.look_up(key)

    def facts(self) -> CatalogueFacts:
        """Return what else metrics show of it."""
        service = self._service
        return service.facts() if isinstance(service, CatalogueService) else CatalogueFacts()

    # -- inside ----------------------------------------------------------------------------------

    async def _locate(
        self, map_id: UUID, routing_keys: Sequence[bytes]
    ) -> Sequence[Located | None]:
        if self._service is None:
            raise ProxyError(ErrorKind.MAP_MISSING)
        return await self._service.locate(map_id, routing_keys)

    async def _refresh(self, map_id: UUID, routing_key: bytes) -> None:
        """Ask the catalogue where a key is, unless it is known to have no mapping."""
        (known,) = await self._locate(map_id, [routing_key])
        if known is None or self._service is None:
            return
        try:
            await self._service.source.refresh(routing_key, known)
        except ProxyError as error:
            if error.kind is not ErrorKind.MAPPING_NOT_FOUND:
                raise

    def _changed(self, change: Change) -> None:
        """Notify clients and sessions of a change; close the upstreams of shards that are gone."""
        for subscriber in self._subscribers:
            subscriber(change)
        if self._parking is not None:
            self._parking.changed(change.mapping_ids, change.shard_ids)
        if change.mapping_ids is None or change.mapping_ids:
            self.mapped_sessions.changed(change.mapping_ids)
        snapshot = self._snapshot
        is_shards = bool(change.shard_ids) or change.mapping_ids is None
        if is_shards and snapshot is not None and snapshot.shards is not None:
            service = snapshot.map_service
            shard_ids = None if service is None else service.shard_ids()
            if shard_ids is not None:
                snapshot.shards.keep_only(shard_ids)

    def _follow_sessions(self) -> None:
        """Compare live sessions with the map from now on, if there is one."""
        is_running = self._stack is not None and self._service is not None
        if is_running and self.mapped_sessions not in self._tasks:
            self._spawn(self.mapped_sessions, self.mapped_sessions.run)

    def _spawn(self, of: object, run: Callable[[], Awaitable[None]]) -> None:
        self._tasks[of] = asyncio.get_running_loop().create_task(_again_and_again(run))

    async def _stop(self, *services: object) -> None:
        tasks = [self._tasks.pop(service) for service in services]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def _again_and_again(run: Callable[[], Awaitable[None]]) -> None:
    """Run until cancelled; again after a failure, which is a bug."""
    while True:
        try:
            await run()
        except Exception:
            _log.exception("the shard map's task failed")
        await asyncio.sleep(_RESTART_SECONDS)
