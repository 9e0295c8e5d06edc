"""Reading the catalogue once, for verbs that show where a key leads or whether all is well.

Not for: a proxy, which follows its map (`catalogue_maps`).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from proxy.catalogue.catalogue_reader import CatalogueReader, open_reader
from proxy.catalogue.followed_map import check_map
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.shard_upstreams import ShardUpstreams
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.server.snapshot import ConfigSnapshot
from proxy.session.private_listener import PrivateListener
from proxy.upstream.connector import Connector


@dataclass(frozen=True, slots=True)
class ReadMap:
    """The map of a configuration, as the catalogue has it now, and what reads its rows."""

    map: CatalogueMap
    reader: CatalogueReader
    shards: ShardUpstreams


@asynccontextmanager
async def reading_map(snapshot: ConfigSnapshot, metrics: Metrics) -> AsyncIterator[ReadMap]:
    """Yield the map that sessions of this configuration would be routed by. Raises ProxyError."""
    settings, upstreams = snapshot.settings, snapshot.upstreams
    name, upstream = settings.catalogue_map, upstreams[settings.catalogue.target]
    listener = PrivateListener.of_verb(Connector(upstreams.name_lookup.resolve), metrics)

    async def host() -> str:
        return (await upstream.address_lookup.target()).host

    shards = ShardUpstreams(settings, upstreams.factory, upstreams.resources(), host)
    try:
        async with (
            listener as private,
            open_reader(private.connect, upstream, lambda _: None)() as reader,
        ):
            found = await reader.read_map(name)
            if found is None:
                raise ProxyError(ErrorKind.CATALOGUE_MAP_MISSING, name)
            check_map(settings.shard_maps[name], found)
            yield ReadMap(found, reader, shards)
    finally:
        shards.close()
