"""Operations that replace rows of the catalogue and of shards, as a plan in their own row says.

For: what repair, the rebuild of a catalogue and relocating have in common. Each reads both sides
again, makes its plan, and keeps it. Then the shards change first, and the catalogue last. Not for:
which rows are replaced (`repair_plan`, `rebuild_plan`).

Invariant: what loses keys is fenced, and its sessions have ended, before anything else has these
keys. Undone, every row is as it was: no session was admitted by the new ones, as the catalogue
never had them.
"""

from abc import abstractmethod
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.fence import LOCK_OUT_ALL, Registered, end_sessions, lock_out
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.mapping_status import FENCE, SESSIONS
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Status
from proxy.catalogue.operation import BEGUN, Json, Operation, Place, Step, Tools
from proxy.catalogue.plan_rows import (
    plan_from_json,
    plan_to_json,
    replace_in_catalogue,
    replace_local,
)
from proxy.catalogue.repair_plan import Replacement, RowChanges
from proxy.catalogue.store import SHOW_MAP

PLANNED: Final = Step("planned", Place.OUTSIDE)

_FENCE: Final = (
    "update shardmap_local.mapping set status = 'offline' where mapping_id = any($1::uuid[])"
)
_MARK: Final = "update shardmap.shard set op_id = $2 where shard_id = any($1::uuid[])"
_SET_SHARD: Final = "update shardmap.shard set status = $2, version = $3 where shard_id = $1"
_SET_IDENTITY: Final = (
    "update shardmap_local.identity set status = $2, version = $3 where map_id = $1"
)
_DELETE_FOREIGN: Final = (
    "delete from shardmap_local.identity where map_id = any($1::uuid[])",
    "delete from shardmap_local.mapping where map_id = any($1::uuid[])",
)
_OFFLINE: Final = str(Status.OFFLINE)


class PlannedOperation(Operation):
    """Replaces rows as its plan says. The plan is known after the first step."""

    steps: ClassVar[tuple[Step, ...]] = (PLANNED, FENCE, SESSIONS, LOCAL, END)

    def __init__(self, catalogue_map: CatalogueMap, op_id: UUID | None = None) -> None:
        super().__init__(catalogue_map, op_id)
        self.row_changes = RowChanges()

    def load(self, body: Json) -> Self:
        """Read what `body` and `results` wrote."""
        if "plan" in body:
            self.row_changes = plan_from_json(body["plan"])
        return super().load(body)

    def results(self) -> Json:
        """Return the plan when it has been made; it may be large."""
        return {"plan": plan_to_json(self.row_changes)} if self.state == BEGUN else {}

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards of a step: the first one for the plan, then those that change."""
        if step is PLANNED:
            return self.shards[:1]
        plan = self.row_changes
        changed = plan.local.keys() | plan.statuses.keys()
        if plan.foreign:
            changed |= {self.shards[0].shard_id}
        return tuple(shard for shard in self.shards if shard.shard_id in changed)

    async def begin(self, catalogue: Connection) -> None:
        """Mark the shards."""
        await self._mark(catalogue, self.op_id)

    async def _mark(self, catalogue: Connection, op_id: UUID | None) -> None:
        await catalogue.execute(_MARK, [shard.shard_id for shard in self.shards], op_id)

    @abstractmethod
    async def make_plan(self, tools: Tools) -> RowChanges:
        """Read both sides, and return what to replace. Raises CatalogueError."""

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Make the plan, or end the sessions of what loses keys in a shard."""
        if step == PLANNED.name:
            self.row_changes = await self.make_plan(tools)
            return
        plan = self.row_changes
        if (status := plan.statuses.get(shard.shard_id)) and status.after == _OFFLINE:
            await end_sessions(shard, Registered.of_map(self.map.map_id), tools, self.progress)
        if losing := self._replacement(shard).losing():
            await end_sessions(shard, Registered.of_mappings(losing), tools, self.progress)

    def _replacement(self, shard: Shard) -> Replacement:
        return self.row_changes.local.get(shard.shard_id, Replacement())

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Fence what loses keys; then write the rows as they are meant to be."""
        status = self.row_changes.statuses.get(shard.shard_id)
        replacement = self._replacement(shard)
        if step == FENCE.name:
            if status is not None and status.after == _OFFLINE:
                await lock_out(connection, shard, tools, LOCK_OUT_ALL)
                await self._set_identity(connection, status.after, status.new_version)
            if losing := replacement.losing():
                await lock_out(connection, shard, tools, _FENCE, losing)
            return
        await lock_out(connection, shard, tools, LOCK_OUT_ALL)
        ids, map_id = replacement.ids(), self.map.map_id
        await replace_local(connection, map_id, self.op_id, ids, replacement.after)
        if status is not None:
            await self._set_identity(connection, status.after, status.new_version)
        if shard is self.shards[0]:
            for statement in _DELETE_FOREIGN:
                await connection.execute(statement, self.row_changes.foreign)

    async def _set_identity(self, connection: Connection, status: str, version: int) -> None:
        await connection.execute(_SET_IDENTITY, self.map.map_id, status, version)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Replace the rows, and show the map to proxies if it was hidden."""
        plan = self.row_changes
        await replace_in_catalogue(catalogue, self.map.map_id, plan.catalogue)
        for shard_id, status in plan.statuses.items():
            await catalogue.execute(_SET_SHARD, shard_id, status.after, status.new_version)
        await self._mark(catalogue, None)
        await catalogue.execute(SHOW_MAP, self.map.map_id)

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the marks are gone: with the last step, or when it was undone."""
        query = "select not exists (select from shardmap.shard where op_id = $1)"
        return bool(await catalogue.fetchval(query, self.op_id))

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Write the rows as they were."""
        await connection.execute(LOCK_OUT_ALL)
        replacement = self._replacement(shard)
        ids, map_id = replacement.ids(), self.map.map_id
        await replace_local(connection, map_id, None, ids, replacement.before)
        status = self.row_changes.statuses.get(shard.shard_id)
        if status is not None and status.before is not None:
            await self._set_identity(connection, status.before, status.version)

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the marks; the rows change in the last step alone."""
        await self._mark(catalogue, None)
