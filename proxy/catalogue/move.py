"""Moving a mapping to another shard while applications run.

The steps of `reassign`, and between them: the catalogue announces that the mapping is offline, its
sessions are ended until none is left, the operator's command copies the rows. After the catalogue
names the target, the target's row gets the status that the mapping had before.

Invariant: before rows are copied or the catalogue names the target, no session of an older epoch
lives on the source, and no transaction that was prepared there is left. From the state `flipped` on
the move can only be completed.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import ClassVar, Final, Self
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import Registered, drain_end, end_sessions
from proxy.catalogue.mapping_operations import CHECKED, END
from proxy.catalogue.mapping_status import sessions_sentence
from proxy.catalogue.model import (
    CatalogueMap,
    Connection,
    Mapping,
    SessionsMode,
    Shard,
    Status,
)
from proxy.catalogue.operation import Json, Place, Step, Tools, states_from
from proxy.catalogue.other_writers import count_unregistered, wait_for_prepared
from proxy.catalogue.reassign import FENCED, SOURCE_CLEARED, TARGET_READY, ToShard

ANNOUNCED: Final = Step("announced", Place.CATALOGUE)
DRAINED: Final = Step("drained", Place.OUTSIDE)
COPIED: Final = Step("copied", Place.OUTSIDE)
FLIPPED: Final = Step("flipped", Place.CATALOGUE)
OPENED: Final = Step("opened", Place.SHARD)

_OPEN_LOCAL: Final = (
    "update shardmap_local.mapping set status = $3, epoch = $4"
    " where mapping_id = $1 and op_id = $2 returning 1"
)
# What ends by itself, or is ended by its owner: then the move can be resumed.
_WAITED_FOR: Final = frozenset(
    reason.value.word for reason in (Reason.SESSIONS_ALIVE, Reason.PREPARED_TRANSACTIONS)
)

Copy = Callable[[CatalogueMap, Mapping, Shard, Shard], Awaitable[None]]
"""Copies the rows of a mapping from a shard to another. Raises CatalogueError: COPY_FAILED."""


class Move(ToShard):
    """Move a mapping to another shard. It has the status that it had before."""

    kind: ClassVar[str] = "move"
    steps: ClassVar[tuple[Step, ...]] = (
        CHECKED,
        FENCED,
        ANNOUNCED,
        DRAINED,
        COPIED,
        TARGET_READY,
        SOURCE_CLEARED,
        FLIPPED,
        OPENED,
        END,
    )
    kept_from: ClassVar[str] = FLIPPED.name
    final_from: ClassVar[str] = FLIPPED.name

    def __init__(
        self,
        catalogue_map: CatalogueMap,
        lo: bytes,
        hi: bytes | None,
        to: str = "",
        *,
        sessions: SessionsMode = SessionsMode.KILL,
        drain_seconds: float = 0.0,
        copy: Copy | None = None,
        expect: int | None = None,
        token: UUID | None = None,
        op_id: UUID | None = None,
    ) -> None:
        """`copy` is not kept in the row: it may have a secret."""
        super().__init__(catalogue_map, lo, hi, to, expect=expect, token=token, op_id=op_id)
        assert sessions is not SessionsMode.KEEP, "a session that is kept writes to the source"
        self._sessions: SessionsMode = sessions
        self._drain_seconds = drain_seconds
        self._copy = copy
        self._has_copy = copy is not None
        self._fenced_at: datetime | None = None
        self._now: Callable[[], datetime] | None = None
        self.sessions_ended = 0
        self.seconds_offline = 0.0
        self.warnings: list[str] = []

    # -- its row ---------------------------------------------------------------------------------

    def body(self) -> Json:
        """Return what the row has."""
        arguments = {
            "sessions": str(self._sessions),
            "drain_seconds": self._drain_seconds,
            "has_copy": self._has_copy,
        }
        return {**super().body(), **arguments}

    def load(self, body: Json) -> Self:
        """Read what `body` wrote."""
        self._sessions = SessionsMode(body["sessions"])
        self._drain_seconds = body["drain_seconds"]
        self._has_copy = body["has_copy"]
        return super().load(body)

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards that a step works in."""
        return (self.target,) if step == OPENED else super().shards_of(step)

    # -- a copy that another process was given ---------------------------------------------------

    @property
    def is_copied(self) -> bool:
        """Whether the step that copies rows is done."""
        return self.state in states_from(self, COPIED.name)

    @property
    def awaits_copy(self) -> bool:
        """Whether rows are still to be copied, by a command that this process does not have."""
        return self._has_copy and self._copy is None and not self.is_copied

    def copy_with(self, copy: Copy | None) -> None:
        """Copy with this when the move is resumed; None: copy nothing."""
        self._copy = copy
        self._has_copy = copy is not None

    def check_resume(self) -> None:
        """Check that the rows can be copied, if they are to be."""
        if self.awaits_copy:
            text = f"the move {self.op_id} was begun with a copy command, which has not run yet"
            hint = (
                f"The command is not kept. shards ops resume {self.op_id} --copy COMMAND, or"
                f" --without-copy; or shards ops undo {self.op_id}"
            )
            raise CatalogueError(Reason.OPERATION_PENDING, text, hint, op_id=self.op_id)

    # -- the steps -------------------------------------------------------------------------------

    def plan(self) -> list[str]:
        """Return what will be done."""
        what, source, target = f"the mapping {self.bounds}", self.source.name, self.target.name
        status = self.before.status
        return [
            self.plan_check(),
            f"Take {what} offline on shard {source}: it refuses new sessions.",
            "Take it offline in the catalogue, which all proxies hear of.",
            sessions_sentence(self._sessions, what, self._drain_seconds),
            *(["Run the copy command."] if self._has_copy else []),
            *self.plan_rows(),
            f"Name shard {target} in the catalogue.",
            f"Set the mapping {status} on shard {target}, then in the catalogue.",
        ]

    async def fence(self, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Take the source's row offline, and set the end of a drain."""
        await super().fence(connection, shard, tools)
        if self._sessions is SessionsMode.DRAIN:
            self.after = replace(self.after, drain_until=drain_end(tools, self._drain_seconds))
        self._fenced_at, self._now = tools.now(), tools.now

    def offline_row(self, shard: Shard, epoch: int) -> Mapping:
        """Return the mapping's row while it is offline."""
        row = super().offline_row(shard, epoch)
        return replace(row, sessions=self._sessions, drain_until=None)

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Check both shards, end the sessions, or copy."""
        match step:
            case DRAINED.name:
                await self._drain(shard, tools)
            case COPIED.name:
                if self._copy is not None:
                    tools.progress("copying")
                    await self._copy(self.map, self.before, self.source, self.target)
            case _:
                await super().do_outside(step, shard, tools)

    async def _drain(self, shard: Shard, tools: Tools) -> None:
        """End the sessions that were there before the fence, and prove that none is left (R12)."""
        which, until = Registered.of_mapping(self.before.mapping_id), self.after.drain_until
        self.sessions_ended += await end_sessions(
            shard, which, tools, self.progress, drain_until=until
        )
        await wait_for_prepared(shard, tools, self.progress)
        async with tools.databases.shard(shard) as connection:
            count = await count_unregistered(connection, self.map.session_roles)
        if count:
            text = f"shard {shard.name}: {count} sessions of the map's logins are not registered"
            self.warnings.append(f"{text}; they can still write for the keys")

    def stays_pending(self, step: str, failure: CatalogueError) -> bool:
        """Return whether it is waited for what keeps the drain from ending."""
        return step == DRAINED.name and failure.reason in _WAITED_FOR

    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Fence, change the rows of both shards, open the target's."""
        if step != OPENED.name:
            await super().do_shard(step, connection, shard, tools)
            return
        self.after = self._opened_row()
        row = self.after
        values = row.mapping_id, self.op_id, str(row.status), row.epoch
        if await connection.fetchval(_OPEN_LOCAL, *values) is None:
            text = f"shard {shard.name} does not have the mapping {self.bounds} any more"
            raise CatalogueError(Reason.STEP_FAILED, text)

    def _opened_row(self) -> Mapping:
        row = self.offline_row(self.target, self._epoch + 2)
        kill = SessionsMode.KILL
        sessions = kill if self.before.status is Status.ONLINE else self.before.sessions
        return replace(row, status=self.before.status, sessions=sessions)

    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Announce, name the target, or set the status at the end."""
        is_end = step == END.name
        await self.write_catalogue(catalogue, self.after, done=is_end)
        is_online = self.before.status is Status.ONLINE
        if is_end and is_online and self._fenced_at is not None and self._now is not None:
            self.seconds_offline = (self._now() - self._fenced_at).total_seconds()
