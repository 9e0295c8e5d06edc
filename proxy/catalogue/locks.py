"""Locks of mappings: with one, only the operator who has its token changes the mapping.

For: locking and unlocking, and the check of every operation that changes a mapping. A lock is in
the catalogue only, has an end, and never affects routing. Not for: what keeps two operations apart
(`operations`).

Invariant: a lock is given and taken while the map's row is locked, as operations begin.
"""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from proxy.catalogue.bounds import in_words
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.mapping_rows import check_expected, mapping_exact
from proxy.catalogue.model import CatalogueMap, Connection, Mapping

# As long as a lock lasts by default.
RENEWED_SECONDS: Final = 3600.0

_LOCK_MAP: Final = "select 1 from shardmap.shard_map where map_id = $1 for update"
_HOLDERS: Final = (
    "select mapping_id, lock_owner, lock_label, locked_until from shardmap.mapping"
    " where mapping_id = any($1::uuid[]) and locked_until > pg_catalog.clock_timestamp()"
)
_LOCK: Final = (
    "update shardmap.mapping set lock_owner = $2, lock_label = $3,"
    " locked_until = pg_catalog.now() + pg_catalog.make_interval(secs => $4) where mapping_id = $1"
)
_UNLOCK: Final = (
    "update shardmap.mapping set lock_owner = null, lock_label = null, locked_until = null"
    " where mapping_id = any($1::uuid[])"
)
_OWNED: Final = (
    "select mapping_id, lo, hi, op_id from shardmap.mapping"
    " where map_id = $1 and lock_owner = $2 order by lo"
)
_RENEW: Final = (
    "update shardmap.mapping set locked_until = greatest(locked_until,"
    " pg_catalog.now() + pg_catalog.make_interval(secs => $2)) where mapping_id = $1"
)
_OWNER: Final = "select lock_owner from shardmap.mapping where mapping_id = $1"


async def check_locks(
    catalogue: Connection,
    catalogue_map: CatalogueMap,
    mappings: Sequence[Mapping],
    token: UUID | None,
) -> None:
    """Check that the holder of this token (None: of none) may change these mappings.

    A token must be that of a lock that one of them has now: if it has expired, others may have
    changed the mapping. Raises CatalogueError: LOCKED, LOCK_NOT_OWNED.
    """
    rows = []
    if token is not None or any(one.locked for one in mappings):
        rows = await catalogue.fetch(_HOLDERS, [one.mapping_id for one in mappings])
    by_id = {one.mapping_id: one for one in mappings}
    for row in rows:
        if row["lock_owner"] != token:
            raise _refused(catalogue_map, by_id[row["mapping_id"]], row, token)
    if token is not None and not rows:
        what = f"the mapping {_in_words(catalogue_map, mappings[0])}" if mappings else "this"
        text = f"{what} is not locked: the token's lock has expired, or was removed"
        raise CatalogueError(Reason.LOCK_NOT_OWNED, text, "Look at it again, then lock it again.")


def _refused(
    catalogue_map: CatalogueMap, mapping: Mapping, row: Any, token: UUID | None
) -> CatalogueError:
    """Return the refusal for the lock of another token."""
    until = f"{row['locked_until']:%Y-%m-%d %H:%M:%S} UTC"
    label = f" ({row['lock_label']})" if row["lock_label"] else ""
    text = f"the mapping {_in_words(catalogue_map, mapping)} is locked{label} until {until}"
    if token is None:
        return CatalogueError(Reason.LOCKED, text, "--token is for who has locked it.")
    text += ", with another token"
    hint = "lakebase-auth-proxy shards unlock RANGE --force takes the lock away."
    return CatalogueError(Reason.LOCK_NOT_OWNED, text, hint)


