"""Giving a mapping to another shard: what moving and reassigning share, and reassigning.

The source's row goes offline, which is the fence. The target gets its row as offline, the source
loses its own, then the catalogue names the target.

Invariant: at no step are the keys online in two shards. Until the catalogue names the target the
operation can be undone; the source then has an epoch above all that were used.
"""

from dataclasses import replace
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import Registered, check_no_sessions, clean_registry
from proxy.catalogue.locks import renew_lock
from proxy.catalogue.mapping_operations import CHECKED, END, MappingOperation
from proxy.catalogue.mapping_rows import served_bounds, serves_others, stray_bounds
from proxy.catalogue.model import CatalogueMap, Connection, Mapping, Shard, Status
from proxy.catalogue.operation import Json, Place, Step, Tools
from proxy.catalogue.shard_store import check_grants, check_rights
from proxy.catalogue.store import is_empty, map_by_id, read_shard

FENCED: Final = Step("fenced", Place.SHARD)
TARGET_READY: Final = Step("target_ready", Place.SHARD)
SOURCE_CLEARED: Final = Step("source_cleared", Place.SHARD)

# Beside that of the fence: of the target's row, and of that row when it is opened.
_EPOCHS_USED: Final = 2
_SELECT_LOCAL: Final = "select status, epoch from shardmap_local.mapping where mapping_id = $1"
_INSERT_LOCAL: Final = (
    "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch, op_id)"
    " values ($1, $2, $3, $4, $5, $6, $7) on conflict (mapping_id) do nothing"
)
_DELETE_OFFLINE: Final = (
    "delete from shardmap_local.mapping where mapping_id = $1 and op_id = $2 and status = 'offline'"
)
_RESTORE_LOCAL: Final = (
    f"{_INSERT_LOCAL.removesuffix(' do nothing')} do update set status = $5, epoch = $6, op_id = $7"
)


