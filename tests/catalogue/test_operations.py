"""How operations run: retries, undoing, and what a process that ended left pending."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.held_connection import RETRY_SECONDS, HeldConnection
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.operation import UNDO_POINTS, Operation, Reach, Tools, points
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operation_steps import Steps
from proxy.catalogue.operations import Operator
from proxy.catalogue.shard_status import TakeShardOffline, TakeShardOnline
from tests.support.catalogue import MAP, SHARD_NAMES
from tests.support.operating import (
    Killed,
    Operating,
    Pauses,
    distinct,
    in_background,
    kill_at,
    until,
)


async def added(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))


async def taken_offline(operating: Operating) -> None:
    await added(operating)
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))


async def shard_taken_offline(operating: Operating) -> None:
    await added(operating)
    await operating.run(TakeShardOffline(operating.map, "one"))


async def nothing(operating: Operating) -> None:
    pass


Case = tuple[Callable[[Operating], Awaitable[None]], Callable[[Operating], Operation]]
CASES: dict[str, Case] = {
    "add": (nothing, lambda o: AddMapping(o.map, *o.bounds(0, 10), "one")),
    "delete": (taken_offline, lambda o: DeleteMapping(o.map, *o.bounds(0, 10))),
    "offline": (added, lambda o: TakeOffline(o.map, *o.bounds(0, 10))),
    "online": (taken_offline, lambda o: TakeOnline(o.map, *o.bounds(0, 10))),
    "shard_offline": (added, lambda o: TakeShardOffline(o.map, "one")),
    "shard_online": (shard_taken_offline, lambda o: TakeShardOnline(o.map, "one")),
}
NAMES = sorted(CASES)
ROLES = {"grant_session", "revoke_session"}

# Of the second operator on the same keys, however long the first one takes.
REFUSED_SECONDS_MAX = 1.0


def failing_at(wanted: str, *more: str, times: int = 100) -> Reach:
    """Return a hook that loses the connection at these points, so many times."""
    left = dict.fromkeys((wanted, *more), times)

    async def reach(point: str) -> None:
        if left.get(point, 0):
            left[point] -= 1
            raise asyncpg.ConnectionDoesNotExistError("lost by the test")

    return reach


def statuses(state: dict[str, list[tuple[Any, ...]]]) -> Any:
    """Return a state without the numbers that every change raises."""
    return (
        [row[:5] for row in state[MAP]],
        [row[:2] for row in state["shards"]],
        [[row[:3] for row in state[name]] for name in SHARD_NAMES],
        [[row[:2] for row in state[f"{name} itself"]] for name in SHARD_NAMES],
        state["log"],
    )


def commits(kind: str) -> list[str]:
    return [point for point in points(KINDS[kind]) if point.endswith(".commit")]


def test_every_kind_of_operation_is_tested_here_or_in_a_file_of_its_own() -> None:
    in_two_shards = {"move", "reassign"}
    elsewhere = {"add_file", "add_shard", "alter_shard", "merge", "remove_shard", "split", *ROLES}
    recovery = {"attach", "detach", "relocate", "repair", "repair_all"}
    assert set(CASES) | elsewhere | in_two_shards | recovery >= set(KINDS)


@pytest.mark.parametrize("kind", NAMES)
async def test_s26_a_step_that_fails_is_undone_and_the_same_call_succeeds(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    kept = KINDS[kind].kept_from
    for point in commits(kind):
        await operating.clear()
        await prepare(operating)
        before = await operating.state()
        operating.slept.seconds.clear()
        with pytest.raises(CatalogueError) as refused:
            await operating.run(make(operating), failing_at(point))
        assert (refused.value.reason, refused.value.sqlstate) == ("step_failed", "58000")
        assert operating.slept.seconds == list(RETRY_SECONDS)
        if kept and point == "end.commit":
            assert refused.value.op_id is not None  # it is completed, not undone
        else:
            assert refused.value.op_id is None
            assert statuses(await operating.state()) == statuses(before)
        await operating.check_invariants()
        await operating.run(make(operating))
        await operating.check_settled()


@pytest.mark.parametrize("kind", NAMES)
async def test_s28_one_lost_connection_at_any_step_is_invisible(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    for point in commits(kind):
        await operating.clear()
        await prepare(operating)
        operating.slept.seconds.clear()
        assert await operating.run(make(operating), failing_at(point, times=1))
        assert operating.slept.seconds == [RETRY_SECONDS[0]]
        await operating.check_settled()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", NAMES)
async def test_s28_a_lost_answer_to_the_last_commit_is_invisible(
    operating: Operating, kind: str, resumed: bool
) -> None:
    """An offline that another process resumed was said to be taken over, although it was done."""

    async def reach(point: str) -> None:
        if point == "end.commit":
            operating.databases.loses_next_answer = True

    prepare, make = CASES[kind]
    await prepare(operating)
    if resumed:
        with pytest.raises(Killed):
            await operating.run(make(operating), kill_at("end"))
        async with operating.operator(reach) as operator:
            (row,) = await operator.pending()
            await operator.resume(row.op_id)
    else:
        assert await operating.run(make(operating), reach)
    assert operating.slept.seconds == [RETRY_SECONDS[0]]
    await operating.check_settled()


@pytest.mark.parametrize("kind", NAMES)
async def test_s27_what_fails_in_do_and_undo_is_pending_until_the_next_writer(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    await prepare(operating)
    before = await operating.state()
    first = commits(kind)[1]
    with pytest.raises(CatalogueError) as refused:
        await operating.run(make(operating), failing_at(first, "undo.shard.commit"))
    assert refused.value.reason == "step_failed"
    op_id = refused.value.op_id
    assert str(op_id) in refused.value.message
    async with operating.operator() as operator:
        (row,) = await operator.pending()
        assert (row.op_id, row.kind, row.state) == (op_id, kind, "undoing")
        with pytest.raises(CatalogueError):  # it has begun to be undone
            await operator.resume(row.op_id)
    await operating.check_invariants()
    await operating.run(AddMapping(operating.map, *operating.bounds(50, 60), "one"))
    await operating.check_settled()
    await operating.run(TakeOffline(operating.map, *operating.bounds(50, 60)))
    await operating.run(DeleteMapping(operating.map, *operating.bounds(50, 60)))
    assert statuses(await operating.state()) == statuses(before)


@pytest.mark.parametrize("kind", NAMES)
async def test_an_operator_that_ends_at_any_point_leaves_what_the_next_writer_settles(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    for point in distinct(points(KINDS[kind])):
        await operating.clear()
        await prepare(operating)
        with pytest.raises(Killed):
            await operating.run(make(operating), kill_at(point))
        await operating.check_invariants()
        await operating.run(AddMapping(operating.map, *operating.bounds(50, 60), "one"))
        await operating.check_settled()


@pytest.mark.parametrize("kind", NAMES)
async def test_an_operator_that_ends_while_it_undoes_leaves_what_the_next_writer_settles(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    for point in distinct(UNDO_POINTS):
        await operating.clear()
        await prepare(operating)
        before = await operating.state()
        failing, killing = failing_at(commits(kind)[1]), kill_at(point)

        async def reach(point: str, failing: Reach = failing, killing: Reach = killing) -> None:
            await failing(point)
            await killing(point)

        with pytest.raises(Killed):
            await operating.run(make(operating), reach)
        await operating.check_invariants()
        async with operating.operator() as operator:
            for row in await operator.pending():
                await operator.undo(row.op_id)
        await operating.check_settled()
        assert statuses(await operating.state()) == statuses(before), point


@pytest.mark.parametrize("kind", NAMES)
async def test_what_was_left_can_be_completed_or_undone(operating: Operating, kind: str) -> None:
    prepare, make = CASES[kind]
    for point in distinct(points(KINDS[kind]))[2:-1]:
        for undo in (False, True):
            await operating.clear()
            await prepare(operating)
            before = statuses(await operating.state())
            with pytest.raises(Killed):
                await operating.run(make(operating), kill_at(point))
            async with operating.operator() as operator:
                (row,) = await operator.pending()
                await (operator.undo if undo else operator.resume)(row.op_id)
                assert await operator.pending() == []
            await operating.check_settled()
            assert (statuses(await operating.state()) == before) is undo, point


@pytest.mark.parametrize("kind", NAMES)
async def test_a_shard_that_cannot_be_reached_leaves_all_as_it_was(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    await prepare(operating)
    before = await operating.state()

    def fail(name: str) -> None:
        if name == "one":
            raise ConnectionRefusedError("no server")

    operating.databases.fail = fail
    with pytest.raises(CatalogueError) as refused:
        await operating.run(make(operating))
    assert (refused.value.reason, refused.value.op_id) == ("step_failed", None)
    assert "shard one" in refused.value.message
    assert operating.slept.seconds == list(RETRY_SECONDS)
    assert await operating.state() == before


@pytest.mark.parametrize("kind", NAMES)
async def test_s27_a_catalogue_that_is_lost_leaves_it_pending_until_the_next_writer(
    operating: Operating, kind: str
) -> None:
    prepare, make = CASES[kind]
    await prepare(operating)
    in_shard = commits(kind)[1].replace(".commit", ".done")

    def fail(name: str) -> None:
        if name == MAP:
            raise ConnectionRefusedError("no server")

    async def reach(point: str) -> None:
        if point == in_shard:
            operating.end_operators()
            operating.databases.fail = fail

    operation = make(operating)
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation, reach)
    assert (refused.value.reason, refused.value.op_id) == ("step_failed", operation.op_id)
    await operating.check_invariants()
    operating.databases.fail = lambda name: None
    await operating.run(AddMapping(operating.map, *operating.bounds(50, 60), "one"))
    await operating.check_settled()


async def test_an_operation_of_another_version_is_refused(operating: Operating) -> None:
    """An unknown kind or state ended the verb with a traceback."""
    await added(operating)
    operation = TakeOffline(operating.map, *operating.bounds(0, 10))
    with pytest.raises(Killed):
        await operating.run(operation, kill_at("sessions"))
    for values in ("kind = 'later'", "kind = 'offline', state = 'later'"):
        await operating.fetch(MAP, f"update shardmap.op_log set {values}")
        other = TakeOffline(operating.map, *operating.bounds(0, 10))
        async with operating.operator() as operator:
            for call in (
                operator.resume(operation.op_id),
                operator.undo(operation.op_id),
                operator.plan_pending(operation.op_id, undo=True),
                operator.run(other),
                operator.plan(other),
            ):
                with pytest.raises(CatalogueError, match="does not know") as refused:
                    await call
                assert refused.value.reason == "operation_pending"
                assert refused.value.op_id == operation.op_id


async def test_an_unknown_operation_is_refused(operating: Operating) -> None:
    async with operating.operator() as operator:
        for call in (operator.resume, operator.undo):
            with pytest.raises(CatalogueError) as refused:
                await call(uuid4())
            assert (refused.value.reason, refused.value.sqlstate) == ("unknown_operation", "42704")


async def test_r11_while_an_operator_lives_others_are_refused_on_the_same_shard(
    operating: Operating,
) -> None:
    pauses = Pauses("local")
    began = time.monotonic()
    await operating.run(AddMapping(operating.map, *operating.bounds(70, 80), "two"))
    undisturbed = time.monotonic() - began
    one = AddMapping(operating.map, *operating.bounds(0, 10), "one")
    async with in_background(operating.run(one, pauses)) as running:
        await pauses.reached("local")
        for keys, shard in (((50, 60), "one"), ((5, 15), "two")):
            began = time.monotonic()
            with pytest.raises(CatalogueError) as refused:
                await operating.run(AddMapping(operating.map, *operating.bounds(*keys), shard))
            assert time.monotonic() - began < max(REFUSED_SECONDS_MAX, 5 * undisturbed)
            assert operating.slept.seconds == []  # it is not tried again
            assert (refused.value.reason, refused.value.sqlstate) == ("operation_pending", "55P03")
            assert str(one.op_id) in refused.value.message
            assert refused.value.op_id is None
        async with operating.operator() as operator:
            for call in (operator.resume, operator.undo):
                with pytest.raises(CatalogueError) as refused:
                    await call(one.op_id)
                assert refused.value.reason == "operation_pending"
        # Another shard, other keys: it goes on.
        await operating.run(AddMapping(operating.map, *operating.bounds(20, 30), "two"))
        pauses.resume("local")
        assert await running
    await operating.check_invariants()
    assert len(await operating.fetch(MAP, "select 1 from shardmap.mapping")) == 3


class _FreeLocks(HeldConnection):
    """Takes the lock of every operation as free."""

    async def lock(self, op_id: UUID) -> bool:
        """Take nothing."""
        return True


class _UnguardedSteps(Steps):
    """Does not look whether the operation is still its own, before a shard's commit."""

    async def _read_state(self, operation: Operation) -> str | None:
        return operation.state


