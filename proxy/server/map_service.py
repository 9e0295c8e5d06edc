"""A catalogue's map as the sessions of a process see it, whichever process keeps it.

`catalogue_service` keeps one; a worker asks the supervisor for what it has.
"""

from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import UUID

from proxy.catalogue.admitting_opener import MapSource
from proxy.catalogue.map_state import Change
from proxy.catalogue.model import Located
from proxy.routing.shard_map import MapKeys


class MapService(Protocol):
    """The map, and what is told of its changes."""

    @property
    def name(self) -> str:
        """The map's name."""

    @property
    def source(self) -> MapSource:
        """The source of mappings."""

    @property
    def keys(self) -> MapKeys | None:
        """The reader of the map's keys; None while their type is not known."""

    @property
    def loaded(self) -> bool:
        """Whether sessions can be routed."""

    async def wait_for_keys(self, seconds: float) -> MapKeys:
        """Return it when the map is loaded. Raises ProxyError after this time."""

    async def locate(self, map_id: UUID, routing_keys: Sequence[bytes]) -> Sequence[Located | None]:
        """Return where live sessions' keys are now. Raises ProxyError if that is not known."""

    async def host(self) -> str:
        """Return the host of the catalogue. Raises ProxyError."""

    def shard_ids(self) -> frozenset[UUID] | None:
        """Return the shards of the map, None if not all are known."""

    def subscribe(self, subscriber: Callable[[Change], None]) -> Callable[[], None]:
        """Call this for each change, until what is returned is called."""
