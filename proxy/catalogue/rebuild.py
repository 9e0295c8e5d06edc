"""Making the catalogue as all shards of a map are: `repair --all --from shard`.

For: a catalogue that was lost or restored to the past. Every shard of the map is read, so all must
be reached. Not for: what is right where two shards differ (`rebuild_plan`).
"""

from collections.abc import Iterator
from itertools import chain
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.differences import Row, Stream, shown
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Status
from proxy.catalogue.operation import Databases, Json, Tools
from proxy.catalogue.planned_operation import PlannedOperation
from proxy.catalogue.rebuild_plan import from_all_shards
from proxy.catalogue.repair import check_locked_rows
from proxy.catalogue.repair_plan import OwnStatus, RowChanges
from proxy.catalogue.store import read_shards
from proxy.catalogue.transactions import transaction
from proxy.catalogue.verify import Itself, catalogue_stream, check_itself, local_stream, read_itself

_SHOWN_MAX: Final = 20


class Rebuild(PlannedOperation):
    """Make the catalogue as all shards are. No other operation of the map runs meanwhile."""

    kind: ClassVar[str] = "repair_all"
    whole_map: ClassVar[bool] = True

    def __init__(
        self, catalogue_map: CatalogueMap, token: UUID | None = None, op_id: UUID | None = None
    ) -> None:
        super().__init__(catalogue_map, op_id)
        self._token = token

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "token": None if self._token is None else str(self._token)}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        token = None if body["token"] is None else UUID(body["token"])
        return cls(catalogue_map, token, op_id).load(body)

    async def find(self, catalogue: Connection) -> None:
        """Find the shards."""
        self.shards = tuple(await read_shards(catalogue, self.map.map_id))

    async def begin(self, catalogue: Connection) -> None:
        """Check that there are shards, and mark them."""
        if not self.shards:
            text = f"the map {self.map.name} has no shards"
            raise CatalogueError(Reason.UNKNOWN_SHARD, text, "`shards attach` adds one.")
        await super().begin(catalogue)

    def plan(self) -> list[str]:
        """Return what will be done."""
        names = ", ".join(shard.name for shard in self.shards)
        return [
            f"Read all mappings of the shards {names}.",
            "Take keys from a shard where another one has them with a higher epoch.",
            "Change the catalogue to what the shards have.",
        ]

    async def make_plan(self, tools: Tools) -> RowChanges:
        """Read the catalogue and all shards, and return what to replace. Raises CatalogueError."""
        databases, map_id = tools.databases, self.map.map_id
        shards: dict[UUID, list[Row]] = {}
        itselves: dict[UUID, Itself] = {}
        for shard in self.shards:
            tools.progress(f"reading shard {shard.name}")
            itselves[shard.shard_id], shards[shard.shard_id] = await self._read(databases, shard)
        tools.progress("reading the catalogue")
        async with (
            databases.catalogue() as catalogue,
            transaction(catalogue, read_only=True),
        ):
            rows = await _all(catalogue_stream(catalogue, map_id))
            plan = from_all_shards(self.map.spec, rows, shards)
            await check_locked_rows(catalogue, self.map, plan, self._token)
        for shard in self.shards:
            self._plan_status(plan, shard, itselves[shard.shard_id])
        return plan

    async def _read(self, databases: Databases, shard: Shard) -> tuple[Itself, list[Row]]:
        async with (
            databases.shard(shard) as connection,
            transaction(connection, read_only=True),
        ):
            where = f"shard {shard.name}"
            itself = await read_itself(connection, self.map.map_id, where)
            if itself is None:
                text = f"{where} does not know the map {self.map.name}"
                raise CatalogueError(Reason.WRONG_SHARD, text)
            check_itself(itself, shard)
            stream = local_stream(connection, self.map.map_id, shard.shard_id)
            return itself, await _all(stream)

    def _plan_status(self, plan: RowChanges, shard: Shard, itself: Itself) -> None:
        """Plan a shard's own status: the shard is right; one that waits for this goes online."""
        if itself.waits and any(row.shard_id == shard.shard_id for row in chain(*plan.conflicts)):
            return  # another shard has keys of it online: it goes on waiting
        after = str(Status.ONLINE) if itself.waits else itself.status
        if itself.waits or after != shard.status:
            version = max(abs(itself.version), shard.version) + 1
            plan.statuses[shard.shard_id] = OwnStatus(itself.status, itself.version, after, version)

    def conflict(self) -> CatalogueError | None:
        """Return the refusal for keys with which nothing was done, None if there are none."""
        conflicts = self.row_changes.conflicts
        if not conflicts:
            return None
        lines = list(self._in_words(conflicts[:_SHOWN_MAX]))
        if len(conflicts) > _SHOWN_MAX:
            lines.append(f"and {len(conflicts) - _SHOWN_MAX} more")
        text = "all other keys were repaired; nothing was done with these, which two shards have:"
        hint = (
            "Take the keys from the wrong shard: `shards verify --shard`, then `shards repair`"
            " --from shard for the right one."
        )
        return CatalogueError(Reason.OVERLAP, "\n  ".join([text, *lines]), hint)

    def _in_words(self, conflicts: list[tuple[Row, Row]]) -> Iterator[str]:
        names = {shard.shard_id: shard.name for shard in self.shards}
        for pair in conflicts:
            lo, hi = max(row.lo for row in pair), min(row.hi for row in pair)
            low, high = shown(self.map.spec, lo, hi)
            sides = (f"{names[row.shard_id]} ({row.status}, epoch {row.epoch})" for row in pair)
            yield f"[{low}, {high}): " + " and ".join(sides)


async def _all(stream: Stream) -> list[Row]:
    rows = []
    while (row := await stream.next()) is not None:
        rows.append(row)
    return rows
