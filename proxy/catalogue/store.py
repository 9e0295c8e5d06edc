"""Reading the catalogue: maps, shards, mappings, and the one look-up of a key.

For: rows to values, whole or in chunks. Not for: changing anything (`operations`), or what a shard
knows of itself (`shard_store`). Every function takes a connection of asyncpg, raises what that
does, and does not say in which transaction it runs.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from collections.abc import Mapping as Row
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import (
    CatalogueMap,
    Connection,
    Located,
    Mapping,
    SessionsMode,
    Shard,
    Status,
    is_shard_name,
)
from proxy.catalogue.schema import catalogue_version, check_readable, check_writable
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec

# Rows of one fetch. A million come in a hundred, and others run between them.
CHUNK_ROWS: Final = 10_000
# For a transaction that reads mappings in chunks. A table that was just filled has no statistics:
# each chunk would be a sort of all rows that follow.
IN_ORDER: Final = (
    "set local enable_sort = off; set local enable_bitmapscan = off; set local enable_seqscan = off"
)

_STATUSES: Final = {str(one): one for one in Status}
_SESSIONS: Final = {str(one): one for one in SessionsMode}
_MAP: Final = (
    "select map_id, name, kind, key_type, normalise, session_roles, version from shardmap.shard_map"
)
_SHARD_COLUMNS: Final = (
    "{0}.shard_id, {0}.map_id, {0}.name, {0}.host, {0}.port, {0}.dbname, {0}.endpoint,"
    " {0}.instance, {0}.workspace, {0}.status, {0}.version, {0}.op_id"
)
_MAPPING_COLUMNS: Final = (
    "{0}.mapping_id, {0}.map_id, {0}.shard_id, {0}.lo, {0}.hi, {0}.status, {0}.sessions,"
    " {0}.drain_until, {0}.epoch, {0}.op_id,"
    " coalesce({0}.locked_until > pg_catalog.now(), false) as locked"
)
_SHARD: Final = f"select {_SHARD_COLUMNS.format('s')} from shardmap.shard s"  # noqa: S608 - constants
_MAPPING: Final = f"select {_MAPPING_COLUMNS.format('m')} from shardmap.mapping m"  # noqa: S608

# The test of hi is outside the limit: inside it, a key that no mapping covers would read every
# mapping below it.
_FIND: Final = """
select * from (
  select * from shardmap.mapping where map_id = $1 and lo <= $2 order by lo desc limit 1
) m where hi is null or hi > $2"""
_PREFIXED: Final = ", ".join(
    f"s.{name} as shard_{name}"
    for name in (
        *("name", "host", "port", "dbname", "endpoint", "instance"),
        *("workspace", "status", "version", "op_id"),
    )
)
_LOCATE: Final = (
    f"select {_MAPPING_COLUMNS.format('m')}, {_PREFIXED} from ({_FIND}) m"  # noqa: S608
    " join shardmap.shard s on s.shard_id = m.shard_id"
)
# One look for each shard, which ends with the first mapping that it finds.
_EMPTY: Final = (
    f"{_SHARD} where s.map_id = $1 and (select true from shardmap.mapping m"  # noqa: S608
    " where m.map_id = s.map_id and m.shard_id = s.shard_id limit 1) is null"
)
# A map of a lost catalogue is hidden from proxies until it has its mappings again: they go on with
# what they know. Each change adds 1 to the version, and no map is changed so often.
HIDDEN_VERSION: Final = -(1 << 40)
# Above every version that a proxy may have seen.
SHOW_MAP: Final = """
update shardmap.shard_map
set version = (extract(epoch from pg_catalog.clock_timestamp()) * 1000)::bigint
where map_id = $1 and version < 1"""
# From the mapping that covers the first key on.
_PAGE: Final = f"""
{_MAPPING} where m.map_id = $1 and ($5::uuid is null or m.shard_id = $5)
and m.lo >= coalesce((select f.lo from shardmap.mapping f where f.map_id = $1 and f.lo <= $2
                      order by f.lo desc limit 1), ''::bytea)
and (m.hi is null or m.hi > $2) and ($3::bytea is null or m.lo < $3)
order by m.lo limit $4"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class MapSummary:
    """A map, and how much it has."""

    map: CatalogueMap
    shards: int
    mappings: int


@dataclass(frozen=True, slots=True)
class Location:
    """A database that has shards."""

    host: str
    port: int
    database: str
    shards: int


@dataclass(frozen=True, slots=True)
class Span:
    """Which mappings: those with keys from `low` to below `high` (None: unbounded), of a shard."""

    low: bytes = b""
    high: bytes | None = None
    shard_id: UUID | None = None


# -- the store -----------------------------------------------------------------------------------


