"""An operator's connections to shards: one for each shard of its operation, kept between steps.

For: an operation whose time is its statements, and not its logins. Not for: the connection to the
catalogue (`held_connection`), which has the operation's lock.

Invariant: a connection on which anything has failed is closed, and is used by no later step.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from uuid import UUID

from proxy.catalogue.errors import driver_errors
from proxy.catalogue.model import Connection, Shard
from proxy.catalogue.operation import Databases
from proxy.errors import ProxyError

_Key = tuple[UUID, str, str, str, str]


class KeptConnections:
    """Opens connections as `Databases` does, and keeps one for each shard of `keep_only`."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self._kept: dict[_Key, tuple[AsyncExitStack, Connection]] = {}
        self._wanted: frozenset[_Key] = frozenset()

    def catalogue(self) -> AbstractAsyncContextManager[Connection]:
        """Connect to the catalogue."""
        return self._databases.catalogue()

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Connection]:
        """Yield the kept connection to a shard; a new one while it is in use, or was lost."""
        key = _key(shard)
        stack, connection = self._kept.pop(key, (AsyncExitStack(), None))
        async with stack:
            if connection is not None and connection.is_closed():
                await _close(stack)
                connection = None
            if connection is None:
                connection = await stack.enter_async_context(self._databases.shard(shard))
            yield connection
            if key in self._wanted and key not in self._kept:
                self._kept[key] = stack.pop_all(), connection

    async def keep_only(self, shards: Iterable[Shard]) -> None:
        """Close the connections to all other shards, and keep none from here on."""
        self._wanted = frozenset(_key(shard) for shard in shards)
        for key in self._kept.keys() - self._wanted:
            stack, _ = self._kept.pop(key)
            await _close(stack)


def _key(shard: Shard) -> _Key:
    """Return all that says how the shard is reached, and as whom."""
    return shard.shard_id, shard.location, shard.endpoint, shard.instance, shard.workspace


async def _close(stack: AsyncExitStack) -> None:
    with suppress(*driver_errors(ProxyError)):
        await stack.aclose()
