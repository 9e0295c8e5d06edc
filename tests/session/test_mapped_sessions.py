"""Live sessions whose mapping moves: which are ended, how, and what is reported as the cause."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import Final
from uuid import UUID

import pytest

from proxy.catalogue.model import Located, Mapping, SessionsMode, Shard, Status
from proxy.errors import ErrorKind, ProxyError
from proxy.session.drain import OpenSession, OpenSessions
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.mapped_sessions import END_SLICE, MappedSession, MappedSessions
from proxy.session.relay import Relay
from proxy.transport.stream import StartupStream
from proxy.upstream.upstream_session import AdmittedBy
from proxy.wire.messages import Terminate
from tests.session.test_drain import QUERY, READY
from tests.support.peer import Peer
from tests.support.running import eventually
from tests.transport.peers import linked

MOVED: Final = ProxyError(ErrorKind.MAPPING_MOVED).response().encode()
MAP, EU, US = (UUID(int=number) for number in (1, 11, 12))
NOW: Final = 1_800_000_000.0
SECONDS_MAX: Final = 20.0
RECENT_MAX: Final = 3


def shard(shard_id: UUID) -> Shard:
    return Shard(shard_id, MAP, "eu" if shard_id == EU else "us", "h.example.com", 5432, "app")


def located(number: int = 1, **changes: object) -> Located:
    mapping = Mapping(UUID(int=number), MAP, EU, b"", None)
    mapping = replace(mapping, **changes)  # type: ignore[arg-type]
    return Located(mapping, shard(mapping.shard_id))


class Catalogue:
    """Where keys are, by routing key; what is not in it is on mapping 1."""

    def __init__(self) -> None:
        self.present: dict[bytes, Located | None] = {}
        self.default: Located | None = located()
        self.fails: ErrorKind | None = None
        self.asked = 0
        self.asked_for: list[bytes] = []
        self.refreshed: list[bytes] = []
        self.refresh_goes_on = asyncio.Event()
        self.refresh_goes_on.set()

    async def refresh(self, map_id: UUID, routing_key: bytes) -> None:
        self.refreshed.append(routing_key)
        await self.refresh_goes_on.wait()
        if self.fails is not None:
            raise ProxyError(self.fails)

    async def locate(self, map_id: UUID, routing_keys: Sequence[bytes]) -> Sequence[Located | None]:
        self.asked += 1
        self.asked_for += routing_keys
        if self.fails is not None:
            raise ProxyError(self.fails)
        return [self.present.get(key, self.default) for key in routing_keys]


@dataclass
class Live:
    """A session that is relayed, and its two peers; `ends` is what was reported."""

    client: Peer
    upstream: Peer
    relay: Relay
    mapped: MappedSession
    task: asyncio.Task[None]
    ends: list[RelayEnd] = field(default_factory=list)


@dataclass
class House:
    catalogue: Catalogue
    open_sessions: OpenSessions
    mapped: MappedSessions
    cancelled: list[bytes] = field(default_factory=list)

    @asynccontextmanager
    async def session(self, key: bytes = b"k", number: int = 1) -> AsyncIterator[Live]:
        admitted_by = AdmittedBy("tenants/eu", MAP, UUID(int=number), EU, key, 1)
        async with linked() as (to_client, client), linked() as (to_upstream, upstream):

            async def cancel() -> None:
                self.cancelled.append(key)

            relay = Relay(to_client.transport, to_upstream.transport, cancel)
            found: list[MappedSession] = []
            ends: list[RelayEnd] = []

            async def serve(one: StartupStream, other: StartupStream, entry: OpenSession) -> None:
                try:
                    entry.opening()
                    one.hand_over(relay.from_client)
                    other.hand_over(relay.from_upstream)
                    mapped = self.mapped.register(entry, admitted_by)
                    assert mapped is not None
                    found.append(mapped)
                    entry.relaying(relay)
                    mapped.report(await relay.run(), ends.append)
                finally:
                    entry.closing()

            task = self.open_sessions.start(partial(serve, to_client, to_upstream))
            await asyncio.sleep(0)
            yield Live(client, upstream, relay, found[0], task, ends)
            task.cancel()
            await asyncio.wait((task,))


@pytest.fixture
async def house() -> AsyncIterator[House]:
    catalogue = Catalogue()
    mapped = MappedSessions(
        catalogue.locate,
        catalogue.refresh,
        clock=lambda: NOW,
        kill_seconds=0.2,
        retry_seconds=0.2,
        recent_max=RECENT_MAX,
    )
    running = asyncio.ensure_future(mapped.run())
    async with asyncio.timeout(SECONDS_MAX):
        yield House(catalogue, OpenSessions(), mapped)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def looked_at(house: House) -> None:
    before = house.catalogue.asked
    await eventually(lambda: house.catalogue.asked > before, "the catalogue is asked")
    await asyncio.sleep(0)


ENDS: Final = {
    "another shard": located(shard_id=US),
    "no mapping": None,
    "offline with kill": located(status=Status.OFFLINE, sessions=SessionsMode.KILL),
    "drain past its time": located(
        status=Status.OFFLINE,
        sessions=SessionsMode.DRAIN,
        drain_until=datetime.fromtimestamp(NOW - 1, UTC),
    ),
    "drain without a time": located(status=Status.OFFLINE, sessions=SessionsMode.DRAIN),
}
GOES_ON: Final = {
    "the same": located(),
    "a higher epoch": located(epoch=9),
    "another mapping of the shard": located(2),
    "offline with keep": located(status=Status.OFFLINE, sessions=SessionsMode.KEEP),
}


@pytest.mark.parametrize("now", ENDS.values(), ids=ENDS)
async def test_idle_session_gets_an_error_when_its_mapping_is_gone(
    house: House, now: Located | None
) -> None:
    async with house.session() as session:
        house.catalogue.default = now
        house.mapped.changed((UUID(int=1),))
        assert await session.client.receive_rest() == MOVED
        assert await session.upstream.receive_rest() == Terminate().encode()
        session.client.end()
        session.upstream.end()
        await session.task
        assert [end.reason for end in session.ends] == [EndReason.MAPPING_MOVED]
    assert len(house.mapped) == 0


async def test_many_sessions_end_in_slices_whatever_their_mappings(house: House) -> None:
    # Each two hundred sessions had slices of their own, all in one turn of the event loop: other
    # sessions waited for a third of a second.
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        live = [
            await stack.enter_async_context(house.session(number=number))
            for number in range(2, 6)
            for _ in range(30)
        ]
        turns: list[int] = []

        def count() -> None:
            turns.append(sum(one.relay.over for one in live))
            loop.call_soon(count)

        count()
        house.catalogue.default = None
        house.mapped.changed([UUID(int=number) for number in range(2, 6)])
        await eventually(lambda: turns[-1] == len(live), "all are over")
        ended = [after - before for before, after in pairwise(turns)]
        live.clear()
        assert max(ended) <= END_SLICE


class FailingTransport(asyncio.Transport):
    """A transport whose connection fails in a way that is not expected of it."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def write(self, data: object) -> None:
        raise RuntimeError("unable to perform operation")


