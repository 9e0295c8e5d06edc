"""The route of a client where the shard map is in the catalogue.

For: the rules of keys and databases (`routing.router`), with the mappings that the catalogue has.
Not for: opening the session (`admitting_opener`), or keeping the map (`map_source`, `feed`).
"""

from typing import Protocol

from proxy.catalogue.admitting_opener import AdmittingOpener, OpenerParts
from proxy.catalogue.shard_upstreams import target_name
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.router import Route, Router
from proxy.routing.shard_map import MapKeys
from proxy.upstream.upstreams import SessionOpener
from proxy.wire.startup import StartupMessage


class KnownMap(Protocol):
    """Whether it is known which map the catalogue has."""

    @property
    def keys(self) -> MapKeys | None:
        """The reader of the map's keys; None while their type is not known."""

    async def wait_for_keys(self, seconds: float) -> MapKeys:
        """Return it when it is known. Raises ProxyError after this time."""


class CatalogueRouter:
    """Routes the sessions of one configuration by a map in the catalogue."""

    def __init__(self, router: Router, known: KnownMap, parts: OpenerParts) -> None:
        """`router` has no map of its own."""
        self._router = router
        self._known = known
        self._parts = parts

    async def route(self, startup: StartupMessage) -> tuple[Route, SessionOpener | None]:
        """Return where a client's session goes, and what opens it; None: the route's target.

        A map that is not loaded, and a catalogue that cannot be reached, are waited for as long as
        a dial may take.

        Raises RouteReplaced, and ProxyError as `Router.take_key` and `MapSource.find` do.
        """
        with self._parts.replaceable():
            async with self._parts.parking.routing():
                return await self._route(startup)

    async def _route(self, startup: StartupMessage) -> tuple[Route, SessionOpener | None]:
        parts, seconds = self._parts, self._parts.connect_timeout_seconds
        deadline = parts.clock() + seconds
        keys = self._known.keys or await self._known.wait_for_keys(seconds)
        key, message = self._router.take_key(startup, keys)
        if not key:
            return self._router.route_by_database(message), None
        routing_key = keys.routing_key(key)
        try:
            located = await parts.source.find(routing_key, deadline=deadline)
        except ProxyError as error:
            if error.kind is ErrorKind.MAPPING_NOT_FOUND:
                raise self._router.not_found(key) from None
            raise
        name = target_name(parts.map_name, located.shard)
        route = self._router.route_by_key(message, key, keys, name)
        return route, AdmittingOpener(parts, located, routing_key)
