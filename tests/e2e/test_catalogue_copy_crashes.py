"""A move whose process is killed while its command copies rows, and every way on from there.

The command line as it is, through the dialer: the command's connections end with the process. The
other points of a move are in `test_catalogue_crashes.py`.
"""

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from proxy.catalogue.mapping_operations import AddMapping
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.killed_verb import KilledVerbs, killed_verbs
from tests.support.operating import Operating
from tests.support.running import psql_path
from tests.support.shards_cli import Shards

pytestmark = pytest.mark.slow

BOUNDS: Final = ("0", "10")
# It has copied half of the rows when its parent dies; nothing of that is committed.
HALF: Final = """\
{psql} -X -q -1 -v ON_ERROR_STOP=1 "$SHARDS_TARGET" -f - <<END
insert into item values (1);
\\! kill -9 $PPID
insert into item select pg_sleep(0.5) is null;
insert into item values (2);
END
"""
WHOLE: Final = """\
{psql} -X -q -1 -v ON_ERROR_STOP=1 "$SHARDS_TARGET" -f - <<END
\\copy item from program '{psql} -X -q "$SHARDS_SOURCE" -c "copy item to stdout"'
END
"""


@pytest_asyncio.fixture
async def operating(stores: Stores) -> AsyncIterator[Operating]:
    found = Operating(stores)
    await found.set_up()
    for name in SHARD_NAMES:
        stores.execute(name, "create table item (number int)", role=stores.roles.admin)
    stores.execute("one", "insert into item values (1), (2)", role=stores.roles.admin)
    await found.run(AddMapping(found.map, *found.bounds(0, 10), "one"))
    yield found
    await found.close()


@pytest_asyncio.fixture
async def verbs() -> AsyncIterator[KilledVerbs]:
    async with killed_verbs() as started:
        yield started


@pytest.mark.parametrize("way", ["resume", "undo", "write"])
async def test_a_move_that_is_killed_while_it_copies_is_undone_or_copies_again(
    operating: Operating, verbs: KilledVerbs, tmp_path: Path, way: str
) -> None:
    stores, shards = operating.stores, Shards(operating.stores, tmp_path)
    half, whole = (text.format(psql=psql_path()) for text in (HALF, WHOLE))
    move = ("move", *BOUNDS, "--to", "two")
    ended = await verbs.run("", *move, "--copy", half, "--config", shards.config)
    assert ended == -signal.SIGKILL
    ((op_id, state),) = await operating.fetch(MAP, "select op_id, state from shardmap.op_log")
    assert state == "drained"
    await operating.check_invariants()
    if way == "resume":
        assert await shards.refused("ops", "resume", str(op_id)) == ("operation_pending", "55P03")
        await shards.done("ops", "resume", str(op_id), "--copy", whole)
    elif way == "undo":
        await shards.done("ops", "undo", str(op_id))
    else:  # the next writer of one of the shards
        await operating.run(AddMapping(operating.map, *operating.bounds(50, 60), "two"))
    await operating.check_settled()
    assert operating.name_of((await operating.mapping(5))["shard_id"]) == (
        "two" if way == "resume" else "one"
    )
    if way != "resume":
        assert stores.execute("two", "select * from item") == ""
        await shards.done(*move, "--copy", whole)
        await operating.check_settled()
    assert stores.execute("two", "select * from item order by number") == "1\n2"
