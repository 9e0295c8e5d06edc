"""What an operation is: its steps, and the row of op_log that a later process continues from.

For: the base class of every change of a map, and the values in its row. Not for: running one
(`operations`, `operation_steps`), or what a kind of operation does (`mapping_operations` and its
neighbours).

An operation has `begin` (catalogue), then steps in the catalogue and in shards, and `end`
(catalogue). Each is one transaction, except a step outside of transactions. A step may be repeated:
the transaction of the first try may have been committed although its answer was lost. After each
step its name is the state in the operation's row, where any later process continues.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any, ClassVar, Final, Protocol, Self
from uuid import UUID, uuid4

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Sleep, Status
from proxy.catalogue.schema import StoreVersion, check_writable

# The states of an operation's row beside the names of its steps.
BEGUN: Final = "begun"
UNDOING: Final = "undoing"

Json = dict[str, Any]
"""A JSON object."""


class Databases(Protocol):
    """Opens connections as an administrator. Both raise ProxyError."""

    def catalogue(self) -> AbstractAsyncContextManager[Connection]:
        """Connect to the catalogue."""

    def shard(self, shard: Shard) -> AbstractAsyncContextManager[Connection]:
        """Connect to a shard."""


Progress = Callable[[str], None]
"""Says what an operation waits for."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What the steps of an operation use beside their connection."""

    databases: Databases
    sleep: Sleep
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    progress: Progress


class Place(Enum):
    """Where a step works."""

    CATALOGUE = auto()  # one transaction
    SHARD = auto()  # one transaction in each of the step's shards
    OUTSIDE = auto()  # once for each of the step's shards, outside a transaction


@dataclass(frozen=True, slots=True)
class Step:
    """A step: its name, which is also the state of the operation after it, and where it works."""

    name: str
    place: Place


class Unchanged(Exception):
    """What was asked for is done already: there is nothing to do."""