async def check_store(connection: Connection, *, writes: bool = False) -> None:
    """Check that this is a catalogue of our version. Raises CatalogueError."""
    version = await catalogue_version(connection)
    if writes:
        check_writable(version)
    else:
        check_readable(version)


async def read_versions(connection: Connection) -> dict[UUID, int]:
    """Return the version of every map."""
    rows = await connection.fetch("select map_id, version from shardmap.shard_map")
    return {row["map_id"]: row["version"] for row in rows}


# -- maps ----------------------------------------------------------------------------------------


async def read_maps(connection: Connection) -> list[MapSummary]:
    """Return all maps, by name."""
    shards = await _counts(connection, "shard")
    mappings = await _counts(connection, "mapping")
    maps = [map_of(row) for row in await connection.fetch(f"{_MAP} order by name")]
    return [MapSummary(one, shards.get(one.map_id, 0), mappings.get(one.map_id, 0)) for one in maps]


async def find_map(connection: Connection, name: str) -> CatalogueMap | None:
    """Return the map of this name, if there is one."""
    row = await connection.fetchrow(f"{_MAP} where name = $1", name)
    return None if row is None else map_of(row)


async def read_map(connection: Connection, name: str) -> CatalogueMap:
    """Return the map of this name. Raises CatalogueError: UNKNOWN_MAP."""
    found = await find_map(connection, name)
    if found is None:
        hint = "`shards list` prints the maps; `shards create` makes one."
        raise CatalogueError(Reason.UNKNOWN_MAP, f"the catalogue has no map {name}", hint)
    return found


async def map_by_id(connection: Connection, map_id: UUID) -> CatalogueMap:
    """Return the map of this id. Raises CatalogueError: UNKNOWN_MAP."""
    row = await connection.fetchrow(f"{_MAP} where map_id = $1", map_id)
    if row is None:
        raise CatalogueError(Reason.UNKNOWN_MAP, f"the catalogue has no map {map_id}")
    return map_of(row)


async def insert_hidden_map(connection: Connection, new: CatalogueMap) -> None:
    """Insert a map with its id, hidden from proxies. Raises CatalogueError: EXISTS."""
    spec = new.spec
    inserted = await connection.fetchval(
        "insert into shardmap.shard_map (map_id, name, kind, key_type, normalise, version)"
        " values ($1, $2, $3, $4, $5, $6) on conflict do nothing returning true",
        *(new.map_id, new.name, str(spec.kind), str(spec.key_type), str(spec.normalise)),
        HIDDEN_VERSION,
    )
    if not inserted:
        text = f"the catalogue has the map {new.map_id}, or one named {new.name}, already"
        raise CatalogueError(Reason.EXISTS, text, "`shards list` prints the maps.")


async def delete_empty_map(connection: Connection, map_id: UUID) -> None:
    """Delete a map that has no shards and no operations."""
    await connection.execute(
        "delete from shardmap.shard_map m where map_id = $1"
        " and not exists (select from shardmap.shard s where s.map_id = m.map_id)"
        " and not exists (select from shardmap.op_log o where o.map_id = m.map_id)",
        map_id,
    )


async def _counts(connection: Connection, table: str) -> dict[UUID, int]:
    rows = await connection.fetch(
        f"select map_id, pg_catalog.count(*) as n from shardmap.{table} group by map_id"  # noqa: S608
    )
    return {row["map_id"]: row["n"] for row in rows}


# -- shards --------------------------------------------------------------------------------------


async def read_shards(connection: Connection, map_id: UUID) -> list[Shard]:
    """Return all shards of a map, by name."""
    rows = await connection.fetch(f"{_SHARD} where s.map_id = $1 order by s.name", map_id)
    return [shard_of(row) for row in rows]


async def empty_shards(connection: Connection, map_id: UUID) -> list[Shard]:
    """Return the shards that have no mapping in the catalogue."""
    rows = await connection.fetch(_EMPTY, map_id)
    return [shard_of(row) for row in rows]


async def is_empty(connection: Connection, shard: Shard) -> bool:
    """Return whether a shard has no mapping in the catalogue."""
    empty = await empty_shards(connection, shard.map_id)
    return any(one.shard_id == shard.shard_id for one in empty)


async def shards_by_id(connection: Connection, ids: Iterable[UUID]) -> list[Shard]:
    """Return those of these shards that exist."""
    rows = await connection.fetch(f"{_SHARD} where s.shard_id = any($1::uuid[])", list(ids))
    return [shard_of(row) for row in rows]