class _WithoutLocks(Operator):
    def __init__(self, tools: Tools, *args: Any, **kwargs: Any) -> None:
        super().__init__(tools, *args, **kwargs)
        self._held = _FreeLocks(self._tools)
        self._steps = Steps(self._tools, self._held, self._reach)


class _WithoutGuard(Operator):
    def __init__(self, tools: Tools, *args: Any, **kwargs: Any) -> None:
        super().__init__(tools, *args, **kwargs)
        self._steps = _UnguardedSteps(self._tools, self._held, self._reach)


async def test_r11_without_the_advisory_lock_a_living_operator_is_undone(
    operating: Operating,
) -> None:
    pauses = Pauses("local")
    one = AddMapping(operating.map, *operating.bounds(0, 10), "one")
    async with in_background(operating.run(one, pauses)) as running:
        await pauses.reached("local")
        other = AddMapping(operating.map, *operating.bounds(0, 10), "one")
        assert await operating.run(other, kind=_WithoutLocks)
        pauses.resume("local")
        with pytest.raises(CatalogueError, match="taken over"):
            await running
    await operating.check_invariants()


async def test_r11_without_the_look_at_its_state_a_lost_operator_gives_keys_to_two_shards(
    operating: Operating,
) -> None:
    pauses = Pauses("local")
    late = AddMapping(operating.map, *operating.bounds(0, 10), "one")
    async with in_background(operating.run(late, pauses, _WithoutGuard)) as running:
        await pauses.reached("local")
        operating.end_operators()
        assert await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "two"))
        pauses.resume("local")
        with pytest.raises(CatalogueError, match="taken over"):
            await running
    with pytest.raises(AssertionError):
        await operating.check_invariants()
    assert len(await operating.local("one")) == len(await operating.local("two")) == 1