async def test_an_end_that_fails_stops_no_other(house: House) -> None:
    # All ends share one row of slices: after one that failed, no session was ever ended again.
    loop = asyncio.get_running_loop()
    failures: list[object] = []
    loop.set_exception_handler(lambda _, context: failures.append(context.get("exception")))
    async with house.session(b"a") as failing, house.session(b"b") as other:
        failing.mapped._entry.relay = Relay(FailingTransport(), FailingTransport())
        house.catalogue.default = None
        house.mapped.changed((UUID(int=1),))
        assert await other.client.receive_rest() == MOVED
    async with house.session(b"c") as later:
        house.mapped.changed((UUID(int=1),))
        assert await later.client.receive_rest() == MOVED
    assert [str(failure) for failure in failures] == ["unable to perform operation"]


@pytest.mark.parametrize("now", GOES_ON.values(), ids=GOES_ON)
async def test_session_goes_on_with_what_the_shard_still_has(house: House, now: Located) -> None:
    async with house.session() as session:
        house.catalogue.default = now
        house.mapped.changed((UUID(int=1),))
        await looked_at(house)
        assert not session.mapped.ends
        assert not session.mapped.moved


async def test_busy_session_is_closed_without_a_message_and_cancelled(house: House) -> None:
    async with house.session() as session:
        await session.client.send(QUERY)
        assert await session.upstream.receive_exactly(len(QUERY)) == QUERY
        house.catalogue.default = None
        house.mapped.changed(None)
        assert await session.client.receive_rest() == b""
        assert await session.upstream.receive_rest() == b""
        await session.task
        assert [end.reason for end in session.ends] == [EndReason.MAPPING_MOVED]
        assert house.cancelled == [b"k"]


