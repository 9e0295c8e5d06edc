"""Taking a whole shard offline and online; its mappings keep their own status.

Invariant: the shard's own status is written behind all admits in flight, and refuses whatever a
proxy believes. Its version is never lower in the shard than in the catalogue.
"""

from dataclasses import replace
from datetime import datetime
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import (
    LOCK_OUT_ALL,
    Registered,
    count_sessions,
    drain_end,
    end_sessions,
    lock_out,
)
from proxy.catalogue.mapping_operations import END, LOCAL
from proxy.catalogue.mapping_rows import check_version
from proxy.catalogue.mapping_status import ANNOUNCE, FENCE, SESSIONS, sessions_sentence
from proxy.catalogue.model import CatalogueMap, Connection, SessionsMode, Shard, Status
from proxy.catalogue.operation import (
    Json,
    Operation,
    Step,
    Tools,
    Unchanged,
    shard_from_json,
    shard_to_json,
)
from proxy.catalogue.store import read_shard

_SET_IDENTITY: Final = (
    "update shardmap_local.identity set status = $2,"
    " version = case when version < 0 then version else greatest(version, $3) end"
    " where map_id = $1 returning pg_catalog.abs(version)"
)


class _ShardStatus(Operation):
    """Sets the status of a whole shard. Its mappings keep their own."""

    undo_locks_out: ClassVar[bool] = True
    status: ClassVar[Status]

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        name: str,
        *,
        expect: int | None = None,
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, op_id)
        self._name = name
        self._expect = expect
        self.after: Shard

    @property
    def before(self) -> Shard:
        """The shard's row as it was."""
        return self.shards[0]

    @classmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""
        operation = cls(catalogue_map, body["rows"][0]["name"], op_id=op_id).load(body)
        after = body.get("after")
        operation.after = operation.wanted() if after is None else shard_from_json(after)
        return operation

    def results(self) -> Json:
        """Return the row as the steps so far have left it, with the version that the shard gave."""
        return {"after": shard_to_json(self.after)}

    async def find(self, catalogue: Connection) -> None:
        """Find the shard."""
        self.shards = (await read_shard(catalogue, self.map, self._name),)
        self.after = self.wanted()

    def wanted(self) -> Shard:
        """Return the row as it is meant to be."""
        before = self.before
        if before.status is self.status:
            return before
        return replace(before, status=self.status, version=before.version + 1)

    async def begin(self, catalogue: Connection) -> None:
        """Check the version and the status, and mark the row."""
        check_version(self.before, self._expect)
        self.check()
        await catalogue.execute(
            "update shardmap.shard set op_id = $2 where shard_id = $1",
            *(self.before.shard_id, self.op_id),
        )

    def check(self) -> None:
        """Raise Unchanged if there is nothing to do."""
        if self.before.status is self.status:
            raise Unchanged

    async def write_identity(self, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Write the shard's own status, after the admits in flight."""
        await lock_out(connection, shard, tools, LOCK_OUT_ALL)
        await self._set_identity(connection)

    async def _set_identity(self, connection: Connection) -> None:
        values = (self.map.map_id, str(self.after.status), self.after.version)
        version = await connection.fetchval(_SET_IDENTITY, *values)
        self.after = replace(self.after, version=version)

    async def write_catalogue(self, catalogue: Connection, *, done: bool) -> None:
        """Write status and version of the row, and clear `op_id` if all is done."""
        await catalogue.execute(
            "update shardmap.shard set status = $2, version = $3,"
            " op_id = case when $4 then null else op_id end where shard_id = $1",
            *(self.after.shard_id, self.after.status, self.after.version, done),
        )

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is as the operation leaves it."""
        query = "select status, version from shardmap.shard where shard_id = $1"
        row = await catalogue.fetchrow(query, self.before.shard_id)
        after = self.after
        return row is not None and (row["status"], row["version"]) == (after.status, after.version)

    def begin_undo(self) -> None:
        """Want the row as it was."""
        self.after = self.before

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Set the shard's own status as it was, with a version above all used, if it changed."""
        query = "select status, version from shardmap_local.identity where map_id = $1"
        row = await connection.fetchrow(query, self.map.map_id)
        if row is None or row["version"] <= self.before.version:
            return
        self.after = replace(self.before, version=max(row["version"], self.before.version + 2))
        await self._set_identity(connection)

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Set the row as it was, with the shard's version."""
        await self.write_catalogue(catalogue, done=True)


class TakeShardOffline(_ShardStatus):
    """Take a shard offline, and end the sessions of all its mappings."""

    kind: ClassVar[str] = "shard_offline"
    steps: ClassVar[tuple[Step, ...]] = (FENCE, ANNOUNCE, SESSIONS, END)
    kept_from: ClassVar[str] = ANNOUNCE.name
    status: ClassVar[Status] = Status.OFFLINE

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        name: str,
        *,
        sessions: SessionsMode = SessionsMode.KILL,
        drain_seconds: float = 0.0,
        expect: int | None = None,
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, name, expect=expect, op_id=op_id)
        self._sessions = sessions
        self._drain_seconds = drain_seconds
        self._drain_until: datetime | None = None
        self.sessions_ended = 0
        # Set for a shard that is offline already, if `count_shard_sessions` finds some.
        self.has_sessions = False

    def body(self) -> Json:
        """Return what the row has."""
        arguments = {"sessions": str(self._sessions), "drain_seconds": self._drain_seconds}
        return {**super().body(), **arguments}

    def load(self, body: Json) -> Self:
        """Read what `body` wrote."""
        self._sessions = SessionsMode(body["sessions"])
        self._drain_seconds = body["drain_seconds"]
        return super().load(body)

    def check(self) -> None:
        """Raise Unchanged for a shard that is offline, unless sessions of it are to be ended."""
        if self.before.status is Status.OFFLINE and not self.has_sessions:
            raise Unchanged

    def plan(self) -> list[str]:
        """Return what will be done."""
        what = f"shard {self._name}"
        sentence = sessions_sentence(self._sessions, what, self._drain_seconds)
        return [
            f"Take {what} offline in its own schema: it refuses new sessions of all mappings.",
            "Take it offline in the catalogue, which all proxies hear of.",
            sentence,
        ]

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Fence: set the shard's own status behind all admits in flight (R15)."""
        self.after = self.wanted()
        await self.write_identity(connection, shard, tools)
        if self._sessions is SessionsMode.DRAIN:
            self._drain_until = drain_end(tools, self._drain_seconds)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Announce, or clear the mark at the end."""
        if step == ANNOUNCE.name:
            await self.write_catalogue(catalogue, done=False)
        else:
            await catalogue.execute(
                "update shardmap.shard set op_id = null where shard_id = $1 and op_id = $2",
                *(self.before.shard_id, self.op_id),
            )

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """End the sessions of the map in this shard, and prove that none is left."""
        if self._sessions is not SessionsMode.KEEP:
            which = Registered.of_map(self.map.map_id)
            until = self._drain_until  # a process that resumes does not wait for the drain again
            self.sessions_ended += await end_sessions(
                shard, which, tools, self.progress, drain_until=until
            )


class TakeShardOnline(_ShardStatus):
    """Take a shard online; each of its mappings has its own status again."""

    kind: ClassVar[str] = "shard_online"
    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)
    checks_first: ClassVar[bool] = True
    status: ClassVar[Status] = Status.ONLINE

    def plan(self) -> list[str]:
        """Return what will be done."""
        return [
            f"Take shard {self._name} online in its own schema.",
            "Take it online in the catalogue.",
        ]

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check as well that it does not wait for a repair: others may have its keys (I1)."""
        await super().check_shard(connection, shard)
        query = "select version < 0 from shardmap_local.identity where map_id = $1"
        if await connection.fetchval(query, self.map.map_id):
            text = f"the shard {shard.name} is offline until it is repaired"
            hint = f"shards verify --shard {shard.name}, then `shards repair`."
            raise CatalogueError(Reason.SHARD_OFFLINE, text, hint)

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Set the shard's own status."""
        self.after = self.wanted()
        await self.write_identity(connection, shard, tools)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Set the status in the catalogue."""
        await self.write_catalogue(catalogue, done=True)


async def count_shard_sessions(tools: Tools, catalogue_map: CatalogueMap, shard: Shard) -> int:
    """Return how many sessions of this map may be alive in a shard."""
    async with tools.databases.shard(shard) as connection:
        return await count_sessions(connection, Registered.of_map(catalogue_map.map_id))
