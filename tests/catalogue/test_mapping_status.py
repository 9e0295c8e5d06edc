"""Taking mappings and shards offline and online: the operator's side."""

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.fence import FENCE_SECONDS_MAX
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.model import SessionsMode
from proxy.catalogue.operation import Operation
from proxy.catalogue.shard_status import TakeShardOffline, TakeShardOnline
from tests.support.operating import Operating

KEEP, DRAIN = SessionsMode.KEEP, SessionsMode.DRAIN


async def add(operating: Operating, low: int, high: int, shard: str = "one") -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(low, high), shard))


async def refusal(operating: Operating, operation: Operation) -> CatalogueError:
    before = await operating.state()
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert await operating.state() == before
    return refused.value


async def test_s16_offline_ends_the_sessions_of_the_mapping_and_no_other(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    bounds = operating.bounds(0, 10)
    async with (
        operating.session(1) as first,
        operating.session(2) as second,
        operating.session(11) as other,
        operating.stores.connect("one", operating.stores.roles.session) as direct,
    ):
        assert {first.verdict, second.verdict, other.verdict} == {"ok"}
        operation = TakeOffline(operating.map, *bounds)
        assert await operating.run(operation)
        assert operation.sessions_ended == 2
        assert not await first.lives()
        assert not await second.lives()
        assert await other.lives()
        assert await direct.fetchval("select true")
    rows = await operating.fetch("one", "select pid from shardmap_local.session")
    assert [row["pid"] for row in rows] == [other.pid]
    assert (operation.after.epoch, (await operating.mapping(1))["epoch"]) == (2, 2)
    async with operating.session(1) as refused:
        assert refused.verdict == "offline"
    await operating.check_invariants()

    online = TakeOnline(operating.map, *bounds)
    assert await operating.run(online)
    assert (await operating.mapping(1))["epoch"] == online.after.epoch == 3
    async with operating.session(1) as again:
        assert again.verdict == "ok"
    await operating.check_invariants()


async def test_s17_keep_leaves_the_sessions_and_refuses_new_ones(operating: Operating) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    async with operating.session(1) as session:
        operation = TakeOffline(operating.map, *bounds, sessions=KEEP)
        await operating.run(operation)
        assert operation.sessions_ended == 0
        assert await session.lives()
        async with operating.session(1) as refused:
            assert refused.verdict == "offline"
        error = await refusal(operating, DeleteMapping(operating.map, *bounds))
        assert (error.reason, error.sqlstate) == ("sessions_alive", "55006")
        # Another offline is another change: it ends them.
        operation = TakeOffline(operating.map, *bounds)
        assert await operating.run(operation)
        assert operation.sessions_ended == 1
        assert not await session.lives()
    assert (await operating.mapping(1))["epoch"] == 3
    assert await operating.run(DeleteMapping(operating.map, *bounds))


async def test_drain_ends_idle_sessions_at_once_and_the_rest_at_its_end(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(1) as idle, operating.session(2) as busy:
        await busy.connection.execute("begin")
        seconds = 3.0
        started = time.monotonic()
        operation = TakeOffline(
            operating.map, *operating.bounds(0, 10), sessions=DRAIN, drain_seconds=seconds
        )
        await operating.run(operation)
        assert time.monotonic() - started >= seconds
        assert operation.sessions_ended == 2
        assert not await idle.lives()
        assert not await busy.lives()
    row = await operating.mapping(1)
    assert row["sessions"] == "drain"
    assert row["drain_until"] == operation.after.drain_until


async def test_doing_again_what_is_done_changes_nothing(operating: Operating) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    offline = [TakeOffline(operating.map, *bounds, sessions=KEEP) for _ in range(2)]
    online = [TakeOnline(operating.map, *bounds) for _ in range(2)]
    for first, again in (offline, online):
        assert await operating.run(first)
        before = await operating.state()
        assert not await operating.run(again)
        assert await operating.state() == before
        assert again.after.epoch == first.after.epoch


async def test_s11_the_same_change_twice_is_taken_at_the_current_epoch_only(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    assert await operating.run(TakeOffline(operating.map, *bounds, expect=1))
    assert not await operating.run(TakeOffline(operating.map, *bounds, expect=2))
    error = await refusal(operating, TakeOffline(operating.map, *bounds, expect=1))
    assert (error.reason, error.sqlstate) == ("stale_epoch", "40001")
    assert (await operating.mapping(1))["epoch"] == 2


async def test_s21_a_stale_epoch_or_version_is_refused(operating: Operating) -> None:
    await add(operating, 0, 10)
    bounds = operating.bounds(0, 10)
    error = await refusal(operating, TakeOffline(operating.map, *bounds, expect=2))
    assert (error.reason, error.sqlstate) == ("stale_epoch", "40001")
    error = await refusal(operating, TakeOnline(operating.map, *bounds, expect=2))
    assert error.reason == "stale_epoch"
    error = await refusal(operating, TakeShardOffline(operating.map, "one", expect=2))
    assert (error.reason, error.sqlstate) == ("stale_version", "40001")
    assert await operating.run(TakeOffline(operating.map, *bounds, expect=1))
    assert await operating.run(TakeShardOffline(operating.map, "one", expect=1))
    error = await refusal(operating, TakeShardOnline(operating.map, "one", expect=1))
    assert await operating.run(TakeShardOnline(operating.map, "one", expect=2))


@pytest.mark.slow
async def test_s59_a_client_that_keeps_its_admit_open_is_ended_and_the_fence_goes_on(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(1, commit=False) as session, operating.session(2) as other:
        assert session.verdict == other.verdict == "ok"
        started = time.monotonic()
        await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10), sessions=KEEP))
        assert FENCE_SECONDS_MAX <= time.monotonic() - started < FENCE_SECONDS_MAX + 5
        assert not await session.lives()
        assert await other.lives()


async def test_many_sessions_of_one_mapping_end(operating: Operating) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(operating.session(1)) for _ in range(50)]
        other = await stack.enter_async_context(operating.session(11))
        operation = TakeOffline(operating.map, *operating.bounds(0, 10))
        await operating.run(operation)
        assert operation.sessions_ended == len(sessions)
        assert not any(await asyncio.gather(*(session.lives() for session in sessions)))
        assert await other.lives()


async def test_sessions_that_may_not_be_ended_leave_the_operation_pending(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    admin = '"' + operating.stores.roles.admin + '"'
    operating.stores.execute("one", f"revoke pg_signal_backend from {admin}")
    async with operating.session(1) as session:
        with pytest.raises(CatalogueError) as refused:
            await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
        assert refused.value.reason == "rights_missing"
        op_id = refused.value.op_id
        assert op_id is not None
        assert await session.lives()
        # It is offline meanwhile, and completed as soon as that is possible.
        assert (await operating.mapping(1))["status"] == "offline"
        operating.stores.execute("one", f"grant pg_signal_backend to {admin}")
        async with operating.operator() as operator:
            assert [row.op_id for row in await operator.pending()] == [op_id]
            assert (await operator.resume(op_id)).state == "announce"
            assert await operator.pending() == []
        assert not await session.lives()
    await operating.check_invariants()
