"""Races between operators, sessions that are admitted, and clients that misbehave.

Each is made deterministic by stopping one side at a point. Where the protection can be taken out
without changing the code, a test shows what happens then.
"""

import asyncio
import secrets
from contextlib import AsyncExitStack
from dataclasses import replace
from hashlib import sha256
from typing import Any

import asyncpg
import pytest

from proxy.catalogue.fence import FENCE_SECONDS_MAX
from proxy.catalogue.mapping_operations import END, AddMapping
from proxy.catalogue.mapping_status import (
    ANNOUNCE,
    FENCE,
    SESSIONS,
    TakeOffline,
    TakeOnline,
)
from proxy.catalogue.model import Connection, SessionsMode, Shard
from proxy.catalogue.operation import Tools
from proxy.catalogue.shard_status import TakeShardOffline
from tests.support.catalogue import Stores
from tests.support.operating import Operating, Pauses, in_background, until


async def add(operating: Operating, low: int, high: int, shard: str = "one") -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(low, high), shard))


def offline(operating: Operating, low: int = 0, high: int = 10) -> TakeOffline:
    return TakeOffline(operating.map, *operating.bounds(low, high))


async def alter_admit(operating: Operating, old: str, new: str, shard: str = "one") -> None:
    """Replace a part of the shard's function, to take a protection out."""
    (row,) = await operating.fetch(
        shard, "select pg_get_functiondef('shardmap_local.admit'::regproc)"
    )
    assert old in row[0]
    await operating.fetch(shard, row[0].replace(old, new))


async def someone_waits(operating: Operating, role: str) -> None:
    """Wait until a statement of this login waits for a lock on the shard."""

    async def waits() -> bool:
        query = (
            "select 1 from pg_stat_activity where usename = $1 and wait_event_type = 'Lock'"
            " and datname = current_database()"
        )
        return bool(await operating.fetch("one", query, role))

    await until(waits, f"{role} waits for a lock")


# -- R1: an admit just before the fence ----------------------------------------------------------