class ToShard(MappingOperation):
    """What both operations share. `shards` are the source and the target."""

    checks_first: ClassVar[bool] = True

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        lo: bytes,
        hi: bytes | None,
        to: str = "",
        *,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        """`to` is the name of the shard that gets the keys."""
        super().__init__(catalogue_map, lo, hi, expect=expect, token=token, op_id=op_id)
        self._to = to
        self._renews_lock = token is not None
        self._epoch = 0  # that of the fence, known from then on
        self._target_is_empty = False  # in the catalogue
        self._is_on_target = False  # as an undo finds it

    @property
    def source(self) -> Shard:
        """The shard that has the mapping."""
        return self.shards[0]

    @property
    def target(self) -> Shard:
        """The shard that gets it."""
        return self.shards[1]

    # -- its row ---------------------------------------------------------------------------------

    def body(self) -> Json:
        """Return what the row has."""
        facts = {"renews_lock": self._renews_lock, "target_is_empty": self._target_is_empty}
        return {**super().body(), **facts}

    def results(self) -> Json:
        """Return the mapping's row as it is, and the epoch of the fence."""
        return {**super().results(), "epoch": self._epoch}

    def load(self, body: Json) -> Self:
        """Read what `body` and `results` wrote."""
        self._renews_lock = body["renews_lock"]
        self._target_is_empty = body["target_is_empty"]
        self._epoch = body.get("epoch", 0)
        return super().load(body)

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards that a step works in: the source, but of some the target or both."""
        match step.name:
            case CHECKED.name:
                return self.shards
            case TARGET_READY.name:
                return (self.target,)
        return (self.source,)

    # -- begin -----------------------------------------------------------------------------------

    async def find(self, catalogue: Connection) -> None:
        """Find the mapping and both shards."""
        await super().find(catalogue)
        self.map = await map_by_id(catalogue, self.map.map_id)  # its session roles as they are now
        self.shards = (*self.shards, await read_shard(catalogue, self.map, self._to))
        self._target_is_empty = await is_empty(catalogue, self.target)

    def check(self) -> None:
        """Check the rows of both shards. Raises CatalogueError: SAME_SHARD, SHARD_OFFLINE."""
        if self.source.shard_id == self.target.shard_id:
            text = f"the mapping {self.bounds} is on shard {self.target.name} already"
            raise CatalogueError(Reason.SAME_SHARD, text)
        if self.target.status is Status.OFFLINE:
            raise self._target_offline()

    def plan_rows(self) -> list[str]:
        """Return what will be done with the rows of the shards."""
        return [
            f"Add the mapping to shard {self.target.name}, offline.",
            f"Delete the mapping from shard {self.source.name}.",
        ]

    def plan_check(self) -> str:
        """Return what is checked at first."""
        return f"Check that shard {self.target.name} can take the mapping {self.bounds}."

    # -- checked ---------------------------------------------------------------------------------

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Check both shards. The connections are kept for the steps to come."""
        async with tools.databases.shard(shard) as connection:
            await self.check_before(connection, shard)
            await clean_registry(connection)  # before the fence, so that it delays no client

    async def check_before(self, connection: Connection, shard: Shard) -> None:
        """Check that the source has the mapping, and that the target can take it."""
        await self.check_shard(connection, shard)
        check = self._check_target if self.is_target(shard) else self.check_source
        await check(connection)

    def is_target(self, shard: Shard) -> bool:
        """Return whether a shard is the target."""
        return shard.shard_id == self.target.shard_id

    async def check_source(self, connection: Connection) -> None:
        """Check that the source has the mapping, and has it offline if the catalogue has."""
        row = await connection.fetchrow(_SELECT_LOCAL, self.before.mapping_id)
        if row is None:
            text = f"shard {self.source.name} does not have the mapping {self.bounds}"
            raise CatalogueError(Reason.STEP_FAILED, text, "`shards verify` shows what differs.")
        if self.before.status is Status.OFFLINE and row["status"] != Status.OFFLINE:
            text = f"shard {self.source.name} has the mapping {self.bounds} online"
            raise CatalogueError(Reason.NOT_OFFLINE, text, "`shards verify` shows what differs.")

    async def _check_target(self, connection: Connection) -> None:
        """Check what would make the operation fail later. Raises CatalogueError."""
        where, roles = f"shard {self.target.name}", self.map.session_roles
        query = "select status from shardmap_local.identity where map_id = $1"
        if await connection.fetchval(query, self.map.map_id) != Status.ONLINE:
            raise self._target_offline()
        await self._check_free(connection)
        if self._target_is_empty:  # it may have been attached, and wait for a repair
            served = await served_bounds(connection, self.map)
            if served is not None:
                raise serves_others(self.target, served)
        await check_rights(connection, roles, where)
        await check_grants(connection, roles, where)

    async def _check_free(self, connection: Connection) -> None:
        """Check that the target has no row with these keys, but that of this operation."""
        bounds = await stray_bounds(connection, self.before, self.map.spec, self.op_id)
        if bounds is not None:
            text = f"shard {self.target.name} has a mapping {bounds} that the catalogue has not"
            raise CatalogueError(Reason.STEP_FAILED, text, "`shards verify` shows what differs.")

    def _target_offline(self) -> CatalogueError:
        hint = f"lakebase-auth-proxy shards online --shard {self.target.name}"
        return CatalogueError(Reason.SHARD_OFFLINE, f"shard {self.target.name} is offline", hint)

    # -- the rows --------------------------------------------------------------------------------

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Fence the source, add the target's row, or delete the source's."""
        match step:
            case FENCED.name:
                await self.fence(connection, shard, tools)
            case TARGET_READY.name:
                await self._check_free(connection)
                self.after = self.offline_row(self.target, self._epoch + 1)
                await connection.execute(_INSERT_LOCAL, *self._local_values(self.after))
            case SOURCE_CLEARED.name:
                await connection.execute(_DELETE_OFFLINE, self.before.mapping_id, self.op_id)
            case _:
                raise NotImplementedError(f"{self.kind} has no step {step} in a shard")

    async def fence(self, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Take the source's row offline, with a new epoch."""
        self.after = self.offline_row(self.source, self.before.epoch)
        await self.set_local(connection, shard, tools)
        self._epoch = self.after.epoch

    def offline_row(self, shard: Shard, epoch: int) -> Mapping:
        """Return the mapping's row while it is offline."""
        return replace(self.before, shard_id=shard.shard_id, status=Status.OFFLINE, epoch=epoch)

    def _local_values(self, row: Mapping) -> tuple[object, ...]:
        bounds = row.mapping_id, row.map_id, row.lo, row.hi
        return *bounds, str(row.status), row.epoch, self.op_id

    async def write_catalogue(self, catalogue: Connection, row: Mapping, *, done: bool) -> None:
        """Write the row, and renew the lock if its owner moves the mapping."""
        await super().write_catalogue(catalogue, row, done=done)
        if self._renews_lock:
            await renew_lock(catalogue, row.mapping_id)

    # -- undo ------------------------------------------------------------------------------------

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Delete the target's row, which comes first; then set the source's as it was.

        Of a catalogue that was restored the operation may be pending again after it was completed.
        Then the source has no row, and the target, if it was reached, has one that is not deleted:
        the shards stay as they are.
        """
        if self.is_target(shard):
            await connection.execute(_DELETE_OFFLINE, self.before.mapping_id, self.op_id)
            self._is_on_target = await self.read_local(connection) is not None
            return
        local = await self.read_local(connection)
        if local is None and (self._is_on_target or self.target.shard_id not in self.reached):
            return
        if local is None or local["op_id"] == self.op_id:
            epoch = self._epoch if local is None else local["epoch"]
            self.after = replace(self.before, epoch=epoch + _EPOCHS_USED + 1)
            await connection.execute(_RESTORE_LOCAL, *self._local_values(self.after))

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Set the row as it was, with the shard's epoch."""
        await self.write_catalogue(catalogue, self.after, done=True)


class Reassign(ToShard):
    """Give a mapping that is offline to another shard, and leave it offline. No rows are copied."""

    kind: ClassVar[str] = "reassign"
    steps: ClassVar[tuple[Step, ...]] = (CHECKED, FENCED, TARGET_READY, SOURCE_CLEARED, END)

    def check(self) -> None:
        """Check both shards, and that the mapping is offline."""
        super().check()
        if self.before.status is not Status.OFFLINE:
            text = f"the mapping {self.bounds} is online"
            hint = "`shards move` moves it; `shards offline` takes it offline."
            raise CatalogueError(Reason.NOT_OFFLINE, text, hint)

    def plan(self) -> list[str]:
        """Return what will be done."""
        last = f"Name shard {self.target.name} in the catalogue; the mapping stays offline."
        return [self.plan_check(), *self.plan_rows(), last]

    async def check_source(self, connection: Connection) -> None:
        """Check as well that no session lives on the keys: the other shard gets them."""
        await super().check_source(connection)
        which = Registered.of_mapping(self.before.mapping_id)
        await check_no_sessions(connection, which, f"the mapping {self.bounds}")

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Name the target."""
        await self.write_catalogue(catalogue, self.after, done=True)
