"""`resolve` with a map in the catalogue: the catalogue is asked, and no shard."""

import asyncio

from proxy.catalogue.bounds import given_key, show_bounds
from proxy.catalogue.shard_upstreams import target_name
from proxy.config import LogSettings, Settings
from proxy.observe.logs import configure_logging
from proxy.routing.keys import hash_key
from proxy.routing.router import mapping_not_found
from proxy.routing.shard_map import Kind, MapKeys
from proxy.server.catalogue_reading import reading_map
from proxy.server.metric_labels import build_metrics
from proxy.server.serving import open_snapshot


def resolve(settings: Settings, key: str) -> dict[str, str]:
    """Return what the map says of a key, as `resolve --json` prints it. Raises ProxyError."""
    configure_logging(**LogSettings(level="error").model_dump())
    return asyncio.run(_resolve(settings, key))


async def _resolve(settings: Settings, text: str) -> dict[str, str]:
    async with (
        open_snapshot(settings, lambda *_: None) as snapshot,
        reading_map(snapshot, build_metrics()) as read,
    ):
        found = read.map
        keys = MapKeys(found.spec)
        key = given_key(keys, text)
        located = await read.reader.locate(found.map_id, keys.routing_key(key), "lookup")
    if located is None:
        raise mapping_not_found(found.name, key)
    mapping, shard = located.mapping, located.shard
    low, high = show_bounds(found.spec, mapping.lo, mapping.hi)
    return {
        "canonical_key": key.hex(),
        "hash": hash_key(key).hex() if found.spec.kind is Kind.HASH else "",
        "low": low,
        "high": high,
        "target": target_name(found.name, shard),
        "endpoint": shard.endpoint or shard.instance,
        "host": shard.host,
        "database": shard.database,
    }
