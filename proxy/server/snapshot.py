"""A snapshot of the configuration: the router and the upstreams that it gives to sessions.

For: one object that a reload replaces as a whole, so that a session sees either the old
configuration or the new one. Not for: deciding; the router does, and the upstreams dial.

Invariant: a snapshot never changes. A session keeps the route and the upstream that it was given.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from proxy.blocking import BlockingCalls
from proxy.catalogue.admitting_opener import OpenerParts, OpenMetrics
from proxy.catalogue.catalogue_router import CatalogueRouter
from proxy.catalogue.parking import Parking
from proxy.catalogue.shard_upstreams import ShardUpstreams
from proxy.config import Files, Settings
from proxy.errors import ProxyError
from proxy.native import Acceleration, acceleration
from proxy.observe.status import ShardMapStatus, Token, WorkspaceApi
from proxy.routing.router import Route, Router
from proxy.server.map_service import MapService
from proxy.server.router_factory import rewritten_file, router_of
from proxy.upstream.phases import RecordTargetPhase
from proxy.upstream.upstreams import MakePool, SessionOpener, SessionPool, Upstreams
from proxy.wire.startup import StartupMessage
from proxy.workspace import sdk_import
from proxy.workspace.registry import TokenAccount, WorkspaceRegistry


@dataclass(frozen=True, slots=True)
class CatalogueWiring:
    """What sessions of a catalogue's map use of this process; `proxy` is its name in shards."""

    parking: Parking
    metrics: OpenMetrics
    proxy: str
    map_in_force: Callable[[], MapService | None]


FindMap = Callable[[Settings, Upstreams], tuple[MapService, CatalogueWiring]]
"""Returns the map of these settings, which may be running already."""

# Importing databricks-sdk takes some tenths of a second, on a small part of a core some seconds.
LOAD_SECONDS_MAX: Final = 60.0


