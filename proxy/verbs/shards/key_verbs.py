"""`shards lookup`: where a key leads, by the catalogue or also by the shard itself."""

from collections.abc import Mapping
from typing import Final

from proxy.catalogue import store
from proxy.catalogue.bounds import show_bounds
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import Located
from proxy.catalogue.shard_store import find_local_mapping, read_identities
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import fingerprint, hash_key
from proxy.routing.shard_map import Kind, MapKeys
from proxy.verbs.shards.arguments import Arguments, Syntax, one_of
from proxy.verbs.shards.output import described
from proxy.verbs.shards.verb import Call, Json, Verb

_CATALOGUE, _SHARD = "catalogue", "shard"


def _source(arguments: Arguments) -> str:
    """Return where to look the key up. Raises UsageError."""
    return one_of("--from", arguments.get("from") or _CATALOGUE, (_CATALOGUE, _SHARD))


async def _look_up(call: Call) -> None:
    call.output.progress("asking the catalogue")
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection)
        keys = MapKeys(owner.spec)
        text = call.arguments.words[0]
        key = keys.parse_key(text) if text else b""
        if not key:
            raise ProxyError(ErrorKind.KEY_MISSING)
        routing_key = keys.routing_key(key)
        located = await store.locate(connection, owner.map_id, routing_key)
    if located is None:
        detail = f"shard map {owner.name}, key with fingerprint {fingerprint(key)}"
        raise ProxyError(ErrorKind.MAPPING_NOT_FOUND, detail)
    low, high = show_bounds(owner.spec, located.mapping.lo, located.mapping.hi)
    facts: Json = {
        "canonical_key": key.hex(),
        "hash": hash_key(key).hex() if owner.spec.kind is Kind.HASH else "",
        "low": low,
        "high": high,
        "shard": located.shard.name,
        "host": located.shard.host,
        "port": located.shard.port,
        "database": located.shard.database,
        "status": str(located.mapping.status),
        "epoch": located.mapping.epoch,
    }
    lines = described(facts)
    if _source(call.arguments) == _SHARD:
        call.output.progress(f"asking shard {located.shard.name}")
        local = await _local(call, located, routing_key)
        facts["local"] = local
        lines += ["", "as the shard has it:", *(described(local) if local else ["no mapping"])]
    call.output.answer(facts, lines)


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
        Syntax("lookup KEY [--from catalogue|shard]", 1, 1, options=("from",)), _look_up, _source
    ),
}
