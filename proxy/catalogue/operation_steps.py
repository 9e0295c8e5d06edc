"""The steps of an operation, each in its place, and undoing them in reverse.

For: one step at a time, with its retries, its record in op_log, and its points. Not for: beginning
an operation, and what is done when a step fails (`operations`).

Invariant: who changes a shard for an operation holds the operation's advisory lock in the catalogue
at the moment of the commit, and its row has the state that this process has left there. A shard's
steps lock its table of mappings against each other, so the one that takes an operation over waits
for a commit that is under way.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from proxy.catalogue import op_log
from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.fence import LOCK_OUT_ALL, lock_out
from proxy.catalogue.held_connection import THE_CATALOGUE, HeldConnection, TakenOver
from proxy.catalogue.model import Connection, Shard
from proxy.catalogue.operation import (
    UNDOING,
    Operation,
    Place,
    Reach,
    Step,
    Tools,
    states_from,
)
from proxy.catalogue.transactions import transaction
from proxy.errors import ProxyError

# While a step runs outside a transaction, its progress is written, and its lock looked after.
_PROGRESS_SECONDS: Final = 0.5
# The server may need this long to notice that our own connection was lost, with its lock.
_LOST_LOCK_SECONDS_MAX: Final = 30.0


class Steps:
    """Does and undoes the steps of operations, over one connection to the catalogue."""

    def __init__(self, tools: Tools, held: HeldConnection, reach: Reach) -> None:
        self._tools = tools
        self._held = held
        self._reach = reach

    async def do(self, operation: Operation, step: Step) -> None:
        """Do a step, and record it. Raises CatalogueError."""
        await self._reach(step.name)
        if step.place is Place.CATALOGUE:
            self._tools.progress(f"{operation.state}: changing the catalogue")
            await self._held.step(THE_CATALOGUE, partial(self._do_catalogue, operation, step))
        else:
            do = self._do_shard if step.place is Place.SHARD else self._do_outside
            for shard in operation.shards_of(step):
                where = f"shard {shard.name}"
                self._tools.progress(f"{operation.state}: changing {where}")
                await self._held.step(where, partial(do, operation, step, shard))
            await self._reach(f"{step.name}.record")
            await self._held.step(THE_CATALOGUE, partial(self._record, operation, step))
        operation.state = step.name
        await self._reach(f"{step.name}.done")

    async def _do_catalogue(self, operation: Operation, step: Step) -> None:
        connection = await self._held.use()
        is_last = step is operation.steps[-1]
        async with transaction(connection):
            state = await op_log.read_state(connection, operation.op_id, lock=True)
            if state is None and is_last and await operation.is_applied(connection):
                return  # an earlier try was committed
            if state == step.name:
                return  # as well
            if state != operation.state:
                raise TakenOver(operation.op_id)
            await operation.do_catalogue(step.name, connection)
            if is_last:
                await op_log.delete(connection, operation.op_id)
            else:
                await op_log.record_step(connection, operation, step.name)
            await self._reach(f"{step.name}.commit")

    async def _do_shard(self, operation: Operation, step: Step, shard: Shard) -> None:
        async with self._tools.databases.shard(shard) as connection:
            await operation.prepare_shard(connection, shard)
            async with self._guarded(operation, connection, operation.state, step.name):
                await operation.check_shard(connection, shard)
                operation.reached.add(shard.shard_id)
                await operation.do_shard(step.name, connection, shard, self._tools)

    async def _record(self, operation: Operation, step: Step) -> None:
        if not await op_log.record_step(await self._held.use(), operation, step.name):
            raise TakenOver(operation.op_id)

    @asynccontextmanager
    async def _guarded(
        self, operation: Operation, connection: Connection, wanted: str, point: str
    ) -> AsyncIterator[None]:
        """Run the block in a transaction of a shard; commit if the operation is still ours."""
        async with transaction(connection):
            await operation.lock_shard(connection)
            yield
            if await self._read_state(operation) != wanted:
                raise TakenOver(operation.op_id)
            await self._reach(f"{point}.commit")

    async def _read_state(self, operation: Operation) -> str | None:
        """Return the operation's state. A failure names the catalogue, and not the shard."""
        try:
            return await op_log.read_state(await self._held.use(), operation.op_id)
        except driver_errors(ProxyError) as error:
            raise translated(error, THE_CATALOGUE) from error

    async def check_shard(self, operation: Operation, shard: Shard) -> None:
        """Check what must hold in a shard before the first step. Raises CatalogueError."""
        async with self._tools.databases.shard(shard) as connection:
            await operation.check_before(connection, shard)

    # -- outside a transaction -------------------------------------------------------------------

    async def _do_outside(self, operation: Operation, step: Step, shard: Shard) -> None:
        """Do it, and end it if another operator has taken over."""
        operation.progress = {}
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(self._keep_up(operation, shard))
                await operation.do_outside(step.name, shard, self._tools)
                keeping.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _keep_up(self, operation: Operation, shard: Shard) -> None:
        """Keep the lock, and write and say the progress. Raises TakenOver."""
        began_at = kept_at = self._tools.monotonic()
        while True:
            await self._tools.sleep(_PROGRESS_SECONDS)
            self._tools.progress(_in_words(operation, shard, self._tools.monotonic() - began_at))
            try:
                is_ours = await op_log.record_progress(await self._held.use(), operation)
            except driver_errors(ProxyError, CatalogueError) as error:
                lost = self._tools.monotonic() - kept_at
                if isinstance(error, TakenOver) and lost >= _LOST_LOCK_SECONDS_MAX:
                    raise TakenOver(operation.op_id) from error
                continue  # while the catalogue is down no other operator can take over
            if not is_ours:
                raise TakenOver(operation.op_id)
            kept_at = self._tools.monotonic()

    # -- undo ------------------------------------------------------------------------------------

    async def can_undo(self, operation: Operation) -> bool:
        """Return whether all shards that were changed can be reached."""
        for shard in operation.changed():
            try:
                async with self._tools.databases.shard(shard) as connection:
                    await connection.execute("select 1")
            except driver_errors(ProxyError, CatalogueError):
                return False
        return True

    async def undo(self, operation: Operation) -> None:
        """Undo in reverse: the shards, then the catalogue. Raises CatalogueError."""
        await self._reach("undo")
        operation.begin_undo()
        await self._held.step(THE_CATALOGUE, partial(self._mark_undoing, operation))
        for shard in operation.changed():
            await self._reach("undo.shard")
            undo = partial(self._undo_shard, operation, shard)
            await self._held.step(f"shard {shard.name}", undo)
            await self._reach("undo.shard.done")
        await self._reach("undo.end")
        await self._held.step(THE_CATALOGUE, partial(self._undo_catalogue, operation))
        await self._reach("undo.done")

    async def _mark_undoing(self, operation: Operation) -> None:
        connection, op_id = await self._held.use(), operation.op_id
        final = states_from(operation, operation.final_from)
        if await op_log.record_undoing(connection, op_id, unless_in=final) is None:
            if await op_log.read_state(connection, op_id) is None:
                raise TakenOver(op_id)
            raise not_undoable(operation)
        operation.state = UNDOING

    async def _undo_shard(self, operation: Operation, shard: Shard) -> None:
        async with (
            self._tools.databases.shard(shard) as connection,
            self._guarded(operation, connection, UNDOING, "undo.shard"),
        ):
            if operation.undo_locks_out:
                await lock_out(connection, shard, self._tools, LOCK_OUT_ALL)
            await operation.undo_shard(connection, shard)

    async def _undo_catalogue(self, operation: Operation) -> None:
        connection = await self._held.use()
        async with transaction(connection):
            state = await op_log.read_state(connection, operation.op_id, lock=True)
            if state is None:
                return  # an earlier try was committed
            if state != UNDOING:
                raise TakenOver(operation.op_id)
            await operation.undo_catalogue(connection)
            await op_log.delete(connection, operation.op_id)
            await self._reach("undo.end.commit")


def _in_words(operation: Operation, shard: Shard, seconds: float) -> str:
    """Return how far a step is that runs outside a transaction."""
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in operation.progress.items()]
    state = f"{operation.kind}: {operation.state} for {seconds:.0f} s, shard {shard.name}"
    return ", ".join([state, *facts])


def not_undoable(operation: Operation) -> CatalogueError:
    """Return the refusal to undo an operation that can only be completed."""
    op_id = operation.op_id
    text = f"the operation {op_id} ({operation.kind}) can only be completed"
    return CatalogueError(Reason.NOT_UNDOABLE, text, f"shards ops resume {op_id}", op_id=op_id)
