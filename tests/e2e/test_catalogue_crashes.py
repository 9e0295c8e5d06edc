"""`shards VERB` killed at every point of every operation; then `ops resume`, `ops undo`, a writer.

The points are those of the code. The verb is a process that ends by SIGKILL, or one that loses a
database at that point. The invariants of shard maps must hold after that, and the old or the new
state must be reached. A case of a kind is what prepares it, and the words of the verb.
"""

import asyncio
import faulthandler
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_status import TakeOffline
from proxy.catalogue.model import Status
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.role_operations import GrantSession, RevokeSession
from proxy.catalogue.shard_operations import RemoveShard
from proxy.catalogue.shard_status import TakeShardOffline
from proxy.catalogue.split import Split
from proxy.emulator.cluster import Cluster
from tests.support.catalogue import MAP, new_stores
from tests.support.crashes import REPORT, Crashes, Prepare
from tests.support.direct_verbs import Servers
from tests.support.killed_verb import KilledVerbs, killed_verbs
from tests.support.operating import Operating
from tests.support.recovering import detached, differences, insert_local, report_of

# The tests share a database, and so the loop of the connections to it.
in_one_loop = pytest.mark.asyncio(loop_scope="module")

# Hundreds of verbs on a busy machine; each has a bound of its own.
ALL_SECONDS_MAX = 900.0
CSV = "low,high,shard\n0,10,one\n10,20,two\n"


async def nothing(operating: Operating) -> None:
    pass


async def added(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))


async def offline(operating: Operating) -> None:
    await added(operating)
    await operating.run(TakeOffline(operating.map, *operating.bounds(0, 10)))


async def split(operating: Operating) -> None:
    await added(operating)
    await operating.run(Split(operating.map, operating.key(5)))


async def shard_offline(operating: Operating) -> None:
    await added(operating)
    await operating.run(TakeShardOffline(operating.map, "one"))


async def without_one(operating: Operating) -> None:
    await operating.run(RemoveShard(operating.map, "one"))


async def granted(operating: Operating) -> None:
    await added(operating)
    await operating.run(GrantSession(operating.map, operating.stores.roles.session))


async def revoked(operating: Operating) -> None:
    await added(operating)
    await operating.run(RevokeSession(operating.map, operating.stores.roles.session))


async def damaged(operating: Operating) -> str:
    """Make shard one have keys of shard two, another epoch, and a row that is none."""
    await added(operating)
    await operating.run(AddMapping(operating.map, *operating.bounds(20, 30), "two"))
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 4")
    await insert_local(operating, "one", 25, 40, status="offline", epoch=9)
    await insert_local(operating, "one", b"\x01", b"\x02", status="offline")
    return await report_of(operating, "one", await differences(operating, "one"))


async def overlapping(operating: Operating) -> None:
    """Make shard one have keys of shard two, as the source of a move, and an epoch of its own."""
    await damaged(operating)
    await operating.fetch("one", "update shardmap_local.mapping set epoch = 1 where epoch = 9")


async def detached_one(operating: Operating) -> None:
    await detached(operating, "one")


async def behind(operating: Operating) -> None:
    await added(operating)
    await operating.fetch(MAP, "update shardmap.mapping set epoch = 4")


LOCATION = ("--endpoint", "{endpoint}", "--port", "{port}")
ADD_SHARD = ("add-shard", "one", "--endpoint", "{endpoint}", "--port", "{port}")
CASES: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "add": (nothing, ("add", "0", "10", "--shard", "one")),
    "add_file": (nothing, ("add", "--file", "{file}")),
    "add_shard": (without_one, ADD_SHARD),
    "alter_shard": (added, ("alter-shard", "one", "--endpoint", "")),
    "attach": (detached_one, ("attach", "one", *LOCATION)),
    "delete": (offline, ("delete", "0", "10")),
    "detach": (added, ("detach", "one", "--force")),
    "grant_session": (revoked, ("grant", "session", "{role}")),
    "merge": (split, ("merge", "5")),
    "move": (added, ("move", "0", "10", "--to", "two")),
    "offline": (added, ("offline", "0", "10")),
    "online": (offline, ("online", "0", "10")),
    "reassign": (offline, ("reassign", "0", "10", "--to", "two")),
    "relocate": (behind, ("relocate", "one", "--endpoint", "{endpoint}", "--port", "65000")),
    "remove_shard": (nothing, ("remove-shard", "one")),
    "repair": (damaged, ("repair", "--shard", "one", "--from", "shard", "--report", REPORT)),
    "repair_all": (overlapping, ("repair", "--all", "--from", "shard")),
    "revoke_session": (granted, ("revoke", "session", "{role}")),
    "shard_offline": (added, ("offline", "--shard", "one")),
    "shard_online": (shard_offline, ("online", "--shard", "one")),
    "split": (added, ("split", "5")),
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def operating(store_clusters: Mapping[str, Cluster]) -> AsyncIterator[Operating]:
    async with new_stores(store_clusters) as stores:
        found = Operating(stores)
        await found.set_up()
        yield found
        await found.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def verbs() -> AsyncIterator[KilledVerbs]:
    async with killed_verbs() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def crashes(
    operating: Operating, verbs: KilledVerbs, tmp_path: Path, kind: str
) -> AsyncIterator[Crashes]:
    stores = operating.stores
    file = tmp_path / "mappings.csv"
    file.write_text(CSV)
    named = {
        "endpoint": stores.endpoint("one"),
        "port": stores.lakebase.port,
        "file": file,
        "role": stores.roles.session,
    }
    prepare, texts = CASES[kind]
    words = tuple(text.format(**named) for text in texts)
    servers = Servers.of(stores, str(stores.file(tmp_path)))
    faulthandler.cancel_dump_traceback_later()  # its bound is for tests that wait
    async with Crashes(
        operating, verbs, servers, kind=kind, words=words, next_writer=next_writer
    ) as found:
        await found.start(prepare)
        yield found


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(KINDS)


@pytest.mark.slow
@in_one_loop
@pytest.mark.parametrize("kind", CASES)
async def test_a_verb_that_ends_at_any_point_can_be_resumed_undone_or_settled(
    crashes: Crashes, kind: str
) -> None:
    async with asyncio.timeout(ALL_SECONDS_MAX):
        await crashes.killed_everywhere()
        # A shard that is down is detached all the same, but not fenced: `catalogue/test_detach.py`.
        if kind != "detach":
            await crashes.down_everywhere()


async def next_writer(operating: Operating, kind: str) -> None:
    """Change the same shard, and change it back, whatever the operation left there."""
    if kind == "add_shard":
        with suppress_reason("exists"):
            await operating.add_shard("one")
    elif kind == "remove_shard":
        with suppress_reason("unknown_shard"):
            await operating.run(RemoveShard(operating.map, "one"))
    elif kind in {"attach", "detach"}:
        with suppress_reason("unknown_shard"):
            await add_and_delete(operating)
    else:
        await add_and_delete(operating)


async def add_and_delete(operating: Operating) -> None:
    """Add a mapping to shard one, and delete it."""
    bounds = operating.bounds(2_000_000_000, 2_000_000_010)
    await operating.run(AddMapping(operating.map, *bounds, "one", status=Status.OFFLINE))
    await operating.run(DeleteMapping(operating.map, *bounds))


@contextmanager
def suppress_reason(reason: str) -> Iterator[None]:
    """Accept that it is done already: the verb was killed after its last step."""
    try:
        yield
    except CatalogueError as error:
        if error.reason != reason:
            raise
