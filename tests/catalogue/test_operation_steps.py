"""What is recorded of an operation's steps, and where a later process continues."""

import json
from collections.abc import Callable

import asyncpg
import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.file_operation import AddFile
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.model import SessionsMode
from proxy.catalogue.operation import BEGUN, Operation, points, shards_reached
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.split import Split
from proxy.routing.map_builder import LineMapping
from tests.support.catalogue import MAP
from tests.support.operating import Killed, Operating, Pauses, in_background, kill_at, until

_WAITING = (
    "select exists (select from pg_locks"
    " where relation = 'shardmap_local.mapping'::regclass and not granted)"
)


async def add(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))


def offline(operating: Operating) -> TakeOffline:
    return TakeOffline(operating.map, *operating.bounds(0, 10))


def drained(operating: Operating) -> TakeOffline:
    mode, bounds = SessionsMode.DRAIN, operating.bounds(0, 10)
    return TakeOffline(operating.map, *bounds, sessions=mode, drain_seconds=60)


async def test_a_step_of_a_shard_is_recorded_and_not_repeated(operating: Operating) -> None:
    await add(operating)
    with pytest.raises(Killed):
        await operating.run(offline(operating), kill_at("announce"))
    (local,) = await operating.local("one")
    passed = []

    async def reach(point: str) -> None:
        passed.append(point)

    async with operating.operator(reach) as operator:
        (row,) = await operator.pending()
        assert row.state == "fence"
        assert row.seconds_in_state >= 0
        await operator.resume(row.op_id)
    assert passed[0] == "announce"
    assert (await operating.mapping(0))["epoch"] == local["epoch"] == 2
    await operating.check_settled()


async def test_a_step_that_was_committed_and_not_recorded_is_repeated(
    operating: Operating,
) -> None:
    await add(operating)
    with pytest.raises(Killed):
        await operating.run(offline(operating), kill_at("fence.record"))
    async with operating.operator() as operator:
        (row,) = await operator.pending()
        assert row.state == BEGUN
        await operator.resume(row.op_id)
    assert (await operating.mapping(0))["epoch"] == 2
    await operating.check_settled()


async def test_a_step_outside_a_transaction_says_how_far_it_is(operating: Operating) -> None:
    await add(operating)
    draining = drained(operating)
    async with operating.session(1) as session, operating.operator() as looking:
        await session.connection.execute("begin")

        async def says() -> bool:
            return [row.progress for row in await looking.pending()] == [{"sessions_left": 1}]

        async with in_background(operating.run(draining)) as running:
            await until(says, "the row has the number of sessions")
            await session.connection.execute("rollback")
            assert await running
    await operating.check_settled()


async def test_r11_a_step_outside_a_transaction_ends_when_another_operator_takes_over(
    operating: Operating,
) -> None:
    """The catalogue's connection is lost while sessions are drained, and with it the lock."""
    await add(operating)
    draining = drained(operating)
    pauses = Pauses("sessions")
    async with operating.session(1) as session:
        await session.connection.execute("begin")
        async with in_background(operating.run(draining, pauses)) as running:
            await pauses.reached("sessions")
            # What an operator leaves that has taken it over, undoes it, and is killed.
            await operating.fetch(MAP, "update shardmap.op_log set state = 'undoing'")
            pauses.resume("sessions")
            with pytest.raises(CatalogueError) as refused:
                await running
        assert (refused.value.reason, refused.value.op_id) == ("operation_pending", None)
        assert await session.lives()


async def test_a_shard_that_is_lost_in_the_middle_leaves_the_operation_to_be_completed(
    operating: Operating,
) -> None:
    """It may have been changed, so it cannot be left as it is; undoing is not begun either."""
    await add(operating)
    await operating.run(offline(operating))
    online = TakeOnline(operating.map, *operating.bounds(0, 10))

    async def lose(point: str) -> None:
        if point == "local.commit":

            def fail(name: str) -> None:
                if name == "one":
                    raise ConnectionRefusedError("no server")

            operating.databases.fail = fail
            raise asyncpg.ConnectionDoesNotExistError("lost by the test")

    with pytest.raises(CatalogueError) as refused:
        await operating.run(online, lose)
    assert (refused.value.reason, refused.value.op_id) == ("step_failed", online.op_id)
    assert "ops resume" in refused.value.hint
    operating.databases.fail = lambda name: None
    async with operating.operator() as operator:
        assert [row.state for row in await operator.pending()] == [BEGUN]
        await operator.resume(online.op_id)
    assert (await operating.mapping(0))["status"] == "online"
    await operating.check_settled()


