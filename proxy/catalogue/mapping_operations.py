"""Adding and deleting one mapping, and what all operations on one mapping share.

Invariant: the shard's row comes first when keys are added and goes first when they are deleted. In
the catalogue a row that is being added shows as offline until the shard has it. Keys are not added
while a shard serves them beside the catalogue, as one that was attached may, until it is repaired.
"""

from dataclasses import replace
from typing import Any, ClassVar, Final, Self
from uuid import UUID, uuid4

from proxy.catalogue.bounds import in_words
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import Registered, check_no_sessions, lock_out
from proxy.catalogue.locks import check_locks
from proxy.catalogue.mapping_rows import (
    check_expected,
    check_not_served,
    mapping_exact,
    mapping_from_json,
    mapping_to_json,
    mappings_overlapping,
    shard_of_mapping,
    stray_bounds,
)
from proxy.catalogue.model import CatalogueMap, Connection, Mapping, Shard, Status
from proxy.catalogue.operation import (
    Json,
    Operation,
    Place,
    Step,
    Tools,
    shard_from_json,
    shard_to_json,
)
from proxy.catalogue.store import empty_shards, read_shard

CHECKED: Final = Step("checked", Place.OUTSIDE)
LOCAL: Final = Step("local", Place.SHARD)
END: Final = Step("end", Place.CATALOGUE)

_SET_LOCAL: Final = (
    "update shardmap_local.mapping set status = $2, op_id = $3,"
    " epoch = case when op_id = $3 and status = $2 then epoch else greatest(epoch, $4) + 1 end"
    " where mapping_id = $1 returning epoch"
)
_SELECT_LOCAL: Final = (
    "select status, epoch, op_id from shardmap_local.mapping where mapping_id = $1 for update"
)
# Of a catalogue that was restored, an operation may be pending again that was completed: what
# others have changed since, and what is in use, is left.
_DELETE_ADDED: Final = (
    "delete from shardmap_local.mapping m where mapping_id = $1 and op_id = $2 and not exists"
    " (select from shardmap_local.live_session s where s.mapping_id = m.mapping_id)"
)


