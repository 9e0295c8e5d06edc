"""Reading the catalogue and a shard at one moment each, to find where they differ.

For: `verify`, and what a repair does again before it changes anything. It takes no locks and
changes nothing. Not for: what a difference is (`differences`).

The catalogue's rows of the shard and the shard's own are read in order by cursors, so a map may be
larger than the memory.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from proxy.catalogue.differences import (
    TOP,
    Comparison,
    Difference,
    ForeignRows,
    Others,
    Row,
    ShardDiffers,
    Stream,
)
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.operation import Databases
from proxy.catalogue.schema import StoreVersion, check_readable
from proxy.catalogue.store import Span, read_mappings
from proxy.catalogue.transactions import transaction

_CHUNK_ROWS: Final = 10_000

_EXTRA: Final = (
    "case when sessions <> 'kill' or drain_until is not null or lock_owner is not null"
    " then pg_catalog.jsonb_build_object('sessions', sessions, 'drain_until', drain_until,"
    " 'lock_owner', lock_owner, 'lock_label', lock_label, 'locked_until', locked_until)::text end"
)
CATALOGUE_ROW: Final = (
    f"select lo, coalesce(hi, $2), mapping_id, status, epoch, shard_id, {_EXTRA}"  # noqa: S608 - constants
    " from shardmap.mapping"
)
LOCAL_ROW: Final = (
    "select lo, coalesce(hi, $2), mapping_id, status, epoch, $3::uuid, op_id::text"
    " from shardmap_local.mapping"
)
_OF_MAP: Final = f"{CATALOGUE_ROW} where map_id = $1 order by lo"
_OF_SHARD: Final = f"{CATALOGUE_ROW} where map_id = $1 and shard_id = $3 order by lo"
_LOCAL: Final = f"{LOCAL_ROW} where map_id = $1 order by lo, hi"
# A map that the catalogue does not have. At this very location it is one of another catalogue.
_FOREIGN: Final = (
    "select m.map_id, pg_catalog.count(*)::int as rows, coalesce(i.location, '') as location"
    " from shardmap_local.mapping m left join shardmap_local.identity i on i.map_id = m.map_id"
    " where m.map_id <> all($1::uuid[]) and i.location is distinct from $2"
    " group by m.map_id, i.location order by m.map_id"
)
_IDENTITY: Final = (
    "select shard_id, location, status, version, map_name, kind, key_type, normalise, hash_version,"
    " store_major, store_minor from shardmap_local.identity where map_id = $1"
)
_HAS_SCHEMA: Final = "select pg_catalog.to_regclass('shardmap_local.identity') is not null"


@dataclass(frozen=True, slots=True)
class Itself:
    """What a shard says of itself and a map."""

    shard_id: UUID
    location: str
    status: str
    version: int

    @property
    def waits(self) -> bool:
        """Whether it is offline until it is repaired: it was detached, or may have keys of others.

        Its version is negative then, so that this is known without the catalogue.
        """
        return self.version < 0


async def read_itself(connection: Connection, map_id: UUID, where: str) -> Itself | None:
    """Return what a database says that it is for a map; None if it does not know the map.

    Raises CatalogueError: STORE_VERSION.
    """
    if not await connection.fetchval(_HAS_SCHEMA):
        return None
    row = await connection.fetchrow(_IDENTITY, map_id)
    if row is None:
        return None
    check_readable(StoreVersion(row["store_major"], row["store_minor"]), where)
    return Itself(row["shard_id"], row["location"], row["status"], row["version"])


def cursor_stream(connection: Connection, query: str, *arguments: object) -> Stream:
    """Return the rows of a query, read in chunks; in a transaction."""
    opened: list[Any] = []

    async def read() -> Sequence[Row]:
        if not opened:
            opened.append(await connection.cursor(query, *arguments))
        return [Row._make(record) for record in await opened[0].fetch(_CHUNK_ROWS)]

    return Stream(read)


def local_stream(connection: Connection, map_id: UUID, shard_id: UUID) -> Stream:
    """Return a shard's own mappings of a map, in order."""
    return cursor_stream(connection, _LOCAL, map_id, TOP, shard_id)


