"""Relocating a shard: the same database at another host, port or name.

For: a shard whose host was renamed, or that was restored to another one. Its row leads there from
then on, and the catalogue is made as the shard is there. Not for: a branch beside its shard
(`attach`).

If the database at the old location still answers and is another one, it is fenced before the
catalogue leads to the new one: two databases may not both serve the keys. It is offline then for
good, so from the state before on the operation can only be completed.

Invariant: the shard's version is never lower in the shard than in the catalogue.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from secrets import randbits
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.detach import fence_shard
from proxy.catalogue.differences import Difference, ShardDiffers, of_keys
from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.fence import Registered, end_sessions
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.mapping_rows import check_version
from proxy.catalogue.mapping_status import FENCE, SESSIONS
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.operation import (
    Json,
    Place,
    Step,
    Tools,
    Unchanged,
    shard_from_json,
    shard_to_json,
)
from proxy.catalogue.planned_operation import PLANNED, PlannedOperation
from proxy.catalogue.repair import check_locked_rows, other_owners, plan_from_shard
from proxy.catalogue.repair_plan import Choice, OwnStatus, RowChanges
from proxy.catalogue.store import read_shard, read_shards, shards_by_id
from proxy.catalogue.verify import Itself, read_itself, reading
from proxy.errors import ProxyError

OLD: Final = Step("old_fenced", Place.OUTSIDE)

SET_LOCATION: Final = (
    "update shardmap_local.identity set location = $2, version = $3 where map_id = $1"
)
SET_ROW: Final = (
    "update shardmap.shard set host = $2, port = $3, dbname = $4, endpoint = $5, instance = $6,"
    " workspace = $7, version = version + 1 where shard_id = $1 returning version"
)
_KEY_BITS: Final = 62


class Relocate(PlannedOperation):
    """Lead a shard's row to another location, and make the catalogue as the shard is there."""

    kind: ClassVar[str] = "relocate"
    steps: ClassVar[tuple[Step, ...]] = (PLANNED, FENCE, SESSIONS, LOCAL, OLD, END)
    kept_from: ClassVar[str] = LOCAL.name
    final_from: ClassVar[str] = LOCAL.name

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        name: str,
        new: Shard,
        found: Sequence[Difference] = (),
        *,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        """`new` has the new location; `found` is what differs, as it was read before."""
        super().__init__(catalogue_map, op_id)
        self._name = name
        self._new = new
        self._old = new
        self._expect = expect
        self._token = token
        self._found = found
        self._versions = (0, 0)  # of the shard itself: before, and at its new location
        self.differences: list[Difference] = []
        """What was repaired."""

    def body(self) -> Json:
        """Return what the row has."""
        token = None if self._token is None else str(self._token)
        return {**super().body(), "old": shard_to_json(self._old), "token": token}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        new = shard_from_json(body["rows"][0])
        return cls(catalogue_map, new.name, new, op_id=op_id).load(body)

    def load(self, body: Json) -> Self:
        """Read what `body` wrote."""
        self._old = shard_from_json(body["old"])
        self._token = None if body["token"] is None else UUID(body["token"])
        before, after = body.get("versions", self._versions)
        self._versions = (before, after)
        return super().load(body)

    def results(self) -> Json:
        """Return the plan, and the versions of the shard itself."""
        return {**super().results(), "versions": list(self._versions)}

    @property
    def shard(self) -> Shard:
        """The shard, at its new location."""
        return self.shards[0]

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards of a step; the shard itself is changed in any case."""
        if step is OLD:
            return self.shards[:1]
        others = [one for one in super().shards_of(step) if one is not self.shards[0]]
        return self.shards[0], *([] if step is PLANNED else others)

    async def find(self, catalogue: Connection) -> None:
        """Find the shard, and those that lose keys to it."""
        self._old = await read_shard(catalogue, self.map, self._name)
        where = self._new
        new = replace(
            self._old,
            host=where.host,
            port=where.port,
            database=where.database,
            endpoint=where.endpoint,
            instance=where.instance,
            workspace=where.workspace,
        )
        others = other_owners(self._found, self._old)
        self.shards = (new, *await shards_by_id(catalogue, sorted(others)))

    async def begin(self, catalogue: Connection) -> None:
        """Check the version, and that no other shard is there; mark them.

        Raises CatalogueError: STALE_VERSION, EXISTS.
        """
        check_version(self._old, self._expect)
        for one in await read_shards(catalogue, self.map.map_id):
            if one.location == self.shard.location and one.shard_id != self.shard.shard_id:
                text = f"the map {self.map.name} has the shard {one.name} at {one.location}"
                raise CatalogueError(Reason.EXISTS, text)
        if shard_to_json(self._old) == shard_to_json(self.shard) and not self._found:
            raise Unchanged
        await super().begin(catalogue)

    def plan(self) -> list[str]:
        """Return what will be done."""
        old, new = self._old.location, self.shard.location
        return [
            f"Check that {new} is the shard {self._name}.",
            f"Write its location, {new}, into it, and repair what differs from the catalogue.",
            f"Take the shard offline at {old}, if another database answers there.",
            f"Lead the shard {self._name} to {new} in the catalogue.",
        ]

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check that the new location is the shard."""
        if shard.shard_id != self.shard.shard_id:
            await super().check_shard(connection, shard)
            return
        itself = await read_itself(connection, self.map.map_id, f"shard {shard.name}")
        check_same(itself, self._old, shard)

    # -- the steps -------------------------------------------------------------------------------

    async def make_plan(self, tools: Tools) -> RowChanges:
        """Compare the catalogue with the shard at its new location."""
        async with reading(tools.databases, self.map, self.shard) as verified:
            itself = check_same(verified.itself, self._old, self.shard)
            found = [one async for one in verified.differences()]
            choice = Choice(self.shard.shard_id, of_keys(found), of_keys(found))
            owners = other_owners(found, self.shard)
            others = [one for one in self.shards[1:] if one.shard_id in owners]
            if len(others) < len(owners):
                raise CatalogueError(Reason.REPORT_STALE, "other shards have its keys now")
            plan = await plan_from_shard(verified, tools.databases, choice, others)
            await check_locked_rows(verified.catalogue, self.map, plan, self._token)
        self.differences = found
        plan.repaired = len(found)
        version = raised(itself.version, self._old.version + 1)
        if any(isinstance(one, ShardDiffers) for one in found):
            version = max(abs(itself.version), self.shard.version) + 1
            plan.statuses[self.shard.shard_id] = OwnStatus(
                itself.status, itself.version, str(self.shard.status), version
            )
        self._versions = (itself.version, version)
        return plan

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Fence, or change rows; with those the shard's own location and version."""
        await super().do_shard(step, connection, shard, tools)
        if step == LOCAL.name and shard.shard_id == self.shard.shard_id:
            values = self.map.map_id, shard.location, self._versions[1]
            await connection.execute(SET_LOCATION, *values)

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Fence what answers at the old location, if it is another database."""
        if step != OLD.name:
            await super().do_outside(step, shard, tools)
            return
        async with AsyncExitStack() as stack:
            here = await stack.enter_async_context(tools.databases.shard(self.shard))
            try:
                there = await stack.enter_async_context(tools.databases.shard(self._old))
            except driver_errors(CatalogueError, ProxyError) as error:
                failure = translated(error, f"shard {self._name} at {self._old.location}")
                tools.progress(f"{failure.message}; it is not fenced there")
                return
            if await _are_same_database(here, there):
                return
            fenced = await fence_shard(there, self.map, self._old, tools)
        if fenced:
            await end_sessions(self._old, Registered.of_map(self.map.map_id), tools, self.progress)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Replace the rows, and lead the shard's row to its new location."""
        new = self.shard
        values = (new.host, new.port, new.database, new.endpoint, new.instance, new.workspace)
        await catalogue.execute(SET_ROW, new.shard_id, *values)
        await super().do_catalogue(step, catalogue)

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Write rows and location as they were."""
        await super().undo_shard(connection, shard)
        if shard.shard_id == self.shard.shard_id:
            values = self.map.map_id, self._old.location, self._versions[0]
            await connection.execute(SET_LOCATION, *values)


def check_same(itself: Itself | None, old: Shard, new: Shard) -> Itself:
    """Check that a database is the shard that was at another location. Raises CatalogueError."""
    known = (old.location, new.location)
    if itself is not None and itself.shard_id == old.shard_id and itself.location in known:
        return itself
    text = f"{new.location} is not the shard {old.name}"
    if itself is not None:
        text += f": it says that it is {itself.location}"
    raise CatalogueError(Reason.WRONG_SHARD, text, "`shards attach` is for a database that is new.")


def raised(own: int, version: int) -> int:
    """Return a shard's own version, raised to that of the catalogue if it is lower.

    It stays negative, where the shard waits for a repair.
    """
    return min(own, -version) if own < 0 else max(own, version)


async def _are_same_database(one: Connection, other: Connection) -> bool:
    """Return whether two connections lead to the same database: they share its advisory locks."""
    key = randbits(_KEY_BITS)
    await one.execute("select pg_catalog.pg_advisory_lock($1)", key)
    try:
        locked = await other.fetchval("select pg_catalog.pg_try_advisory_lock($1)", key)
        if locked:
            await other.execute("select pg_catalog.pg_advisory_unlock($1)", key)
        return not locked
    finally:
        await one.execute("select pg_catalog.pg_advisory_unlock($1)", key)
