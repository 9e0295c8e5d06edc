"""Adding and removing shards: provisioned, registered, granted; or nothing of it."""

from typing import Any

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_status import TakeOffline
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.operation import UNDO_POINTS, Operation, points
from proxy.catalogue.shard_operations import AddShard, RemoveShard, new_shard
from tests.catalogue.test_operations import failing_at
from tests.support.catalogue import MAP
from tests.support.operating import Killed, Operating, distinct, kill_at

SHARDS = "select name, host, port, dbname, status, version, op_id from shardmap.shard order by name"


def adding(operating: Operating, name: str = "one", at: str = "one") -> AddShard:
    stores = operating.stores
    where = (stores.host(at).upper(), stores.lakebase.port, stores.database)
    shard = new_shard(operating.map, name, *where)
    operating.shards[name] = shard
    return AddShard(operating.map, shard)


async def removed(operating: Operating) -> None:
    await operating.run(RemoveShard(operating.map, "one"))


async def refusal(operating: Operating, operation: Operation) -> CatalogueError:
    before = await operating.fetch(MAP, SHARDS)
    with pytest.raises(CatalogueError) as refused:
        await operating.run(operation)
    assert await operating.fetch(MAP, SHARDS) == before
    assert await operating.fetch(MAP, "select * from shardmap.op_log") == []
    return refused.value


async def drop_schema(operating: Operating) -> None:
    await operating.fetch("one", "drop schema shardmap_local cascade")


async def identities(operating: Operating) -> list[Any]:
    rows: list[Any] = await operating.fetch("one", "select * from shardmap_local.identity")
    return rows


async def test_s25_a_shard_is_provisioned_registered_and_granted(operating: Operating) -> None:
    await removed(operating)
    await drop_schema(operating)
    role = operating.stores.roles.session
    await operating.fetch(MAP, "update shardmap.shard_map set session_roles = array[$1]", role)
    operation = adding(operating)
    assert await operating.run(operation)
    one, two = await operating.fetch(MAP, SHARDS)
    assert tuple(one) == ("one", operating.stores.host("one"), *tuple(two)[2:])
    assert (one["status"], one["version"], one["op_id"]) == ("online", 1, None)
    (identity,) = await identities(operating)
    assert identity["shard_id"] == operation.shard.shard_id
    assert identity["location"] == operation.shard.location
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    async with operating.session(1) as session:
        assert session.verdict == "ok"
    await operating.check_invariants()


async def test_s25_a_database_with_the_schema_becomes_a_shard_again(operating: Operating) -> None:
    await removed(operating)
    assert await identities(operating) == []
    assert await operating.run(adding(operating))
    assert len(await identities(operating)) == 1


async def test_s25_a_database_can_be_the_shard_of_two_maps(operating: Operating) -> None:
    other = Operating(operating.stores)
    other.map = CatalogueMap(other.map.map_id, "others", operating.map.spec, 1)
    await operating.fetch(
        MAP,
        "insert into shardmap.shard_map (map_id, name, kind, key_type)"
        " values ($1, 'others', 'range', 'int4')",
        other.map.map_id,
    )
    assert await other.run(adding(other))
    assert len(await identities(operating)) == 2
    assert await other.run(RemoveShard(other.map, "one"))
    (left,) = await identities(operating)
    assert left["map_id"] == operating.map.map_id


async def test_s24_a_name_or_a_location_is_taken_once(operating: Operating) -> None:
    error = await refusal(operating, adding(operating, "one", "two"))
    assert (error.reason, error.sqlstate) == ("exists", "42710")
    error = await refusal(operating, adding(operating, "three", "two"))
    assert error.reason == "exists"
    # The same database under another name of its host.
    shard = new_shard(operating.map, "three", "alias.example.com", 5432, operating.stores.database)
    operating.databases.aliases = {"three": "two"}
    error = await refusal(operating, AddShard(operating.map, shard))
    assert error.reason == "exists"


async def test_s24_only_an_empty_shard_is_removed(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    error = await refusal(operating, RemoveShard(operating.map, "one"))
    assert (error.reason, error.sqlstate) == ("not_empty", "2BP01")
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))
    await operating.run(DeleteMapping(operating.map, *operating.bounds(0, 10)))
    assert await operating.run(RemoveShard(operating.map, "one"))
    assert [row["name"] for row in await operating.fetch(MAP, SHARDS)] == ["two"]
    assert await identities(operating) == []
    error = await refusal(operating, RemoveShard(operating.map, "one"))
    assert error.reason == "unknown_shard"