async def test_r1_the_fence_waits_for_an_admit_in_flight_and_ends_its_session(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(1, commit=False) as session:
        assert session.verdict == "ok"
        operation = offline(operating)
        async with in_background(operating.run(operation)) as running:
            await someone_waits(operating, operating.stores.roles.admin)
            await session.connection.execute("commit")
            assert await running
        assert operation.sessions_ended == 1
        assert not await session.lives()


async def test_r1_without_the_lock_of_admit_its_session_is_overlooked(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    await alter_admit(operating, " for share", "")
    async with operating.session(1, commit=False) as session:
        operation = offline(operating)
        assert await operating.run(operation)
        await session.connection.execute("commit")
        assert operation.sessions_ended == 0
        assert await session.lives()


async def test_r1_an_admit_that_waits_for_the_fence_reads_what_it_left(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    pauses = Pauses("fence.commit")
    async with in_background(operating.run(offline(operating), pauses)) as running:
        await pauses.reached("fence.commit")
        row = await operating.mapping(1)
        stores = operating.stores
        async with stores.connect("one", stores.roles.session) as connection:
            admit = operating.admit(connection, "one", row, operating.key(1))
            async with in_background(admit) as admitting:
                await someone_waits(operating, stores.roles.session)
                pauses.resume("fence.commit")
                assert (await admitting)["verdict"] == "offline"
        assert await running


BUSY = 30  # sessions that are admitted again and again, so that one of them always has the lock


async def test_r1_the_fence_of_a_busy_mapping_neither_waits_long_nor_ends_its_admits(
    operating: Operating,
) -> None:
    """Admits share the row's lock: those of a busy mapping kept an update waiting for ever.

    After five seconds the fence then ended clients that had done nothing wrong.
    """
    await add(operating, 0, 10)
    row, stores = await operating.mapping(1), operating.stores

    async def open_again_and_again(connection: Any) -> None:
        verdict = ""
        while verdict != "offline":
            async with connection.transaction():
                admitted = await operating.admit(connection, "one", row, operating.key(1))
                verdict = admitted["verdict"]
                await connection.execute("select pg_sleep(0.002)")
            admits.append(verdict)

    admits: list[str] = []

    async def all_are_under_way() -> bool:
        return len(admits) >= 2 * BUSY

    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(stores.connect("one", stores.roles.session))
            for _ in range(BUSY)
        ]
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(open_again_and_again(connection))
            await until(all_are_under_way, "all are under way")
            operation = TakeOffline(
                operating.map, *operating.bounds(0, 10), sessions=SessionsMode.KEEP
            )
            async with asyncio.timeout(FENCE_SECONDS_MAX):
                await operating.run(operation)


# -- R2: first the fence is committed, then sessions are looked for --------------------------------


class _EndsBeforeTheFence(TakeOffline):
    """The wrong order."""

    steps = (SESSIONS, FENCE, ANNOUNCE, END)


@pytest.mark.parametrize("right", [True, False])
async def test_r2_sessions_are_ended_only_after_the_fence(
    operating: Operating, right: bool
) -> None:
    await add(operating, 0, 10)
    kind = TakeOffline if right else _EndsBeforeTheFence
    operation = kind(operating.map, *operating.bounds(0, 10))
    pauses = Pauses("fence")
    async with (
        operating.session(1) as early,
        in_background(operating.run(operation, pauses)) as running,
    ):
        await pauses.reached("fence")
        assert await early.lives() is right
        async with operating.session(2) as late:  # the shard is not fenced yet
            assert late.verdict == "ok"
            pauses.resume("fence")
            assert await running
            assert not await early.lives()
            assert await late.lives() is not right


# -- R8: what a client does to its own session -----------------------------------------------------

ESCAPES = (
    "discard all",
    "set application_name = ''",
    "select pg_advisory_unlock_all()",
    "reset all",
    "deallocate all",
    "set session_replication_role = replica",
    "delete from shardmap_local.session",
    "truncate shardmap_local.session",
    "update shardmap_local.session set mapping_id = null",
)


@pytest.mark.parametrize("protected", [True, False])
async def test_r8_a_client_cannot_take_itself_out_of_the_registry(
    operating: Operating, protected: bool
) -> None:
    await add(operating, 0, 10)
    if not protected:
        role = f'"{operating.stores.roles.session}"'
        await operating.fetch("one", f"grant select, delete on shardmap_local.session to {role}")
    async with operating.session(1) as session:
        refused = 0
        for statement in ESCAPES:
            try:
                await session.connection.execute(statement)
            except asyncpg.InsufficientPrivilegeError:
                refused += 1
        assert refused == (4 if protected else 3)
        operation = offline(operating)
        await operating.run(operation)
        assert operation.sessions_ended == protected
        assert await session.lives() is not protected


# -- R9: another backend has the pid ---------------------------------------------------------------


# The shard's view, without the start of the backend.
LIVE_BY_PID = (
    "create or replace view shardmap_local.live_session as select s.*"
    " from shardmap_local.session s join pg_catalog.pg_stat_activity a on a.pid = s.pid"
)


@pytest.mark.parametrize("right", [True, False])
async def test_r9_a_backend_that_got_the_pid_of_a_registered_one_is_left_alone(
    operating: Operating, right: bool
) -> None:
    await add(operating, 0, 10)
    if not right:
        await operating.fetch("one", LIVE_BY_PID)
    async with operating.session(1) as session:
        # As if it had been registered by an earlier backend of this pid.
        await operating.fetch(
            "one",
            "update shardmap_local.session set backend_start = backend_start - interval '1 day'",
        )
        operation = offline(operating)
        await operating.run(operation)
        assert operation.sessions_ended == (not right)
        assert await session.lives() is right
    assert await operating.fetch("one", "select 1 from shardmap_local.session") == []


# -- R10: a session that ended before it was handed over -------------------------------------------


@pytest.mark.parametrize("right", [True, False])
async def test_r10_a_session_whose_proxy_died_before_the_hand_over_is_in_nobodys_way(
    operating: Operating, right: bool
) -> None:
    await add(operating, 0, 10)
    async with operating.session(1) as session:
        assert session.verdict == "ok"
        session.connection.terminate()  # without a word, as a process that is killed
        query = "select 1 from pg_stat_activity where pid = $1"

        async def ended() -> bool:
            return not await operating.fetch("one", query, session.pid)

        await until(ended, "the backend has ended")
    if not right:
        await operating.fetch(
            "one",
            "create or replace view shardmap_local.live_session as"
            " select s.* from shardmap_local.session s",
        )
    left = [] if right else [session.pid]
    seen = await operating.fetch("one", "select pid from shardmap_local.live_session")
    assert [row["pid"] for row in seen] == left
    operation = offline(operating)
    await operating.run(operation)
    assert operation.sessions_ended == 0
    kept = await operating.fetch("one", "select pid from shardmap_local.session")
    assert [row["pid"] for row in kept] == left


# -- R14: a client calls admit itself, and keeps the transaction open ---------------------------


class _WaitsForClients(TakeOffline):
    """Changes the shard's row without ending what holds it."""

    async def set_local(self, connection: Connection, shard: Shard, tools: Tools) -> None:
        """Change the row alone."""
        sql = (
            "update shardmap_local.mapping set status = 'offline', epoch = epoch + 1, op_id = $2"
            " where mapping_id = $1 returning epoch"
        )
        epoch = await connection.fetchval(sql, self.before.mapping_id, self.op_id)
        self.after = replace(self.after, epoch=epoch)


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
async def test_r14_a_fence_waits_for_no_client_that_keeps_its_admit_open(
    operating: Operating, right: bool
) -> None:
    await add(operating, 0, 10)
    kind = TakeOffline if right else _WaitsForClients
    operation = kind(operating.map, *operating.bounds(0, 10), sessions=SessionsMode.KEEP)
    async with operating.session(1, commit=False) as session:
        async with in_background(operating.run(operation)) as running:
            await someone_waits(operating, operating.stores.roles.admin)
            if right:
                assert await running
            else:
                await asyncio.wait((running,), timeout=FENCE_SECONDS_MAX + 2)
                assert not running.done()
        assert await session.lives() is not right


# -- R6: a branch of a shard, under its own host --------------------------------------------------


@pytest.mark.parametrize("right", [True, False])
async def test_r6_a_branch_of_a_shard_admits_nothing(operating: Operating, right: bool) -> None:
    await add(operating, 0, 10)
    row = await operating.mapping(1)
    # The server of "two" as a branch of the shard "one": the same rows under another host.
    await operating.fetch("two", "delete from shardmap_local.identity")
    for table in ("identity", "mapping"):
        for copied in await operating.fetch("one", f"select * from shardmap_local.{table}"):
            places = ", ".join(f"${at}" for at in range(1, len(copied) + 1))
            await operating.fetch(
                "two", f"insert into shardmap_local.{table} values ({places})", *copied
            )
    if not right:
        await alter_admit(operating, " or i.location <> p_location", "", shard="two")
    # Who writes the catalogue points the shard there, and a proxy dials it.
    branch = operating.shards["two"]
    dialled = replace(branch, shard_id=operating.shards["one"].shard_id)
    operating.shards["two"] = dialled
    async with operating.stores.connect("two", operating.stores.roles.session) as connection:
        admitted = await operating.admit(connection, "two", row, operating.key(1))
        assert admitted["verdict"] == ("wrong_shard" if right else "ok")


# -- R15: an admit in flight while its shard goes offline ------------------------------------------


class _WithoutLock(TakeShardOffline):
    """Writes the shard's status without waiting for the admits in flight."""

    async def write_identity(
        self, connection: Connection, shard: Shard, tools: Tools | None
    ) -> None:
        """Write the status alone."""
        await connection.execute(
            "update shardmap_local.identity set status = 'offline', version = version + 1"
        )


@pytest.mark.parametrize("right", [True, False])
async def test_r15_a_shards_fence_waits_for_an_admit_in_flight(
    operating: Operating, right: bool
) -> None:
    await add(operating, 0, 10)
    operation = (TakeShardOffline if right else _WithoutLock)(operating.map, "one")
    async with operating.session(1, commit=False) as session:
        assert session.verdict == "ok"
        async with in_background(operating.run(operation)) as running:
            if right:
                await someone_waits(operating, operating.stores.roles.admin)
            else:
                assert await running
            await session.connection.execute("commit")
            assert await running
        assert operation.sessions_ended == right
        assert await session.lives() is not right


@pytest.mark.parametrize("right", [True, False])
async def test_r15_an_admit_reads_the_shards_status_only_after_its_lock(
    operating: Operating, right: bool
) -> None:
    await add(operating, 0, 10)
    if not right:
        late = "select * into m from shardmap_local.mapping where mapping_id = p_mapping"
        early = "select * into i from shardmap_local.identity where map_id = p_map;\n  " + late
        await alter_admit(operating, late, early)
        again = "select * into i from shardmap_local.identity where map_id = p_map;\n  if not found"
        await alter_admit(operating, again, "if i.map_id is null")
    pauses = Pauses("fence.commit")
    stores = operating.stores
    row = await operating.mapping(1)
    operation = TakeShardOffline(operating.map, "one")
    async with (
        stores.connect("one", stores.roles.session) as connection,
        in_background(operating.run(operation, pauses)) as running,
    ):
        await pauses.reached("fence.commit")
        admit = operating.admit(connection, "one", row, operating.key(1))
        async with in_background(admit) as admitting:
            await someone_waits(operating, stores.roles.session)
            pauses.resume("fence.commit")
            assert (await admitting)["verdict"] == ("offline" if right else "ok")
        assert await running


# -- one backend for several clients, one after the other ------------------------------------------


class Taken:
    """A backend that a pool gives to one client after the other."""

    def __init__(self, operating: Operating, connection: Any) -> None:
        self._operating = operating
        self._connection = connection
        self._secret: bytes | None = None

    async def take(self, key: int, secret: bytes | None = None) -> str:
        """Return the verdict on the next client; with another secret than that of the last one."""
        operating, shard = self._operating, self._operating.shards["one"]
        row = await operating.mapping(key)
        following = secrets.token_bytes(16)
        admitted = await self._connection.fetchrow(
            "select * from shardmap_local.admit(1, $1, $2, $3, $4, $5, $6, 'pool', $7, $8)",
            *(shard.map_id, shard.shard_id, shard.location, row["mapping_id"], row["epoch"]),
            *(operating.key(key), secret or self._secret, sha256(following).digest()),
        )
        if admitted["verdict"] == "ok":
            self._secret = following
        return str(admitted["verdict"])

    async def registered(self) -> Any:
        (row,) = await self._operating.fetch("one", "select * from shardmap_local.session")
        return row

    async def lives(self) -> bool:
        try:
            return bool(await self._connection.fetchval("select true"))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False


async def test_s76_a_fence_finds_a_backend_exactly_while_it_is_the_mappings_own(
    operating: Operating, stores: Stores
) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    first, second = await operating.mapping(1), await operating.mapping(11)
    async with stores.connect("one", stores.roles.session) as connection:
        taken = Taken(operating, connection)
        assert await taken.take(1) == "ok"
        assert await taken.take(11) == "ok"
        row = await taken.registered()
        assert row["mapping_id"] == second["mapping_id"]
        # A client's own call, an old secret: nothing changes.
        assert await taken.take(1, b"not the secret") == "unregistered"
        assert await taken.registered() == row

        operation = offline(operating)
        await operating.run(operation)
        assert operation.sessions_ended == 0
        assert await taken.lives()
        await operating.run(TakeOnline(operating.map, *operating.bounds(0, 10)))

        assert await taken.take(1) == "ok"
        assert (await taken.registered())["mapping_id"] == first["mapping_id"]
        operation = offline(operating, 10, 20)
        await operating.run(operation)
        assert operation.sessions_ended == 0
        assert await taken.lives()
        operation = offline(operating)
        await operating.run(operation)
        assert operation.sessions_ended == 1
        assert not await taken.lives()
