"""The mappings that an operation changes: found by their bounds, kept in the operation's row.

For: reading one row in the catalogue and in a shard, and showing its bounds in an error. Not for
reading maps (`store`).
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from proxy.catalogue.bounds import in_words
from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.model import (
    CatalogueMap,
    Connection,
    Mapping,
    SessionsMode,
    Shard,
    Status,
)
from proxy.catalogue.operation import Json, Tools
from proxy.catalogue.store import mapping_of, shards_by_id
from proxy.errors import ProxyError
from proxy.routing.shard_map import MapSpec

# Shards without mappings are asked so many at a time, and all within the time that one which was
# scaled to zero has been seen to take: each may be down, and a dial has a minute.
CHECKS_MAX: Final = 16
CHECK_SECONDS_MAX: Final = 30.0

EVERYTHING: Final = (b"", None)
"""The bounds of all keys."""

_MAPPING: Final = (
    "select *, coalesce(locked_until > pg_catalog.clock_timestamp(), false) as locked"
    " from shardmap.mapping"
)
_EXACT: Final = f"{_MAPPING} where map_id = $1 and lo = $2 and hi is not distinct from $3"
# The last one that begins below a key, and the one that begins with it.
_AROUND: Final = (
    f"(({_MAPPING} where map_id = $1 and lo < $2 order by lo desc limit 1)"
    f" union all ({_MAPPING} where map_id = $1 and lo = $2)) order by lo"
)
_LOCKED: Final = (
    f"{_MAPPING} where map_id = $1 and shard_id = $2"
    " and locked_until > pg_catalog.clock_timestamp() order by lo"
)
_STRAY: Final = (
    "select lo, hi from shardmap_local.mapping where op_id is distinct from $4"
    " and (mapping_id = $5 or map_id = $1 and (hi is null or hi > $2)"
    " and ($3::bytea is null or lo < $3)) limit 1"
)
_SERVED: Final = (
    "select m.lo, m.hi from shardmap_local.mapping m"
    " join shardmap_local.identity i on i.map_id = m.map_id and i.status = 'online'"
    " where m.map_id = $1 and m.status = 'online' and (m.hi is null or m.hi > $2)"
    " and ($3::bytea is null or m.lo < $3) limit 1"
)
_OVERLAPPING: Final = (
    f"{_MAPPING} where map_id = $1 and span operator(pg_catalog.&&) shardmap.keyrange("
    " pg_catalog.uuid_send($1) || '\\x00'::bytea || $2,"
    " pg_catalog.uuid_send($1) || coalesce('\\x00'::bytea || $3, '\\x01'::bytea)) order by lo"
)


async def mapping_exact(
    connection: Connection, catalogue_map: CatalogueMap, lo: bytes, hi: bytes | None
) -> Mapping:
    """Return the mapping with exactly these bounds. Raises CatalogueError: UNKNOWN_MAPPING."""
    row = await connection.fetchrow(_EXACT, catalogue_map.map_id, lo, hi)
    if row is None:
        bounds = in_words(catalogue_map.spec, lo, hi)
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


async def locked_mappings(
    connection: Connection, catalogue_map: CatalogueMap, shard: Shard
) -> list[Mapping]:
    """Return the mappings of a shard that are locked now."""
    rows = await connection.fetch(_LOCKED, catalogue_map.map_id, shard.shard_id)
    return [mapping_of(row) for row in rows]


async def mappings_around(
    connection: Connection, catalogue_map: CatalogueMap, key: bytes
) -> tuple[Mapping | None, Mapping | None]:
    """Return the last mapping that begins below a key, and the one that begins with it."""
    rows = await connection.fetch(_AROUND, catalogue_map.map_id, key)
    found = [mapping_of(row) for row in rows]
    at = found.pop() if found and found[-1].lo == key else None
    return (found[0] if found else None), at


async def stray_bounds(
    shard: Connection, mapping: Mapping, spec: MapSpec, op_id: UUID
) -> str | None:
    """Return the bounds of a shard's own mapping with some of these keys, or with the same id.

    That of `op_id` does not count.
    """
    values = mapping.map_id, mapping.lo, mapping.hi, op_id, mapping.mapping_id
    row = await shard.fetchrow(_STRAY, *values)
    return None if row is None else in_words(spec, row["lo"], row["hi"])


async def check_not_served(
    tools: Tools,
    owner: CatalogueMap,
    shards: Sequence[Shard],
    bounds: tuple[bytes, bytes | None],
    *,
    own: UUID | None = None,
    seconds_max: float = CHECK_SECONDS_MAX,
) -> None:
    """Check that shards which have no mapping in the catalogue do not serve these keys.

    They may have been attached, and wait for a repair. `own` gets the keys, and is to serve none at
    all: with its first mapping it is not looked at any more. Those that do not answer in time are
    passed over: they are no reason to stop what concerns others. Raises CatalogueError: OVERLAP.
    """
    dials, deadline = asyncio.Semaphore(CHECKS_MAX), asyncio.get_running_loop().time() + seconds_max
    found: list[tuple[Shard, str]] = []

    async def check(shard: Shard) -> None:
        try:
            async with (
                asyncio.timeout_at(deadline),
                dials,
                tools.databases.shard(shard) as connection,
            ):
                is_own = shard.shard_id == own
                served = await served_bounds(connection, owner, EVERYTHING if is_own else bounds)
        except driver_errors(CatalogueError, ProxyError) as error:
            where = f"shard {shard.name}"
            is_late = isinstance(error, TimeoutError)
            text = f"{where}: no answer in time" if is_late else translated(error, where).message
            tools.progress(f"{text}; it is not known which keys it serves")
            return
        if served is not None:
            found.append((shard, served))

    async with asyncio.TaskGroup() as group:
        for shard in shards:
            group.create_task(check(shard))
    for shard, served in found:
        raise serves_others(shard, served)


async def served_bounds(
    shard: Connection, owner: CatalogueMap, bounds: tuple[bytes, bytes | None] = EVERYTHING
) -> str | None:
    """Return the bounds of a shard's own mapping that is online and has some of these keys."""
    row = await shard.fetchrow(_SERVED, owner.map_id, *bounds)
    return None if row is None else in_words(owner.spec, row["lo"], row["hi"])


def serves_others(shard: Shard, served: str) -> CatalogueError:
    """Return the refusal to change what belongs to a shard before it is repaired."""
    text = f"shard {shard.name} serves {served}, which the catalogue does not give to it"
    hint = f"shards verify --shard {shard.name}, then `shards repair` for all of its keys."
    return CatalogueError(Reason.OVERLAP, text, hint)


async def shard_of_mapping(connection: Connection, mapping: Mapping) -> Shard:
    """Return the shard that has a mapping."""
    (shard,) = await shards_by_id(connection, [mapping.shard_id])
    return shard


def check_version(shard: Shard, expected: int | None) -> None:
    """Raise CatalogueError STALE_VERSION if a shard's row is not as the caller knows it."""
    check_expected(f"the shard {shard.name}", expected, shard.version, Reason.STALE_VERSION)


def check_expected(
    what: str, expected: int | None, found: int, reason: Reason = Reason.STALE_EPOCH
) -> None:
    """Raise CatalogueError, STALE_EPOCH of a mapping, if the row is not as the caller knows it."""
    if expected is not None and expected != found:
        text = f"{what} is at {found}, not at {expected}"
        raise CatalogueError(reason, text, "Look at it again, then decide again.")


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
