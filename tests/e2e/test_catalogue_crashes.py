"""`shards VERB` killed at every step of every operation; then another writer comes.

The steps are those of the code. A case's operation is prepared directly, the verb is a process that
ends by SIGKILL, and the invariants of shard maps must hold after it and after the next writer.
"""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline
from proxy.catalogue.operation import UNDO_POINTS, points
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.shard_operations import RemoveShard
from proxy.catalogue.shard_status import TakeShardOffline
from tests.support.catalogue import MAP, Stores
from tests.support.killed_verb import KilledVerbs, killed_verbs
from tests.support.operating import Operating, distinct

CSV = "low,high,shard\n0,10,one\n10,20,two\n"


async def nothing(operating: Operating) -> None:
    pass


async def added(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))


async def offline(operating: Operating) -> None:
    await added(operating)
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))


async def shard_offline(operating: Operating) -> None:
    await added(operating)
    await operating.run(TakeShardOffline(operating.map, "one"))


async def without_one(operating: Operating) -> None:
    if await operating.fetch(MAP, "select 1 from shardmap.shard where name = 'one'"):
        await operating.run(RemoveShard(operating.map, "one"))


async def with_one(operating: Operating) -> None:
    if not await operating.fetch(MAP, "select 1 from shardmap.shard where name = 'one'"):
        await operating.add_shard("one")


ADD_SHARD = ("add-shard", "one", "--endpoint", "{endpoint}", "--port", "{port}")
CASES: dict[str, tuple[Callable[[Operating], Awaitable[None]], tuple[str, ...]]] = {
    "add": (nothing, ("add", "0", "10", "--shard", "one")),
    "add_file": (nothing, ("add", "--file", "{file}")),
    "add_shard": (without_one, ADD_SHARD),
    "delete": (offline, ("delete", "0", "10")),
    "grant_session": (added, ("grant", "session", "{role}")),
    "offline": (added, ("offline", "0", "10")),
    "online": (offline, ("online", "0", "10")),
    "remove_shard": (with_one, ("remove-shard", "one")),
    "revoke_session": (added, ("revoke", "session", "{role}")),
    "shard_offline": (added, ("offline", "--shard", "one")),
    "shard_online": (shard_offline, ("online", "--shard", "one")),
}


@pytest_asyncio.fixture
async def operating(stores: Stores) -> AsyncIterator[Operating]:
    found = Operating(stores)
    await found.set_up()
    yield found
    await found.close()


@pytest_asyncio.fixture
async def verbs() -> AsyncIterator[KilledVerbs]:
    async with killed_verbs() as started:
        yield started


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(KINDS)


def cases() -> list[tuple[str, str, str]]:
    """Return the kind, the point at which it is killed, and the point that fails before."""
    found = []
    for kind, operation in KINDS.items():
        passed = points(operation)
        in_shard = next(point for point in passed[3:] if point.endswith(".commit"))
        found += [(kind, point, "") for point in distinct(passed)]
        found += [(kind, point, in_shard) for point in distinct(UNDO_POINTS)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
async def test_a_verb_that_is_killed_leaves_what_the_next_writer_settles(
    operating: Operating, verbs: KilledVerbs, tmp_path: Path, kind: str
) -> None:
    stores = operating.stores
    file = tmp_path / "mappings.csv"
    file.write_text(CSV)
    words = {
        "endpoint": stores.endpoint("one"),
        "port": stores.lakebase.port,
        "file": file,
        "role": stores.roles.session,
    }
    prepare, texts = CASES[kind]
    arguments = [text.format(**words) for text in texts]
    config = str(stores.file(tmp_path))
    for _, point, failing in [case for case in cases() if case[0] == kind]:
        await operating.clear()
        await with_one(operating)
        await prepare(operating)
        ended = await verbs.run(point, *arguments, "--config", config, failing=failing)
        assert ended == -signal.SIGKILL, (point, failing)
        await operating.check_invariants()
        await next_writer(operating, kind)
        await operating.check_settled()


async def next_writer(operating: Operating, kind: str) -> None:
    """Change the same shard, whatever the operation left there."""
    if kind == "add_shard":
        with suppress_reason("exists"):
            await operating.add_shard("one")
    elif kind == "remove_shard":
        with suppress_reason("unknown_shard"):
            await operating.run(RemoveShard(operating.map, "one"))
    else:
        await operating.run(AddMapping(operating.map, *operating.bounds(500, 510), "one"))


@contextmanager
def suppress_reason(reason: str) -> Iterator[None]:
    """Accept that it is done already: the verb was killed after its last step."""
    try:
        yield
    except CatalogueError as error:
        if error.reason != reason:
            raise