async def read_shard(connection: Connection, owner: CatalogueMap, name: str) -> Shard:
    """Return the shard of this name. Raises CatalogueError: UNKNOWN_SHARD."""
    query = f"{_SHARD} where s.map_id = $1 and s.name = $2"
    row = await connection.fetchrow(query, owner.map_id, name)
    if row is None:
        text = f"the map {owner.name} has no shard {name}"
        raise CatalogueError(Reason.UNKNOWN_SHARD, text, "`shards show` prints the shards.")
    return shard_of(row)


async def count_mappings(connection: Connection, map_id: UUID) -> dict[UUID, int]:
    """Return how many mappings each shard has; a shard that has none is not in it."""
    rows = await connection.fetch(
        "select shard_id, pg_catalog.count(*) as n from shardmap.mapping"
        " where map_id = $1 group by shard_id",
        map_id,
    )
    return {row["shard_id"]: row["n"] for row in rows}


async def read_locations(connection: Connection) -> list[Location]:
    """Return each database that has shards once, over all maps."""
    rows = await connection.fetch(
        "select host, port, dbname, pg_catalog.count(*) as n from shardmap.shard"
        " group by host, port, dbname order by host, port, dbname"
    )
    return [Location(row["host"], row["port"], row["dbname"], row["n"]) for row in rows]


# -- mappings ------------------------------------------------------------------------------------


async def locate(connection: Connection, map_id: UUID, routing_key: bytes) -> Located | None:
    """Return the mapping that covers a key, with its shard, in one query."""
    row = await connection.fetchrow(_LOCATE, map_id, routing_key)
    if row is None:
        return None
    shard = {name.removeprefix("shard_"): value for name, value in row.items() if "shard_" in name}
    shard |= {"shard_id": row["shard_id"], "map_id": row["map_id"]}
    return Located(mapping_of(row), shard_of(shard))


async def mappings_by_id(connection: Connection, ids: Iterable[UUID]) -> list[Mapping]:
    """Return those of these mappings that exist."""
    rows = await connection.fetch(f"{_MAPPING} where m.mapping_id = any($1::uuid[])", list(ids))
    return [mapping_of(row) for row in rows]


async def read_mappings(
    connection: Connection, map_id: UUID, span: Span, limit: int
) -> list[Mapping]:
    """Return the first mappings of the span, `limit` at most, by their lower bounds."""
    rows = await connection.fetch(_PAGE, map_id, span.low, span.high, limit, span.shard_id)
    return [mapping_of(row) for row in rows]


async def stream_mappings(
    connection: Connection,
    map_id: UUID,
    span: Span,
    limit: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> AsyncIterator[Sequence[Mapping]]:
    """Yield the mappings of the span in chunks, by their lower bounds, `limit` at most.

    It is for a transaction; in one of one snapshot they are those of one moment.
    """
    await connection.execute(IN_ORDER)
    left = limit
    while left is None or left > 0:
        rows = chunk_rows if left is None else min(left, chunk_rows)
        chunk = await read_mappings(connection, map_id, span, rows)
        if chunk:
            yield chunk
        if len(chunk) < rows:
            return
        left = None if left is None else left - rows
        # No mapping begins below the end of the one before it.
        end = chunk[-1].hi
        if end is None:
            return
        span = Span(end, span.high, span.shard_id)


# -- rows ----------------------------------------------------------------------------------------


def map_of(row: Row[str, Any]) -> CatalogueMap:
    """Return the map of a driver's record."""
    spec = MapSpec(Kind(row["kind"]), KeyType(row["key_type"]), Normalise(row["normalise"]))
    roles = tuple(row["session_roles"])
    return CatalogueMap(row["map_id"], row["name"], spec, row["version"], roles)


def shard_of(row: Row[str, Any]) -> Shard:
    """Return the shard of a driver's record.

    A status that is none is offline, and a name that is none is not shown.
    """
    name, fault = row["name"], ""
    if row["status"] not in _STATUSES:
        fault = "its status is none"
    if not is_shard_name(name):
        name, fault = str(row["shard_id"]), "its name has characters that no name has"
    return Shard(
        row["shard_id"],
        row["map_id"],
        name,
        row["host"],
        row["port"],
        row["dbname"],
        row["endpoint"],
        row["instance"],
        row["workspace"],
        _STATUSES.get(row["status"], Status.OFFLINE),
        row["version"],
        row["op_id"],
        fault,
    )


def mapping_of(row: Row[str, Any]) -> Mapping:
    """Return the mapping of a driver's record; words that are none are read as in a whole map."""
    return Mapping(
        row["mapping_id"],
        row["map_id"],
        row["shard_id"],
        row["lo"],
        row["hi"],
        _STATUSES.get(row["status"], Status.OFFLINE),
        _SESSIONS.get(row["sessions"], SessionsMode.KILL),
        row["drain_until"],
        row["epoch"],
        row["locked"],
        row["op_id"],
    )