class MappingOperation(Operation):
    """An operation on one mapping that exists; `before` is its row as it was.

    `after` is the row as the operation leaves it; its epoch is known once the shard has it.
    """

    undo_locks_out: ClassVar[bool] = True

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        lo: bytes,
        hi: bytes | None,
        *,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        """`token` is that of the caller's lock."""
        super().__init__(catalogue_map, op_id)
        self._lo = lo
        self._hi = hi
        self._expect = expect
        self.token = token
        self.before: Mapping
        self.after: Mapping

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        return in_words(self.map.spec, self._lo, self._hi)

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "mapping": mapping_to_json(self.before)}

    def results(self) -> Json:
        """Return the row as the steps so far have left it, with the epoch that the shard gave."""
        return {"after": mapping_to_json(self.after)}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        mapping = mapping_from_json(body["mapping"])
        operation = cls(catalogue_map, mapping.lo, mapping.hi, op_id=op_id).load(body)
        operation.before = mapping
        operation.after = mapping_from_json(body["after"]) if "after" in body else mapping
        return operation

    async def find(self, catalogue: Connection) -> None:
        """Find the mapping and its shard."""
        self.before = await mapping_exact(catalogue, self.map, self._lo, self._hi)
        self.after = self.before
        self.shards = (await shard_of_mapping(catalogue, self.before),)

    async def begin(self, catalogue: Connection) -> None:
        """Check the lock and the epoch, and mark the row."""
        await check_locks(catalogue, self.map, (self.before,), self.token)
        check_expected(f"the mapping {self.bounds}", self._expect, self.before.epoch)
        self.check()
        await catalogue.execute(
            "update shardmap.mapping set op_id = $2 where mapping_id = $1",
            self.before.mapping_id,
            self.op_id,
        )

    def check(self) -> None:
        """Check the mapping's state. Raises CatalogueError, or Unchanged."""

    async def read_local(self, connection: Connection) -> Any:
        """Return the shard's row, locked, if it has one."""
        return await connection.fetchrow(_SELECT_LOCAL, self.before.mapping_id)

    async def set_local(self, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Set the status of the shard's row, with a new epoch, once for this operation."""
        values = (self.before.mapping_id, str(self.after.status), self.op_id, self.before.epoch)
        row = await lock_out(connection, shard, tools, _SET_LOCAL, *values)
        if row is None:
            text = f"shard {shard.name} does not have the mapping {self.bounds}"
            raise CatalogueError(Reason.STEP_FAILED, text)
        self.after = replace(self.after, epoch=row["epoch"])

    async def write_catalogue(self, catalogue: Connection, row: Mapping, *, done: bool) -> None:
        """Write what operations change of a row, and clear `op_id` if all is done."""
        await catalogue.execute(
            "update shardmap.mapping set status = $2, sessions = $3, drain_until = $4, epoch = $5,"
            " op_id = case when $6 then null else op_id end, shard_id = $7 where mapping_id = $1",
            row.mapping_id,
            row.status,
            row.sessions,
            row.drain_until,
            row.epoch,
            done,
            row.shard_id,
        )

    def begin_undo(self) -> None:
        """Want the row as it was."""
        self.after = self.before

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is as the operation leaves it."""
        row = await catalogue.fetchrow(
            "select status, epoch from shardmap.mapping where mapping_id = $1",
            self.before.mapping_id,
        )
        after = self.after
        return row is not None and (row["status"], row["epoch"]) == (after.status, after.epoch)


class AddMapping(MappingOperation):
    """Add a mapping: in the catalogue as offline, in the shard, then as it is meant to be."""

    kind: ClassVar[str] = "add"
    steps: ClassVar[tuple[Step, ...]] = (CHECKED, LOCAL, END)

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        lo: bytes,
        hi: bytes | None,
        shard: str = "",
        *,
        status: Status = Status.ONLINE,
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, lo, hi, op_id=op_id)
        self._shard = shard
        self._status = status
        self._mapping_id = uuid4()
        self._empty: tuple[Shard, ...] = ()

    def body(self) -> Json:
        """Return what the row has: the status is the one that is meant."""
        empty = [shard_to_json(shard) for shard in self._empty]
        return {**super().body(), "mapping": mapping_to_json(self.after), "empty": empty}

    def load(self, body: Json) -> Self:
        """Read what `body` wrote."""
        self._empty = tuple(shard_from_json(row) for row in body.get("empty", ()))
        return super().load(body)

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards that a step works in: those without mappings are checked at once."""
        return self._empty[:1] if step is CHECKED else self.shards

    async def find(self, catalogue: Connection) -> None:
        """Find the shard, and pending operations on the same keys."""
        shard = await read_shard(catalogue, self.map, self._shard)
        self.shards = (shard,)
        self.before = self.after = Mapping(
            self._mapping_id,
            self.map.map_id,
            shard.shard_id,
            self._lo,
            self._hi,
            self._status,
        )
        taken = await mappings_overlapping(catalogue, self.map, self._lo, self._hi)
        self.blocking = frozenset(one.op_id for one in taken if one.op_id)

    async def begin(self, catalogue: Connection) -> None:
        """Add the row as offline. Raises CatalogueError: OVERLAP."""
        if taken := await mappings_overlapping(catalogue, self.map, self._lo, self._hi):
            other = in_words(self.map.spec, taken[0].lo, taken[0].hi)
            shard = await shard_of_mapping(catalogue, taken[0])
            text = f"{self.bounds} overlaps {other}, which is on shard {shard.name}"
            raise CatalogueError(Reason.OVERLAP, text)
        row = self.after
        self._empty = tuple(await empty_shards(catalogue, self.map.map_id))
        await catalogue.execute(
            "insert into shardmap.mapping (mapping_id, map_id, shard_id, lo, hi, status, op_id)"
            " values ($1, $2, $3, $4, $5, 'offline', $6)",
            *(row.mapping_id, row.map_id, row.shard_id, row.lo, row.hi, self.op_id),
        )

    def plan(self) -> list[str]:
        """Return what will be done."""
        name = self.shards[0].name
        return [
            f"Reserve the keys {self.bounds} in the catalogue, as offline.",
            f"Add the mapping to shard {name}, {self.after.status}.",
            f"Set the mapping {self.after.status} in the catalogue.",
        ]

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Check the shards without mappings."""
        await self.check_others(tools)

    async def check_others(self, tools: Tools) -> None:
        """Check that no shard without mappings serves the keys (I1), and its own shard none."""
        bounds, own = (self._lo, self._hi), self.after.shard_id
        await check_not_served(tools, self.map, self._empty, bounds, own=own)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Add the shard's row."""
        row = self.after
        bounds = await stray_bounds(connection, row, self.map.spec, self.op_id)
        if bounds is not None:
            text = f"shard {shard.name} has a mapping {bounds} that the catalogue has not"
            raise CatalogueError(Reason.STEP_FAILED, text)
        await connection.execute(
            "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch, op_id)"
            " values ($1, $2, $3, $4, $5, $6, $7) on conflict (mapping_id) do nothing",
            *(row.mapping_id, row.map_id, row.lo, row.hi, row.status, row.epoch, self.op_id),
        )

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Set the row's final status."""
        await self.write_catalogue(catalogue, self.after, done=True)

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Delete the shard's row, if it is as it was added."""
        await connection.execute(_DELETE_ADDED, self.after.mapping_id, self.op_id)

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Delete the row."""
        await catalogue.execute(
            "delete from shardmap.mapping where mapping_id = $1", self.after.mapping_id
        )


class DeleteMapping(MappingOperation):
    """Delete a mapping that is offline and has no live session."""

    kind: ClassVar[str] = "delete"
    steps: ClassVar[tuple[Step, ...]] = (CHECKED, LOCAL, END)
    _epoch = 0  # of the shard's row, which may be higher than the catalogue's

    def results(self) -> Json:
        """Return the epoch of the shard's row."""
        return {**super().results(), "epoch": self._epoch}

    def load(self, body: Json) -> Self:
        """Read what `results` wrote."""
        self._epoch = body.get("epoch", 0)
        return super().load(body)

    def check(self) -> None:
        """Check that the mapping is offline."""
        if self.before.status is not Status.OFFLINE:
            text = f"the mapping {self.bounds} is online"
            hint = "lakebase-auth-proxy shards offline takes it offline."
            raise CatalogueError(Reason.NOT_OFFLINE, text, hint)

    def plan(self) -> list[str]:
        """Return what will be done."""
        return [
            f"Delete the mapping {self.bounds} from shard {self.shards[0].name}.",
            "Delete the mapping from the catalogue.",
        ]

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check that no session lives on the keys: another shard may get them next."""
        await super().check_shard(connection, shard)
        which = Registered.of_mapping(self.before.mapping_id)
        await check_no_sessions(connection, which, f"the mapping {self.bounds}")

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Read the epoch of the shard's row: it must be known when the row is gone."""
        async with tools.databases.shard(shard) as connection:
            await self.check_shard(connection, shard)
            local = await self.read_local(connection)
        self._epoch = 0 if local is None else local["epoch"]

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Delete the shard's row."""
        local = await self.read_local(connection)
        if local is not None and local["status"] != Status.OFFLINE:
            text = f"shard {shard.name} has the mapping {self.bounds} online"
            raise CatalogueError(Reason.NOT_OFFLINE, text)
        await connection.execute(
            "delete from shardmap_local.mapping where mapping_id = $1", self.before.mapping_id
        )

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Delete the row."""
        await catalogue.execute(
            "delete from shardmap.mapping where mapping_id = $1", self.before.mapping_id
        )

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is gone."""
        query = "select 1 from shardmap.mapping where mapping_id = $1"
        return await catalogue.fetchval(query, self.before.mapping_id) is None

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Add the shard's row again if it was deleted, with an epoch above all used."""
        local = await self.read_local(connection)
        if local is None:
            row, epoch = self.before, max(self.before.epoch, self._epoch) + 1
            await connection.execute(
                "insert into shardmap_local.mapping"
                " (mapping_id, map_id, lo, hi, status, epoch, op_id)"
                " values ($1, $2, $3, $4, 'offline', $5, $6)",
                *(row.mapping_id, row.map_id, row.lo, row.hi, epoch, self.op_id),
            )
            self.after = replace(self.before, epoch=epoch)
        elif local["op_id"] == self.op_id:
            self.after = replace(self.before, epoch=local["epoch"])

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the mark; the epoch is the shard's if that has changed."""
        await self.write_catalogue(catalogue, self.after, done=True)
