"""What a proxy reads of the catalogue, over one connection.

For: the few questions of `map_source` and `feed`, with the errors that clients get. Not for: verbs,
which read by `store`.

Invariant: what leaves here is a value or a ProxyError, and every question has an end.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final, Protocol
from uuid import UUID

from proxy.catalogue import store
from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.model import CatalogueMap, Connect, Connection, Located, Mapping, Shard
from proxy.catalogue.packed_rows import (
    CHUNK_ROWS_MAX,
    READ_FIRST_CHUNK,
    READ_NEXT_CHUNK,
    RowChunk,
)
from proxy.catalogue.transactions import transaction
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.upstreams import SessionOpener

CHANNEL: Final = "shardmap"
# One question; a chunk of a large map on a busy database takes some tenths of a second.
QUERY_SECONDS_MAX: Final = 30.0
# Ids in one question.
IDS_MAX: Final = 1000

_WHERE: Final = "the catalogue"
_KINDS: Final = {
    Reason.STORE_VERSION.value.word: ErrorKind.STORE_VERSION,
    Reason.STORE_MISSING.value.word: ErrorKind.CATALOGUE_REFUSED,
    Reason.RIGHTS_MISSING.value.word: ErrorKind.CATALOGUE_REFUSED,
}

RecordQuery = Callable[[str], None]
"""Counts a question by its purpose: a word of QUERY_PURPOSES."""

QUERY_PURPOSES: Final = ("map", "version", "load", "lookup", "refresh", "changes")


class CatalogueReader(Protocol):
    """One connection's questions. Every method raises ProxyError."""

    async def read_map(self, name: str) -> CatalogueMap | None:
        """Return the map of this name, after a check of the store's version."""

    async def version(self, map_id: UUID) -> int | None:
        """Return the version of a map, None if it is not there any more."""

    async def locate(self, map_id: UUID, routing_key: bytes, purpose: str) -> Located | None:
        """Return the mapping that covers a routing key, with its shard, in one query."""

    async def mappings(self, ids: Iterable[UUID]) -> list[Mapping]:
        """Return those of these mappings that exist."""

    async def shards(self, map_id: UUID) -> list[Shard]:
        """Return all shards of a map."""

    def snapshot(self) -> AbstractAsyncContextManager[None]:
        """Read everything in the block as of one moment."""

    def chunks(self, map_id: UUID) -> AsyncIterator[RowChunk]:
        """Yield all rows of a map in the order of their lower bounds, in columns."""

    async def listen(
        self, on_payload: Callable[[str], None], on_closed: Callable[[], None]
    ) -> None:
        """Call `on_payload` for each notification from now on, and `on_closed` at the end."""


OpenReader = Callable[[], AbstractAsyncContextManager[CatalogueReader]]
"""Opens a connection to the catalogue, and closes it after the block. Raises ProxyError."""


class StoreReader:
    """A `CatalogueReader` on a connection of asyncpg."""

    def __init__(self, connection: Connection, record: RecordQuery) -> None:
        self._connection = connection
        self._record = record

    async def read_map(self, name: str) -> CatalogueMap | None:
        """Return the map of this name, after a check of the store's version."""
        async with self._asking("map"):
            await store.check_store(self._connection)
            return await store.find_map(self._connection, name)

    async def version(self, map_id: UUID) -> int | None:
        """Return the version of a map, None if it is not there any more."""
        async with self._asking("version"):
            return (await store.read_versions(self._connection)).get(map_id)

    async def locate(self, map_id: UUID, routing_key: bytes, purpose: str) -> Located | None:
        """Return the mapping that covers a routing key, with its shard, in one query."""
        async with self._asking(purpose):
            return await store.locate(self._connection, map_id, routing_key)

    async def mappings(self, ids: Iterable[UUID]) -> list[Mapping]:
        """Return those of these mappings that exist."""
        async with self._asking("changes"):
            return await store.mappings_by_id(self._connection, ids)

    async def shards(self, map_id: UUID) -> list[Shard]:
        """Return all shards of a map."""
        async with self._asking("changes"):
            return await store.read_shards(self._connection, map_id)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[None]:
        """Read everything in the block as of one moment."""
        try:
            async with transaction(self._connection, read_only=True):
                yield
        except driver_errors(CatalogueError) as error:
            raise refusal(error) from error

    async def chunks(self, map_id: UUID) -> AsyncIterator[RowChunk]:
        """Yield all rows of a map in the order of their lower bounds, in columns."""
        async with self._asking("load"):
            await self._connection.execute(store.IN_ORDER)
        sql, after = READ_FIRST_CHUNK, b""
        while True:  # each chunk begins after the one before it
            async with self._asking("load"):
                row = await self._connection.fetchrow(sql, map_id, after, CHUNK_ROWS_MAX)
                chunk = RowChunk.of(dict(row))
            if chunk:
                yield chunk
            if len(chunk) < CHUNK_ROWS_MAX:
                return
            sql, after = READ_NEXT_CHUNK, chunk.last_lo()

    async def listen(
        self, on_payload: Callable[[str], None], on_closed: Callable[[], None]
    ) -> None:
        """Call `on_payload` for each notification from now on, and `on_closed` at the end."""

        def notified(_connection: object, _pid: int, _channel: str, payload: Any) -> None:
            on_payload(payload)

        self._connection.add_termination_listener(lambda _connection: on_closed())
        async with self._asking("version"):
            await self._connection.add_listener(CHANNEL, notified)

    @asynccontextmanager
    async def _asking(self, purpose: str) -> AsyncIterator[None]:
        """Count a question, bound its time, and translate its errors."""
        self._record(purpose)
        try:
            async with asyncio.timeout(QUERY_SECONDS_MAX):
                yield
        except TimeoutError as error:
            detail = f"{_WHERE} did not answer within {QUERY_SECONDS_MAX:g} s"
            raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE, detail) from error
        except ValueError as error:  # columns that do not fit together
            raise ProxyError(ErrorKind.CATALOGUE_REFUSED, f"{_WHERE}: {error}") from error
        except driver_errors(CatalogueError) as error:
            raise refusal(error) from error


def refusal(error: BaseException) -> ProxyError:
    """Return what a client is told of an error of the catalogue or of the dial to it.

    It is final where a credential was refused: waiting does not help.
    """
    found = translated(error, _WHERE)
    kind = _KINDS.get(found.reason, ErrorKind.CATALOGUE_UNREACHABLE)
    refused = found.sqlstate.startswith("28") and not found.transient
    return ProxyError(kind, found.message, final=refused)


def open_reader(connect: Connect, opener: SessionOpener, record: RecordQuery) -> OpenReader:
    """Return what opens readers on sessions of this opener."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[CatalogueReader]:
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(connect(opener))
            except ProxyError as error:
                raise refusal(error) from error
            yield StoreReader(connection, record)

    return opened
