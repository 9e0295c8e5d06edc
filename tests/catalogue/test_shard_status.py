"""Taking whole shards offline and online: the operator's side."""

import pytest

from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline
from proxy.catalogue.model import SessionsMode
from proxy.catalogue.shard_status import TakeShardOffline, TakeShardOnline
from tests.support.catalogue import MAP
from tests.support.operating import Operating

KEEP, DRAIN = SessionsMode.KEEP, SessionsMode.DRAIN


async def add(operating: Operating, low: int, high: int, shard: str = "one") -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(low, high), shard))


async def test_s58_a_shard_that_is_offline_refuses_all_its_keys_and_keeps_their_status(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    await add(operating, 10, 20)
    await add(operating, 20, 30, "two")
    await operating.run(TakeOffline(operating.map, *operating.bounds(10, 20)))
    async with operating.session(1) as one, operating.session(21) as other:
        operation = TakeShardOffline(operating.map, "one")
        assert await operating.run(operation)
        assert operation.sessions_ended == 1
        assert not await one.lives()
        assert await other.lives()
        # A proxy that has not heard of it believes what the catalogue said before.
        async with operating.session(1) as refused:
            assert refused.verdict == "offline"
    rows = await operating.fetch(MAP, "select status, version from shardmap.shard order by name")
    assert [tuple(row) for row in rows] == [("offline", 2), ("online", 1)]
    (identity,) = await operating.fetch("one", "select * from shardmap_local.identity")
    assert (identity["status"], identity["version"]) == ("offline", 2)
    assert not await operating.run(TakeShardOffline(operating.map, "one"))

    assert await operating.run(TakeShardOnline(operating.map, "one"))
    async with operating.session(1) as one, operating.session(11) as other:
        assert (one.verdict, other.verdict) == ("ok", "offline")
    await operating.check_invariants()


async def test_a_shard_that_is_offline_with_its_sessions_kept_can_end_them(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(1) as session:
        await operating.run(TakeShardOffline(operating.map, "one", sessions=KEEP))
        assert await session.lives()
        before = await operating.state()
        operation = TakeShardOffline(operating.map, "one")
        operation.has_sessions = True
        assert await operating.run(operation)
        assert operation.sessions_ended == 1
        assert not await session.lives()
        assert await operating.state() == before


@pytest.mark.slow
async def test_s59_a_shards_fence_ends_a_client_that_keeps_its_admit_open(
    operating: Operating,
) -> None:
    await add(operating, 0, 10)
    async with operating.session(1, commit=False) as session:
        await operating.run(TakeShardOffline(operating.map, "one", sessions=KEEP))
        assert not await session.lives()
