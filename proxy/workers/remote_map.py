"""A worker's side of a map in a catalogue: it asks the supervisor, which alone has the map.

For: the `MapService` of a worker. Not for: the answers (`map_answers`), or what sessions do.

Invariant: a worker keeps no mapping, but what its live sessions have. A key costs one call on the
machine; the supervisor hears of a change first, and tells every worker.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from proxy.catalogue.map_state import Change, Subscriber
from proxy.catalogue.model import Located
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.routing.shard_map import MapKeys
from proxy.workers.map_messages import located_as_dict, located_from_dict, spec_from_list
from proxy.workers.rpc import RpcConnection, RpcConnectionLost


class RemoteSource:
    """Finds mappings by asking the supervisor: a `MapSource` of the sessions."""

    def __init__(self, owner: "RemoteMap") -> None:
        self._owner = owner

    async def find(self, routing_key: bytes, *, deadline: float | None = None) -> Located:
        """Return where a key is. Raises ProxyError."""
        now = asyncio.get_running_loop().time()
        seconds = None if deadline is None else max(0.0, deadline - now)
        return await self._owner.ask("map_find", routing_key, seconds=seconds)

    async def refresh(self, routing_key: bytes, stale: Located) -> Located:
        """Return where a key is now, by the catalogue. Raises ProxyError."""
        return await self._owner.ask("map_refresh", routing_key, stale=located_as_dict(stale))

    async def dial_failed(self, routing_key: bytes, located: Located) -> Located:
        """Return where a key is after its shard could not be reached. Raises ProxyError."""
        return await self._owner.ask(
            "map_dial_failed", routing_key, located=located_as_dict(located)
        )

    def dial_succeeded(self, located: Located) -> None:
        """Report that the shard of a mapping was reached."""
        self._owner.dial_succeeded(located)


class RemoteMap:
    """The supervisor's map, as a worker's sessions see it."""

    def __init__(self, name: str, rpc: RpcConnection, metrics: Metrics) -> None:
        self.name = name
        self.source = RemoteSource(self)
        self._rpc = rpc
        self._metrics = metrics
        self._keys: MapKeys | None = None
        self._shard_names: set[str] = set()
        self._unreachable: set[UUID] = set()  # mappings whose back-off a success would end
        self._subscribers: list[Subscriber] = []

    @property
    def keys(self) -> MapKeys | None:
        """The reader of the map's keys; None while it is not known."""
        return self._keys

    @property
    def loaded(self) -> bool:
        """Whether sessions can be routed. The supervisor accepts, and says whether it is ready."""
        return True

    async def wait_for_keys(self, seconds: float) -> MapKeys:
        """Return it when the supervisor has loaded the map. Raises ProxyError after this time."""
        answer = await self._call("map_keys", seconds=seconds)
        self._keys = MapKeys(spec_from_list(answer["spec"]))
        self._know(answer["shards"])
        return self._keys

    async def locate(self, map_id: UUID, routing_keys: Sequence[bytes]) -> Sequence[Located | None]:
        """Return where live sessions' keys are now. Raises ProxyError if that is not known."""
        hexed = [key.hex() for key in routing_keys]
        found = await self._call("map_locate", map_id=map_id.hex, routing_keys=hexed)
        return [None if one is None else located_from_dict(one) for one in found]

    async def host(self) -> str:
        """Return the host of the catalogue. Raises ProxyError."""
        return str(await self._call("map_host"))

    def shard_ids(self) -> frozenset[UUID] | None:
        """Return None: the worker does not know which shards there are."""
        return None

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call this for each change, until what is returned is called."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    # -- what the supervisor tells, and what it is asked -----------------------------------------

    def changed(self, change: Change) -> None:
        """Notify the sessions of a change."""
        if change.mapping_ids is None:
            self._keys = None  # it may be another map of the same name
        for subscriber in tuple(self._subscribers):
            subscriber(change)

    async def ask(self, name: str, routing_key: bytes, **arguments: object) -> Located:
        """Return where a key is, as one of the supervisor's answers. Raises ProxyError."""
        answer = await self._call(name, routing_key=routing_key.hex(), **arguments)
        located = located_from_dict(answer)
        if name == "map_dial_failed":
            self._unreachable.add(located.mapping.mapping_id)
        self._know([located.shard.name])
        return located

    def dial_succeeded(self, located: Located) -> None:
        """Report that the shard of a mapping was reached, if it was not before."""
        if located.mapping.mapping_id in self._unreachable:
            self._unreachable.discard(located.mapping.mapping_id)
            located_dict = located_as_dict(located)
            self._rpc.notify("map_dial_succeeded", map_name=self.name, located=located_dict)

    def _know(self, shard_names: Sequence[str]) -> None:
        """Count by these shards, too."""
        if not self._shard_names.issuperset(shard_names):
            self._shard_names.update(shard_names)
            names = sorted(f"{self.name}/{name}" for name in self._shard_names)
            self._metrics.configure_shards(self.name, 0, names)

    async def _call(self, name: str, **arguments: object) -> Any:
        try:
            return await self._rpc.call(name, map_name=self.name, **arguments)
        except RpcConnectionLost:
            raise ProxyError(ErrorKind.SHUTTING_DOWN) from None
