"""Taking keys out of service in a shard: the fence, and the sessions that were there before it.

For: locking against admits, ending what holds such a lock for too long, and ending the sessions of
a mapping or of a whole shard until none is left. Not for: the rows that the fence changes.

Invariant: only sessions that are registered for the given mappings are ended, and those that hold
up the fence. A session is ended by its pid and start together: another one may have that pid now.
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import Connection, Shard
from proxy.catalogue.operation import Json, Tools
from proxy.catalogue.shard_store import WAY_TO_END
from proxy.catalogue.transactions import LOCK_SECONDS_MAX, transaction

# An admit takes milliseconds. What blocks the fence for longer is a client that keeps one open.
FENCE_SECONDS_MAX: Final = 5.0
# With that, and what it takes to end the blockers.
BLOCKED_SECONDS_MAX: Final = 30.0
_BARRIER_MS: Final = 200
LOCK_OUT_ALL: Final = "lock table only shardmap_local.mapping in exclusive mode"
_BARRIER: Final = (
    f"savepoint fence; set local lock_timeout = '{_BARRIER_MS}ms'; {LOCK_OUT_ALL};"
    f" set local lock_timeout = '{LOCK_SECONDS_MAX}s'"
)
# From the first attempt to end a session to the proof that there is none.
SESSIONS_SECONDS_MAX: Final = 60.0
# Between two looks: the first is short, and each is twice as long as the one before.
FIRST_POLL_SECONDS: Final = 0.002
_POLL_SECONDS: Final = 0.02
_DRAIN_POLL_SECONDS: Final = 0.5
_PIDS_SHOWN_MAX: Final = 5

# The view says which registrations are of a live backend. It cannot be locked itself, and is read
# once: it reads the activity of all backends, which must not happen for each session.
_LIVE: Final = "live as materialized (select pid, backend_start from shardmap_local.live_session)"
_IS_LIVE: Final = "l.pid = s.pid and l.backend_start = s.backend_start"
_REGISTERED: Final = (
    f"shardmap_local.session s join live l on {_IS_LIVE}"
    " join pg_catalog.pg_stat_activity a on a.pid = s.pid"
)
CLEANED_MAX: Final = 10_000
_CLEAN: Final = f"""
with {_LIVE}, dead as materialized (
  select s.pid, s.backend_start from shardmap_local.session s
  where {{}} and not exists (select from live l where {_IS_LIVE})
  limit {CLEANED_MAX} for update of s skip locked)
delete from shardmap_local.session s using dead d
where s.pid = d.pid and s.backend_start = d.backend_start"""  # noqa: S608 - constants
_OF_MAPPING: Final = "s.mapping_id = $1"
_OF_MAPPINGS: Final = "s.mapping_id = any($1::uuid[])"
_OF_MAP: Final = (
    "exists (select from shardmap_local.mapping m"
    " where m.mapping_id = s.mapping_id and m.map_id = $1)"
)
_WAY: Final = WAY_TO_END.format("a.usesysid")

_BLOCKERS: Final = f"""
select a.pid, {_WAY} as way from pg_catalog.pg_stat_activity a
where a.pid = any(pg_catalog.pg_blocking_pids($1))
and coalesce(a.xact_start < clock_timestamp() - make_interval(secs => $2), true)
and a.usesysid <> (select oid from pg_catalog.pg_roles where rolname = current_user)"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True)
class Registered:
    """Which sessions: those of one mapping, or of all mappings of a map in a shard."""

    condition: str
    id: UUID | list[UUID]

    @classmethod
    def of_mapping(cls, mapping_id: UUID) -> "Registered":
        """Return the sessions of a mapping."""
        return cls(_OF_MAPPING, mapping_id)

    @classmethod
    def of_mappings(cls, mapping_ids: list[UUID]) -> "Registered":
        """Return the sessions of any of these mappings."""
        return cls(_OF_MAPPINGS, mapping_ids)

    @classmethod
    def of_map(cls, map_id: UUID) -> "Registered":
        """Return the sessions of all mappings that the shard has of a map."""
        return cls(_OF_MAP, map_id)