async def test_a_shard_with_mappings_of_its_own_is_not_removed(operating: Operating) -> None:
    """One that was attached, and not repaired yet, lost its whole map."""
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    await operating.fetch(MAP, "delete from shardmap.mapping")
    for call in (operating.run, operating.plan):
        with pytest.raises(CatalogueError) as refused:
            await call(RemoveShard(operating.map, "one"))
        assert (refused.value.reason, refused.value.op_id) == ("not_empty", None)
    assert len(await operating.local("one")) == 1


async def test_the_catalogue_is_no_shard(operating: Operating) -> None:
    operating.databases.aliases = {"three": MAP}
    error = await refusal(operating, adding(operating, "three", MAP))
    assert (error.reason, error.sqlstate) == ("catalogue_is_shard", "55000")


async def test_s66_without_the_rights_over_its_sessions_a_shard_is_refused(
    operating: Operating,
) -> None:
    await removed(operating)
    role, admin = operating.stores.roles.session, operating.stores.roles.admin
    await operating.fetch(MAP, "update shardmap.shard_map set session_roles = array[$1]", role)
    for right in ("pg_signal_backend", "pg_read_all_stats"):
        operating.stores.execute("one", f'revoke {right} from "{admin}"')
        error = await refusal(operating, adding(operating))
        assert (error.reason, error.sqlstate) == ("rights_missing", "42501")
        assert f"grant {right}" in error.hint
        operating.stores.execute("one", f'grant {right} to "{admin}"')
    assert await operating.run(adding(operating))


@pytest.mark.parametrize("adds", [True, False])
async def test_s26_a_step_that_fails_is_undone_and_the_same_call_succeeds(
    operating: Operating, adds: bool
) -> None:
    kind = AddShard if adds else RemoveShard
    for point in [point for point in points(kind) if point.endswith(".commit")]:
        if adds:
            await removed(operating)
        before = await operating.fetch(MAP, SHARDS), len(await identities(operating))
        operation = adding(operating) if adds else RemoveShard(operating.map, "one")
        with pytest.raises(CatalogueError) as refused:
            await operating.run(operation, failing_at(point))
        assert (refused.value.reason, refused.value.op_id) == ("step_failed", None)
        assert (await operating.fetch(MAP, SHARDS), len(await identities(operating))) == before
        assert await operating.run(adding(operating) if adds else RemoveShard(operating.map, "one"))
        if not adds:
            await operating.run(adding(operating))


@pytest.mark.parametrize("adds", [True, False])
async def test_an_operator_that_ends_at_any_point_leaves_what_the_next_writer_settles(
    operating: Operating, adds: bool
) -> None:
    kind = AddShard if adds else RemoveShard
    for point in [*distinct(points(kind)), *distinct(UNDO_POINTS)]:
        if adds:
            await removed(operating)
        failing, killing = failing_at("local.commit"), kill_at(point)

        async def reach(passed: str, failing: Any = failing, killing: Any = killing) -> None:
            await killing(passed)
            await failing(passed)

        operation = adding(operating) if adds else RemoveShard(operating.map, "one")
        with pytest.raises(Killed):
            await operating.run(operation, reach if point in UNDO_POINTS else killing)
        # The same verb again, or what it left is there: one of them.
        done = await operating.fetch(MAP, "select 1 from shardmap.shard where name = 'one'")
        pending = await operating.fetch(MAP, "select 1 from shardmap.op_log")
        if pending or bool(done) is not adds:
            await operating.run(adding(operating) if adds else RemoveShard(operating.map, "one"))
        rows = await operating.fetch(MAP, SHARDS)
        assert [row["name"] for row in rows] == (["one", "two"] if adds else ["two"]), point
        assert all(row["op_id"] is None for row in rows)
        assert len(await identities(operating)) == adds
        assert await operating.fetch(MAP, "select * from shardmap.op_log") == []
        if not adds:
            await operating.run(adding(operating))


async def test_plans_of_shards(operating: Operating) -> None:
    before = await operating.state()
    async with operating.operator() as operator:
        assert len(await operator.plan(RemoveShard(operating.map, "one"))) == 2
    assert await operating.state() == before
    await removed(operating)
    await drop_schema(operating)
    async with operating.operator() as operator:
        assert len(await operator.plan(adding(operating))) == 4
    assert [row["name"] for row in await operating.fetch(MAP, SHARDS)] == ["two"]