async def test_end_by_the_shard_itself_is_the_moves(house: House) -> None:
    async with house.session() as session:
        house.catalogue.default = None
        house.mapped.changed((UUID(int=1),))
        await looked_at(house)
        await session.upstream.send(READY)  # its 57P01, say
        session.upstream.end()
        assert await session.client.receive_rest() == READY
        session.client.end()
        await session.task
        assert [end.reason for end in session.ends] == [EndReason.MAPPING_MOVED]


async def end_by_shard(session: Live) -> None:
    """End a session as its shard does. Its end may be reported already when this returns."""
    session.upstream.end()
    await session.client.receive_rest()
    session.client.end()
    await session.task


async def test_end_by_the_shard_that_the_feed_is_late_to_tell_of_is_the_moves(house: House) -> None:
    """On a busy machine the feed came more than a second later: 86 of 800 ends had no cause."""
    house.catalogue.refresh_goes_on.clear()
    async with (
        house.session(b"a") as one,
        house.session(b"b") as other,
        house.session(b"c") as live,
    ):
        await end_by_shard(one)
        await end_by_shard(other)
        await eventually(lambda: house.catalogue.refreshed, "the catalogue is asked")
        assert one.ends == other.ends == []
        house.catalogue.default = None
        house.catalogue.refresh_goes_on.set()
        await eventually(lambda: one.ends and other.ends, "both ends are reported")
        for ended in (one, other):
            assert [end.reason for end in ended.ends] == [EndReason.MAPPING_MOVED]
        assert await live.client.receive_rest() == MOVED
    assert len(house.catalogue.refreshed) == 1
    assert len(house.mapped) == 0


async def test_end_by_the_shard_that_the_feed_tells_of_first_is_the_moves(house: House) -> None:
    house.catalogue.refresh_goes_on.clear()
    async with house.session() as session:
        await end_by_shard(session)
        assert session.ends == []
        house.catalogue.default = None
        house.mapped.changed((UUID(int=1),))
        await eventually(lambda: session.ends, "the end is reported")
        assert [end.reason for end in session.ends] == [EndReason.MAPPING_MOVED]
    assert len(house.mapped) == 0


@pytest.mark.parametrize("fails", [None, ErrorKind.CATALOGUE_UNREACHABLE])
async def test_end_by_the_shard_without_a_move_is_reported_as_it_is(
    house: House, fails: ErrorKind | None
) -> None:
    house.catalogue.fails = fails
    async with house.session() as session:
        await end_by_shard(session)
        await eventually(lambda: session.ends, "the end is reported")
        assert [end.reason for end in session.ends] == [EndReason.UPSTREAM_CLOSED]
    assert house.catalogue.refreshed == [b"k"]
    assert len(house.mapped) == 0


async def test_end_whose_cause_is_still_asked_for_is_reported_when_the_proxy_ends(
    house: House,
) -> None:
    house.catalogue.refresh_goes_on.clear()
    async with house.session() as session:
        await end_by_shard(session)
        house.mapped.close()
        assert [end.reason for end in session.ends] == [EndReason.UPSTREAM_CLOSED]
    assert len(house.mapped) == 0


