"""Outages of a shard map in a catalogue, and the alerts that tell them.

For: the alert rules (`tests/observe/test_alert_rules.py`). The proxy follows a real catalogue, and
real shards admit its sessions. Not for: outages that need no map (`outages`).
"""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.operation import points
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.server.serving import serving
from tests.support.admin_address import metrics_once
from tests.support.catalogue import MAP, Stores
from tests.support.killed_verb import killed_verbs
from tests.support.operator import Operator
from tests.support.outages import ADMIN, World, refuses
from tests.support.prometheus import Alert
from tests.support.running import eventually

# Of the mapping [0, 10) on shard one; `add` is killed with [10, 20).
DATABASE: Final = "app@5"


@dataclass
class MappedWorld(World):
    """A proxy with a map in the catalogue `stores`; its clients give a key."""

    stores: Stores

    async def connect(self, **more: Any) -> None:
        """Connect to the key's shard and close politely, or be refused."""
        await super().connect(**{"dbname": DATABASE, **more})

    async def all_over(self) -> None:
        """Wait until no client is left; the connection that follows the map stays."""
        await eventually(
            lambda: self.proxy.metrics.value("connections") == 0, "no client is connected"
        )


@asynccontextmanager
async def running_with_map(stores: Stores) -> AsyncIterator[MappedWorld]:
    """Start a proxy that follows a map with one mapping."""
    operator = Operator(stores, MapSpec(Kind.RANGE, KeyType.INT4))
    await operator.install()
    await operator.add("0", "10", "one")
    async with AsyncExitStack() as stack:
        settings = stores.settings(stores.roles.session, **ADMIN)
        proxy = await stack.enter_async_context(serving(settings))
        yield MappedWorld(stores.lakebase, proxy, stack, stores)


async def catalogue_goes(world: MappedWorld, _directory: Path) -> None:
    endpoint = world.lakebase[MAP].endpoint
    endpoint.disabled = True
    endpoint.end_sessions()
    await metrics_once(world.admin_port, lambda text: "lakebase_proxy_feed_connected 0.0" in text)
    await world.connects()


async def shard_is_a_copy(world: MappedWorld, _directory: Path) -> None:
    async with world.stores.connect("one") as local:
        await local.execute("update shardmap_local.identity set location = 'other:5432/app'")
    await world.connects()


async def shard_was_restored(world: MappedWorld, _directory: Path) -> None:
    # As seen from the catalogue: it has changes that the shard has lost.
    async with world.stores.connect(MAP) as catalogue:
        await catalogue.execute("update shardmap.mapping set epoch = 9")
    value = world.proxy.metrics.value
    await eventually(
        lambda: value("cache_changes_total", map="tenants", change="mapping") == 1, "it has come"
    )
    await world.connects()


async def verb_is_killed(world: MappedWorld, directory: Path) -> None:
    """Kill `shards add` when the operation is in the catalogue and in no shard."""
    assert "begin.done" in points(AddMapping)
    arguments = ("add", "10", "20", "--shard", "one", "--config", str(world.stores.file(directory)))
    async with killed_verbs() as verbs:
        assert await verbs.run("begin.done", *arguments) == -signal.SIGKILL
    pending = 'lakebase_proxy_shard_map_operations{map="tenants"} 1.0'
    await metrics_once(world.admin_port, lambda text: pending in text)
    await world.connects()


@dataclass(frozen=True)
class MapOutage:
    """What happens in a minute of an outage, and which alerts fire at its end."""

    alerts: tuple[Alert, ...]
    happens: Callable[[MappedWorld, Path], Awaitable[None]]
    minutes: float = 20


SHARD_DISAGREES: Final = Alert("LakebaseProxyShardDisagrees")
MAP_OUTAGES: Final[Mapping[str, MapOutage]] = {
    "the catalogue is gone": MapOutage((Alert("LakebaseProxyFeedDown"),), catalogue_goes),
    "a shard is a copy": MapOutage((SHARD_DISAGREES, refuses("wrong_shard")), shard_is_a_copy),
    "a shard was restored": MapOutage(
        (SHARD_DISAGREES, refuses("shard_behind")), shard_was_restored
    ),
    "a verb was killed": MapOutage((Alert("LakebaseProxyOperationPending"),), verb_is_killed),
}
