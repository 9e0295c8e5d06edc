"""Operations that are pending on a shard that is gone: they go with it to its new host, or end.

For: `relocate` and `alter-shard`, which come after them: each has the row that its shard had when
it began, so that neither could go on. And for `detach` of a shard that is gone for good. Not for:
a location that still answers, where they can be settled.

Invariant: only operations whose process has ended are changed: their locks are held meanwhile.
"""

import json
from typing import Any, Final

from proxy.catalogue.errors import CatalogueError, driver_errors
from proxy.catalogue.held_connection import lock_key
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.op_log import OperationRow, read_all
from proxy.catalogue.operation import Databases, shard_from_json, to_text
from proxy.catalogue.relocate import SET_LOCATION, SET_ROW, Relocate, check_same, raised
from proxy.catalogue.transactions import transaction
from proxy.catalogue.verify import read_itself
from proxy.errors import ProxyError

_LOCK_MAP: Final = "select from shardmap.shard_map where map_id = $1 for update"
_SET_BODY: Final = "update shardmap.op_log set body = $2::text::jsonb where op_id = $1"
_GIVE_UP: Final = (
    "update shardmap.mapping set op_id = null where op_id = any($1::uuid[])",
    "update shardmap.shard set op_id = null where op_id = any($1::uuid[])",
    "delete from shardmap.op_log where op_id = any($1::uuid[])",
)
_LOCK: Final = "select pg_catalog.pg_try_advisory_xact_lock($1)"


async def lead_pending(
    databases: Databases, catalogue_map: CatalogueMap, old: Shard, new: Shard
) -> int:
    """Lead what is pending on a shard to its new location, with its row. Return how many.

    None if there is nothing, or the old location answers. It may be repeated.

    Raises CatalogueError: OPERATION_PENDING while a process works on one, WRONG_SHARD if the new
    location is another shard.
    """
    async with databases.catalogue() as catalogue:
        rows = [row for row in await _pending(catalogue, catalogue_map, old) if _has_one(row)]
        if not rows or await _answers(databases, old):
            return 0
        async with transaction(catalogue):
            pending = await _locked(catalogue, catalogue_map, old)
            pending = [row for row in pending if _has_one(row)]
            values = (new.host, new.port, new.database, new.endpoint, new.instance, new.workspace)
            version = await catalogue.fetchval(SET_ROW, new.shard_id, *values)
            await _write_location(databases, catalogue_map, (old, new), version)
            for row in pending:
                await catalogue.execute(_SET_BODY, row.op_id, to_text(_led(row.body, new)))
    return len(pending)


async def give_up_pending(
    databases: Databases, catalogue_map: CatalogueMap, shard: Shard
) -> list[OperationRow]:
    """End what is pending on a shard that does not answer, as it is. Return what it was.

    Other shards keep what they have of it: what they refuse, and what differs, is repaired there.
    Raises CatalogueError: OPERATION_PENDING while a process works on one.
    """
    async with databases.catalogue() as catalogue:
        rows = await _pending(catalogue, catalogue_map, shard)
        reached = {shard, *(one for row in rows for one in _reached_by(row, shard))}
        if not rows or any([await _answers(databases, one) for one in reached]):
            return []
        async with transaction(catalogue):
            pending = await _locked(catalogue, catalogue_map, shard)
            ids = [row.op_id for row in pending]
            for statement in _GIVE_UP:
                await catalogue.execute(statement, ids)
    return pending


def _reached_by(row: OperationRow, shard: Shard) -> list[Shard]:
    """Return where an operation reaches a shard; one that relocates it has another location."""
    shards = [shard_from_json(one) for one in row.body["rows"]]
    return [one for one in shards if one.shard_id == shard.shard_id]


async def _pending(
    catalogue: Connection, catalogue_map: CatalogueMap, shard: Shard
) -> list[OperationRow]:
    """Return the operations on the shard."""
    rows = await read_all(catalogue, catalogue_map.map_id)
    return [row for row in rows if str(shard.shard_id) in row.body["shards"]]


async def _locked(
    catalogue: Connection, catalogue_map: CatalogueMap, shard: Shard
) -> list[OperationRow]:
    """Lock the map and the operations on the shard, and return these."""
    await catalogue.execute(_LOCK_MAP, catalogue_map.map_id)
    pending = await _pending(catalogue, catalogue_map, shard)
    for row in pending:
        if not await catalogue.fetchval(_LOCK, lock_key(row.op_id)):
            raise row.in_use()
    return pending


def _has_one(row: OperationRow) -> bool:
    """Return whether an operation has one location of its shard, and not both."""
    return row.kind != Relocate.kind


async def _answers(databases: Databases, shard: Shard) -> bool:
    try:
        async with databases.shard(shard):
            return True
    except driver_errors(CatalogueError, ProxyError):
        return False


async def _write_location(
    databases: Databases, catalogue_map: CatalogueMap, shard: tuple[Shard, Shard], version: int
) -> None:
    """Write into the shard where it is, and the version that the catalogue is to have.

    It is committed first: the old location is gone anyway.
    """
    old, new = shard
    async with databases.shard(new) as connection, transaction(connection):
        found = await read_itself(connection, catalogue_map.map_id, f"shard {new.name}")
        itself = check_same(found, old, new)
        values = catalogue_map.map_id, new.location, raised(itself.version, version)
        await connection.execute(SET_LOCATION, *values)


def _led(body: Any, new: Shard) -> dict[str, Any]:
    """Return an operation's body with the shard's new location."""
    changed: dict[str, Any] = json.loads(json.dumps(body))
    for row in changed["rows"]:
        if row["shard_id"] == str(new.shard_id):
            row.update(
                host=new.host,
                port=new.port,
                database=new.database,
                endpoint=new.endpoint,
                instance=new.instance,
                workspace=new.workspace,
            )
    return changed
