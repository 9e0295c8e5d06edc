"""The supervisor's side of a map in a catalogue: what workers ask of it, and are told.

For: answering from the map in force, and passing on its changes. Not for: keeping the map
(`server.catalogue_maps`).

Invariants: an answer is of the map that the worker names, or a refusal. A worker that was told
where a key is can have the token of its shard.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from proxy.catalogue.map_state import Change
from proxy.catalogue.model import Located
from proxy.errors import ErrorKind, ProxyError
from proxy.server.app import App
from proxy.server.map_service import MapService
from proxy.workers.map_messages import (
    Message,
    change_as_dict,
    located_as_dict,
    located_from_dict,
    spec_as_list,
)
from proxy.workers.rpc import Methods


class MapAnswers:
    """Answers by the map of the App; `tell` sends a message to every worker."""

    def __init__(self, app: App, tell: Callable[[Message], None]) -> None:
        self._app = app
        self._tell = tell
        app.catalogue.subscribe(self._changed)

    @property
    def methods(self) -> Methods:
        """The methods that a worker may call, by name."""
        return {
            "map_keys": self._keys,
            "map_find": self._find,
            "map_refresh": self._refresh,
            "map_dial_failed": self._dial_failed,
            "map_dial_succeeded": self._dial_succeeded,
            "map_locate": self._locate,
            "map_host": self._host,
        }

    def _changed(self, change: Change) -> None:
        self._tell(change_as_dict(change))

    def _map(self, name: str) -> MapService:
        """Return the map in force. Raises ProxyError if a reload has exchanged it."""
        found = self._app.catalogue.service
        if found is None or found.name != name:
            raise ProxyError(ErrorKind.MAPPING_STALE, "the configuration has changed meanwhile")
        return found

    async def _keys(self, map_name: str, seconds: float) -> Message:
        keys = await self._map(map_name).wait_for_keys(seconds)
        return {"spec": spec_as_list(keys.spec), "shards": self._app.catalogue.shard_names()}

    async def _find(self, map_name: str, routing_key: str, seconds: float | None) -> Message:
        now = asyncio.get_running_loop().time()
        deadline = None if seconds is None else now + seconds
        key = bytes.fromhex(routing_key)
        return await self._told(self._map(map_name).source.find(key, deadline=deadline))

    async def _refresh(self, map_name: str, routing_key: str, stale: Message) -> Message:
        source = self._map(map_name).source
        return await self._told(
            source.refresh(bytes.fromhex(routing_key), located_from_dict(stale))
        )

    async def _dial_failed(self, map_name: str, routing_key: str, located: Message) -> Message:
        source = self._map(map_name).source
        return await self._told(
            source.dial_failed(bytes.fromhex(routing_key), located_from_dict(located))
        )

    async def _dial_succeeded(self, map_name: str, located: Message) -> None:
        with suppress(ProxyError):
            self._map(map_name).source.dial_succeeded(located_from_dict(located))

    async def _locate(
        self, map_name: str, map_id: str, routing_keys: Sequence[str]
    ) -> list[Message | None]:
        keys = [bytes.fromhex(key) for key in routing_keys]
        found = await self._map(map_name).locate(UUID(map_id), keys)
        return [None if one is None else located_as_dict(one) for one in found]

    async def _host(self, map_name: str) -> str:
        return await self._map(map_name).host()

    async def _told(self, answer: Awaitable[Located]) -> dict[str, Any]:
        """Return an answer as a message. Have the shard's credentials ready for the worker."""
        located = await answer
        shards = self._app.snapshot.shards
        if shards is not None:
            with suppress(ProxyError):  # the worker refuses it for the same reason
                await shards.of(located.shard)
        return located_as_dict(located)