@pytest.mark.parametrize("point", ["local", "local.commit"])
async def test_r11_an_operator_that_lost_its_lock_changes_nothing_any_more(
    operating: Operating, point: str
) -> None:
    """It is stopped, its connection ends, another one undoes its operation; then it goes on."""
    pauses = Pauses(point)
    late = AddMapping(operating.map, *operating.bounds(0, 10), "one")
    async with in_background(operating.run(late, pauses)) as running:
        await pauses.reached(point)
        operating.end_operators()
        other = AddMapping(operating.map, *operating.bounds(0, 10), "two")
        async with in_background(operating.run(other)) as taking_over:
            if point == "local":
                assert await taking_over

            async def undoing() -> bool:
                return (await operating.state())["log"] == [("add", "undoing")]

            if point == "local.commit":  # its transaction keeps the shard locked
                await until(undoing, "the other one waits for the shard")
            pauses.resume(point)
            with pytest.raises(CatalogueError) as refused:
                await running
            assert refused.value.reason == "operation_pending"
            await taking_over
    await operating.check_invariants()
    assert (await operating.mapping(0))["shard_id"] == operating.shards["two"].shard_id
    assert await operating.local("one") == []


async def test_s29_concurrent_operators_lose_and_double_nothing(operating: Operating) -> None:
    async def work(number: int) -> list[int]:
        done = []
        for low in range(0, 60, 10):
            shard = SHARD_NAMES[number % 2]
            try:
                await operating.run(
                    AddMapping(operating.map, *operating.bounds(low, low + 10), shard)
                )
            except CatalogueError as error:
                refusals.add(error.reason)
            else:
                done.append(low)
        return done

    refusals: set[str] = set()

    done = [low for some in await asyncio.gather(*map(work, range(4))) for low in some]
    assert refusals <= {"overlap", "operation_pending"}
    assert len(done) == len(set(done))
    lows = await operating.fetch(MAP, "select lo from shardmap.mapping order by lo")
    assert [row["lo"] for row in lows] == [operating.key(low) for low in sorted(done)]
    await operating.check_settled()
