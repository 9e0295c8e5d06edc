"""Runs operations: begin in the catalogue, then the shards, then the end in the catalogue.

For: what comes after what, what is done when a step fails, and what an earlier process left
pending. Not for: a step (`operation_steps`), or what a kind of operation does (`operation` and
those that build on it).

Invariant: whatever happens to an operator, its operation is done, undone, or a row of op_log that
any later one can take up. One whose connection was lost changes nothing after another took over.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final, Protocol, Self, TypeVar
from uuid import UUID

from proxy.catalogue import op_log
from proxy.catalogue.errors import CatalogueError, Reason, ReasonRow
from proxy.catalogue.held_connection import THE_CATALOGUE, HeldConnection, TakenOver
from proxy.catalogue.kept_connections import KeptConnections
from proxy.catalogue.model import CatalogueMap, Connection
from proxy.catalogue.op_log import OperationRow
from proxy.catalogue.operation import (
    BEGUN,
    UNDOING,
    Operation,
    Reach,
    Tools,
    Unchanged,
    pass_by,
    shards_reached,
    states_from,
    steps_after,
)
from proxy.catalogue.operation_steps import Steps, not_undoable
from proxy.catalogue.transactions import transaction

# How often one writer settles what is in its way. More often, others keep beginning new ones.
SETTLED_MAX: Final = 20

_Result = TypeVar("_Result")
FindMap = Callable[[Connection, UUID], Awaitable[CatalogueMap]]
"""Reads a map by its id."""


class Repeat(Protocol):
    """Calls something in a database, named in words, until it succeeds or is refused."""

    async def __call__(self, where: str, call: Callable[[], Awaitable[_Result]]) -> _Result: ...


class _RollBack(Exception):
    """Ends a transaction that was made only to look."""


class Operator:
    """Runs operations over one connection to the catalogue; use it with `async with`.

    `owner` says in the operation's row who it is. `kinds` finds the class of a pending operation.
    `reach` is called at each point, for tests.
    """

    def __init__(
        self,
        tools: Tools,
        kinds: Mapping[str, type[Operation]],
        find_map: FindMap,
        *,
        owner: str,
        reach: Reach = pass_by,
    ) -> None:
        self._kept = KeptConnections(tools.databases)
        self._tools = tools = replace(tools, databases=self._kept)
        self._kinds = kinds
        self._find_map = find_map
        self._owner = owner
        self._reach = reach
        self._held = HeldConnection(tools)
        self._steps = Steps(tools, self._held, reach)

    async def __aenter__(self) -> Self:
        await self._held.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._kept.keep_only(())
        await self._held.__aexit__(*error)

    async def run(self, operation: Operation) -> bool:
        """Do the whole operation. Return whether there was something to do.

        Raises CatalogueError: with `op_id` if an operation is left pending, else nothing is half
        done.
        """
        try:
            if operation.checks_first:
                await self._check_all(operation, self._held.step)
            await self._begin(operation)
            await self._complete(operation)
        except Unchanged:
            return False
        finally:
            await self._held.unlock(operation.op_id)
        return True

    async def plan(self, operation: Operation) -> list[str]:
        """Check all preconditions; change nothing. Return what `run` would do, a sentence each.

        There is none if there is nothing to do.
        """
        return await self._check_all(operation, self._held.repeat)

    async def _check_all(self, operation: Operation, repeat: Repeat) -> list[str]:
        """Check all preconditions in the catalogue; then in shards, if nothing is in the way."""
        plan = partial(self._plan_once, operation)
        sentences, is_free = await repeat(THE_CATALOGUE, plan)
        await self._kept.keep_only(operation.shards)
        is_asked = sentences and is_free and operation.needs_shards
        for shard in operation.shards if is_asked else ():
            check = partial(self._steps.check_shard, operation, shard)
            await repeat(f"shard {shard.name}", check)
        if is_asked:
            await operation.check_others(self._tools)
        return sentences

    async def pending(self, map_id: UUID | None = None) -> list[OperationRow]:
        """Return the pending operations, of one map or all, the oldest first."""

        async def read() -> list[OperationRow]:
            return await op_log.read_all(await self._held.use(), map_id)

        return await self._held.repeat(THE_CATALOGUE, read)

    async def resume(
        self, op_id: UUID, prepare: Callable[[Operation], None] = lambda _: None
    ) -> OperationRow:
        """Complete a pending operation. Return its row as it was. Raises CatalogueError.

        `prepare` gives the operation what its row does not have.
        """
        return await self._take_up(op_id, undo=False, prepare=prepare)

    async def undo(self, op_id: UUID) -> OperationRow:
        """Undo a pending operation. Return its row as it was. Raises CatalogueError.

        It is refused from the operation's `final_from` on: NOT_UNDOABLE.
        """
        return await self._take_up(op_id, undo=True)

    async def plan_pending(
        self, op_id: UUID, *, undo: bool, prepare: Callable[[Operation], None] = lambda _: None
    ) -> list[str]:
        """Check that a pending operation can be undone, or completed. Return what would be done."""
        try:
            row, operation = await self._held.repeat(
                THE_CATALOGUE, partial(self._read_locked, op_id)
            )
        finally:
            await self._held.unlock(op_id)
        prepare(operation)
        _check_way(row, operation, undo=undo)
        names = ", ".join(shard.name for shard in operation.shards)
        verb = "Undo" if undo else "Complete"
        return [f"{verb} the operation {op_id} ({row.kind}, {row.state}) on shard {names}."]

    async def _begin(self, operation: Operation) -> None:
        """Begin, after what was left pending on the same shards is settled."""
        await self._reach("begin")
        begin = partial(self._begin_once, operation)
        for _ in range(SETTLED_MAX):
            pending = await self._held.step(THE_CATALOGUE, begin)
            if not pending:
                await self._reach("begin.done")
                return
            await self._settle(pending[0])
        text = f"{SETTLED_MAX} operations came first"
        raise CatalogueError(Reason.OPERATION_PENDING, text, "Try again.")

    async def _begin_once(self, operation: Operation) -> list[OperationRow]:
        """Return the operations in the way. If there are none, it has begun."""
        connection = await self._held.use()
        if not await self._held.lock(operation.op_id):
            raise TakenOver(operation.op_id)
        async with transaction(connection):
            await _lock_map(connection, operation)
            if await op_log.read_state(connection, operation.op_id) is not None:
                return []  # an earlier try was committed
            await operation.find(connection)
            if pending := await op_log.in_the_way(connection, operation):
                return pending
            await operation.begin(connection)
            await op_log.insert(connection, operation, self._owner)
            await self._reach("begin.commit")
        return []

    async def _plan_once(self, operation: Operation) -> tuple[list[str], bool]:
        """Return the plan, and whether no other operation has to be settled first."""
        connection = await self._held.use()
        sentences: list[str] = []
        pending: list[OperationRow] = []
        with suppress(_RollBack, Unchanged):
            async with transaction(connection):
                await _lock_map(connection, operation)
                await operation.find(connection)
                pending = await op_log.in_the_way(connection, operation)
                sentences = [await self._plan_settling(row) for row in pending]
                if not pending:
                    await operation.begin(connection)
                sentences += operation.plan()
                raise _RollBack
        return sentences, not pending

    async def _plan_settling(self, row: OperationRow) -> str:
        if not await self._held.lock(row.op_id):
            raise row.in_use()
        await self._held.unlock(row.op_id)
        verb = "Complete" if self._is_kept(row) else "Undo"
        return f"{verb} the operation {row.op_id} ({row.kind}), which {row.owner} left pending."

    # -- the steps -------------------------------------------------------------------------------

    async def _complete(self, operation: Operation) -> None:
        """Do the steps after the operation's state; undo all of them if one fails.

        Raises CatalogueError. It has `op_id` if the operation is left pending.
        """
        kept = states_from(operation, operation.kept_from)
        for step in steps_after(operation, operation.state):
            await self._kept.keep_only(operation.shards)  # a step may find that there are more
            try:
                await self._steps.do(operation, step)
            except TakenOver:
                raise
            except CatalogueError as failure:
                if operation.state in kept or operation.stays_pending(step.name, failure):
                    raise _left_pending(operation, failure) from failure
                await self._undo_after(operation, failure)

    async def _undo_after(self, operation: Operation, failure: CatalogueError) -> None:
        """Undo, and raise why; or that the operation is left pending.

        If a shard cannot be reached, undoing is not begun: the operation can still be completed.
        """
        if not await self._steps.can_undo(operation):
            raise _left_pending(operation, failure) from failure
        try:
            await self._steps.undo(operation)
        except TakenOver:
            raise
        except CatalogueError as again:
            raise _left_pending(operation, failure, again) from failure
        raise failure

    # -- what was left pending -------------------------------------------------------------------

    async def _settle(self, row: OperationRow) -> None:
        """Complete or undo an operation that is in the way, unless its operator lives."""
        self._tools.progress(f"settling the operation {row.op_id} ({row.kind}, {row.state})")
        try:
            await self._take_up(row.op_id, undo=None)
        except CatalogueError as error:
            if error.reason != Reason.UNKNOWN_OPERATION.value.word:
                raise  # if it is unknown, its operator or another writer was faster

    async def _take_up(
        self,
        op_id: UUID,
        *,
        undo: bool | None,
        prepare: Callable[[Operation], None] = lambda _: None,
    ) -> OperationRow:
        """Complete or undo (None: as its state says) a pending operation. Return its row."""
        try:
            row, operation = await self._held.repeat(
                THE_CATALOGUE, partial(self._read_locked, op_id)
            )
            prepare(operation)
            if undo is None:
                undo = not self._is_kept(row)
            else:
                _check_way(row, operation, undo=undo)
            if undo:
                await self._undo_pending(operation)
            else:
                await self._complete(operation)
        finally:
            await self._held.unlock(op_id)
        return row

    async def _undo_pending(self, operation: Operation) -> None:
        """Undo what was left pending. A failure leaves it so."""
        await self._kept.keep_only(operation.shards)
        try:
            await self._steps.undo(operation)
        except TakenOver:
            raise
        except CatalogueError as failure:
            raise _left_pending(operation, failure) from failure

    async def _read_locked(self, op_id: UUID) -> tuple[OperationRow, Operation]:
        """Take the operation's lock; return its row, and what it is. Raises CatalogueError."""
        connection = await self._held.use()
        row = await op_log.read_one(connection, op_id)
        if row is not None:
            if not await self._held.lock(op_id):
                raise row.in_use()
            row = await op_log.read_one(connection, op_id)
        if row is None:
            raise CatalogueError(Reason.UNKNOWN_OPERATION, f"there is no operation {op_id}")
        owner = await self._find_map(connection, row.map_id)
        operation = self._kind_of(row).from_body(owner, op_id, {**row.body})
        operation.state = row.state
        operation.reached = shards_reached(operation, row.reached_from)
        return row, operation

    def _is_kept(self, row: OperationRow) -> bool:
        """Return whether the next writer completes this operation, instead of undoing it."""
        kind = self._kind_of(row)
        return row.state in states_from(kind, kind.kept_from)

    def _kind_of(self, row: OperationRow) -> type[Operation]:
        """Return what an operation is. Raises CatalogueError if only another version knows it."""
        kind = self._kinds.get(row.kind)
        states = {BEGUN, UNDOING} | ({step.name for step in kind.steps} if kind else set())
        if kind is None or not {row.state, row.reached_from or BEGUN} <= states:
            text = f"this version does not know the operation {row.op_id} ({row.kind}, {row.state})"
            hint = f"{row.owner} began it: use that version."
            raise CatalogueError(Reason.OPERATION_PENDING, text, hint, op_id=row.op_id)
        return kind


