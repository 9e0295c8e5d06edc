"""Attaching databases: a shard that was detached, one that is lost and comes back, and a branch."""

import pytest

from proxy.catalogue.attach import Attach, read_found
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.operation import points
from proxy.catalogue.rebuild import Rebuild
from proxy.catalogue.shard_operations import RemoveShard
from proxy.catalogue.shard_status import TakeShardOffline, TakeShardOnline
from tests.catalogue.test_operations import failing_at
from tests.catalogue.test_repair import add
from tests.support.catalogue import MAP
from tests.support.operating import Killed, Operating, distinct, kill_at
from tests.support.recovering import (
    attaching,
    check_equal,
    detached,
    insert_local,
    lose_catalogue,
    repair,
    restore,
    saved,
    shard_row,
    told,
)


async def branched(operating: Operating) -> None:
    """Make the server of shard two a branch of shard one's."""
    await add(operating, 0, 10, "one")
    await operating.run(RemoveShard(operating.map, "two"))
    await restore(operating, "two", await saved(operating, "one"))


async def refusal(operating: Operating, operation: Attach) -> CatalogueError:
    before = await operating.state()
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert await operating.state() == before
    return refused.value


async def test_s31_detach_attach_and_repair_from_the_shard_restore(operating: Operating) -> None:
    await add(operating, 0, 10, "one")
    await add(operating, 10, 20, "two")
    before = await operating.mapping(5)
    async with operating.session(5) as session:
        await detached(operating, "one")
        assert not await session.lives()
    assert len(await operating.fetch(MAP, "select 1 from shardmap.mapping")) == 1
    attach = await attaching(operating, "one")
    await operating.run(attach)
    assert attach.found.mappings == 1
    assert (await shard_row(operating, "one")).status == "offline"  # it waits for the repair
    assert await told(operating, "one") == [("0", "10")]
    await repair(operating, "one", "shard")
    await check_equal(operating)
    after = await operating.mapping(5)
    assert (after["mapping_id"], after["shard_id"]) == (before["mapping_id"], before["shard_id"])
    assert after["epoch"] == before["epoch"] + 1
    async with operating.session(5) as session:
        assert session.verdict == "ok"


async def test_a_shard_that_was_offline_before_it_was_detached_is_offline_after_it(
    operating: Operating,
) -> None:
    await add(operating, 0, 10, "one")
    await operating.run(TakeShardOffline(operating.map, "one"))
    await detached(operating, "one", force=False)
    await operating.run(await attaching(operating, "one"))
    await repair(operating, "one", "shard")
    await check_equal(operating)
    assert (await shard_row(operating, "one")).status == "offline"
    await operating.run(TakeShardOnline(operating.map, "one"))
    await check_equal(operating)


async def test_an_unreachable_shard_is_detached_and_comes_back_with_keys_of_others(
    operating: Operating,
) -> None:
    await add(operating, 0, 10, "one")
    before = await operating.mapping(5)

    def fail(name: str) -> None:
        if name == "one":
            raise ConnectionRefusedError("no server")

    operating.databases.fail = fail
    detach = await detached(operating, "one")
    assert (detach.mappings, detach.fenced) == (1, False)
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 5), "two"))
    operating.databases.fail = lambda name: None
    await operating.run(await attaching(operating, "one"))
    async with operating.stores.connect("one", operating.stores.roles.session) as connection:
        stale = await operating.admit(connection, "one", before, operating.key(3))
        assert stale["verdict"] == "offline"  # I1: another shard has the key
    assert await told(operating, "one") == [("0", "5"), ("5", "10")]
    await repair(operating, "one", "catalogue")
    await check_equal(operating)
    assert (await shard_row(operating, "one")).status == "online"


async def came_back(operating: Operating) -> None:
    """Attach shard one, which was detached unfenced; shard two has some of its keys since."""
    await add(operating, 0, 10, "one")

    def fail(name: str) -> None:
        if name == "one":
            raise ConnectionRefusedError("no server")

    operating.databases.fail = fail
    await detached(operating, "one")
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 5), "two"))
    operating.databases.fail = lambda name: None
    await operating.run(await attaching(operating, "one"))


async def test_a_shard_that_waits_for_a_repair_is_not_taken_online_by_hand(
    operating: Operating,
) -> None:
    # Its own rows are online: with the shard online, two shards would serve the same keys (I1).
    await came_back(operating)
    reason = await operating.refusal(TakeShardOnline(operating.map, "one"))
    assert reason == ("shard_offline", "55006")
    await repair(operating, "one", "catalogue")
    await check_equal(operating)


async def test_a_rebuild_leaves_a_shard_waiting_that_has_keys_in_conflict(
    operating: Operating,
) -> None:
    # Nothing is done with keys that two shards have online, so the shard must not serve (I1).
    await came_back(operating)
    rebuild = Rebuild(operating.map)
    await operating.run(rebuild)
    assert rebuild.conflict() is not None
    assert (await shard_row(operating, "one")).status == "offline"
    (itself,) = await operating.fetch("one", "select status from shardmap_local.identity")
    assert itself["status"] == "offline"
    await repair(operating, "one", "catalogue")
    await check_equal(operating)


async def test_a_part_of_a_repair_leaves_the_shard_waiting(operating: Operating) -> None:
    await add(operating, 0, 10, "one")
    await add(operating, 10, 20, "one")
    await detached(operating, "one")
    await operating.run(await attaching(operating, "one"))
    await repair(operating, "one", "shard", ("0", "10"))
    assert (await shard_row(operating, "one")).status == "offline"
    await repair(operating, "one", "shard", ("10", "20"))
    assert (await shard_row(operating, "one")).status == "online"
    await check_equal(operating)


