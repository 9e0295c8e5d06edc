"""The rows of a plan: kept in an operation's row, and written into the catalogue and into shards.

For: a million rows in one string of JSON, and replacing rows in one transaction. Not for: which
rows (`repair_plan`).
"""

import struct
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from typing import Final
from uuid import UUID

from proxy.catalogue.differences import TOP, Row
from proxy.catalogue.model import Connection
from proxy.catalogue.operation import Json
from proxy.catalogue.repair_plan import OwnStatus, Replacement, RowChanges

# Of a row: its ids, epoch and whether it is online; the lengths of bounds and extra follow.
_HEAD: Final = struct.Struct(">16s16sq?III")
_NO_EXTRA: Final = 0xFFFFFFFF
_STATUSES: Final = {True: "online", False: "offline"}
_DELETE_LOCAL: Final = (
    "delete from shardmap_local.mapping where map_id = $1 and mapping_id = any($2::uuid[])"
)
_DELETE: Final = "delete from shardmap.mapping where map_id = $1 and mapping_id = any($2::uuid[])"
_SET_EXTRA: Final = """
update shardmap.mapping m set sessions = e->>'sessions',
  drain_until = (e->>'drain_until')::timestamptz, lock_owner = (e->>'lock_owner')::uuid,
  lock_label = e->>'lock_label', locked_until = (e->>'locked_until')::timestamptz
from unnest($1::uuid[], $2::text[]) as t (id, extra), lateral (select t.extra::jsonb) as x (e)
where m.mapping_id = t.id"""


# -- as JSON -------------------------------------------------------------------------------------


def plan_to_json(plan: RowChanges) -> Json:
    """Return a plan as an operation's row has it."""
    return {
        "repaired": plan.repaired,
        "catalogue": _to_json(plan.catalogue),
        "local": {str(shard_id): _to_json(one) for shard_id, one in plan.local.items()},
        "statuses": {str(shard_id): list(one) for shard_id, one in plan.statuses.items()},
        "foreign": [str(map_id) for map_id in plan.foreign],
    }


def plan_from_json(body: Json) -> RowChanges:
    """Return the plan of `plan_to_json`; it has no conflicts, with which nothing is done."""
    return RowChanges(
        body["repaired"],
        _from_json(body["catalogue"]),
        {UUID(shard_id): _from_json(one) for shard_id, one in body["local"].items()},
        {UUID(shard_id): OwnStatus(*one) for shard_id, one in body["statuses"].items()},
        [UUID(map_id) for map_id in body["foreign"]],
    )


def _to_json(one: Replacement) -> list[str]:
    return [pack(one.before), pack(one.after)]


def _from_json(texts: Sequence[str]) -> Replacement:
    return Replacement(*map(unpack, texts))


def pack(rows: Iterable[Row]) -> str:
    """Return rows as text."""
    parts: list[bytes] = []
    for row in rows:
        extra = None if row.extra is None else row.extra.encode()
        size = _NO_EXTRA if extra is None else len(extra)
        head = (row.mapping_id.bytes, row.shard_id.bytes, row.epoch, row.status == "online")
        parts += (_HEAD.pack(*head, len(row.lo), len(row.hi), size), row.lo, row.hi, extra or b"")
    return b64encode(zlib.compress(b"".join(parts), 1)).decode()


def unpack(text: str) -> list[Row]:
    """Return the rows of `pack`."""
    packed = zlib.decompress(b64decode(text))
    rows: list[Row] = []
    at = 0
    while at < len(packed):
        mapping_id, shard_id, epoch, is_online, lo, hi, size = _HEAD.unpack_from(packed, at)
        at += _HEAD.size
        ends = (at + lo, at + lo + hi)
        extra = None
        if size != _NO_EXTRA:
            extra = packed[ends[1] : ends[1] + size].decode()
        values = (packed[at : ends[0]], packed[ends[0] : ends[1]], UUID(bytes=mapping_id))
        rows.append(Row(*values, _STATUSES[is_online], epoch, UUID(bytes=shard_id), extra))
        at = ends[1] + (0 if extra is None else size)
    return rows


# -- in a database -------------------------------------------------------------------------------


async def replace_local(
    connection: Connection,
    map_id: UUID,
    op_id: UUID | None,
    ids: Sequence[UUID],
    rows: Sequence[Row],
) -> None:
    """Delete the mappings of these ids from a shard, and insert rows.

    They get this operation's id; without one, that which they had.
    """
    await connection.execute(_DELETE_LOCAL, map_id, ids)
    if not rows:
        return
    await connection.copy_records_to_table(
        "mapping",
        schema_name="shardmap_local",
        columns=("mapping_id", "map_id", "lo", "hi", "status", "epoch", "op_id"),
        records=(
            (row.mapping_id, map_id, row.lo, _hi(row), row.status, row.epoch, op_id or row.extra)
            for row in rows
        ),
    )


async def replace_in_catalogue(
    connection: Connection, map_id: UUID, replacement: Replacement
) -> None:
    """Delete the rows before from the catalogue, and insert those after."""
    ids = [row.mapping_id for row in replacement.before]
    if ids:
        await connection.execute(_DELETE, map_id, ids)
    rows = replacement.after
    if not rows:
        return
    await connection.copy_records_to_table(
        "mapping",
        schema_name="shardmap",
        columns=("mapping_id", "map_id", "shard_id", "lo", "hi", "status", "epoch"),
        records=(
            (row.mapping_id, map_id, row.shard_id, row.lo, _hi(row), row.status, row.epoch)
            for row in rows
        ),
    )
    extras = [(row.mapping_id, row.extra) for row in rows if row.extra is not None]
    if extras:
        await connection.execute(_SET_EXTRA, *map(list, zip(*extras, strict=True)))


def _hi(row: Row) -> bytes | None:
    return None if row.hi == TOP else row.hi
