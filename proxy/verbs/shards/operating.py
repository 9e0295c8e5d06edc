"""Running an operation for a verb: read the map, make the operation, plan it or do it.

For: what every verb that changes a map shares. Not for: any operation.
"""

import asyncio
import getpass
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, TypeVar

from proxy.catalogue import store
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.held_connection import THE_CATALOGUE, HeldConnection
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.operation import Operation, Tools
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operations import Operator
from proxy.catalogue.transactions import transaction
from proxy.verbs.shards.verb import Call, Json, shard_facts

# After a signal to end, which SIGKILL may follow.
UNDO_SECONDS_MAX: Final = 20.0

_NOT_UNDOABLE: Final = Reason.NOT_UNDOABLE.value.word
_UNKNOWN: Final = Reason.UNKNOWN_OPERATION.value.word
_Made = TypeVar("_Made", bound=Operation)
_Run_co = TypeVar("_Run_co", bound=Operation, covariant=True)
_Result = TypeVar("_Result")


class _RollBack(Exception):
    """Ends a transaction that was made only to look."""


Do = Callable[[Operation], Awaitable[bool]]
"""Does an operation; returns whether there was something to do."""


@dataclass(frozen=True, slots=True)
class Done(Generic[_Run_co]):
    """An operation that was done; `changed` is false if there was nothing to do."""

    operation: _Run_co
    map: CatalogueMap
    changed: bool


@asynccontextmanager
async def operating(call: Call) -> AsyncIterator[Operator]:
    """Yield an operator with the call's connections."""
    async with Operator(
        _tools(call), KINDS, store.map_by_id, owner=_owner(), reach=call.reach
    ) as operator:
        yield operator


def _tools(call: Call) -> Tools:
    return Tools(
        call.administration,
        call.sleep,
        lambda: datetime.now(UTC),
        time.monotonic,
        call.output.progress,
    )


async def in_catalogue(
    call: Call, change: Callable[[Connection, CatalogueMap], Awaitable[_Result]]
) -> _Result:
    """Return what a change of the catalogue alone returns, in one transaction.

    It is tried again as a step of an operation is. A dry run is rolled back. Raises CatalogueError.
    """
    async with HeldConnection(_tools(call)) as held:

        async def once() -> _Result:
            connection = await held.use()
            owner = await call.read_map(connection, writes=True)
            with suppress(_RollBack):
                async with transaction(connection):
                    result = await change(connection, owner)
                    if call.arguments.dry_run:
                        raise _RollBack
            return result

        return await held.repeat(THE_CATALOGUE, once)


async def run(
    call: Call, make: Callable[[Connection, CatalogueMap], Awaitable[_Made]]
) -> Done[_Made] | None:
    """Do the operation that `make` returns. If it is a dry run, print the plan and return None.

    `make` gets a connection to the catalogue and the map. Raises CatalogueError and ProxyError.
    """
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection, writes=True)
        operation = await make(connection, owner)
    async with running(call) as (operator, do):
        if call.arguments.dry_run:
            call.output.plan(await operator.plan(operation))
            return None
        return Done(operation, owner, await do(operation))


@asynccontextmanager
async def running(call: Call) -> AsyncIterator[tuple[Operator, Do]]:
    """Yield an operator, and what runs one operation after the other with it.

    One that a signal stops is undone. Raises CatalogueError.
    """
    started: list[Operation] = []
    try:
        async with operating(call) as operator:

            async def do(operation: Operation) -> bool:
                started[:] = [operation]
                return await operator.run(operation)

            yield operator, do
    except asyncio.CancelledError:
        for operation in started:
            await _undo_interrupted(call, operation)
        raise


async def counted_shard(call: Call, owner: CatalogueMap, shard: Shard) -> Json:
    """Return a shard as JSON has it, with how many mappings it has now. Raises CatalogueError."""
    async with call.administration.catalogue() as connection:
        counts = await store.count_mappings(connection, owner.map_id)
    return shard_facts(shard, counts.get(shard.shard_id, 0))


async def _undo_interrupted(call: Call, operation: Operation) -> None:
    """Undo an operation that a signal has stopped, or complete one that cannot be undone.

    Raises CatalogueError if it is left pending.
    """
    try:
        async with asyncio.timeout(UNDO_SECONDS_MAX), operating(call) as operator:
            try:
                await operator.undo(operation.op_id)
            except CatalogueError as error:
                if error.reason != _NOT_UNDOABLE:
                    raise
                await operator.resume(operation.op_id)
    except (CatalogueError, TimeoutError) as error:
        if isinstance(error, CatalogueError) and error.reason == _UNKNOWN:
            return  # it had not begun, or was complete
        text = f"interrupted; the operation {operation.op_id} is left pending"
        hint = f"shards ops undo {operation.op_id}, or shards ops resume {operation.op_id}"
        raise CatalogueError(Reason.STEP_FAILED, text, hint, op_id=operation.op_id) from error


def _owner() -> str:
    """Return who this is, for another administrator who finds the operation."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container the number of a user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}, pid {os.getpid()}"