async def test_an_operation_in_a_state_has_reached_the_shards_of_its_steps(
    operating: Operating,
) -> None:
    operation = offline(operating)
    await add(operating)
    async with operating.stores.connect(MAP) as catalogue:
        await operation.find(catalogue)
    one = {operating.shards["one"].shard_id}
    assert shards_reached(operation, BEGUN) == shards_reached(operation, "announce") == one
    assert shards_reached(operation, "") == one


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_a_point_before_each_commit_and_before_its_record(kind: str) -> None:
    found = points(KINDS[kind])
    assert found[:3] == ["begin", "begin.commit", "begin.done"]
    assert found[-1] == f"{KINDS[kind].steps[-1].name}.done"
    assert len(found) == len(set(found))


async def test_the_results_of_steps_are_kept_in_the_row(operating: Operating) -> None:
    await add(operating)
    with pytest.raises(Killed):
        await operating.run(offline(operating), kill_at("announce"))
    (row,) = await operating.fetch(MAP, "select body from shardmap.op_log")
    body = json.loads(row["body"])
    assert (body["mapping"]["epoch"], body["after"]["epoch"]) == (1, 2)
    assert (body["mapping"]["status"], body["after"]["status"]) == ("online", "offline")


async def test_a_catalogue_that_is_lost_in_a_step_of_a_shard_is_named(
    operating: Operating,
) -> None:
    """It was said of the shard that its connection was lost."""
    await add(operating)

    async def reach(point: str) -> None:
        if point == "fence":

            def fail(name: str) -> None:
                if name == MAP:
                    raise ConnectionRefusedError("no server")

            operating.databases.fail = fail
            operating.end_operators()

    with pytest.raises(CatalogueError) as refused:
        await operating.run(offline(operating), reach)
    assert "pending: the catalogue: " in refused.value.message
    assert "ops resume" in refused.value.hint  # it has not begun to be undone
    assert not [line for line in operating.told if line.startswith("shard one: ")]


UNDONE: dict[str, Callable[[Operating], Operation]] = {
    "fence": offline,
    "local": lambda o: Split(o.map, o.key(5)),
}


@pytest.mark.parametrize("step", sorted(UNDONE))
async def test_r14_undoing_ends_a_session_that_keeps_its_admit_open(
    operating: Operating, step: str
) -> None:
    """It waited for the client five times, and left the shard to that client."""
    await add(operating)
    operation = UNDONE[step](operating)
    with pytest.raises(Killed):
        await operating.run(operation, kill_at(f"{step}.done"))
    async with operating.session(1, commit=False) as session, operating.operator() as operator:
        assert session.verdict in ("offline", "stale")  # it has the row's lock all the same
        await operator.undo(operation.op_id)
        assert operating.slept.seconds == []
        assert not await session.lives()
    await operating.check_settled()


async def test_r11_who_takes_over_waits_for_a_commit_that_is_under_way(
    operating: Operating,
) -> None:
    """What the shard's rows are locked for: else undoing finds none, and they come after it."""
    pauses = Pauses("local.commit")
    late = AddFile(operating.map, [LineMapping(1, *operating.bounds(0, 10), "one")])
    async with in_background(operating.run(late, pauses)) as running:
        await pauses.reached("local.commit")
        operating.end_operators()
        async with (
            operating.operator() as operator,
            in_background(operator.undo(late.op_id)) as undoing,
        ):

            async def waits_or_is_done() -> bool:
                return undoing.done() or await operating.fetch("one", _WAITING) == [(True,)]

            await until(waits_or_is_done, "the one who takes over waits")
            pauses.resume("local.commit")
            with pytest.raises(CatalogueError):
                await running
            await undoing
    assert await operating.local("one") == []
    await operating.check_settled()


async def test_r11_a_step_of_the_catalogue_is_not_done_once_another_operator_undoes(
    operating: Operating,
) -> None:
    await add(operating)
    pauses = Pauses("end")
    async with in_background(operating.run(Split(operating.map, operating.key(5)), pauses)) as task:
        await pauses.reached("end")
        await operating.fetch(MAP, "update shardmap.op_log set state = 'undoing'")
        pauses.resume("end")
        with pytest.raises(CatalogueError) as refused:
            await task
    assert (refused.value.reason, refused.value.op_id) == ("operation_pending", None)
    assert (await operating.mapping(7))["lo"] == operating.key(0)
