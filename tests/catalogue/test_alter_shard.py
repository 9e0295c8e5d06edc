"""Changing a shard's row beside its location: version, name, resource."""

import pytest

from proxy.catalogue.alter_shard import AlterShard, ShardChanges
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.model import Shard
from proxy.catalogue.shard_status import TakeShardOffline
from tests.support.catalogue import MAP
from tests.support.operating import Killed, Operating, fail_at, kill_at

ENDPOINT = "projects/p/branches/b/endpoints/other"


def alter(operating: Operating, expect: int | None = None, **new: str) -> AlterShard:
    return AlterShard(operating.map, "one", ShardChanges(**new), expect=expect)


async def row(operating: Operating) -> tuple[object, ...]:
    (found,) = await operating.fetch(
        MAP,
        "select name, endpoint, instance, workspace, version, status, op_id from shardmap.shard"
        " where shard_id = $1",
        operating.shards["one"].shard_id,
    )
    return tuple(found)


async def local_version(operating: Operating) -> int:
    (found,) = await operating.fetch("one", "select version from shardmap_local.identity")
    version: int = found["version"]
    return version


async def test_the_row_changes_and_the_shards_own_version_follows(operating: Operating) -> None:
    before = await row(operating)
    operation = alter(operating, endpoint=ENDPOINT, workspace="eu")
    assert len(await operating.plan(operation)) == 2
    assert await operating.run(operation)
    assert await row(operating) == ("one", ENDPOINT, "", "eu", 2, "online", None)
    assert operation.after.version == await local_version(operating) == 2
    await operating.run(alter(operating, instance="an-instance"))
    assert await row(operating) == ("one", "", "an-instance", "eu", 3, "online", None)
    assert not await operating.run(alter(operating, instance="an-instance", workspace="eu"))
    await operating.run(alter(operating, instance="", workspace=""))
    await operating.run(alter(operating, endpoint=str(before[1])))
    assert (await row(operating))[:4] == before[:4]
    assert await local_version(operating) == 5


async def test_a_renamed_shard_keeps_what_it_has(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    operating.databases.aliases["uno"] = "one"
    assert await operating.run(AlterShard(operating.map, "one", ShardChanges(name="uno")))
    async with operating.session(1, name="one") as session:
        assert session.verdict == "ok"
    await operating.run(TakeShardOffline(operating.map, "uno"))
    assert not await operating.run(TakeShardOffline(operating.map, "uno"))
    assert (await row(operating))[0] == "uno"


async def test_a_name_that_is_taken_and_an_unknown_shard_are_refused(operating: Operating) -> None:
    taken = AlterShard(operating.map, "one", ShardChanges(name="two"))
    assert await operating.refusal(taken) == ("exists", "42710")
    unknown = AlterShard(operating.map, "three", ShardChanges(workspace="eu"))
    assert await operating.refusal(unknown) == ("unknown_shard", "42704")


async def test_s21_a_stale_version_is_refused_and_the_current_one_is_taken(
    operating: Operating,
) -> None:
    stale = alter(operating, workspace="eu", expect=2)
    assert await operating.refusal(stale) == ("stale_version", "40001")
    assert await operating.run(alter(operating, workspace="eu", expect=1))
    assert await operating.refusal(alter(operating, workspace="us", expect=1)) == (
        "stale_version",
        "40001",
    )
    assert await operating.run(alter(operating, workspace="us", expect=2))


async def test_a_shard_that_waits_for_a_repair_goes_on_waiting(operating: Operating) -> None:
    await operating.fetch("one", "update shardmap_local.identity set version = -3")
    await operating.run(alter(operating, workspace="eu"))
    assert (await row(operating))[4] == -await local_version(operating) == 4


async def test_what_fails_is_undone_and_its_version_is_not_used_again(operating: Operating) -> None:
    before = await row(operating)
    with pytest.raises(CatalogueError):
        await operating.run(alter(operating, workspace="eu"), fail_at("end.commit"))
    assert await row(operating) == before
    await operating.check_settled()
    await operating.run(alter(operating, workspace="us"))
    assert (await row(operating))[4] == await local_version(operating) == 3


@pytest.mark.parametrize("word", ["resume", "undo"])
async def test_s27_what_another_process_left_is_completed_or_undone(
    operating: Operating, word: str
) -> None:
    operation = alter(operating, workspace="eu")
    with pytest.raises(Killed):
        await operating.run(operation, kill_at("end"))
    async with operating.operator() as operator:
        await getattr(operator, word)(operation.op_id)
    found = await row(operating)
    assert found[3:5] == (("eu", 2) if word == "resume" else ("", 1))
    assert await local_version(operating) == 2
    await operating.check_settled()


@pytest.mark.parametrize("point", ["local", "local.record", "end"])
async def test_what_leads_nowhere_by_now_is_undone_all_the_same(
    operating: Operating, point: str
) -> None:
    """The endpoint of the new row is deleted: undoing dialled it, and the shard was stuck."""
    before = await row(operating)
    with pytest.raises(Killed):
        await operating.run(alter(operating, endpoint=ENDPOINT), kill_at(point))

    def is_gone(shard: Shard) -> None:
        if shard.endpoint == ENDPOINT:
            raise ConnectionRefusedError("no such endpoint")

    operating.databases.fail_at = is_gone
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    assert await row(operating) == before
    await operating.check_settled()
