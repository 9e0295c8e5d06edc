"""`shards lookup`: where a key leads, by the catalogue, the shard itself, or a running proxy."""

from collections.abc import Mapping
from functools import partial
from typing import Final

from proxy.blocking import BlockingCalls
from proxy.catalogue import store
from proxy.catalogue.bounds import given_key, lookup_facts
from proxy.catalogue.errors import CatalogueError, Reason, ReasonRow
from proxy.catalogue.model import Located
from proxy.catalogue.shard_store import find_local_mapping, read_identities
from proxy.routing.router import mapping_not_found
from proxy.routing.shard_map import MapKeys
from proxy.verbs.admin_client import REQUEST_SECONDS_MAX, AdminError, look_up
from proxy.verbs.shards.arguments import Arguments, one_of, syntax
from proxy.verbs.shards.output import described
from proxy.verbs.shards.verb import Call, Json, Verb, chosen_map

_CATALOGUE, _CACHE, _SHARD = "catalogue", "cache", "shard"
_SOURCES: Final = (_CATALOGUE, _CACHE, _SHARD)
_NO_PROXY: Final = ReasonRow("proxy_unreachable", "08001")


def _source(arguments: Arguments) -> str:
    """Return where to look the key up. Raises UsageError."""
    return one_of("--from", arguments.get("from") or _CATALOGUE, _SOURCES)


async def _look_up(call: Call) -> None:
    if _source(call.arguments) == _CACHE:
        await _ask_proxy(call)
        return
    call.output.progress("asking the catalogue")
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection)
        keys = MapKeys(owner.spec)
        key = given_key(keys, call.arguments.words[0])
        routing_key = keys.routing_key(key)
        located = await store.locate(connection, owner.map_id, routing_key)
    if located is None:
        raise mapping_not_found(owner.name, key)
    facts: Json = lookup_facts(owner.spec, key, located)
    lines = described(facts)
    if _source(call.arguments) == _SHARD:
        call.output.progress(f"asking shard {located.shard.name}")
        local = await _local(call, located, routing_key)
        facts["local"] = local
        lines += ["", "as the shard has it:", *(described(local) if local else ["no mapping"])]
    call.output.answer(facts, lines)


async def _ask_proxy(call: Call) -> None:
    """Answer what the running proxy knows of the key, by its admin address."""
    call.output.progress("asking the proxy")
    settings, key = call.settings, call.arguments.words[0]
    ask = partial(look_up, settings.admin, key)
    try:
        facts = await BlockingCalls("admin").run(ask, 2 * REQUEST_SECONDS_MAX)
    except TimeoutError:
        raise CatalogueError(_NO_PROXY, "the proxy's admin address does not answer") from None
    except AdminError as error:
        raise CatalogueError(_NO_PROXY, str(error)) from error
    if not facts.pop("ok", False):
        row = ReasonRow(str(facts["reason"]), str(facts["sqlstate"]))
        raise CatalogueError(row, str(facts["error"]), str(facts["hint"]))
    owner, wanted = facts.pop("map"), chosen_map(call.arguments, settings)
    if owner != wanted:
        text = f"the proxy routes by the map {owner}, not by {wanted}"
        raise CatalogueError(Reason.UNKNOWN_MAP, text)
    call.output.answer(facts, described(facts))


async def _local(call: Call, located: Located, routing_key: bytes) -> Json | None:
    """Return the shard's own row of the key; None if it has none. Raises CatalogueError."""
    shard = located.shard
    async with call.administration.shard(shard) as connection:
        query = "select pg_catalog.to_regclass('shardmap_local.identity') is not null"
        known = await read_identities(connection) if await connection.fetchval(query) else []
        identity = next((one for one in known if one.map_id == shard.map_id), None)
        if identity is None:
            text = f"shard {shard.name}: {shard.location} is not set up as a shard of this map"
            raise CatalogueError(Reason.SHARD_NOT_VALID, text, "`shards add-shard` sets it up.")
        row = await find_local_mapping(connection, shard.map_id, routing_key)
    if row is None:
        return None
    return {"status": str(row.status), "epoch": row.epoch, "location": identity.location}


VERBS: Final[Mapping[str, Verb]] = {
    "lookup": Verb(
        syntax("lookup KEY [--from catalogue|cache|shard]", 1, 1, options=("from",)),
        _look_up,
        _source,
    ),
}
