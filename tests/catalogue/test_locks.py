"""Locks of mappings: who may change one, for how long, and what ends that."""

import asyncio
from uuid import UUID, uuid4

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.locks import check_locks, unlock_all, unlock_mapping
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_rows import mapping_exact
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.transactions import transaction
from tests.support.catalogue import MAP
from tests.support.operating import Killed, Operating, kill_at, until

Bounds = tuple[bytes, bytes | None]


async def add(operating: Operating, low: int = 0, high: int = 10) -> Bounds:
    bounds = operating.bounds(low, high)
    await operating.run(AddMapping(operating.map, *bounds, "one"))
    return bounds


async def unlock(operating: Operating, bounds: Bounds | None, token: UUID | None = None) -> int:
    async with operating.stores.connect(MAP) as catalogue, transaction(catalogue):
        if bounds is not None:
            return await unlock_mapping(catalogue, operating.map, bounds, token)
        assert token is not None
        return await unlock_all(catalogue, operating.map, token)


async def expire(operating: Operating, bounds: Bounds) -> None:
    query = "update shardmap.mapping set locked_until = now() - interval '1 s' where lo = $1"
    await operating.fetch(MAP, query, bounds[0])


async def test_s13_a_locked_mapping_is_changed_with_its_token_only(operating: Operating) -> None:
    bounds = await add(operating)
    token = await operating.lock(0, 10)
    assert await operating.refusal(TakeOffline(operating.map, *bounds)) == ("locked", "55P03")
    other = TakeOffline(operating.map, *bounds, token=uuid4())
    assert await operating.refusal(other) == ("lock_not_owned", "55P03")
    async with operating.session(1) as session:  # it never affects routing
        assert session.verdict == "ok"
        assert await operating.run(TakeOffline(operating.map, *bounds, token=token))
        assert not await session.lives()
    assert await operating.run(TakeOnline(operating.map, *bounds, token=token))
    assert (await operating.mapping(1))["lock_owner"] == token
    assert await operating.run(TakeOffline(operating.map, *bounds, token=token))
    assert await operating.refusal(DeleteMapping(operating.map, *bounds)) == ("locked", "55P03")
    assert await operating.run(DeleteMapping(operating.map, *bounds, token=token))


async def test_s13_a_mapping_is_locked_once(operating: Operating) -> None:
    await add(operating)
    token = await operating.lock(0, 10)
    with pytest.raises(CatalogueError) as refused:
        await operating.lock(0, 10)
    assert refused.value.reason == "locked"
    assert "a copy" in refused.value.message
    # The try of which the answer was lost is not another lock.
    assert await operating.lock(0, 10, token=token) == token


async def test_s13_a_lock_is_taken_away_with_its_token_or_by_force(operating: Operating) -> None:
    bounds = await add(operating)
    token = await operating.lock(0, 10)
    with pytest.raises(CatalogueError) as refused:
        await unlock(operating, bounds, uuid4())
    assert (refused.value.reason, refused.value.sqlstate) == ("lock_not_owned", "55P03")
    assert await unlock(operating, bounds, token) == 1
    assert await unlock(operating, bounds, token) == 0
    await operating.lock(0, 10)
    assert await unlock(operating, bounds) == 1
    assert await unlock(operating, bounds) == 0
    assert await operating.run(TakeOffline(operating.map, *bounds))


async def test_s13_unlocking_all_of_one_token_spares_those_of_others(operating: Operating) -> None:
    for low in (0, 10, 20):
        await add(operating, low, low + 10)
    token = await operating.lock(0, 10)
    await operating.lock(10, 20, token=token)
    other = await operating.lock(20, 30)
    assert await unlock(operating, None, token) == 2
    owners = [(await operating.mapping(key))["lock_owner"] for key in (1, 11, 21)]
    assert owners == [None, None, other]
    assert await unlock(operating, None, token) == 0


