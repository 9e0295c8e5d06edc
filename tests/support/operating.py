"""A catalogue with one map on two shards, an operator, and what tests look at afterwards.

For: running operations and checking the invariants of shard maps over real PostgreSQL, with direct
connections as the administrator. Not for: the command line, which connects through the dialer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol
from uuid import UUID, uuid4

import asyncpg

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.locks import lock_mapping
from proxy.catalogue.model import CatalogueMap, Shard
from proxy.catalogue.operation import Operation, Reach, Tools, pass_by
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operations import Operator
from proxy.catalogue.schema import migrate_catalogue, migrate_shard
from proxy.catalogue.shard_operations import AddShard, new_shard
from proxy.catalogue.transactions import transaction
from proxy.routing.keys import KeyType, parse_key
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.invariants import check_invariants, check_settled

STEP_SECONDS_MAX: Final = 30.0
OWNER: Final = "the tests"
LOOKING: Final = "looking"


@dataclass
class Databases:
    """Connects directly. `fail` is called with the database's name first, and may raise.

    `aliases` are servers by the names of shards that lead to another one's, `hosts` by their
    hosts. With `loses_next_answer` the connection to the catalogue is lost after its next commit.
    """

    stores: Stores
    fail: Callable[[str], None] = lambda name: None
    aliases: dict[str, str] = field(default_factory=dict)
    loses_next_answer: bool = False
    hosts: dict[str, str] = field(default_factory=dict)
    fail_at: Callable[[Shard], None] = lambda shard: None

    @asynccontextmanager
    async def catalogue(self) -> AsyncIterator[Any]:
        """Connect to the catalogue."""
        self.fail(MAP)
        async with self.stores.connect(MAP) as connection:
            yield LosingConnection(self, connection)

    def shard(self, shard: Shard) -> AbstractAsyncContextManager[Any]:
        """Connect to a shard."""
        self.fail(shard.name)
        self.fail_at(shard)
        name = self.hosts.get(shard.host) or self.aliases.get(shard.name, shard.name)
        return self.stores.connect(name)


class Loses(Protocol):
    """Says whether the next answer is lost."""

    loses_next_answer: bool


class LosingConnection:
    """A connection that may be lost between a commit and its answer."""

    def __init__(self, databases: Loses, connection: Any) -> None:
        self._databases = databases
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def execute(self, query: str, *arguments: Any) -> Any:
        """Execute a statement."""
        answer = await self._connection.execute(query, *arguments)
        if query == "commit" and self._databases.loses_next_answer:
            self._databases.loses_next_answer = False
            self._connection.terminate()
            raise asyncpg.ConnectionDoesNotExistError("lost by the test")
        return answer


class Slept:
    """Sleeps as long as asked for short waits, and only notes the long ones of retries."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        if seconds >= 1:
            self.seconds.append(seconds)
        await asyncio.sleep(seconds if seconds < 1 else 0)


class Session:
    """A session that the shard was asked to admit, on a connection of the session role."""

    def __init__(self, connection: Any, verdict: str, pid: int) -> None:
        self.connection = connection
        self.verdict = verdict
        self.pid = pid

    async def lives(self) -> bool:
        """Return whether it still answers."""
        try:
            return bool(await self.connection.fetchval("select true"))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False


