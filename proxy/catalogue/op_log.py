"""The rows of op_log: the operations that are under way or were left pending.

For: reading them, and the changes that the machine makes. Not for: what is in a body (`operation`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import Connection
from proxy.catalogue.operation import BEGUN, UNDOING, Json, Operation, to_text

_SELECT: Final = (
    "select o.op_id, o.map_id, m.name as map_name, o.kind, o.state, o.body, o.owner, o.created_at,"
    " o.updated_at, o.progress, greatest(0, extract(epoch from pg_catalog.clock_timestamp()"
    " - o.updated_at))::float8 as seconds_in_state from shardmap.op_log o"
    " left join shardmap.shard_map m using (map_id)"
)
_ALL: Final = f"{_SELECT} where $1::uuid is null or o.map_id = $1 order by o.created_at"
_ONE: Final = f"{_SELECT} where o.op_id = $1"
_IN_THE_WAY: Final = (
    f"{_SELECT} where o.map_id = $1 and o.op_id <> $2"
    " and ($3 or (o.body->>'whole_map')::bool or o.op_id = any($4)"
    " or o.body->'shards' ?| $5::text[]) order by o.created_at"
)
_INSERT: Final = (
    "insert into shardmap.op_log (op_id, map_id, kind, state, body, owner)"
    " values ($1, $2, $3, $4, $5::text::jsonb, $6)"
)
_STATE: Final = "select state from shardmap.op_log where op_id = $1"
_RECORD: Final = (
    "update shardmap.op_log set state = $3, body = body || $4::text::jsonb, progress = null,"
    " updated_at = pg_catalog.now() where op_id = $1 and state = any($2::text[]) returning state"
)
_RECORD_UNDOING: Final = (
    "update shardmap.op_log set state = $2, updated_at = pg_catalog.now(), body = body"
    " || case state when $2 then '{}' else"
    " pg_catalog.jsonb_build_object('undoing_from', state) end"
    " where op_id = $1 and state <> all($3::text[]) returning state"
)
_RECORD_PROGRESS: Final = (
    "update shardmap.op_log set progress = $3::text::jsonb where op_id = $1 and state = $2"
    " returning state"
)


@dataclass(frozen=True, slots=True)
class OperationRow:
    """A pending operation as the catalogue has it."""

    op_id: UUID
    map_id: UUID
    map_name: str
    kind: str
    state: str
    body: Mapping[str, Any]
    owner: str
    created_at: datetime
    updated_at: datetime
    progress: Json
    seconds_in_state: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Return the row of a driver's record."""
        values = {
            "body": json.loads(record["body"]),
            "progress": json.loads(record["progress"] or "{}"),
            "map_name": record["map_name"] or "",
        }
        return cls(**{**record, **values})

    @property
    def reached_from(self) -> str:
        """The state up to which the steps were done, also while they are being undone."""
        before: str = self.body.get("undoing_from", "")
        return before if self.state == UNDOING else self.state

    def in_use(self) -> CatalogueError:
        """Return the refusal while the operator of this operation lives."""
        text = (
            f"{self.owner} runs the operation {self.op_id} ({self.kind}, {self.state}) on the same"
            f" shard since {self.created_at:%Y-%m-%d %H:%M:%S} UTC"
        )
        return CatalogueError(Reason.OPERATION_PENDING, text, "Try again when it has ended.")


async def read_all(connection: Connection, map_id: UUID | None) -> list[OperationRow]:
    """Return the operations of one map or all, the oldest first."""
    return [OperationRow.of(record) for record in await connection.fetch(_ALL, map_id)]


async def read_one(connection: Connection, op_id: UUID) -> OperationRow | None:
    """Return an operation, if it is there."""
    record = await connection.fetchrow(_ONE, op_id)
    return None if record is None else OperationRow.of(record)


async def in_the_way(connection: Connection, operation: Operation) -> list[OperationRow]:
    """Return the pending operations of the same shards, or that change the same rows."""
    shards = [str(shard.shard_id) for shard in operation.shards]
    values = (operation.op_id, operation.whole_map, list(operation.blocking), shards)
    records = await connection.fetch(_IN_THE_WAY, operation.map.map_id, *values)
    return [OperationRow.of(record) for record in records]


async def insert(connection: Connection, operation: Operation, owner: str) -> None:
    """Add the row of an operation that begins."""
    values = (operation.op_id, operation.map.map_id, operation.kind, BEGUN)
    await connection.execute(_INSERT, *values, to_text(operation.body()), owner)


async def read_state(connection: Connection, op_id: UUID, *, lock: bool = False) -> str | None:
    """Return an operation's state, None if there is no such operation; lock its row if asked."""
    state: str | None = await connection.fetchval(f"{_STATE} for update" if lock else _STATE, op_id)
    return state


async def record_step(connection: Connection, operation: Operation, step: str) -> bool:
    """Set the state after a step, and keep the results. Return whether it was the one before."""
    values = ([operation.state, step], step, to_text(operation.results()))
    return await connection.fetchval(_RECORD, operation.op_id, *values) is not None


async def record_undoing(
    connection: Connection, op_id: UUID, *, unless_in: frozenset[str]
) -> str | None:
    """Set the state of an operation that is undone, unless it is in one of these states.

    Return the new state, or None.
    """
    values = (op_id, UNDOING, list(unless_in))
    recorded: str | None = await connection.fetchval(_RECORD_UNDOING, *values)
    return recorded


async def record_progress(connection: Connection, operation: Operation) -> bool:
    """Keep the progress of the step that runs. Return whether the state is the one before it."""
    values = (operation.op_id, operation.state, to_text(operation.progress))
    return await connection.fetchval(_RECORD_PROGRESS, *values) is not None


async def delete(connection: Connection, op_id: UUID) -> None:
    """Delete the row of an operation that has ended."""
    await connection.execute("delete from shardmap.op_log where op_id = $1", op_id)
