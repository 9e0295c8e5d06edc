"""Changing what a shard's row says beside its location: resource, workspace, name.

Sidecars follow: the next session of the shard is dialled by the new row, those that live go on. The
location is not changed here, as another database may be there.

Invariant: the shard's version is never lower in the shard than in the catalogue. The shard is
reached by the new row, so that values which lead nowhere are never in force. Undoing leaves the
shard as it is: neither row may lead there by then, and its version may be the higher one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.mapping_rows import check_version
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.operation import (
    Json,
    Operation,
    Step,
    Tools,
    Unchanged,
    shard_from_json,
    shard_to_json,
)
from proxy.catalogue.store import read_shard, read_shards

# Negative, it says that the shard waits for a repair.
_RAISE_VERSION: Final = (
    "update shardmap_local.identity set version = case when version < 0"
    " then least(version, -$2::bigint) - 1 else greatest(version, $2) + 1 end"
    " where map_id = $1 returning pg_catalog.abs(version)"
)
_ROW: Final = (
    "select name, endpoint, instance, workspace, version from shardmap.shard where shard_id = $1"
)


@dataclass(frozen=True, slots=True)
class ShardChanges:
    """New values of a shard's row; None: as it is. Endpoint and instance exclude each other."""

    name: str | None = None
    endpoint: str | None = None
    instance: str | None = None
    workspace: str | None = None

    def of(self, shard: Shard) -> Shard:
        """Return the row with these values."""
        if self.endpoint is not None:
            shard = replace(shard, endpoint=self.endpoint, instance="")
        if self.instance is not None:
            shard = replace(shard, endpoint="", instance=self.instance)
        if self.workspace is not None:
            shard = replace(shard, workspace=self.workspace)
        return shard if self.name is None else replace(shard, name=self.name)


class AlterShard(Operation):
    """Change a shard's row. `after` is the row as the operation leaves it."""

    kind: ClassVar[str] = "alter_shard"
    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        name: str,
        changes: ShardChanges,
        *,
        expect: int | None = None,
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, op_id)
        self._name = name
        self._changes = changes
        self._expect = expect
        self.before: Shard

    @property
    def after(self) -> Shard:
        """The shard's row as it will be; it leads to the shard."""
        return self.shards[0]

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "before": shard_to_json(self.before)}

    def results(self) -> Json:
        """Return the row, with the version that the shard gave."""
        return {"rows": [shard_to_json(self.after)]}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        before = shard_from_json(body["before"])
        operation = cls(catalogue_map, before.name, ShardChanges(), op_id=op_id).load(body)
        operation.before = before
        return operation

    async def find(self, catalogue: Connection) -> None:
        """Find the shard, and pending operations on one of the new name."""
        self.before = await read_shard(catalogue, self.map, self._name)
        after = self._changes.of(self.before)
        if after != self.before:
            after = replace(after, version=self.before.version + 1)
        self.shards = (after,)
        same = await self._same_name(catalogue)
        self.blocking = frozenset(one.op_id for one in same if one.op_id)

    async def _same_name(self, catalogue: Connection) -> list[Shard]:
        shards = await read_shards(catalogue, self.map.map_id)
        after = self.after
        return [one for one in shards if one.name == after.name and one.shard_id != after.shard_id]

    async def check_values(self, catalogue: Connection) -> None:
        """Check version and name. Raises CatalogueError, and Unchanged."""
        check_version(self.before, self._expect)
        if self.after == self.before:
            raise Unchanged
        for one in await self._same_name(catalogue):
            text = f"the map {self.map.name} has the shard {one.name} at {one.location}"
            raise CatalogueError(Reason.EXISTS, text)

    async def begin(self, catalogue: Connection) -> None:
        """Check version and name, and mark the row. Raises CatalogueError: EXISTS."""
        await self.check_values(catalogue)
        await catalogue.execute(
            "update shardmap.shard set op_id = $2 where shard_id = $1",
            *(self.before.shard_id, self.op_id),
        )

    def plan(self) -> list[str]:
        """Return what will be done."""
        before, after = shard_to_json(self.before), shard_to_json(self.after)
        names = ("name", "endpoint", "instance", "workspace")
        changed = [name for name in names if before[name] != after[name]]
        values = ", ".join(f"{name} {after[name] or 'none'}" for name in changed)
        return [
            f"Raise the version of shard {self._name} in its own schema, reached by the new row.",
            f"Set in the catalogue: {values}. Proxies open new sessions by it, others go on.",
        ]

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Raise the version of the shard's identity."""
        values = self.map.map_id, self.before.version
        version = await connection.fetchval(_RAISE_VERSION, *values)
        self.shards = (replace(self.after, version=version),)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Set the row."""
        await catalogue.execute(
            "update shardmap.shard set name = $2, endpoint = $3, instance = $4, workspace = $5,"
            " version = $6, op_id = null where shard_id = $1",
            *(self.after.shard_id, *self._values()),
        )

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is as the operation leaves it."""
        row = await catalogue.fetchrow(_ROW, self.after.shard_id)
        return row is not None and tuple(row) == self._values()

    def _values(self) -> tuple[str, str, str, str, int]:
        after = self.after
        return after.name, after.endpoint, after.instance, after.workspace, after.version

    def changed(self) -> list[Shard]:
        """Return no shard: undoing leaves it as it is."""
        return []

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Do nothing."""

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the mark; the row changes in the last step alone."""
        await catalogue.execute(
            "update shardmap.shard set op_id = null where shard_id = $1", self.before.shard_id
        )
