"""Detaching a shard: its row and its mappings go from the catalogue; what it has itself stays.

For: a shard that is lost, or is to be attached elsewhere. One that can be reached is fenced first:
it is offline until it is attached and repaired, and its own version is negative until then. Not
for: a shard without mappings, which `remove-shard` removes on both sides.
"""

from contextlib import AsyncExitStack
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.fence import LOCK_OUT_ALL, Registered, end_sessions, lock_out
from proxy.catalogue.locks import check_locks
from proxy.catalogue.mapping_operations import END
from proxy.catalogue.mapping_rows import check_version, locked_mappings
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Status
from proxy.catalogue.operation import Json, Operation, Place, Step, Tools
from proxy.catalogue.store import count_mappings, read_shard
from proxy.catalogue.transactions import transaction
from proxy.catalogue.verify import read_itself
from proxy.errors import ProxyError

CONFIRMED: Final = Step("confirmed", Place.CATALOGUE)
FENCED: Final = Step("fenced", Place.OUTSIDE)

_FENCE: Final = (
    "update shardmap_local.identity set version = case status when 'online'"
    " then -(greatest(version, $2) + 1) else version end, status = 'offline'"
    " where map_id = $1"
)


class Detach(Operation):
    """Delete a shard and its mappings from the catalogue. Before the fence it can be undone."""

    kind: ClassVar[str] = "detach"
    steps: ClassVar[tuple[Step, ...]] = (CONFIRMED, FENCED, END)
    kept_from: ClassVar[str] = CONFIRMED.name
    final_from: ClassVar[str] = CONFIRMED.name
    needs_shards: ClassVar[bool] = False

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        name: str,
        *,
        force: bool = False,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, op_id)
        self._name = name
        self._force = force
        self._expect = expect
        self._token = token
        self.mappings = 0
        """How many mappings there were."""
        self.fenced = False
        """Whether the shard is offline now."""
        self.reached_other = False
        """Whether another database was found at the shard's location."""

    @property
    def shard(self) -> Shard:
        """The shard."""
        return self.shards[0]

    def body(self) -> Json:
        """Return what the row has."""
        return {**super().body(), "mappings": self.mappings}

    def results(self) -> Json:
        """Return whether the shard was fenced, or another database was found."""
        return {"fenced": self.fenced, "reached_other": self.reached_other}

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        made = cls(catalogue_map, body["rows"][0]["name"], op_id=op_id).load(body)
        made.mappings, made.fenced = body["mappings"], body.get("fenced", False)
        made.reached_other = body.get("reached_other", False)
        return made

    async def find(self, catalogue: Connection) -> None:
        """Find the shard."""
        self.shards = (await read_shard(catalogue, self.map, self._name),)

    async def begin(self, catalogue: Connection) -> None:
        """Check the version, that the shard is offline unless it is forced, and locks; mark it."""
        check_version(self.shard, self._expect)
        if self.shard.status is Status.ONLINE and not self._force:
            text = f"the shard {self._name} is online"
            hint = (
                f"shards offline --shard {self._name}; --force is for one that cannot be reached."
            )
            raise CatalogueError(Reason.NOT_OFFLINE, text, hint)
        locked = await locked_mappings(catalogue, self.map, self.shard)
        await check_locks(catalogue, self.map, locked, self._token)
        counts = await count_mappings(catalogue, self.map.map_id)
        self.mappings = counts.get(self.shard.shard_id, 0)
        await catalogue.execute(
            "update shardmap.shard set op_id = $2 where shard_id = $1",
            *(self.shard.shard_id, self.op_id),
        )

    def plan(self) -> list[str]:
        """Return what will be done."""
        return [
            f"Take shard {self._name} offline in its own schema, if it can be reached.",
            "End its sessions.",
            f"Delete the shard and its {self.mappings} mappings from the catalogue.",
        ]

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Fence the shard, unless it cannot be reached or is another one."""
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(tools.databases.shard(shard))
            except driver_errors(CatalogueError, ProxyError) as error:
                failure = translated(error, f"shard {shard.name}")
                tools.progress(f"{failure.message}; it is not fenced")
                return
            self.fenced = await fence_shard(connection, self.map, shard, tools)
            self.reached_other = not self.fenced
        if self.fenced:
            await end_sessions(shard, Registered.of_map(self.map.map_id), tools, self.progress)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Do nothing: a shard that cannot be reached is no failure."""

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Delete the mappings, and the shard."""
        if step == CONFIRMED.name:
            return
        shard_id = self.shard.shard_id
        await catalogue.execute("delete from shardmap.mapping where shard_id = $1", shard_id)
        await catalogue.execute("delete from shardmap.shard where shard_id = $1", shard_id)

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is gone."""
        query = "select not exists (select from shardmap.shard where shard_id = $1)"
        return bool(await catalogue.fetchval(query, self.shard.shard_id))

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Do nothing: from the fence on it is completed."""

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Clear the mark."""
        await catalogue.execute(
            "update shardmap.shard set op_id = null where shard_id = $1", self.shard.shard_id
        )


async def fence_shard(
    connection: Connection, owner: CatalogueMap, shard: Shard, tools: Tools
) -> bool:
    """Take a shard offline in its own schema, until it is repaired. Return whether it is the shard.

    Its sessions are as they were.
    """
    itself = await read_itself(connection, owner.map_id, f"shard {shard.name}")
    if itself is None or (itself.shard_id, itself.location) != (shard.shard_id, shard.location):
        return False
    async with transaction(connection):
        await lock_out(connection, shard, tools, LOCK_OUT_ALL)
        await connection.execute(_FENCE, owner.map_id, shard.version)
    return True
