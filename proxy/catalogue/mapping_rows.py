"""The mappings that an operation changes: found by their bounds, kept in the operation's row.

For: reading one row in the catalogue and in a shard, and showing its bounds in an error. Not for
reading maps (`store`).
"""

from collections.abc import Mapping as Row
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import (
    CatalogueMap,
    Connection,
    Mapping,
    SessionsMode,
    Shard,
    Status,
)
from proxy.catalogue.operation import Json
from proxy.routing.shard_map import ShardMapping

_MAPPING: Final = (
    "select mapping_id, map_id, shard_id, lo, hi, status, sessions, drain_until, epoch, op_id,"
    " coalesce(locked_until > pg_catalog.now(), false) as locked from shardmap.mapping"
)
_EXACT: Final = f"{_MAPPING} where map_id = $1 and lo = $2 and hi is not distinct from $3"
_OVERLAPPING: Final = (
    f"{_MAPPING} where map_id = $1 and span operator(pg_catalog.&&) shardmap.keyrange("
    " pg_catalog.uuid_send($1) || '\\x00'::bytea || $2,"
    " pg_catalog.uuid_send($1) || coalesce('\\x00'::bytea || $3, '\\x01'::bytea)) order by lo"
)
_SHARD: Final = (
    'select shard_id, map_id, name, host, port, dbname as "database", endpoint, instance,'
    " workspace, status, version, op_id from shardmap.shard"
)


def show_bounds(catalogue_map: CatalogueMap, lo: bytes, hi: bytes | None) -> str:
    """Return the bounds of a mapping in words, as a person writes them."""
    low, high = catalogue_map.spec.show_bounds(ShardMapping(lo, hi, ""))
    return low if low == high else f"[{low}, {high})"


async def mapping_exact(
    connection: Connection, catalogue_map: CatalogueMap, lo: bytes, hi: bytes | None
) -> Mapping:
    """Return the mapping with exactly these bounds. Raises CatalogueError: UNKNOWN_MAPPING."""
    row = await connection.fetchrow(_EXACT, catalogue_map.map_id, lo, hi)
    if row is None:
        bounds = show_bounds(catalogue_map, lo, hi)
        text = f"the map {catalogue_map.name} has no mapping {bounds}"
        hint = "`shards show` prints the mappings; a range must be exactly one of them."
        raise CatalogueError(Reason.UNKNOWN_MAPPING, text, hint)
    return mapping_of(row)


async def mappings_overlapping(
    connection: Connection, catalogue_map: CatalogueMap, lo: bytes, hi: bytes | None
) -> list[Mapping]:
    """Return the mappings that have some of these keys."""
    rows = await connection.fetch(_OVERLAPPING, catalogue_map.map_id, lo, hi)
    return [mapping_of(row) for row in rows]


async def shard_by_name(connection: Connection, catalogue_map: CatalogueMap, name: str) -> Shard:
    """Return a shard of a map. Raises CatalogueError: UNKNOWN_SHARD."""
    query = f"{_SHARD} where map_id = $1 and name = $2"
    row = await connection.fetchrow(query, catalogue_map.map_id, name)
    if row is None:
        text = f"the map {catalogue_map.name} has no shard {name}"
        raise CatalogueError(Reason.UNKNOWN_SHARD, text, "`shards show` prints the shards.")
    return shard_of(row)


async def shard_by_id(connection: Connection, shard_id: UUID) -> Shard:
    """Return the shard of a mapping."""
    return shard_of(await connection.fetchrow(f"{_SHARD} where shard_id = $1", shard_id))


async def shards_of(connection: Connection, catalogue_map: CatalogueMap) -> list[Shard]:
    """Return all shards of a map, by name."""
    query = f"{_SHARD} where map_id = $1 order by name"
    return [shard_of(row) for row in await connection.fetch(query, catalogue_map.map_id)]


def check_expected(what: str, expected: int | None, found: int) -> None:
    """Raise CatalogueError (STALE_EPOCH) if the row is not as the caller knows it."""
    if expected is not None and expected != found:
        text = f"{what} is at {found}, not at {expected}"
        raise CatalogueError(Reason.STALE_EPOCH, text, "Look at it again, then decide again.")


def mapping_of(row: Row[str, Any]) -> Mapping:
    """Return the mapping of a driver's record."""
    values = {**row, "status": Status(row["status"]), "sessions": SessionsMode(row["sessions"])}
    return Mapping(**values)


def shard_of(row: Row[str, Any]) -> Shard:
    """Return the shard of a driver's record."""
    return Shard(**{**row, "status": Status(row["status"])})


def mapping_to_json(mapping: Mapping) -> Json:
    """Return a mapping as it is kept in an operation's row."""
    drain_until = mapping.drain_until
    return {
        "mapping_id": str(mapping.mapping_id),
        "map_id": str(mapping.map_id),
        "shard_id": str(mapping.shard_id),
        "lo": mapping.lo.hex(),
        "hi": None if mapping.hi is None else mapping.hi.hex(),
        "status": str(mapping.status),
        "sessions": str(mapping.sessions),
        "drain_until": None if drain_until is None else drain_until.isoformat(),
        "epoch": mapping.epoch,
    }


def mapping_from_json(row: Json) -> Mapping:
    """Return the mapping of `mapping_to_json`."""
    drain_until = row["drain_until"]
    return Mapping(
        mapping_id=UUID(row["mapping_id"]),
        map_id=UUID(row["map_id"]),
        shard_id=UUID(row["shard_id"]),
        lo=bytes.fromhex(row["lo"]),
        hi=None if row["hi"] is None else bytes.fromhex(row["hi"]),
        status=Status(row["status"]),
        sessions=SessionsMode(row["sessions"]),
        drain_until=None if drain_until is None else datetime.fromisoformat(drain_until),
        epoch=row["epoch"],
    )