class Operating:
    """The map `tenants` of ranges of int4 keys, on the shards "one" and "two"."""

    def __init__(self, stores: Stores, kind: Kind = Kind.RANGE) -> None:
        self.stores = stores
        self.databases = Databases(stores)
        self.slept = Slept()
        self.told: list[str] = []
        spec = MapSpec(kind, KeyType.INT4)
        self.map = CatalogueMap(uuid4(), "tenants", spec, 1)
        self.shards: dict[str, Shard] = {}
        self._connections: dict[tuple[str, str], Any] = {}
        self._stack = AsyncExitStack()

    async def close(self) -> None:
        """Close the connections that tests look through."""
        await self._stack.aclose()

    async def connected(self, name: str, role: str) -> Any:
        """Return the connection that tests look through; a new one if it was ended."""
        connection = self._connections.get((name, role))
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            if connection is not None:
                await connection.execute("rollback")
                return connection
        opened = await self._stack.enter_async_context(self.stores.connect(name, role))
        # The name tells it from an operator's; often there is no transaction to roll back.
        await opened.execute(f"set application_name = {LOOKING}; set client_min_messages = error")
        self._connections[name, role] = opened
        return opened

    @property
    def tools(self) -> Tools:
        """The tools of the operations."""
        return Tools(
            self.databases,
            self.slept,
            lambda: datetime.now(UTC),
            time.monotonic,
            self.told.append,
        )

    async def set_up(self) -> None:
        """Install the schemas, and add the map and its shards."""
        spec = self.map.spec
        async with self.stores.connect(MAP) as catalogue:
            await migrate_catalogue(catalogue)
            await catalogue.execute(
                "insert into shardmap.shard_map (map_id, name, kind, key_type)"
                " values ($1, $2, $3, $4)",
                *(self.map.map_id, self.map.name, str(spec.kind), str(spec.key_type)),
            )
            for name in SHARD_NAMES:
                await self._add_shard(catalogue, name)

    async def _add_shard(self, catalogue: Any, name: str) -> None:
        stores = self.stores
        where = (stores.host(name), stores.lakebase.port, stores.database, stores.endpoint(name))
        self.shards[name] = shard = Shard(uuid4(), self.map.map_id, name, *where)
        await catalogue.execute(
            "insert into shardmap.shard (shard_id, map_id, name, host, port, dbname, endpoint)"
            " values ($1, $2, $3, $4, $5, $6, $7)",
            *(shard.shard_id, shard.map_id, name, *where),
        )
        async with stores.connect(name) as connection:
            await migrate_shard(connection, name)
            spec = self.map.spec
            await connection.execute(
                "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
                " hash_version, shard_id, location, version) values ($1,$2,$3,$4,$5,1,$6,$7,1)",
                *(self.map.map_id, self.map.name, str(spec.kind), str(spec.key_type), "none"),
                *(shard.shard_id, shard.location),
            )
            role = '"' + stores.roles.session + '"'
            await connection.execute(
                f"grant usage on schema shardmap_local to {role};"
                f"grant execute on function shardmap_local.admit to {role}"
            )

    # -- operations ------------------------------------------------------------------------------

    @asynccontextmanager
    async def operator(
        self, reach: Reach = pass_by, kind: type[Operator] = Operator
    ) -> AsyncIterator[Operator]:
        """Yield an operator with a connection of its own; `kind` may be one without protection."""

        async def find_map(connection: Any, map_id: UUID) -> CatalogueMap:
            assert map_id == self.map.map_id
            return self.map

        async with kind(self.tools, KINDS, find_map, owner=OWNER, reach=reach) as operator:
            yield operator

    async def run(
        self, operation: Operation, reach: Reach = pass_by, kind: type[Operator] = Operator
    ) -> bool:
        """Run one operation."""
        async with self.operator(reach, kind) as operator:
            return await operator.run(operation)

    async def plan(self, operation: Operation) -> list[str]:
        """Return what an operation would do."""
        async with self.operator() as operator:
            return await operator.plan(operation)

    async def refusal(self, operation: Operation) -> tuple[str, str]:
        """Return reason and SQLSTATE: of the plan as well, and nothing has changed."""
        before = await self.state()
        found = []
        for call in (self.run, self.plan):
            try:
                await call(operation)
            except CatalogueError as error:
                found.append((error.reason, error.sqlstate))
            assert await self.state() == before
        assert len(found) == 2, "it was not refused"
        assert found[0] == found[1]
        return found[0]

    async def lock(
        self, low: int, high: int, *, token: UUID | None = None, seconds: float = 60
    ) -> UUID:
        """Lock a mapping; return the token."""
        token = token or uuid4()
        bounds = self.bounds(low, high)
        async with self.stores.connect(MAP) as catalogue, transaction(catalogue):
            await lock_mapping(catalogue, self.map, bounds, token, label="a copy", seconds=seconds)
        return token

    async def add_shard(self, name: str) -> None:
        """Add a shard again that was removed."""
        stores = self.stores
        where = (stores.host(name), stores.lakebase.port, stores.database)
        shard = new_shard(self.map, name, *where, endpoint=stores.endpoint(name))
        self.shards[name] = shard
        await self.run(AddShard(self.map, shard))

    def key(self, value: int) -> bytes:
        """Return a key's bytes."""
        return parse_key(str(value), KeyType.INT4)

    def bounds(self, low: int | None, high: int | None) -> tuple[bytes, bytes | None]:
        """Return the bounds of a range; None is open."""
        return b"" if low is None else self.key(low), None if high is None else self.key(high)

    # -- sessions --------------------------------------------------------------------------------

    @asynccontextmanager
    async def session(
        self, key: int, *, epoch: int | None = None, commit: bool = True, name: str | None = None
    ) -> AsyncIterator[Session]:
        """Yield a session that its shard was asked to admit, with the catalogue's row."""
        row = await self.mapping(key)
        shard = name or self.name_of(row["shard_id"])
        async with self.stores.connect(shard, self.stores.roles.session) as connection:
            if not commit:
                await connection.execute("begin")
            admitted = await self.admit(connection, shard, row, self.key(key), epoch)
            yield Session(connection, admitted["verdict"], admitted["pid"])

    async def admit(
        self, connection: Any, name: str, row: Any, key: bytes, epoch: int | None = None
    ) -> Any:
        """Return what the shard's own function answers."""
        shard = self.shards[name]
        return await connection.fetchrow(
            "select * from shardmap_local.admit(1, $1, $2, $3, $4, $5, $6, 'test', null, null)",
            *(shard.map_id, shard.shard_id, shard.location, row["mapping_id"]),
            *(row["epoch"] if epoch is None else epoch, key),
        )

    # -- looking ---------------------------------------------------------------------------------

    def name_of(self, shard_id: UUID | str) -> str:
        """Return the name of a shard."""
        return next(name for name, one in self.shards.items() if str(one.shard_id) == str(shard_id))

    async def fetch(self, name: str, query: str, *arguments: Any) -> Any:
        """Return the rows of a query to the catalogue ("map") or a shard, as administrator."""
        connection = await self.connected(name, self.stores.roles.admin)
        return await connection.fetch(query, *arguments)

    async def mapping(self, key: int) -> Any:
        """Return the catalogue's row for a key."""
        rows = await self.fetch(
            MAP,
            "select * from shardmap.mapping where map_id = $1 and lo <= $2"
            " and (hi is null or hi > $2)",
            *(self.map.map_id, self.key(key)),
        )
        assert len(rows) == 1, rows
        return rows[0]

    async def local(self, name: str) -> list[Any]:
        """Return a shard's own mappings, by their lower bound."""
        rows: list[Any] = await self.fetch(name, "select * from shardmap_local.mapping order by lo")
        return rows

    async def registered(self, name: str = "one") -> dict[int, UUID]:
        """Return the mappings of a shard's live sessions, by their pids."""
        rows = await self.fetch(name, "select pid, mapping_id from shardmap_local.live_session")
        return {row["pid"]: row["mapping_id"] for row in rows}

    async def state(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return all rows that operations change, comparable."""
        queries = {
            MAP: "select lo, hi, shard_id, status, sessions, epoch, op_id from shardmap.mapping"
            " order by lo",
            "shards": "select name, status, version, op_id from shardmap.shard order by name",
            "log": "select kind, state from shardmap.op_log order by created_at",
        }
        local = "select lo, hi, status, epoch from shardmap_local.mapping order by lo"
        identity = "select shard_id, status, version from shardmap_local.identity"
        found = {name: await self.fetch(MAP, query) for name, query in queries.items()}
        for name in SHARD_NAMES:
            found[name] = await self.fetch(name, local)
            found[f"{name} itself"] = await self.fetch(name, identity)
        return {name: [tuple(row) for row in rows] for name, rows in found.items()}

    def end_operators(self) -> None:
        """End all connections of the administrator to the catalogue."""
        self.stores.execute(
            MAP,
            "select pg_terminate_backend(pid) from pg_stat_activity"
            f" where datname = current_database() and usename = '{self.stores.roles.admin}'",
        )

    async def clear(self) -> None:
        """Delete all mappings, and set the shards online as at first."""
        await self.fetch(MAP, "delete from shardmap.op_log")
        await self.fetch(MAP, "delete from shardmap.mapping")
        online = "set status = 'online', version = 1"
        await self.fetch(MAP, f"update shardmap.shard {online}, op_id = null")
        for name in SHARD_NAMES:
            await self.fetch(name, "delete from shardmap_local.mapping")
            await self.fetch(name, f"update shardmap_local.identity {online}")

    async def check_invariants(self) -> None:
        """Fail unless I1 to I4 of the shard maps' document hold."""
        await check_invariants(self)

    async def check_settled(self) -> None:
        """Fail unless the invariants hold and nothing is left: both sides have the same rows."""
        await check_settled(self)


class Pauses:
    """Stops an operation at points, until the test lets it go on."""

    def __init__(self, *points: str) -> None:
        self._reached = {point: asyncio.Event() for point in points}
        self._resumed = {point: asyncio.Event() for point in points}

    async def __call__(self, point: str) -> None:
        if point in self._reached:
            self._reached[point].set()
            await self._resumed[point].wait()

    async def reached(self, point: str) -> None:
        """Wait until the operation is there."""
        async with asyncio.timeout(STEP_SECONDS_MAX):
            await self._reached[point].wait()

    def resume(self, point: str) -> None:
        """Resume the operation."""
        self._resumed[point].set()


class Killed(Exception):
    """The end of an operator, as if its process had been killed."""


def distinct(points: Sequence[str]) -> list[str]:
    """Return points without those at which all is as at the next one."""
    return [point for point in points if not point.endswith(".done") or point == points[-1]]


def kill_at(wanted: str) -> Reach:
    """Return a hook that ends the operator at a point."""

    async def reach(point: str) -> None:
        if point == wanted:
            raise Killed(point)

    return reach


def fail_at(wanted: str) -> Reach:
    """Return a hook that fails at a point, for good: what was done is undone."""

    async def reach(point: str) -> None:
        if point == wanted:
            raise CatalogueError(Reason.STEP_FAILED, "failed by the test")

    return reach


@asynccontextmanager
async def in_background(call: Awaitable[Any]) -> AsyncIterator["asyncio.Task[Any]"]:
    """Run something while the block runs; it is ended with the block."""
    task = asyncio.ensure_future(call)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + STEP_SECONDS_MAX
    while not await condition():
        assert time.monotonic() < deadline, f"not within {STEP_SECONDS_MAX:g} s: {what}"
        await asyncio.sleep(0.01)
