"""What a verb of `shards` is: its syntax, and what it does with its arguments.

For: the types that all verbs share, and how maps, shards and mappings are shown in JSON. Not for:
any one of them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

from proxy.catalogue import store
from proxy.catalogue.bounds import show_bounds
from proxy.catalogue.model import CatalogueMap, Connection, Shard, Sleep
from proxy.catalogue.model import Mapping as MappingRow
from proxy.catalogue.operation import Reach, pass_by
from proxy.config import Settings
from proxy.routing.shard_map import MapSpec
from proxy.verbs.shards.administration import Administration
from proxy.verbs.shards.arguments import Arguments, map_name
from proxy.verbs.shards.output import Output
from proxy.verbs.syntax import Syntax, UsageError

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a verb: what it was given, what it connects with, and where it answers.

    `reach` is called at each point of an operation, `sleep` before a step is tried again.
    """

    arguments: Arguments
    administration: Administration
    output: Output
    reach: Reach = pass_by
    sleep: Sleep = asyncio.sleep

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.administration.settings

    async def read_map(self, connection: Connection, *, writes: bool = False) -> CatalogueMap:
        """Return the map that the call is about. Raises CatalogueError."""
        await store.check_store(connection, writes=writes)
        name = chosen_map(self.arguments, self.administration.settings)
        return await store.read_map(connection, name)


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb. `judge` raises UsageError for arguments that can be judged without a database.

    `run` answers, or raises CatalogueError or ProxyError. What it returns is the exit code, None
    for success.
    """

    syntax: Syntax
    run: Callable[[Call], Awaitable[int | None]]
    judge: Callable[[Arguments], object] = lambda _: None
    of_a_map: Callable[[Arguments], bool] = lambda _: True
    """Returns whether the call is about one map."""

    def check_map_name(self, arguments: Arguments, settings: Settings) -> None:
        """Raise UsageError if the verb is about a map and none is named."""
        if self.of_a_map(arguments):
            chosen_map(arguments, settings)


def chosen_map(arguments: Arguments, settings: Settings) -> str:
    """Return the name of the map that a call is about. Raises UsageError."""
    name = arguments.get("map") or settings.routing.shard_map
    if not name:
        raise UsageError("--map NAME is needed: routing.shard_map is not set")
    return map_name(name)


# -- JSON ----------------------------------------------------------------------------------------


def map_facts(one: CatalogueMap) -> Json:
    """Return a map as JSON has it."""
    return {
        "name": one.name,
        "kind": str(one.spec.kind),
        "key_type": str(one.spec.key_type),
        "normalise": str(one.spec.normalise),
        "version": one.version,
    }


def shard_facts(shard: Shard, mappings: int) -> Json:
    """Return a shard as JSON has it."""
    return {
        "name": shard.name,
        "host": shard.host,
        "port": shard.port,
        "database": shard.database,
        "endpoint": shard.endpoint,
        "instance": shard.instance,
        "workspace": shard.workspace,
        "status": str(shard.status),
        "version": shard.version,
        "mappings": mappings,
    }


def mapping_facts(mapping: MappingRow, spec: MapSpec, shard_names: Mapping[UUID, str]) -> Json:
    """Return a mapping as JSON has it; `op` is the operation that has it now, or null."""
    low, high = show_bounds(spec, mapping.lo, mapping.hi)
    return {
        "low": low,
        "high": high,
        "shard": shard_names[mapping.shard_id],
        "status": str(mapping.status),
        "epoch": mapping.epoch,
        "locked": mapping.locked,
        "op": None if mapping.op_id is None else str(mapping.op_id),
    }