class ConfigSnapshot:
    """Settings, and what is made of them for sessions."""

    def __init__(
        self,
        settings: Settings,
        workspaces: WorkspaceRegistry,
        record_phase: RecordTargetPhase,
        before: "ConfigSnapshot | None" = None,
        router: Router | None = None,
        *,
        find_map: FindMap | None = None,
        make_pool: MakePool | None = None,
    ) -> None:
        """`before` is the snapshot that this one replaces.

        `router` is that of these settings, if it was made already: that of a large map takes
        seconds, and is made in a thread. `find_map` returns the map of a catalogue; without it,
        sessions with a key of such a map are refused. Without `make_pool` no target pools.

        Raises ConfigurationError for files that settings name and that cannot be used.
        """
        self.settings = settings
        self.files = Files.of(settings)  # before they are read, so that a later write is noticed
        self.router = router or router_of(settings)
        self.upstreams: Upstreams = Upstreams(
            settings,
            workspaces,
            record_phase,
            before.upstreams if before else None,
            make_pool=make_pool,
        )
        self.map_service: MapService | None = None
        self.shards: ShardUpstreams | None = None
        self._catalogue_router: CatalogueRouter | None = None
        if settings.catalogue_map and find_map is not None:
            self._use_catalogue(find_map, before)

    def _use_catalogue(self, find_map: FindMap, before: "ConfigSnapshot | None") -> None:
        service, wiring = find_map(self.settings, self.upstreams)
        self.map_service = service
        self.shards = ShardUpstreams(
            self.settings,
            self.upstreams.factory,
            self.upstreams.resources(),
            service.host,
            None if before is None else before.shards,
        )
        parts = OpenerParts(
            self.settings.catalogue_map,
            service.source,
            self.shards,
            wiring.parking,
            wiring.metrics,
            wiring.proxy,
            self.settings.catalogue.validate,
            self.settings.upstream.connect_timeout_seconds,
            asyncio.get_running_loop().time,
            lambda: wiring.map_in_force() is service,
        )
        self._catalogue_router = CatalogueRouter(self.router, service, parts)

    def close(self) -> None:
        """Close the upstreams that no other configuration and no dial uses."""
        self.upstreams.close()
        if self.shards is not None:
            self.shards.close()

    async def route(self, startup: StartupMessage) -> tuple[Route, SessionOpener]:
        """Return where a client's session goes. Raises ProxyError for one without a target.

        A static map answers at once. Raises RouteReplaced if a reload has exchanged the map.
        """
        if self._catalogue_router is not None:
            route, opener = await self._catalogue_router.route(startup)
            return route, opener or self.upstreams[route.target]
        route = self.router.route(startup)
        return route, self.upstreams[route.target]

    def rewritten(self, later: "ConfigSnapshot") -> Iterator[str]:
        """Yield the keys whose file is the same in a later snapshot, and has other contents."""
        yield from self.files.rewritten(later.files)
        if self.settings.routing.shard_map == later.settings.routing.shard_map:
            file = rewritten_file(later.settings, self.router.shard_map, later.router.shard_map)
            if file is not None:
                yield file

    @property
    def map_facts(self) -> Mapping[str, object]:
        """The log fields that identify the shard map in use."""
        shard_map = self.router.shard_map
        if shard_map is None:
            return {}
        name = self.settings.routing.shard_map
        return {"shard_map": name, "mappings": len(shard_map), "map_digest": shard_map.digest}

    def static_map_status(self) -> ShardMapStatus | None:
        """Return the state of a static map, None without one."""
        shard_map = self.router.shard_map
        if shard_map is None:
            return None
        spec = shard_map.spec
        return ShardMapStatus(
            name=self.settings.routing.shard_map,
            source="static",
            kind=spec.kind,
            key_type=spec.key_type,
            mappings=len(shard_map),
            shards=len(shard_map.targets()),
            state="ready",
        )

    @property
    def acceleration(self) -> Acceleration:
        """Whether new sessions use the compiled relay."""
        return acceleration(upstream.settings.accelerated for upstream in self.upstreams.values())

    async def load_sdk(self) -> None:
        """Import databricks-sdk in a thread, if an upstream needs a workspace.

        Raises ImportError if it cannot be used, and TimeoutError.
        """
        if any(upstream.resource is not None for upstream in self.upstreams.values()):
            await BlockingCalls("databricks-sdk").run(sdk_import.load, LOAD_SECONDS_MAX)

    @property
    def pools(self) -> list[SessionPool]:
        """The pools of its targets and shards."""
        shards = [] if self.shards is None else [upstream for _, upstream in self.shards]
        found = [*self.upstreams.values(), *shards]
        return [upstream.pool for upstream in found if upstream.pool is not None]

    def hosts(self) -> Mapping[str, str]:
        """Return each target's host, empty while it is not known."""
        named = [*self.upstreams.items(), *(self.shards or ())]
        return {name: upstream.address_lookup.host for name, upstream in named}

    def roles(self) -> Sequence[str]:
        """Return the roles that sessions log in as, so far as they are known, each once."""
        lookups = [upstream.address_lookup for upstream in self.upstreams.values()]
        return list(dict.fromkeys(each.role for each in lookups if each.role))

    @property
    def accounts(self) -> Sequence[TokenAccount]:
        """The accounts in use, each once; those that only shards have come last."""
        of_shards = () if self.shards is None else self.shards.accounts
        return list(dict.fromkeys((*self.upstreams.accounts, *of_shards)))

    def accounts_without_token(self) -> Sequence[TokenAccount]:
        """Return the accounts that have no token, valid or not."""
        return [one for one in self.upstreams.accounts if one.token_source.newest is None]

    def workspace_apis(self) -> Sequence[WorkspaceApi]:
        """Return whether credentials can be had: for each account, and from the password file."""
        of_shards = () if self.shards is None else self.shards.accounts
        outages = [*self.upstreams.outages, *(one.outage for one in of_shards if one.outage)]
        return [
            WorkspaceApi(
                outage.name,
                outage.since,
                outage.failing_seconds,
                outage.failure.reason if outage.failure else "",
            )
            for outage in dict.fromkeys(outages)
        ]

    async def read_password(self) -> None:
        """Read the password file, so that its outage is known without a client in this process."""
        if self.upstreams.password_file is not None:
            with suppress(ProxyError):  # it is recorded
                await self.upstreams.password_file.fresh()

    def tokens(self) -> Sequence[Token]:
        """Return the times of each account's newest token."""
        now = time.time()
        return [
            Token(
                account.name,
                now - newest.requested_at,
                newest.expires_at - now,
                account.token_source.accepted_age_seconds,
            )
            for account in self.accounts
            if (newest := account.token_source.newest) is not None
        ]