async def test_end_by_the_client_is_reported_at_once(house: House) -> None:
    async with house.session() as session:
        await session.client.send(Terminate().encode())
        session.client.end()
        session.upstream.end()
        await session.task
        assert [end.reason for end in session.ends] == [EndReason.CLIENT_CLOSED]
    assert len(house.mapped) == 0


async def test_drain_ends_idle_sessions_at_once_and_busy_ones_in_its_time(house: House) -> None:
    until_then = datetime.fromtimestamp(NOW + 0.5, UTC)
    draining = located(status=Status.OFFLINE, sessions=SessionsMode.DRAIN, drain_until=until_then)
    async with house.session() as idle, house.session() as busy, house.session() as stuck:
        for session in (busy, stuck):
            await session.client.send(QUERY)
            await session.upstream.receive_exactly(len(QUERY))
        house.catalogue.default = draining
        house.mapped.changed((UUID(int=1),))
        assert await idle.client.receive_rest() == MOVED
        assert not busy.relay.over
        await busy.upstream.send(READY)
        assert await busy.client.receive_rest() == READY + MOVED
        assert not stuck.relay.over
        house.catalogue.default = replace(
            draining,
            mapping=replace(draining.mapping, drain_until=datetime.fromtimestamp(NOW, UTC)),
        )
        assert await stuck.client.receive_rest() == b""


async def test_split_and_move_of_one_half_ends_its_sessions_only(house: House) -> None:
    async with house.session(b"a") as low, house.session(b"m") as high:
        house.catalogue.present = {b"a": located(1), b"m": located(2)}
        house.mapped.changed((UUID(int=1), UUID(int=2)))
        await looked_at(house)
        assert (low.mapped.mapping_id, high.mapped.mapping_id) == (UUID(int=1), UUID(int=2))
        house.catalogue.present[b"m"] = located(2, shard_id=US)
        house.mapped.changed((UUID(int=2),))
        assert await high.client.receive_rest() == MOVED
        assert not low.relay.over


async def test_change_between_admission_and_registration_is_noticed(house: House) -> None:
    house.catalogue.default = None
    house.mapped.changed((UUID(int=1),))
    async with house.session() as session:
        assert await session.client.receive_rest() == MOVED


async def test_change_of_another_mapping_asks_nothing(house: House) -> None:
    async with house.session():
        house.mapped.changed((UUID(int=2),))
        house.mapped.changed((UUID(int=1),))
        await looked_at(house)
        assert house.catalogue.asked == 1


async def test_catalogue_that_cannot_be_asked_ends_nothing_until_it_can(house: House) -> None:
    """The session of a mapping that had moved lived on until the mapping changed again."""
    async with house.session() as session:
        house.catalogue.fails = ErrorKind.CATALOGUE_UNREACHABLE
        house.catalogue.default = None
        house.mapped.changed((UUID(int=1),))
        await looked_at(house)
        assert not session.mapped.moved
        await looked_at(house)  # again, without another change
        house.catalogue.fails = None
        assert await session.client.receive_rest() == MOVED


async def test_sessions_of_a_map_that_is_not_in_force_any_more_are_asked_for_once(
    house: House,
) -> None:
    async with house.session(), house.session(b"other", 2) as other:
        house.catalogue.fails = ErrorKind.CATALOGUE_MAP_MISSING
        house.mapped.changed((UUID(int=1),))
        await looked_at(house)
        house.catalogue.fails = ErrorKind.CATALOGUE_UNREACHABLE
        house.mapped.changed((UUID(int=2),))
        for _ in range(3):
            await looked_at(house)
        assert house.catalogue.asked_for.count(b"k") == 1
        assert not other.mapped.moved


async def test_memory_of_recent_changes_is_bounded(house: House) -> None:
    house.catalogue.default = None
    house.mapped.changed([UUID(int=number) for number in range(1, 9)])
    assert len(house.mapped._recent) == RECENT_MAX
    async with house.session() as session:  # its mapping's change is not remembered by name
        assert await session.client.receive_rest() == MOVED