async def test_a_lock_that_has_expired_is_none_and_its_token_opens_nothing(
    operating: Operating,
) -> None:
    bounds = await add(operating)
    token = await operating.lock(0, 10)
    await expire(operating, bounds)
    # Others may have changed the mapping since, as far as the holder knows.
    with_token = TakeOffline(operating.map, *bounds, token=token)
    assert await operating.refusal(with_token) == ("lock_not_owned", "55P03")
    assert await operating.run(TakeOffline(operating.map, *bounds))
    assert await unlock(operating, bounds, uuid4()) == 0
    assert await unlock(operating, bounds, token) == 1
    later = await operating.lock(0, 10)
    await expire(operating, bounds)
    assert await operating.lock(0, 10) != later


async def test_a_lock_that_expires_while_its_holder_waits_is_none(operating: Operating) -> None:
    """The age of a lock was that at the start of the transaction, and not after the wait."""
    bounds = await add(operating)
    token = await operating.lock(0, 10, seconds=1)

    async def waits() -> bool:
        query = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
        return bool(await operating.fetch(MAP, query))

    async def has_expired() -> bool:
        query = "select 1 from shardmap.mapping where locked_until < clock_timestamp()"
        return bool(await operating.fetch(MAP, query))

    operation = TakeOffline(operating.map, *bounds, token=token)
    async with operating.stores.connect(MAP) as other:
        async with transaction(other):
            await other.execute("select 1 from shardmap.shard_map for update")
            running = asyncio.ensure_future(operating.run(operation))
            await until(waits, "the operator waits for the row of the map")
            await until(has_expired, "the lock has expired")
        with pytest.raises(CatalogueError) as refused:
            await running
    assert refused.value.reason == "lock_not_owned"


async def test_a_mapping_of_a_pending_operation_is_neither_locked_nor_unlocked(
    operating: Operating,
) -> None:
    bounds = await add(operating)
    token = await operating.lock(0, 10)
    with pytest.raises(Killed):
        await operating.run(
            TakeOffline(operating.map, *bounds, token=token), kill_at("fence.commit")
        )
    for call in (
        unlock(operating, bounds, token),
        unlock(operating, bounds),
        unlock(operating, None, token),
    ):
        with pytest.raises(CatalogueError) as refused:
            await call
        assert (refused.value.reason, refused.value.sqlstate) == ("operation_pending", "55P03")
    await expire(operating, bounds)
    with pytest.raises(CatalogueError) as refused:
        await operating.lock(0, 10)
    assert refused.value.reason == "operation_pending"
    # Who settles it needs no token; the lock is as it was.
    await operating.run(AddMapping(operating.map, *operating.bounds(50, 60), "one"))
    assert (await operating.mapping(1))["lock_owner"] == token
    assert (await operating.mapping(1))["status"] == "online"


async def test_s29_of_concurrent_operators_one_gets_the_lock(operating: Operating) -> None:
    await add(operating)
    calls = [operating.lock(0, 10) for _ in range(8)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    tokens = [one for one in found if isinstance(one, UUID)]
    refused = [one.reason for one in found if isinstance(one, CatalogueError)]
    assert (len(tokens), refused) == (1, ["locked"] * 7)
    assert (await operating.mapping(1))["lock_owner"] == tokens[0]


async def test_of_many_mappings_each_locked_one_must_be_the_tokens(operating: Operating) -> None:
    bounds = [await add(operating, low, low + 10) for low in (0, 10, 20)]
    token = await operating.lock(0, 10)
    async with operating.stores.connect(MAP) as catalogue:
        rows = [await mapping_exact(catalogue, operating.map, *one) for one in bounds]
        await check_locks(catalogue, operating.map, rows, token)
        await check_locks(catalogue, operating.map, rows[1:], None)
        with pytest.raises(CatalogueError, match=r"\[0, 10\) is locked"):
            await check_locks(catalogue, operating.map, rows, None)
        with pytest.raises(CatalogueError, match=r"\[10, 20\) is not locked"):
            await check_locks(catalogue, operating.map, rows[1:], token)


async def test_an_unknown_mapping_or_map_has_no_lock(operating: Operating) -> None:
    with pytest.raises(CatalogueError) as refused:
        await operating.lock(0, 10)
    assert refused.value.reason == "unknown_mapping"