async def lock_mapping(
    catalogue: Connection,
    catalogue_map: CatalogueMap,
    bounds: tuple[bytes, bytes | None],
    token: UUID,
    *,
    label: str,
    seconds: float,
    expect: int | None = None,
) -> None:
    """Lock a mapping with a new token. In a transaction of the catalogue.

    To do it again, with the same token, changes nothing. Raises CatalogueError: UNKNOWN_MAPPING,
    LOCKED, STALE_EPOCH, OPERATION_PENDING.
    """
    await _lock_map(catalogue, catalogue_map)
    mapping = await mapping_exact(catalogue, catalogue_map, *bounds)
    if mapping.locked and await catalogue.fetchval(_OWNER, mapping.mapping_id) == token:
        return  # an earlier try was committed
    await check_locks(catalogue, catalogue_map, (mapping,), None)
    _check_epoch(catalogue_map, mapping, expect)
    _check_pending(catalogue_map, mapping)
    await catalogue.execute(_LOCK, mapping.mapping_id, token, label or None, seconds)


async def unlock_mapping(
    catalogue: Connection,
    catalogue_map: CatalogueMap,
    bounds: tuple[bytes, bytes | None],
    token: UUID | None,
    expect: int | None = None,
) -> int:
    """Take away the lock of a mapping; without a token whosever it is. Return how many there were.

    In a transaction of the catalogue. Raises CatalogueError: UNKNOWN_MAPPING, STALE_EPOCH,
    LOCK_NOT_OWNED, OPERATION_PENDING.
    """
    await _lock_map(catalogue, catalogue_map)
    mapping = await mapping_exact(catalogue, catalogue_map, *bounds)
    _check_epoch(catalogue_map, mapping, expect)
    owner = await catalogue.fetchval(_OWNER, mapping.mapping_id)
    if owner is None:
        return 0
    if token is not None and owner != token:
        if mapping.locked:
            await check_locks(catalogue, catalogue_map, (mapping,), token)
        return 0  # the expired lock of another operator
    _check_pending(catalogue_map, mapping)
    await catalogue.execute(_UNLOCK, [mapping.mapping_id])
    return 1


async def unlock_all(catalogue: Connection, catalogue_map: CatalogueMap, token: UUID) -> int:
    """Take away all locks of a token in a map. Return how many there were.

    In a transaction of the catalogue. Raises CatalogueError: OPERATION_PENDING.
    """
    await _lock_map(catalogue, catalogue_map)
    rows = await catalogue.fetch(_OWNED, catalogue_map.map_id, token)
    for row in rows:
        if row["op_id"] is not None:
            raise _pending(in_words(catalogue_map.spec, row["lo"], row["hi"]), row["op_id"])
    await catalogue.execute(_UNLOCK, [row["mapping_id"] for row in rows])
    return len(rows)


async def renew_lock(catalogue: Connection, mapping_id: UUID) -> None:
    """Extend a lock to RENEWED_SECONDS from now, unless it lasts longer.

    For an operation that was begun with the lock's token: while it has the mapping, no other lock
    can be given, even after this one has expired.
    """
    await catalogue.execute(_RENEW, mapping_id, RENEWED_SECONDS)


async def _lock_map(catalogue: Connection, catalogue_map: CatalogueMap) -> None:
    if await catalogue.fetchval(_LOCK_MAP, catalogue_map.map_id) is None:
        raise CatalogueError(Reason.UNKNOWN_MAP, f"there is no map {catalogue_map.name}")


def _check_epoch(catalogue_map: CatalogueMap, mapping: Mapping, expect: int | None) -> None:
    check_expected(f"the mapping {_in_words(catalogue_map, mapping)}", expect, mapping.epoch)


def _check_pending(catalogue_map: CatalogueMap, mapping: Mapping) -> None:
    if mapping.op_id is not None:
        raise _pending(_in_words(catalogue_map, mapping), mapping.op_id)


def _pending(bounds: str, op_id: UUID) -> CatalogueError:
    text = f"the operation {op_id} has the mapping {bounds}"
    return CatalogueError(Reason.OPERATION_PENDING, text, "See `shards ops`.")


def _in_words(catalogue_map: CatalogueMap, mapping: Mapping) -> str:
    return in_words(catalogue_map.spec, mapping.lo, mapping.hi)
