"""Moves under a running sidecar: clients lose a session, and find their key on the other shard."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.model import SessionsMode
from proxy.catalogue.move import Move
from proxy.catalogue.reassign import Reassign
from proxy.server.app import App
from tests.support.catalogue import MAP, Stores
from tests.support.operating import Killed, Operating, Pauses, in_background, kill_at, until
from tests.support.running import LogLines, eventually
from tests.support.sidecars import (
    ENDED,
    Start,
    connect,
    lives,
    moved,
    named_shards,
    parked,
    session,
    started_sidecars,
)

SECONDS_MAX: Final = 30.0
MANY: Final = 100
HELD_SECONDS: Final = 0.5


@pytest_asyncio.fixture
async def operating(stores: Stores) -> AsyncIterator[Operating]:
    """Return a map with [0, 100) and [100, 200) on shard one; a table on both names its shard."""
    async with named_shards(stores) as found:
        yield found


@pytest_asyncio.fixture
async def start(stores: Stores) -> AsyncIterator[Start]:
    """Return a function that starts a sidecar; keyword arguments are of [catalogue]."""
    async with started_sidecars(stores) as started:
        yield started


async def shard_of(connection: Any) -> str:
    """Return the shard that a session is on, by its own table."""
    name: str = await connection.fetchval("select name from here")
    return name


def move(operating: Operating, low: int = 0, to: str = "two", **arguments: Any) -> Move:
    return Move(operating.map, *operating.bounds(low, low + 100), to, **arguments)


@dataclass
class Loop:
    """A client that queries for one key without end, and connects again when it has to."""

    app: App
    key: int
    shards: list[str] = field(default_factory=list)
    lost: int = 0
    refused: list[str] = field(default_factory=list)
    waited_max_seconds: float = 0.0

    async def __call__(self) -> None:
        while True:
            began = time.monotonic()
            try:
                connection = await connect(self.app, self.key)
            except (asyncpg.PostgresError, OSError) as error:
                self.refused.append(repr(error))
                continue
            self.waited_max_seconds = max(self.waited_max_seconds, time.monotonic() - began)
            try:
                while True:
                    self.shards.append(await shard_of(connection))
            except ENDED:
                self.lost += 1
            finally:
                connection.terminate()


@pytest.mark.parametrize("feed", ["listen", "off"])
async def test_the_loop_of_a_key_loses_one_session_and_goes_on_on_the_other_shard(
    operating: Operating, start: Start, feed: str
) -> None:
    app = await start(feed=feed)
    loop = Loop(app, 5)
    async with in_background(loop()):
        await eventually(lambda: len(loop.shards) > 3, "it queries")
        await operating.run(moving := move(operating))
        await eventually(lambda: "two" in loop.shards, "it is on the other shard")
    first = loop.shards.index("two")
    assert set(loop.shards[:first]) == {"one"}
    assert set(loop.shards[first:]) == {"two"}
    assert (loop.lost, loop.refused, moving.sessions_ended) == (1, [], 1)
    await operating.check_settled()


async def test_a_hundred_sessions_are_each_ended_once_and_a_hundred_new_clients_wait_no_longer(
    operating: Operating, start: Start
) -> None:
    app = await start()
    async with AsyncExitStack() as stack:
        began = time.monotonic()
        sessions = [await stack.enter_async_context(session(app, key)) for key in range(MANY)]
        open_seconds = time.monotonic() - began
        other = await stack.enter_async_context(session(app, 150))
        pauses = Pauses("announced.done")
        moving = move(operating)
        async with in_background(operating.run(moving, pauses)) as running:
            await pauses.reached("announced.done")
            coming = [asyncio.ensure_future(timed_connect(app, key)) for key in range(MANY)]
            await eventually(lambda: parked(app) == MANY, "they are parked")
            resumed_at = time.monotonic()
            pauses.resume("announced.done")
            assert await running
            done_at = time.monotonic()
        for connection, connected_at in await asyncio.gather(*coming):
            stack.callback(connection.terminate)
            assert await shard_of(connection) == "two"
            # The bound is relative: the machine may be busy.
            offline_seconds = done_at - resumed_at
            assert connected_at - resumed_at < 2 * offline_seconds + open_seconds + 2.0
        assert moving.sessions_ended == MANY
        await eventually(lambda: moved(app) == MANY, "each is counted")
        assert not any([await lives(one) for one in sessions])
        assert await lives(other)
        assert moved(app) == MANY
        assert app.metrics.value("startup_failures_total") == 0
    await operating.check_settled()


async def timed_connect(app: App, key: int) -> tuple[Any, float]:
    connection = await connect(app, key)
    return connection, time.monotonic()


async def test_s10_a_reassigned_mapping_is_served_from_the_other_shard_once_it_is_online(
    operating: Operating, start: Start
) -> None:
    app = await start()
    bounds = operating.bounds(0, 100)
    with pytest.raises(CatalogueError) as refused:
        await operating.run(Reassign(operating.map, *bounds, "two"))
    assert refused.value.reason == "not_offline"
    await operating.run(TakeOffline(operating.map, *bounds))
    await operating.run(Reassign(operating.map, *bounds, "two"))
    waiting = asyncio.ensure_future(connect(app, 5))
    await eventually(lambda: parked(app) == 1, "it is parked")
    await operating.run(TakeOnline(operating.map, *bounds))
    connection = await waiting
    assert await shard_of(connection) == "two"
    connection.terminate()
    async with operating.session(5, name="one") as old:
        assert old.verdict == "mapping_missing"


async def test_s11_the_same_move_twice_needs_the_epoch_of_now(
    operating: Operating, start: Start
) -> None:
    app = await start()
    await operating.run(move(operating, expect=1))
    with pytest.raises(CatalogueError) as refused:
        await operating.run(move(operating, to="one", expect=1))
    assert (refused.value.reason, refused.value.sqlstate) == ("stale_epoch", "40001")
    async with session(app, 5) as one:
        assert await shard_of(one) == "two"
        await operating.run(move(operating, to="one", expect=4))
        assert not await lives(one)
    async with session(app, 5) as one:
        assert await shard_of(one) == "one"


async def test_s27_a_move_that_was_killed_is_undone_by_the_next_writer_under_clients(
    operating: Operating, start: Start
) -> None:
    app = await start()
    for point in ("announced", "drained", "target_ready.record", "flipped"):
        with pytest.raises(Killed):
            await operating.run(move(operating), kill_at(point))
        waiting = asyncio.ensure_future(connect(app, 5))
        await eventually(lambda: parked(app) == 1, "it is parked")
        await operating.run(moving := move(operating, low=100))  # the other mapping
        connection = await waiting
        assert await shard_of(connection) == "one"
        connection.terminate()
        await operating.run(move(operating, low=100, to="one"))
        assert moving.after.epoch > 1
    await operating.check_settled()


async def test_s29_one_of_two_moves_of_a_range_wins_and_other_ranges_are_not_delayed(
    operating: Operating, start: Start
) -> None:
    """On two shards the operators work at the same time; on one the second one hears at once."""
    app = await start()
    await operating.run(move(operating, low=100))
    pauses = Pauses("drained.done")
    bounds = operating.bounds(0, 100)
    async with in_background(operating.run(first := move(operating), pauses)) as running:
        await pauses.reached("drained.done")
        for other in (move(operating), Reassign(operating.map, *bounds, "two")):
            began = time.monotonic()
            with pytest.raises(CatalogueError) as refused:
                await operating.run(other)
            assert (refused.value.reason, refused.value.sqlstate) == ("operation_pending", "55P03")
            assert str(first.op_id) in refused.value.message
            assert time.monotonic() - began < SECONDS_MAX
        async with session(app, 150) as other_key:  # clients of other keys notice nothing
            assert await shard_of(other_key) == "two"
        pauses.resume("drained.done")
        assert await running
    async with session(app, 5) as connection:
        assert await shard_of(connection) == "two"
    await operating.check_settled()


async def test_r4_a_client_that_comes_between_flip_and_opening_is_parked_and_served(
    operating: Operating, start: Start
) -> None:
    app = await start()
    pauses = Pauses("opened")
    async with in_background(operating.run(move(operating), pauses)) as running:
        await pauses.reached("opened")
        waiting = asyncio.ensure_future(connect(app, 5))
        await eventually(lambda: parked(app) == 1, "it is parked")
        pauses.resume("opened")
        assert await running
        connection = await waiting
        assert await shard_of(connection) == "two"
        connection.terminate()
    assert app.metrics.value("startup_failures_total") == 0


async def test_r4_without_a_feed_a_client_that_comes_before_the_opening_is_served_after_it(
    operating: Operating, start: Start
) -> None:
    app = await start(feed="off")
    async with session(app, 5):
        pass
    pauses = Pauses("opened")
    async with in_background(operating.run(move(operating), pauses)) as running:
        await pauses.reached("opened")
        waiting = asyncio.ensure_future(connect(app, 5))
        await eventually(lambda: parked(app) == 1, "it is parked")
        pauses.resume("opened")
        assert await running
        connection = await waiting
        assert await shard_of(connection) == "two"
        connection.terminate()


async def test_the_wait_for_the_cause_of_an_end_is_not_in_the_duration_of_its_session(
    operating: Operating, start: Start, log: LogLines
) -> None:
    """The catalogue is asked whether the mapping has moved, and answers half a second later."""
    app = await start()
    waits = "select from pg_locks where not granted and relation = 'shardmap.mapping'::regclass"

    async def is_asked() -> bool:
        return bool(await operating.fetch(MAP, waits))

    async with operating.stores.connect(MAP) as catalogue:
        await catalogue.execute("begin")
        began = time.monotonic()
        async with session(app, 5) as client:
            pid = await client.fetchval("select pg_backend_pid()")
            await catalogue.execute("lock table shardmap.mapping")
            await operating.fetch("one", "select pg_terminate_backend($1)", pid)
            await until(is_asked, "the catalogue is asked")
            seconds = time.monotonic() - began
            await catalogue.execute(f"select pg_sleep({HELD_SECONDS}); rollback")
    await eventually(lambda: log.events("session ended"), "its end is logged")
    (line,) = log.events("session ended")
    assert line["reason"] == "upstream_closed"
    assert line["duration_seconds"] < seconds + HELD_SECONDS / 2


async def test_r12_a_transaction_that_a_client_has_prepared_is_waited_for(
    operating: Operating, start: Start
) -> None:
    app = await start()
    async with session(app, 5) as connection:
        await connection.execute("begin; prepare transaction 'of a client'")
        async with operating.operator() as looking:

            async def waits() -> bool:
                rows = await looking.pending()
                return [row.progress for row in rows] == [{"prepared_transactions": 1}]

            async with in_background(operating.run(move(operating))) as running:
                await until(waits, "it waits for the transaction")
                assert not await lives(connection)
                async with operating.stores.connect("one", operating.stores.roles.session) as other:
                    await other.execute("commit prepared 'of a client'")
                assert await running
    await operating.check_settled()


async def test_r13_a_commit_in_flight_at_the_kill_is_on_the_source_before_the_copy_or_never(
    operating: Operating, start: Start
) -> None:
    """Clients write all the time; the copy has every row whose COMMIT was answered."""
    app = await start()
    role = operating.stores.roles.session
    await operating.fetch("one", "create table kept (n int)")
    await operating.fetch("one", f'grant all on kept to "{role}"')
    copied: set[int] = set()
    answered: set[int] = set()

    async def copy(*_: object) -> None:
        copied.update(row["n"] for row in await operating.fetch("one", "select n from kept"))

    async def write(first: int) -> None:
        async with session(app, 5) as connection:
            with suppress(*ENDED):
                for n in range(first, first + 100_000):
                    await connection.execute(f"begin; insert into kept values ({n}); commit")
                    answered.add(n)

    writers = [asyncio.ensure_future(write(first * 100_000)) for first in range(4)]
    await eventually(lambda: len(answered) > 20, "they write")
    await operating.run(move(operating, copy=copy))
    await asyncio.gather(*writers)
    assert answered <= copied
    left = {row["n"] for row in await operating.fetch("one", "select n from kept")}
    assert left == copied


async def test_a_drain_lets_the_transaction_of_a_client_end(
    operating: Operating, start: Start
) -> None:
    app = await start()
    async with session(app, 5) as busy, session(app, 6) as idle:
        await busy.execute("begin")
        draining = move(operating, sessions=SessionsMode.DRAIN, drain_seconds=60)
        async with in_background(operating.run(draining)) as running:
            # Not asked: a driver whose query is answered by its end may close before the shard.
            await eventually(idle.is_closed, "the idle one is ended")
            assert await busy.fetchval("select 1") == 1
            await busy.execute("commit")
            assert await running
        assert not await lives(busy)
    async with session(app, 5) as connection:
        assert await shard_of(connection) == "two"
    await eventually(lambda: moved(app) == 2, "both are counted")