async def _lock_map(connection: Connection, operation: Operation) -> None:
    query = "select 1 from shardmap.shard_map where map_id = $1 for update"
    if await connection.fetchval(query, operation.map.map_id) is None:
        raise CatalogueError(Reason.UNKNOWN_MAP, f"there is no map {operation.map.name}")


def _check_way(row: OperationRow, operation: Operation, *, undo: bool) -> None:
    """Check that an operation can be undone, or completed. Raises CatalogueError."""
    if undo and row.state in states_from(operation, operation.final_from):
        raise not_undoable(operation)
    if not undo and (row.state == UNDOING or not operation.resumable):
        text = f"the operation {row.op_id} ({row.kind}, {row.state}) can only be undone"
        hint = f"shards ops undo {row.op_id}"
        raise CatalogueError(Reason.OPERATION_PENDING, text, hint, op_id=row.op_id)
    if not undo:
        operation.check_resume()


def _left_pending(
    operation: Operation, failure: CatalogueError, undoing: CatalogueError | None = None
) -> CatalogueError:
    text = f"the operation {operation.op_id} ({operation.kind}) is left pending: {failure.message}"
    hint = f"shards ops undo {operation.op_id}"
    resume = f"shards ops resume {operation.op_id}"
    is_final = operation.state in states_from(operation, operation.final_from)
    if undoing is not None:
        text += f"; undoing it failed: {undoing.message}"
        is_final = is_final or undoing.reason == Reason.NOT_UNDOABLE.value.word
    if is_final:
        hint = resume
    elif operation.resumable and operation.state != UNDOING:
        hint = f"{resume}, or {hint}"
    row = ReasonRow(failure.reason, failure.sqlstate)
    return CatalogueError(row, text, hint, op_id=operation.op_id)
