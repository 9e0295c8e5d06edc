"""Moving and reassigning a mapping: states, epochs, undoing at each, and what is refused."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.locks import lock_mapping
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.model import CatalogueMap, Mapping, SessionsMode, Shard, Status
from proxy.catalogue.move import Move
from proxy.catalogue.operation import BEGUN, Operation, Reach, Tools, points, states_from
from proxy.catalogue.reassign import Reassign
from proxy.catalogue.role_operations import GrantSession
from proxy.catalogue.shard_status import TakeShardOffline
from tests.support.catalogue import MAP, Stores
from tests.support.operating import (
    Killed,
    Operating,
    Pauses,
    distinct,
    in_background,
    kill_at,
    until,
)

MOVE_POINTS = distinct(points(Move))


async def added(operating: Operating, status: Status = Status.ONLINE) -> None:
    bounds = operating.bounds(0, 10)
    await operating.run(AddMapping(operating.map, *bounds, "one", status=status))


def move(operating: Operating, to: str = "two", **arguments: Any) -> Move:
    return Move(operating.map, *operating.bounds(0, 10), to, **arguments)


def reassign(operating: Operating, to: str = "two", **arguments: Any) -> Reassign:
    return Reassign(operating.map, *operating.bounds(0, 10), to, **arguments)


async def where(operating: Operating) -> tuple[str, str, int]:
    """Return the shard, the status and the epoch of the mapping in the catalogue."""
    row = await operating.mapping(1)
    return operating.name_of(row["shard_id"]), row["status"], row["epoch"]


async def refused(operating: Operating, operation: Operation) -> CatalogueError:
    """Run an operation that is refused, which leaves all as it was."""
    version = "select version from shardmap.shard_map"
    before = await operating.state(), await operating.fetch(MAP, version)
    with pytest.raises(CatalogueError) as raised:
        await operating.run(operation)
    assert raised.value.op_id is None
    assert (await operating.state(), await operating.fetch(MAP, version)) == before
    return raised.value


# -- epochs and states ---------------------------------------------------------------------------


async def test_a_move_uses_three_epochs_and_the_source_forgets_the_mapping(
    operating: Operating,
) -> None:
    await added(operating)
    seen: list[tuple[str, Any, Any, Any]] = []

    async def reach(point: str) -> None:
        if point.endswith(".done"):
            rows = [
                [(row["status"], row["epoch"]) for row in await operating.local(name)]
                for name in ("one", "two")
            ]
            seen.append((point.removesuffix(".done"), rows[0], rows[1], await where(operating)))

    assert await operating.run(move(operating), reach)
    online, offline = ("one", "online", 1), ("one", "offline", 2)
    assert seen == [
        ("begin", [("online", 1)], [], online),
        ("checked", [("online", 1)], [], online),
        ("fenced", [("offline", 2)], [], online),
        ("announced", [("offline", 2)], [], offline),
        ("drained", [("offline", 2)], [], offline),
        ("copied", [("offline", 2)], [], offline),
        ("target_ready", [("offline", 2)], [("offline", 3)], offline),
        ("source_cleared", [], [("offline", 3)], offline),
        ("flipped", [], [("offline", 3)], ("two", "offline", 3)),
        ("opened", [], [("online", 4)], ("two", "offline", 3)),
        ("end", [], [("online", 4)], ("two", "online", 4)),
    ]
    await operating.check_settled()


async def test_a_mapping_that_was_offline_is_offline_on_the_other_shard(
    operating: Operating,
) -> None:
    await added(operating)
    await operating.run(
        TakeOffline(operating.map, *operating.bounds(0, 10), sessions=SessionsMode.DRAIN)
    )
    assert await operating.run(moving := move(operating))
    assert await where(operating) == ("two", "offline", 5)
    assert (await operating.mapping(1))["sessions"] == "drain"
    assert (moving.after.epoch, moving.seconds_offline) == (5, 0.0)
    await operating.check_settled()


async def test_s10_online_it_is_not_reassigned_and_offline_it_is_and_stays_so(
    operating: Operating,
) -> None:
    await added(operating)
    error = await refused(operating, reassign(operating))
    assert (error.reason, error.sqlstate) == ("not_offline", "55006")
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
    assert await operating.run(reassign(operating))
    assert await where(operating) == ("two", "offline", 4)
    await operating.check_settled()
    await operating.run(TakeOnline(operating.map, *operating.bounds(0, 10)))
    async with operating.session(1) as session:
        assert session.verdict == "ok"
    async with operating.session(1, name="one") as session:
        assert session.verdict == "mapping_missing"


@pytest.mark.parametrize("kind", [Move, Reassign])
async def test_s11_twice_with_fresh_epochs_and_not_with_a_stale_one(
    operating: Operating, kind: type[Move] | type[Reassign]
) -> None:
    await added(operating, Status.OFFLINE)
    bounds = operating.bounds(0, 10)
    epoch = 1
    for to in ("two", "one"):
        epoch = (await operating.mapping(1))["epoch"]
        assert await operating.run(kind(operating.map, *bounds, to, expect=epoch))
    error = await refused(operating, kind(operating.map, *bounds, "two", expect=epoch))
    assert (error.reason, error.sqlstate) == ("stale_epoch", "40001")
    await operating.check_settled()


async def test_a_row_that_is_ahead_of_the_catalogue_keeps_its_epochs_rising(
    operating: Operating,
) -> None:
    await added(operating)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 41")
    await operating.run(move(operating))
    assert await where(operating) == ("two", "online", 44)
    await operating.check_settled()


# -- sessions ------------------------------------------------------------------------------------


async def test_a_move_ends_the_sessions_of_its_mapping_and_no_other(operating: Operating) -> None:
    await added(operating)
    await operating.run(AddMapping(operating.map, *operating.bounds(10, 20), "one"))
    async with operating.session(1) as session, operating.session(11) as other:
        await operating.run(moving := move(operating))
        assert (moving.sessions_ended, await session.lives(), await other.lives()) == (
            1,
            False,
            True,
        )
    assert 0 < moving.seconds_offline < 30


async def test_a_move_forgets_the_sessions_that_ended_by_themselves(operating: Operating) -> None:
    await added(operating)
    await operating.run(AddMapping(operating.map, *operating.bounds(10, 20), "one"))
    async with operating.session(11) as gone:
        pid = gone.pid
    async with operating.session(12) as other:

        async def is_gone() -> bool:
            query = "select 1 from pg_stat_activity where pid = $1"
            return not await operating.fetch("one", query, pid)

        await until(is_gone, "its backend has ended")
        await operating.run(move(operating))
        rows = await operating.fetch("one", "select pid from shardmap_local.session")
        assert [row["pid"] for row in rows] == [other.pid]


async def test_a_drain_lets_a_transaction_end_and_says_how_many_are_left(
    operating: Operating,
) -> None:
    await added(operating)
    draining = move(operating, sessions=SessionsMode.DRAIN, drain_seconds=60)
    async with operating.session(1) as session, operating.operator() as looking:
        await session.connection.execute("begin; create temp table t ()")

        async def says() -> bool:
            rows = [(row.state, row.progress) for row in await looking.pending()]
            return rows == [("announced", {"sessions_left": 1})]

        async with in_background(operating.run(draining)) as running:
            await until(says, "the row has the number of sessions")
            await session.connection.execute("commit")
            assert await running
    assert (await where(operating))[:2] == ("two", "online")


class Hasty(Operating):
    """Minutes pass while a step waits a few times."""

    @property
    def tools(self) -> Tools:
        now = 0.0

        def monotonic() -> float:
            nonlocal now
            now += 10
            return now

        return replace(super().tools, monotonic=monotonic)


@pytest_asyncio.fixture
async def hasty(stores: Stores) -> AsyncIterator[Hasty]:
    found = Hasty(stores)
    await found.set_up()
    yield found
    await found.close()


@pytest.mark.parametrize("undo", [False, True])
async def test_a_drain_that_does_not_end_is_pending_and_the_mapping_offline(
    hasty: Hasty, undo: bool
) -> None:
    """A process that is stopped does not end, and PostgreSQL shows it as alive."""
    await added(hasty)
    moving = move(hasty)
    async with hasty.session(1) as session:
        os.kill(session.pid, signal.SIGSTOP)
        try:
            with pytest.raises(CatalogueError) as raised:
                await hasty.run(moving)
        finally:
            os.kill(session.pid, signal.SIGCONT)
    error = raised.value
    assert (error.reason, error.sqlstate, error.op_id) == ("sessions_alive", "55006", moving.op_id)
    assert str(session.pid) in error.message
    assert await where(hasty) == ("one", "offline", 2)
    async with hasty.operator() as operator:
        (row,) = await operator.pending()
        assert (row.state, row.progress) == ("announced", {})
        await (operator.undo if undo else operator.resume)(row.op_id)
    assert await where(hasty) == (("one", "online", 5) if undo else ("two", "online", 4))
    await hasty.check_settled()


async def test_r12_a_prepared_transaction_keeps_a_move_pending_and_is_named(hasty: Hasty) -> None:
    await added(hasty)
    session = hasty.stores.roles.session
    async with hasty.stores.connect("one", session) as connection:
        await connection.execute("begin; prepare transaction 'payroll'")
        moving = move(hasty)
        with pytest.raises(CatalogueError) as raised:
            await hasty.run(moving)
        error = raised.value
        assert (error.reason, error.sqlstate) == ("prepared_transactions", "55006")
        assert error.op_id == moving.op_id
        assert "'payroll'" in error.message
        await connection.execute("commit prepared 'payroll'")
    async with hasty.operator() as operator:
        await operator.resume(moving.op_id)
    assert (await where(hasty))[:2] == ("two", "online")


async def test_r12_a_transaction_that_is_prepared_later_is_not_waited_for(
    operating: Operating,
) -> None:
    """It is of other keys: those of the move have no session any more."""
    await added(operating)
    async with operating.stores.connect("one", operating.stores.roles.session) as connection:
        await connection.execute("begin; prepare transaction 'first'")
        moving = move(operating)
        async with operating.operator() as looking:

            async def says() -> bool:
                rows = await looking.pending()
                return [row.progress for row in rows] == [{"prepared_transactions": 1}]

            async with in_background(operating.run(moving)) as running:
                await until(says, "it waits")
                await connection.execute("begin; prepare transaction 'second'")
                await connection.execute("commit prepared 'first'")
                assert await running
        await connection.execute("commit prepared 'second'")


async def test_r12_logins_beside_the_proxy_are_counted_in_a_warning(operating: Operating) -> None:
    await operating.run(GrantSession(operating.map, operating.stores.roles.session))
    await added(operating)
    async with operating.stores.connect("one", operating.stores.roles.session) as connection:
        await connection.execute("select pg_sleep(6)")
        await operating.run(moving := move(operating))
    (warning,) = moving.warnings
    assert "1 session" in warning


# -- the copy ------------------------------------------------------------------------------------


class Copied:
    """A copy that is called, and fails if it is asked to."""

    def __init__(self, failure: CatalogueError | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[str, str]] = []

    async def __call__(
        self, owner: CatalogueMap, mapping: Mapping, source: Shard, target: Shard
    ) -> None:
        self.calls.append((source.name, target.name))
        if self.failure is not None:
            raise self.failure


async def test_rows_are_copied_once_while_the_mapping_is_offline(operating: Operating) -> None:
    await added(operating)
    copy = Copied()
    await operating.run(move(operating, copy=copy))
    assert copy.calls == [("one", "two")]
    await operating.check_settled()


async def test_a_copy_that_fails_is_undone(operating: Operating) -> None:
    await added(operating)
    copy = Copied(CatalogueError(Reason.COPY_FAILED, "the disk is full"))
    with pytest.raises(CatalogueError) as raised:
        await operating.run(move(operating, copy=copy))
    assert (raised.value.reason, raised.value.sqlstate) == ("copy_failed", "58000")
    assert raised.value.op_id is None
    assert await where(operating) == ("one", "online", 5)
    await operating.check_settled()


@pytest.mark.parametrize("again", [True, False])
async def test_a_copy_that_has_not_run_is_asked_for_again(
    operating: Operating, again: bool
) -> None:
    await added(operating)
    moving = move(operating, copy=Copied())
    with pytest.raises(Killed):
        await operating.run(moving, kill_at("copied"))
    copy = Copied() if again else None

    def prepare(operation: Operation) -> None:
        assert isinstance(operation, Move)
        assert operation.awaits_copy
        operation.copy_with(copy)

    async with operating.operator() as operator:
        with pytest.raises(CatalogueError) as raised:
            await operator.resume(moving.op_id)
        assert (raised.value.reason, raised.value.op_id) == ("operation_pending", moving.op_id)
        assert "--without-copy" in raised.value.hint
        await operator.resume(moving.op_id, prepare)
    assert copy is None or copy.calls == [("one", "two")]
    await operating.check_settled()


async def test_a_copy_that_has_run_is_not_asked_for(operating: Operating) -> None:
    await added(operating)
    moving = move(operating, copy=Copied())
    with pytest.raises(Killed):
        await operating.run(moving, kill_at("target_ready"))
    async with operating.operator() as operator:
        await operator.resume(moving.op_id)
    await operating.check_settled()


# -- ends at any point ---------------------------------------------------------------------------


async def ended_at(operating: Operating, operation: Operation, point: str) -> str:
    """Kill the operator at a point. Return the state that is left."""
    await operating.clear()
    await added(operating, Status.ONLINE if isinstance(operation, Move) else Status.OFFLINE)
    with pytest.raises(Killed):
        await operating.run(operation, kill_at(point))
    await operating.check_invariants()
    rows = await operating.fetch(MAP, "select state from shardmap.op_log")
    return rows[0]["state"] if rows else ""


@pytest.mark.parametrize("make", [move, reassign])
async def test_from_each_state_it_is_completed(
    operating: Operating, make: Callable[[Operating], Move | Reassign]
) -> None:
    for point in distinct(points(type(make(operating)))):
        if await ended_at(operating, operation := make(operating), point):
            async with operating.operator() as operator:
                await operator.resume(operation.op_id)
        elif point != "end.done":
            continue
        expected = ("two", "online", 4) if isinstance(operation, Move) else ("two", "offline", 3)
        assert await where(operating) == expected, point
        await operating.check_settled()


@pytest.mark.parametrize("make", [move, reassign])
async def test_from_each_state_before_the_flip_it_is_undone_with_a_new_epoch(
    operating: Operating, make: Callable[[Operating], Move | Reassign]
) -> None:
    for point in distinct(points(type(make(operating)))):
        state = await ended_at(operating, operation := make(operating), point)
        if not state:
            continue
        async with operating.operator() as operator:
            if state in ("flipped", "opened"):
                with pytest.raises(CatalogueError) as raised:
                    await operator.undo(operation.op_id)
                error = raised.value
                assert (error.reason, error.sqlstate) == ("not_undoable", "55006")
                assert error.op_id == operation.op_id
                continue
            await operator.undo(operation.op_id)
        name, status, epoch = await where(operating)
        assert (name, status) == ("one", "online" if isinstance(operation, Move) else "offline")
        untouched = state == BEGUN or (state == "checked" and point != "fenced.record")
        assert epoch == (1 if untouched else 5), (point, state)
        await operating.check_settled()


async def test_the_next_writer_undoes_before_the_flip_and_completes_after_it(
    operating: Operating,
) -> None:
    for point in MOVE_POINTS:
        state = await ended_at(operating, move(operating), point)
        await operating.run(AddMapping(operating.map, *operating.bounds(50, 60), "two"))
        is_moved = state in ("flipped", "opened") or point == "end.done"
        assert (await where(operating))[:2] == ("two" if is_moved else "one", "online"), point
        await operating.check_settled()


def failing(point: str) -> Reach:
    """Return a hook that loses the connection at a point whenever it is passed."""

    async def reach(passed: str) -> None:
        if passed == point:
            raise asyncpg.ConnectionDoesNotExistError("lost by the test")

    return reach


@pytest.mark.parametrize("make", [move, reassign])
async def test_s26_a_step_that_fails_is_undone_or_pending_and_then_the_same_call_succeeds(
    operating: Operating, make: Callable[[Operating], Move | Reassign]
) -> None:
    kind = type(make(operating))
    kept = {f"{name}.commit" for name in states_from(kind, kind.kept_from)} - {"flipped.commit"}
    for point in [one for one in points(kind) if one.endswith(".commit")]:
        await operating.clear()
        await added(operating, Status.ONLINE if kind is Move else Status.OFFLINE)
        with pytest.raises(CatalogueError) as raised:
            await operating.run(operation := make(operating), failing(point))
        assert (raised.value.reason, raised.value.sqlstate) == ("step_failed", "58000")
        await operating.check_invariants()
        if point in kept:
            assert raised.value.op_id == operation.op_id
            async with operating.operator() as operator:
                await operator.resume(operation.op_id)
        else:
            assert raised.value.op_id is None
            await operating.check_settled()
            await operating.run(make(operating))
        await operating.check_settled()


@pytest.mark.parametrize("lost", ["one", "two"])
async def test_a_shard_that_is_lost_in_the_middle_leaves_the_move_pending(
    operating: Operating, lost: str
) -> None:
    await added(operating)
    moving, point = move(operating), {"one": "source_cleared", "two": "target_ready"}[lost]

    def fail(name: str) -> None:
        if name == lost:
            raise ConnectionRefusedError("no server")

    async def reach(passed: str) -> None:
        if passed == f"{point}.commit":
            operating.databases.fail = fail
            raise asyncpg.ConnectionDoesNotExistError("lost by the test")

    with pytest.raises(CatalogueError) as raised:
        await operating.run(moving, reach)
    assert (raised.value.reason, raised.value.op_id) == ("step_failed", moving.op_id)
    await operating.check_invariants()
    operating.databases.fail = lambda name: None
    async with operating.operator() as operator:
        await operator.resume(moving.op_id)
    assert (await where(operating))[:2] == ("two", "online")
    await operating.check_settled()


# -- what is refused before the fence ------------------------------------------------------------


@pytest.mark.parametrize("make", [move, reassign])
async def test_its_own_shard_and_one_that_does_not_exist_are_refused(
    operating: Operating, make: Callable[[Operating, str], Move | Reassign]
) -> None:
    await added(operating)
    error = await refused(operating, make(operating, "one"))
    assert (error.reason, error.sqlstate) == ("same_shard", "22023")
    error = await refused(operating, make(operating, "three"))
    assert (error.reason, error.sqlstate) == ("unknown_shard", "42704")


async def test_a_shard_that_is_offline_gets_nothing(operating: Operating) -> None:
    await added(operating)
    await operating.fetch("two", "update shardmap_local.identity set status = 'offline'")
    error = await refused(operating, move(operating))
    assert (error.reason, error.sqlstate) == ("shard_offline", "55006")
    await operating.fetch("two", "update shardmap_local.identity set status = 'online'")
    await operating.run(TakeShardOffline(operating.map, "two"))
    error = await refused(operating, move(operating))
    assert (error.reason, error.sqlstate) == ("shard_offline", "55006")


SPOILT = {
    "another identity": (
        "update shardmap_local.identity set shard_id = gen_random_uuid()",
        ("wrong_shard", "55000"),
    ),
    "no identity": ("delete from shardmap_local.identity", ("wrong_shard", "55000")),
    "another version": (
        "update shardmap_local.identity set store_major = 9",
        ("store_version", "55000"),
    ),
    "no schema": ("drop schema shardmap_local cascade", ("store_missing", "55000")),
    "a stray row": (
        (
            "insert into shardmap_local.mapping"
            " select gen_random_uuid(), map_id, '', null, 'offline', 1, null"
            " from shardmap_local.identity"
        ),
        ("step_failed", "58000"),
    ),
}


@pytest.mark.parametrize("how", SPOILT)
async def test_a_target_that_cannot_take_the_keys_is_refused_before_the_fence(
    operating: Operating, how: str
) -> None:
    await added(operating)
    statement, expected = SPOILT[how]
    await operating.fetch("two", statement)
    with pytest.raises(CatalogueError) as raised:
        await operating.run(move(operating))
    assert (raised.value.reason, raised.value.sqlstate) == expected
    assert raised.value.op_id is None
    assert await where(operating) == ("one", "online", 1)
    assert [row["epoch"] for row in await operating.local("one")] == [1]


@pytest.mark.parametrize("kind", [Move, Reassign])
async def test_a_source_that_has_an_offline_mapping_online_is_refused(
    operating: Operating, kind: type[Move] | type[Reassign]
) -> None:
    await added(operating, Status.OFFLINE)
    await operating.fetch("one", "update shardmap_local.mapping set status = 'online'")
    error = await refused(operating, kind(operating.map, *operating.bounds(0, 10), "two"))
    assert (error.reason, error.sqlstate) == ("not_offline", "55006")


@pytest.mark.parametrize("kind", [Move, Reassign])
async def test_a_target_that_has_the_mapping_with_other_keys_is_refused(
    operating: Operating, kind: type[Move] | type[Reassign]
) -> None:
    # A merge keeps the id of the left mapping: a restored shard may have it with other bounds.
    await added(operating, Status.OFFLINE)
    query = (
        "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch)"
        " values ($1, $2, $3, $4, 'offline', 1)"
    )
    row = await operating.mapping(1)
    await operating.fetch(
        "two", query, row["mapping_id"], row["map_id"], *operating.bounds(100, 110)
    )
    error = await refused(operating, kind(operating.map, *operating.bounds(0, 10), "two"))
    assert error.reason == "step_failed"
    assert "[100, 110)" in error.message


async def test_a_target_whose_session_roles_lack_grants_is_refused(operating: Operating) -> None:
    await added(operating)
    role = operating.stores.roles.session
    await operating.run(GrantSession(operating.map, role))
    await operating.fetch("two", f'revoke execute on function shardmap_local.admit from "{role}"')
    error = await refused(operating, move(operating))
    assert (error.reason, error.sqlstate) == ("rights_missing", "42501")
    assert "grant execute" in error.hint


async def test_a_target_that_cannot_be_reached_leaves_nothing_begun(operating: Operating) -> None:
    await added(operating)

    def fail(name: str) -> None:
        if name == "two":
            raise ConnectionRefusedError("no server")

    operating.databases.fail = fail
    error = await refused(operating, move(operating))
    assert error.reason == "step_failed"


async def test_a_mapping_with_sessions_that_were_kept_is_not_reassigned(
    operating: Operating,
) -> None:
    await added(operating)
    async with operating.session(1):
        keep = SessionsMode.KEEP
        await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10), sessions=keep))
        error = await refused(operating, reassign(operating))
        assert (error.reason, error.sqlstate) == ("sessions_alive", "55006")
        (pid,) = await operating.registered()
        assert f"(pids {pid})" in error.message
        await operating.run(moving := move(operating))  # which ends them
        assert moving.sessions_ended == 1
    await operating.check_settled()


# -- several operators ---------------------------------------------------------------------------


async def test_s29_of_two_moves_of_one_range_one_wins_and_the_other_hears_at_once(
    operating: Operating,
) -> None:
    await added(operating)
    pauses = Pauses("copied")
    async with in_background(operating.run(first := move(operating), pauses)) as running:
        await pauses.reached("copied")
        async with asyncio.timeout(5):
            with pytest.raises(CatalogueError) as raised:
                await operating.run(move(operating))
        assert (raised.value.reason, raised.value.sqlstate) == ("operation_pending", "55P03")
        assert str(first.op_id) in raised.value.message
        pauses.resume("copied")
        assert await running
    await operating.check_settled()


async def test_a_lock_is_needed_and_lasts_longer_after_a_move_of_its_owner(
    operating: Operating,
) -> None:
    await added(operating)
    token = uuid4()
    async with operating.stores.connect(MAP) as catalogue, catalogue.transaction():
        bounds = operating.bounds(0, 10)
        await lock_mapping(catalogue, operating.map, bounds, token, label="", seconds=60)
    for other, reason in ((None, "locked"), (uuid4(), "lock_not_owned")):
        error = await refused(operating, move(operating, token=other))
        assert (error.reason, error.sqlstate) == (reason, "55P03")
    before = (await operating.mapping(1))["locked_until"]
    await operating.run(move(operating, token=token))
    row = await operating.mapping(1)
    assert (row["lock_owner"], row["locked_until"] > before) == (token, True)


async def test_a_plan_checks_both_shards_and_changes_nothing(operating: Operating) -> None:
    await added(operating)
    before = await operating.state()
    async with operating.operator() as operator:
        plan = await operator.plan(move(operating, copy=Copied()))
        assert any("copy command" in sentence for sentence in plan)
        await operating.fetch("two", "update shardmap_local.identity set status = 'offline'")
        with pytest.raises(CatalogueError) as raised:
            await operator.plan(move(operating))
        assert raised.value.reason == "shard_offline"
        await operating.fetch("two", "update shardmap_local.identity set status = 'online'")
    assert await operating.state() == before


# -- the race R4 ---------------------------------------------------------------------------------


async def test_r4_between_flip_and_opening_the_target_refuses_as_offline(
    operating: Operating,
) -> None:
    await added(operating)
    pauses = Pauses("opened")
    async with in_background(operating.run(move(operating), pauses)) as running:
        await pauses.reached("opened")
        async with operating.session(1) as session:
            assert session.verdict == "offline"
        async with operating.session(1, name="one", epoch=1) as session:
            assert session.verdict == "mapping_missing"
        pauses.resume("opened")
        assert await running
    async with operating.session(1) as session:
        assert session.verdict == "ok"


async def test_r13_a_commit_in_flight_at_the_kill_is_there_or_not_and_in_one_place(
    operating: Operating,
) -> None:
    """The client does not hear which; the rows that are copied have it or not."""
    await added(operating)
    await operating.fetch("one", "create table written (n int)")
    await operating.fetch("one", f'grant all on written to "{operating.stores.roles.session}"')
    copied: list[int] = []

    async def copy(*_: object) -> None:
        copied.extend(row["n"] for row in await operating.fetch("one", "select n from written"))

    async with (
        operating.session(1) as session,
        in_background(
            session.connection.execute("begin; insert into written values (1); commit")
        ) as writing,
    ):
        await operating.run(move(operating, copy=copy))
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            await writing
    rows = [row["n"] for row in await operating.fetch("one", "select n from written")]
    assert copied == rows