def catalogue_stream(connection: Connection, map_id: UUID) -> Stream:
    """Return all mappings of a map, in order."""
    return cursor_stream(connection, _OF_MAP, map_id, TOP)


class Verification:
    """The catalogue and one shard, each as of one moment; made by `verification`."""

    def __init__(
        self,
        catalogue: Connection,
        local: Connection,
        owner: CatalogueMap,
        shard: Shard,
        itself: Itself | None,
    ) -> None:
        self.catalogue = catalogue
        self.local = local
        self.itself = itself
        self.owner = owner
        self._shard = shard

    async def differences(self) -> AsyncIterator[Difference]:
        """Yield what differs, once."""
        map_id, itself = self.owner.map_id, self.itself
        if itself is None or itself.status != self._shard.status:
            yield ShardDiffers(self._shard.status, None if itself is None else itself.status)
        if await self.local.fetchval(_HAS_SCHEMA):
            known = await self.catalogue.fetch("select map_id from shardmap.shard_map")
            ids = [row["map_id"] for row in known]
            for row in await self.local.fetch(_FOREIGN, ids, self._shard.location):
                yield ForeignRows(**row)
        ours = (self.catalogue, _OF_SHARD, map_id, TOP, self._shard.shard_id)
        local = Stream(_nothing) if itself is None else self._local_stream()
        comparison = Comparison(
            self.owner.spec, cursor_stream(*ours), local, Others(self._read_others)
        )
        async for one in comparison.differences():
            yield one

    def _local_stream(self) -> Stream:
        return local_stream(self.local, self.owner.map_id, self._shard.shard_id)

    async def _read_others(self, lo: bytes, limit: int) -> Sequence[Row]:
        found = await read_mappings(self.catalogue, self.owner.map_id, Span(lo), limit)
        return [
            Row(
                one.lo,
                TOP if one.hi is None else one.hi,
                one.mapping_id,
                str(one.status),
                one.epoch,
                one.shard_id,
            )
            for one in found
        ]


@asynccontextmanager
async def reading(
    databases: Databases, owner: CatalogueMap, shard: Shard
) -> AsyncIterator[Verification]:
    """Yield a database to compare with the catalogue's shard, whatever it says that it is.

    Raises CatalogueError: STORE_VERSION.
    """
    async with (
        databases.catalogue() as catalogue,
        databases.shard(shard) as local,
        transaction(catalogue, read_only=True),
        transaction(local, read_only=True),
    ):
        itself = await read_itself(local, owner.map_id, f"shard {shard.name}")
        yield Verification(catalogue, local, owner, shard, itself)


@asynccontextmanager
async def verification(
    databases: Databases, owner: CatalogueMap, shard: Shard
) -> AsyncIterator[Verification]:
    """Yield a shard to verify. Raises CatalogueError: WRONG_SHARD, STORE_VERSION."""
    async with reading(databases, owner, shard) as verified:
        if verified.itself is not None:
            check_itself(verified.itself, shard)
        yield verified


def check_itself(itself: Itself, shard: Shard) -> None:
    """Check that a database is this shard. Raises CatalogueError: WRONG_SHARD."""
    if (itself.shard_id, itself.location) == (shard.shard_id, shard.location):
        return
    text = f"shard {shard.name}: {shard.location} says that it is {itself.location}"
    hint = (
        "Has the shard another host now? `shards relocate`. Is it a branch, or a copy?"
        " `shards attach NAME --new-identity` makes it a shard of its own."
    )
    raise CatalogueError(Reason.WRONG_SHARD, text, hint)


async def _nothing() -> Sequence[Row]:
    return ()
