"""Taking mappings offline and online.

Offline: the shard's row first, which is the fence; then the catalogue, which all proxies hear of;
then the sessions that were there before, until none is left. Online: the shard, then the catalogue.

Invariant: from the fence on the shard refuses new sessions, whatever a proxy believes. The epoch of
a mapping is never lower in the shard than in the catalogue.
"""

from dataclasses import replace
from datetime import datetime
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.fence import Registered, drain_end, end_sessions
from proxy.catalogue.mapping_operations import END, LOCAL, MappingOperation
from proxy.catalogue.model import CatalogueMap, Connection, SessionsMode, Shard, Status
from proxy.catalogue.operation import Json, Place, Step, Tools, Unchanged

FENCE: Final = Step("fence", Place.SHARD)
ANNOUNCE: Final = Step("announce", Place.CATALOGUE)
SESSIONS: Final = Step("sessions", Place.OUTSIDE)

_STATE: Final = "select status, sessions, epoch, op_id from shardmap.mapping where mapping_id = $1"
_SENTENCES: Final = {
    SessionsMode.KILL: "End the sessions of {what} until none is left.",
    SessionsMode.DRAIN: "End the sessions of {what} when idle, the rest after {seconds:g} s.",
    SessionsMode.KEEP: "Leave the sessions of {what} as they are.",
}


def sessions_sentence(mode: SessionsMode, what: str, seconds: float) -> str:
    """Return what a plan says of the sessions."""
    return _SENTENCES[mode].format(what=what, seconds=seconds)


class _MappingStatus(MappingOperation):
    """What offline and online share."""

    status: ClassVar[Status]

    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Set the shard's row as it was, with an epoch above all used, if it was changed."""
        local = await self.read_local(connection)
        if local is None or local["op_id"] != self.op_id:
            return
        epoch = local["epoch"]
        if local["status"] != self.before.status or epoch <= self.before.epoch + 1:
            epoch = max(epoch, self.before.epoch) + 1
            await connection.execute(
                "update shardmap_local.mapping set status = $2, epoch = $3 where mapping_id = $1",
                *(self.before.mapping_id, str(self.before.status), epoch),
            )
        self.after = replace(self.before, epoch=epoch)

    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Set the row as it was, with the shard's epoch."""
        await self.write_catalogue(catalogue, self.after, done=True)


class TakeOffline(_MappingStatus):
    """Take a mapping offline, and end its sessions. From the announcement on it is completed."""

    kind: ClassVar[str] = "offline"
    steps: ClassVar[tuple[Step, ...]] = (FENCE, ANNOUNCE, SESSIONS, END)
    kept_from: ClassVar[str] = ANNOUNCE.name
    status: ClassVar[Status] = Status.OFFLINE

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        lo: bytes,
        hi: bytes | None,
        *,
        sessions: SessionsMode = SessionsMode.KILL,
        drain_seconds: float = 0.0,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        super().__init__(catalogue_map, lo, hi, expect=expect, token=token, op_id=op_id)
        self._sessions = sessions
        self._drain_seconds = drain_seconds
        self._drain_until: datetime | None = None
        self.sessions_ended = 0

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
        """Raise Unchanged for the same offline."""
        before = self.before
        if before.status is Status.OFFLINE and before.sessions is self._sessions:
            raise Unchanged
        self.after = replace(before, status=Status.OFFLINE, sessions=self._sessions)

    def plan(self) -> list[str]:
        """Return what will be done."""
        what = f"the mapping {self.bounds}"
        sentence = sessions_sentence(self._sessions, what, self._drain_seconds)
        return [
            f"Take {what} offline on shard {self.shards[0].name}: it refuses new sessions.",
            "Take it offline in the catalogue, which all proxies hear of.",
            sentence,
        ]

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Fence: take the shard's row offline, and set the end of a drain."""
        self.after = replace(self.after, status=Status.OFFLINE, sessions=self._sessions)
        await self.set_local(connection, shard, tools)
        if self._sessions is SessionsMode.DRAIN:
            self._drain_until = drain_end(tools, self._drain_seconds)
            self.after = replace(self.after, drain_until=self._drain_until)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Announce, or clear the mark at the end."""
        if step == ANNOUNCE.name:
            await self.write_catalogue(catalogue, self.after, done=False)
        else:
            await catalogue.execute(
                "update shardmap.mapping set op_id = null where mapping_id = $1 and op_id = $2",
                *(self.before.mapping_id, self.op_id),
            )

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """End the sessions that were there before the fence, and prove that none is left."""
        if self._sessions is SessionsMode.KEEP:
            return
        which = Registered.of_mapping(self.before.mapping_id)
        until = self._drain_until
        if until is None and self._sessions is SessionsMode.DRAIN:  # resumed by another process
            until = await self._announced_drain(tools)
        self.sessions_ended += await end_sessions(
            shard, which, tools, self.progress, drain_until=until
        )

    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the row is as announced: a process that resumes has not set its epoch."""
        row = await catalogue.fetchrow(_STATE, self.before.mapping_id)
        wanted = str(Status.OFFLINE), str(self._sessions), None
        return (
            row is not None
            and (row["status"], row["sessions"], row["op_id"]) == wanted
            and row["epoch"] > self.before.epoch
        )

    async def _announced_drain(self, tools: Tools) -> datetime | None:
        async with tools.databases.catalogue() as catalogue:
            query = "select drain_until from shardmap.mapping where mapping_id = $1"
            until: datetime | None = await catalogue.fetchval(query, self.before.mapping_id)
            return until


class TakeOnline(_MappingStatus):
    """Take a mapping online."""

    kind: ClassVar[str] = "online"
    steps: ClassVar[tuple[Step, ...]] = (LOCAL, END)
    status: ClassVar[Status] = Status.ONLINE

    def check(self) -> None:
        """Raise Unchanged for a mapping that is online."""
        if self.before.status is Status.ONLINE:
            raise Unchanged
        self._plan_after()

    def plan(self) -> list[str]:
        """Return what will be done."""
        return [
            f"Take the mapping {self.bounds} online on shard {self.shards[0].name}.",
            "Take it online in the catalogue.",
        ]

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Take the shard's row online."""
        self._plan_after()
        await self.set_local(connection, shard, tools)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Take the row online."""
        await self.write_catalogue(catalogue, self.after, done=True)

    def _plan_after(self) -> None:
        kill = SessionsMode.KILL
        self.after = replace(self.before, status=Status.ONLINE, sessions=kill, drain_until=None)
