"""`shards attach`: a database with a local map becomes a shard, and brings its map if need be.

Not for: what happens in the database (`catalogue.attach`).
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final
from uuid import uuid4

from proxy.catalogue import store
from proxy.catalogue.attach import Attach, Found, read_found
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.verbs.shards.arguments import Arguments, syntax
from proxy.verbs.shards.operating import run
from proxy.verbs.shards.shard_verbs import (
    LOCATION_OPTIONS,
    LOCATION_USAGE,
    given_host,
    given_shard,
    judge_location,
)
from proxy.verbs.shards.verb import Call, Verb, chosen_map, map_facts, shard_facts
from proxy.verbs.syntax import UsageError

# Of a map that is not known yet; only its location is used.
_UNKNOWN: Final = CatalogueMap(uuid4(), "", MapSpec(Kind.LIST, KeyType.BYTEA), 1)
_SWITCHES: Final = ("new-identity", "force")


def _judge(arguments: Arguments) -> None:
    judge_location(arguments)
    if arguments.switches.issuperset(_SWITCHES):
        raise UsageError("--new-identity and --force exclude each other")


@dataclass(frozen=True, slots=True)
class _Attached:
    """What is attached: the map as the database has it, the row to add, and what was found."""

    map: CatalogueMap
    shard: Shard
    found: Found


async def _attach(call: Call) -> None:
    name = call.arguments.words[0]
    attached = await _find(call, await given_host(call))
    new_identity, moved = (word in call.arguments.switches for word in _SWITCHES)
    if new_identity:
        attached = replace(attached, shard=replace(attached.shard, shard_id=uuid4()))

    async def make(_: Connection, owner: CatalogueMap) -> Attach:
        return Attach(owner, attached.shard, attached.found, new_identity=new_identity, moved=moved)

    call.output.progress(f"attaching the shard {name}")
    async with _map_in_catalogue(call, attached) as is_there:
        if not is_there:
            operation = await make(None, attached.map)
            operation.check_location()
            create = f"Create the map {attached.map.name} with the id that the database has."
            call.output.plan([create, *operation.plan()])
            return
        done = await run(call, make)
    if done is None:
        return
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection)
        shard = await store.read_shard(connection, owner, name)
    count = attached.found.mappings
    line = f"attached the shard {name} at {shard.location}; its {count} mappings wait for a repair"
    facts = {"map": map_facts(owner), "shard": shard_facts(shard, 0), "found": count}
    call.output.answer(facts, [line])


async def _find(call: Call, host: str) -> _Attached:
    """Return what is at the location that is given. Raises CatalogueError."""
    async with call.administration.catalogue() as connection:
        await store.check_store(connection, writes=True)
        name = chosen_map(call.arguments, call.settings)
        known = await store.find_map(connection, name)
    shard = await given_shard(call, known or _UNKNOWN, host)
    call.output.progress(f"reading what {shard.location} has")
    async with call.administration.shard(shard) as connection:
        found_map, found = await read_found(connection, shard, name, known)
    if known is not None and known.spec != found_map.spec:
        text = f"{shard.location} has the map {name} with other keys than the catalogue"
        raise CatalogueError(Reason.SHARD_NOT_VALID, text)
    owner = known or found_map
    row = replace(shard, shard_id=found.itself.shard_id, map_id=owner.map_id)
    return _Attached(owner, row, found)


@asynccontextmanager
async def _map_in_catalogue(call: Call, attached: _Attached) -> AsyncIterator[bool]:
    """Add the map while the block runs, if the catalogue lacks it; it goes if the block fails.

    Yields false for a dry run that would add it. Proxies do not see the map before its mappings
    are repaired: those that knew it go on with what they know.
    """
    owner = attached.map
    async with call.administration.catalogue() as connection:
        exists = await store.find_map(connection, owner.name) is not None
        if not exists and not call.arguments.dry_run:
            await store.insert_hidden_map(connection, owner)
    if exists or call.arguments.dry_run:
        yield exists
        return
    try:
        yield True
    except CatalogueError as error:
        if error.op_id is None:
            with suppress(CatalogueError):
                async with call.administration.catalogue() as connection:
                    await store.delete_empty_map(connection, owner.map_id)
        raise


VERBS: Final[Mapping[str, Verb]] = {
    "attach": Verb(
        syntax(
            f"attach {LOCATION_USAGE} [--new-identity | --force]",
            1,
            1,
            options=LOCATION_OPTIONS,
            switches=_SWITCHES,
            writes=True,
        ),
        _attach,
        _judge,
    ),
}