class Operation(ABC):
    """One change of a map. Its attributes are what its row in op_log has.

    `steps` come after `begin`; the last one ends the operation, in the catalogue. From the state
    `kept_from` on the next writer completes the operation, before it undoes it. From `final_from`
    on it can only be completed.
    """

    kind: ClassVar[str]
    steps: ClassVar[tuple[Step, ...]]
    kept_from: ClassVar[str] = ""
    final_from: ClassVar[str] = ""
    resumable: ClassVar[bool] = True
    checks_first: ClassVar[bool] = False
    """Whether the shards are checked before it begins, so that a refusal leaves no trace."""
    needs_shards: ClassVar[bool] = True
    """Whether the shards must answer; else a plan asks nothing of them."""
    undo_locks_out: ClassVar[bool] = False
    """Whether undoing changes what admits read: it waits for them, and ends what keeps one open."""
    whole_map: ClassVar[bool] = False
    """Whether no other operation of the map may run meanwhile, whatever its shards."""

    def __init__(self, catalogue_map: CatalogueMap, op_id: UUID | None = None) -> None:
        self.map = catalogue_map
        self.op_id = op_id or uuid4()
        # Both are known after `find`: what it changes, and what is in the way beside that.
        self.shards: tuple[Shard, ...] = ()
        self.blocking: frozenset[UUID] = frozenset()
        # What its row has, as far as this process knows; and the shards that may be changed.
        self.state = BEGUN
        self.reached: set[UUID] = set()
        self.progress: Json = {}
        """What the row says while a step outside a transaction runs."""

    # -- its row ---------------------------------------------------------------------------------

    def body(self) -> Json:
        """Return what the row has: arguments, and the rows as they were."""
        return {
            "shards": [str(shard.shard_id) for shard in self.shards],
            "rows": [shard_to_json(shard) for shard in self.shards],
            "whole_map": self.whole_map,
        }

    @classmethod
    @abstractmethod
    def from_body(cls, catalogue_map: CatalogueMap, op_id: UUID, body: Json) -> Self:
        """Return the operation of a row."""

    def load(self, body: Json) -> Self:
        """Read what `body` of this class wrote."""
        self.shards = tuple(shard_from_json(row) for row in body["rows"])
        return self

    def results(self) -> Json:
        """Return what the steps so far have found and later ones need; kept after each step.

        `load` finds it in the body, where it replaces facts of the same names.
        """
        return {}

    def shards_of(self, step: Step) -> tuple[Shard, ...]:
        """Return the shards that a step works in, in this order."""
        return self.shards

    # -- what it does ----------------------------------------------------------------------------

    @abstractmethod
    async def find(self, catalogue: Connection) -> None:
        """Find the rows, and with them `shards` and `blocking`. Raises CatalogueError: unknown."""

    @abstractmethod
    async def begin(self, catalogue: Connection) -> None:
        """Check the preconditions and mark the rows with `op_id`; the map's row is locked.

        Called after `find`, in the same transaction. Raises CatalogueError for what is refused,
        Unchanged if there is nothing to do.
        """

    @abstractmethod
    def plan(self) -> list[str]:
        """Return what will be done, a sentence each. Called after `begin`."""

    @abstractmethod
    async def do_catalogue(self, step: str, catalogue: Connection) -> None:
        """Do a step of the catalogue.

        As any step, it may be done already: by a try whose answer was lost, or another process.
        """

    @abstractmethod
    async def do_shard(self, step: str, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Do a step of a shard."""

    def check_resume(self) -> None:  # noqa: B027
        """Check that this process can complete the operation. Raises CatalogueError."""

    async def do_outside(self, step: str, shard: Shard, tools: Tools) -> None:
        """Do a step outside a transaction, for a shard. It may set `progress` meanwhile."""
        raise NotImplementedError(f"{self.kind} has no step {step} outside a transaction")

    def stays_pending(self, step: str, failure: CatalogueError) -> bool:
        """Return whether a step that failed leaves the operation pending, and not undone."""
        return False

    async def prepare_shard(self, connection: Connection, shard: Shard) -> None:  # noqa: B027
        """Do what must come before a shard's first transaction."""

    async def lock_shard(self, connection: Connection) -> None:
        """Lock what operations change in a shard against each other; admit does not wait for it."""
        await connection.execute(
            "lock table only shardmap_local.mapping in share row exclusive mode"
        )

    async def check_shard(self, connection: Connection, shard: Shard) -> None:
        """Check what must hold in a shard, before each of its steps. Raises CatalogueError."""
        await check_identity(connection, self.map, shard)

    async def check_before(self, connection: Connection, shard: Shard) -> None:
        """Check what must hold in a shard before the first step."""
        await self.check_shard(connection, shard)

    async def check_others(self, tools: Tools) -> None:  # noqa: B027
        """Check what must hold in other shards than its own; a plan checks that as well."""

    def begin_undo(self) -> None:  # noqa: B027
        """Want the rows as they were. Called before anything is undone."""

    def changed(self) -> list[Shard]:
        """Return the shards to undo: those that may have been changed, the last one first."""
        return [one for one in reversed(self.shards) if one.shard_id in self.reached]

    @abstractmethod
    async def undo_shard(self, connection: Connection, shard: Shard) -> None:
        """Take back what this operation changed in a shard, if it did."""

    @abstractmethod
    async def undo_catalogue(self, catalogue: Connection) -> None:
        """Take back what this operation changed in the catalogue; the shards come first."""

    @abstractmethod
    async def is_applied(self, catalogue: Connection) -> bool:
        """Return whether the catalogue is as the last step leaves it.

        Asked where its answer was lost and the operation's row is gone.
        """


async def check_identity(connection: Connection, catalogue_map: CatalogueMap, shard: Shard) -> None:
    """Check that this database is the shard, of a version that can be written to.

    Raises CatalogueError: WRONG_SHARD, STORE_MISSING, STORE_VERSION.
    """
    where = f"shard {shard.name}"
    found = await connection.fetchrow(
        "select shard_id, location, store_major, store_minor from shardmap_local.identity"
        " where map_id = $1",
        catalogue_map.map_id,
    )
    if found is None:
        text = f"{where}: {shard.location} is no shard of the map {catalogue_map.name}"
        raise CatalogueError(Reason.WRONG_SHARD, text)
    check_writable(StoreVersion(found["store_major"], found["store_minor"]), where)
    if found["shard_id"] != shard.shard_id or found["location"] != shard.location:
        text = f"{where}: {shard.location} says that it is {found['location']}"
        hint = "Is it a branch, or a copy, of the shard?"
        raise CatalogueError(Reason.WRONG_SHARD, text, hint)


def shard_to_json(shard: Shard) -> Json:
    """Return a shard's row as it is kept in an operation's row."""
    return {
        "shard_id": str(shard.shard_id),
        "name": shard.name,
        "map_id": str(shard.map_id),
        "host": shard.host,
        "port": shard.port,
        "database": shard.database,
        "endpoint": shard.endpoint,
        "instance": shard.instance,
        "workspace": shard.workspace,
        "status": str(shard.status),
        "version": shard.version,
    }


def shard_from_json(row: Mapping[str, Any]) -> Shard:
    """Return the shard of `shard_to_json`."""
    ids = {name: UUID(row[name]) for name in ("shard_id", "map_id")}
    return Shard(**{**row, **ids, "status": Status(row["status"])})


Reach = Callable[[str], Awaitable[None]]
"""Called at each point of an operation, with its name: a test may wait or end the process there."""


async def pass_by(point: str) -> None:
    """Stop at no point."""


def to_text(body: Json) -> str:
    """Return JSON for the driver, which takes it as text."""
    return json.dumps(body)


# The points of undoing an operation, in order; those of a shard come again for each shard.
UNDO_POINTS: Final = (
    "undo",
    "undo.shard",
    "undo.shard.commit",
    "undo.shard.done",
    "undo.end",
    "undo.end.commit",
    "undo.done",
)


def points(operation: type[Operation]) -> list[str]:
    """Return the points that doing this kind of operation passes, in order.

    STEP.commit comes before a commit, for each shard; STEP.record before the state is recorded.
    """
    found = ["begin", "begin.commit", "begin.done"]
    for step in operation.steps:
        commit = [] if step.place is Place.OUTSIDE else [f"{step.name}.commit"]
        record = [] if step.place is Place.CATALOGUE else [f"{step.name}.record"]
        found += [step.name, *commit, *record, f"{step.name}.done"]
    return found


def states_from(operation: Operation | type[Operation], first: str) -> frozenset[str]:
    """Return the states of an operation from this one on; without one there are none."""
    names = [step.name for step in operation.steps]
    return frozenset(names[names.index(first) :] if first else ())


def steps_after(operation: Operation, state: str) -> tuple[Step, ...]:
    """Return the steps that follow a state."""
    names = [BEGUN, *(step.name for step in operation.steps)]
    return operation.steps[names.index(state) :]


def shards_reached(operation: Operation, state: str) -> set[UUID]:
    """Return the shards that an operation in this state may have changed; all without a state.

    The step after the state may have been committed.
    """
    after = steps_after(operation, state) if state else ()
    begun = operation.steps[: len(operation.steps) - len(after) + 1]
    shards = [operation.shards_of(step) for step in begun if step.place is Place.SHARD]
    return {shard.shard_id for some in shards for shard in some}