async def test_a_shard_without_mappings_waits_for_nothing(operating: Operating) -> None:
    await detached(operating, "one")
    await operating.run(await attaching(operating, "one"))
    await check_equal(operating)
    assert (await shard_row(operating, "one")).status == "online"


async def test_s40_r6_a_branch_is_refused_without_a_new_identity(operating: Operating) -> None:
    await branched(operating)
    refused = await refusal(operating, await attaching(operating, "two"))
    assert (refused.reason, refused.sqlstate) == ("identity_exists", "42710")
    assert "relocate one" in refused.hint
    assert "--new-identity" in refused.hint


async def test_s40_r6_a_branch_is_refused_when_the_catalogue_was_lost(
    operating: Operating,
) -> None:
    """Its shard was not attached yet: the branch took its place, with old rows."""
    await branched(operating)
    await lose_catalogue(operating)
    refused = await refusal(operating, await attaching(operating, "two"))
    assert (refused.reason, refused.sqlstate) == ("identity_exists", "42710")
    assert operating.shards["one"].location in refused.message
    assert "--new-identity" in refused.hint
    assert "--force" in refused.hint
    await operating.run(await attaching(operating, "two", moved=True))
    (identity,) = await operating.fetch("two", "select location from shardmap_local.identity")
    assert identity["location"] == operating.shards["two"].location


async def test_s40_r6_a_branch_becomes_a_shard_of_its_own(operating: Operating) -> None:
    await branched(operating)
    attach = await attaching(operating, "two", new_identity=True)
    await operating.run(attach)
    operating.shards["two"] = await shard_row(operating, "two")
    assert operating.shards["two"].shard_id != operating.shards["one"].shard_id
    (local,) = await operating.local("two")
    assert local["status"] == "offline"
    assert await told(operating, "one") == []
    assert await told(operating, "two") == [("0", "10")]
    await operating.check_invariants()
    async with operating.session(5) as session:
        assert (session.verdict, await session.lives()) == ("ok", True)
    await repair(operating, "two", "catalogue")
    await check_equal(operating)
    assert await operating.local("two") == []


async def test_a_branch_takes_the_keys_of_its_shard(operating: Operating) -> None:
    await branched(operating)
    await operating.run(await attaching(operating, "two", new_identity=True))
    operating.shards["two"] = await shard_row(operating, "two")
    async with operating.session(5) as session:
        await repair(operating, "two", "shard")
        assert not await session.lives()
    await check_equal(operating)
    assert (await operating.mapping(5))["shard_id"] == operating.shards["two"].shard_id


async def test_what_is_no_shard_of_the_map_is_not_attached(operating: Operating) -> None:
    async with operating.stores.connect("one") as connection:
        with pytest.raises(CatalogueError) as refused:
            await read_found(connection, operating.shards["one"], "others", None)
        assert refused.value.reason == "shard_not_valid"
        assert "its maps: tenants" in refused.value.message
    async with operating.stores.connect(MAP) as connection:
        with pytest.raises(CatalogueError) as refused:
            await read_found(connection, operating.shards["one"], "tenants", None)
        assert refused.value.reason == "catalogue_is_shard"
    await operating.fetch("one", "drop schema shardmap_local cascade")
    async with operating.stores.connect("one") as connection:
        with pytest.raises(CatalogueError) as refused:
            await read_found(connection, operating.shards["one"], "tenants", None)
        assert "its maps: none" in refused.value.message


async def prepared(operating: Operating, *, new_identity: bool) -> Attach:
    """Return an operation that attaches shard one, or a branch of it as two."""
    if not await operating.fetch(MAP, "select 1 from shardmap.shard where name = 'one'"):
        await operating.run(await attaching(operating, "one"))
    await operating.clear()
    if new_identity:
        if len(await operating.fetch(MAP, "select 1 from shardmap.shard")) > 1:
            await branched(operating)
        else:
            await add(operating, 0, 10, "one")
            await restore(operating, "two", await saved(operating, "one"))
        return await attaching(operating, "two", new_identity=True)
    await add(operating, 0, 10, "one")
    await insert_local(operating, "one", 20, 30, status="offline")
    await detached(operating, "one")
    await add(operating, 0, 5, "two")
    return await attaching(operating, "one")


@pytest.mark.slow
@pytest.mark.parametrize("new_identity", [False, True])
async def test_s26_an_attach_that_fails_leaves_all_as_it_was(
    operating: Operating, new_identity: bool
) -> None:
    for point in [one for one in points(Attach) if one.endswith(".commit")]:
        operation = await prepared(operating, new_identity=new_identity)
        before = await operating.state()
        with pytest.raises(CatalogueError) as refused:
            await operating.run(operation, failing_at(point))
        assert (refused.value.reason, refused.value.op_id) == ("step_failed", None), point
        assert await operating.state() == before, point


@pytest.mark.slow
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("new_identity", [False, True])
async def test_an_attach_left_at_any_point_can_be_completed_and_undone(
    operating: Operating, new_identity: bool, undo: bool
) -> None:
    for point in distinct(points(Attach))[2:-1]:
        operation = await prepared(operating, new_identity=new_identity)
        before = await operating.state()
        name = operation.shard.name
        with pytest.raises(Killed):
            await operating.run(operation, kill_at(point))
        async with operating.operator() as operator:
            (row,) = await operator.pending()
            await (operator.undo if undo else operator.resume)(row.op_id)
        if undo:
            assert await operating.state() == before, point
            continue
        await repair(operating, name, "catalogue")
        await check_equal(operating)
        if new_identity:
            await operating.run(RemoveShard(operating.map, name))