class _Alive(NamedTuple):
    """A session that is registered and may be alive. Its start and state may be hidden from us."""

    pid: int
    login: int
    name: str
    known: bool
    way: str | None


async def lock_out(
    connection: Connection, shard: Shard, tools: Tools, statement: str, *arguments: Any
) -> Any:
    """Return the row of a statement that must wait for the admits in flight.

    A transaction that blocks it and is older than FENCE_SECONDS_MAX is ended, unless it is another
    administrator's. Raises what asyncpg does; a lock that stays held is 55P03.
    """
    pid = await connection.fetchval("select pg_catalog.pg_backend_pid()")
    await _let_admits_pass(connection)
    try:
        async with asyncio.timeout(BLOCKED_SECONDS_MAX), asyncio.TaskGroup() as group:
            waiting = group.create_task(_one(connection, statement, *arguments))
            done, _ = await asyncio.wait((waiting,), timeout=FENCE_SECONDS_MAX)
            if not done:
                tools.progress(f"shard {shard.name}: ending what keeps an admit open")
                await _end_blockers(waiting, pid, shard, tools)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return waiting.result()


async def _one(connection: Connection, statement: str, *arguments: Any) -> Any:
    if arguments:
        return await connection.fetchrow(statement, *arguments)
    return await connection.execute(statement)


async def _let_admits_pass(connection: Connection) -> None:
    """Hold new admits for a moment, until those in flight have ended.

    Admits share the lock of a row, so those of a busy mapping could follow each other for ever
    while an update waits for the row. Who waits for a table is not overtaken. The lock is kept if
    it is granted in time; else a client keeps an admit open, and all others must not wait for it.
    """
    try:
        await connection.execute(_BARRIER)
    except asyncpg.LockNotAvailableError:
        await connection.execute("rollback to savepoint fence")


async def _end_blockers(waiting: asyncio.Task[Any], pid: int, shard: Shard, tools: Tools) -> None:
    """End what blocks a backend for too long, until it has what it waits for."""
    async with tools.databases.shard(shard) as connection:
        while not waiting.done():
            for row in await connection.fetch(_BLOCKERS, pid, FENCE_SECONDS_MAX):
                if row["way"] is not None:
                    await connection.execute(f"select {row['way']}($1)", row["pid"])
            with suppress(asyncpg.LockNotAvailableError):  # it only makes new admits wait
                async with transaction(connection):
                    await connection.execute(f"set local lock_timeout = '{_BARRIER_MS}ms'")
                    await connection.execute(LOCK_OUT_ALL)
            await asyncio.wait((waiting,), timeout=_POLL_SECONDS)


async def end_sessions(
    shard: Shard,
    which: Registered,
    tools: Tools,
    progress: Json,
    *,
    drain_until: datetime | None = None,
) -> int:
    """End these sessions, and return how many there were, when it is proven that none is left.

    Until `drain_until` only those that are idle outside a transaction are ended. The fence must
    have been committed before. `progress` gets the number of sessions that are left. Raises
    CatalogueError: RIGHTS_MISSING, or SESSIONS_ALIVE after SESSIONS_SECONDS_MAX.
    """
    ended: set[int] = set()
    async with tools.databases.shard(shard) as connection:
        deadline, pauses = None, growing_pauses(_POLL_SECONDS)
        while alive := await _alive(connection, which):
            progress["sessions_left"] = len(alive)
            draining = drain_until is not None and tools.now() < drain_until
            if not draining and deadline is None:
                deadline = tools.monotonic() + SESSIONS_SECONDS_MAX
            if deadline is not None and tools.monotonic() >= deadline:
                raise _still_alive(shard, alive)
            _check_rights(shard, alive)
            ended |= await _end(connection, which, alive, only_idle=draining)
            await tools.sleep(_DRAIN_POLL_SECONDS if draining else next(pauses))
        progress.pop("sessions_left", None)
        await _clean(connection, which)
    return len(ended)


def growing_pauses(last: float) -> Iterator[float]:
    """Yield the pauses between looks: each twice the one before, from FIRST_POLL_SECONDS on."""
    seconds = FIRST_POLL_SECONDS
    while True:  # as long as its caller looks
        yield seconds
        seconds = min(last, 2 * seconds)


async def count_sessions(connection: Connection, which: Registered) -> int:
    """Return how many of these sessions may be alive."""
    return len(await _alive(connection, which))


async def check_no_sessions(connection: Connection, which: Registered, what: str) -> None:
    """Check that none of these sessions may be alive. Raises CatalogueError: SESSIONS_ALIVE."""
    if alive := await _alive(connection, which):
        text = f"{len(alive)} sessions live on {what} ({_pids(alive)})"
        hint = "lakebase-auth-proxy shards offline --sessions kill ends them."
        raise CatalogueError(Reason.SESSIONS_ALIVE, text, hint)


async def _alive(connection: Connection, which: Registered) -> list[_Alive]:
    rows = await connection.fetch(
        f"with {_LIVE}"  # noqa: S608 - constants
        " select a.pid, a.usesysid as login, coalesce(a.usename, '') as name,"
        f" a.backend_start is not null as known, {_WAY} as way"
        f" from {_REGISTERED} where {which.condition}",
        which.id,
    )
    return [_Alive(**row) for row in rows]


async def _end(
    connection: Connection, which: Registered, alive: list[_Alive], *, only_idle: bool
) -> set[int]:
    """Ask each of these sessions to end. Return the pids of those that were asked.

    A row that another transaction holds is being registered anew, for a mapping that may not be
    ours; the next round sees.
    """
    ended: set[int] = set()
    for login, way in {(one.login, one.way) for one in alive}:
        rows = await connection.fetch(
            f"with {_LIVE}, found as materialized (select a.pid"  # noqa: S608 - constants, and a name with an oid
            f" from {_REGISTERED} where {which.condition} and a.usesysid = $2"
            " and (not $3 or a.state = 'idle') for update of s skip locked)"
            f" select pid, {way}(pid) as asked from found",
            which.id,
            login,
            only_idle,
        )
        ended |= {row["pid"] for row in rows if row["asked"]}
    return ended


async def _clean(connection: Connection, which: Registered) -> None:
    """Delete the rows of sessions that have ended, CLEANED_MAX at most."""
    await connection.execute(_CLEAN.format(which.condition), which.id)


async def clean_registry(connection: Connection) -> None:
    """Delete the rows of sessions that have ended by themselves, of all mappings of the shard.

    At most CLEANED_MAX, so that it takes a moment, however many have ended since the last time.
    """
    await connection.execute(_CLEAN.format("true"))


def _check_rights(shard: Shard, alive: list[_Alive]) -> None:
    """Raise CatalogueError for a login whose sessions we may not see, or not end."""
    for one in alive:
        if one.known and one.way is not None:
            continue
        verb = "end" if one.known else "see"
        text = f"shard {shard.name}: the administrator may not {verb} sessions of {one.name}"
        hint = f"lakebase-auth-proxy shards grant session {one.name} --sql prints what it takes."
        raise CatalogueError(Reason.RIGHTS_MISSING, text, hint)


def _still_alive(shard: Shard, alive: list[_Alive]) -> CatalogueError:
    text = f"shard {shard.name}: {len(alive)} sessions have not ended ({_pids(alive)})"
    return CatalogueError(Reason.SESSIONS_ALIVE, text)


def _pids(alive: list[_Alive]) -> str:
    """Return the pids of the first of them, in words."""
    more = ", ..." if len(alive) > _PIDS_SHOWN_MAX else ""
    return "pids " + ", ".join(str(one.pid) for one in alive[:_PIDS_SHOWN_MAX]) + more


def drain_end(tools: Tools, seconds: float) -> datetime:
    """Return the end of a drain that begins now."""
    return tools.now() + timedelta(seconds=seconds)
