"""What opens sessions for shard keys, over the catalogue itself: no proxy, no cache, no feed.

For: tests of one session's verdicts, dials and waits against real shards. Not for: what
applications notice (`sidecars`).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from proxy.catalogue.admitting_opener import AdmittingOpener, OpenerParts
from proxy.catalogue.model import Located, Mapping, SessionsMode, Shard, Status
from proxy.catalogue.parking import Parking
from proxy.catalogue.shard_upstreams import ShardUpstreams
from proxy.errors import ErrorKind, ProxyError
from proxy.server.metric_labels import build_metrics
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstream_session import UpstreamSession
from proxy.upstream.upstreams import Upstreams
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workspace.registry import LocalWorkspaceRegistry
from tests.support.catalogue import MAP
from tests.support.dialing import asked
from tests.support.operator import Operator

KEY: Final = "5"
SECONDS_MAX: Final = 30.0
FIND: Final = (
    "select * from (select * from shardmap.mapping where map_id = $1 and lo <= $2"
    " order by lo desc limit 1) m where hi is null or hi > $2"
)


class DirectSource:
    """The catalogue itself, without a cache: what is `known` is remembered until asked past it."""

    def __init__(self, operator: Operator, catalogue: Any) -> None:
        self._operator = operator
        self._catalogue = catalogue
        self._lock = asyncio.Lock()
        self.known: Located | None = None
        self.queries = 0
        self.reached: list[str] = []
        self.fails = False

    async def find(self, routing_key: bytes, *, deadline: float | None = None) -> Located:
        if self.known is not None and self.known.mapping.status is Status.ONLINE:
            return self.known
        return await self.ask(routing_key)

    async def refresh(self, routing_key: bytes, stale: Located) -> Located:
        return await self.ask(routing_key)

    async def dial_failed(self, routing_key: bytes, located: Located) -> Located:
        self.reached.append("no")
        return await self.ask(routing_key)

    def dial_succeeded(self, located: Located) -> None:
        self.reached.append("yes")

    async def ask(self, routing_key: bytes) -> Located:
        if self.fails:
            raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE)
        async with self._lock:
            self.queries += 1
            row = await self._catalogue.fetchrow(FIND, self._operator.map_id, routing_key)
            if row is None:
                raise ProxyError(ErrorKind.MAPPING_NOT_FOUND)
            shard = await self._catalogue.fetchrow(
                "select * from shardmap.shard where shard_id = $1", row["shard_id"]
            )
        mapping = Mapping(
            *(row["mapping_id"], row["map_id"], row["shard_id"], row["lo"], row["hi"]),
            Status(row["status"]),
            SessionsMode(row["sessions"]),
            epoch=row["epoch"],
            op_id=row["op_id"],
        )
        self.known = Located(
            mapping,
            Shard(
                *(shard["shard_id"], shard["map_id"], shard["name"], shard["host"], shard["port"]),
                *(shard["dbname"], shard["endpoint"], shard["instance"], shard["workspace"]),
                Status(shard["status"]),
                op_id=shard["op_id"],
            ),
        )
        return self.known


@dataclass
class Counts:
    """What was counted."""

    verdicts: list[str] = field(default_factory=list)
    stale: int = 0
    parked_now: int = 0
    parks: list[str] = field(default_factory=list)

    def admitted(self, shard_map: str, verdict: str, seconds: float) -> None:
        assert shard_map == "tenants"
        assert seconds >= 0
        self.verdicts.append(verdict)

    def stale_retried(self, shard_map: str) -> None:
        self.stale += 1

    def parked(self, now: int) -> None:
        self.parked_now = now

    def park_ended(self, result: str) -> None:
        self.parks.append(result)


@dataclass
class Sidecar:
    """What opens sessions for keys."""

    operator: Operator
    source: DirectSource
    parts: OpenerParts
    counts: Counts
    sessions: list[UpstreamSession] = field(default_factory=list)

    async def opener(self, key: str = KEY) -> AdmittingOpener:
        routing_key = self.operator.keys.routing_key(self.operator.keys.parse_key(key))
        located = await self.source.find(routing_key)
        return AdmittingOpener(self.parts, located, routing_key)

    async def open(
        self, key: str = KEY, options: bytes = b"", phases: DialPhases | None = None
    ) -> UpstreamSession:
        opener = await self.opener(key)
        return await self.open_with(opener, options, phases)

    async def open_with(
        self, opener: AdmittingOpener, options: bytes = b"", phases: DialPhases | None = None
    ) -> UpstreamSession:
        pairs = [(b"user", b"app"), (b"options", options)]
        async with asyncio.timeout(SECONDS_MAX):
            startup = StartupMessage(V3_0, tuple(pairs))
            session = await opener.open(startup, phases or DialPhases())
        self.sessions.append(session)
        return session

    async def refusal(self, key: str = KEY, options: bytes = b"") -> ProxyError:
        with pytest.raises(ProxyError) as refused:
            await self.open(key, options)
        return refused.value

    async def port_of(self, session: UpstreamSession) -> bytes:
        return await asked(session, "select current_setting('cluster_name')")


@asynccontextmanager
async def direct_sidecar(operator: Operator, **sections: Any) -> AsyncIterator[Sidecar]:
    """Yield what opens sessions for the keys of an operator's map, with these settings."""
    stores = operator.stores
    settings = stores.settings(stores.roles.session, **sections)
    metrics = build_metrics()
    registry = LocalWorkspaceRegistry(metrics, version="1")
    upstreams = Upstreams(settings, registry, lambda *_: None)
    counts = Counts()

    async def catalogue_host() -> str:
        return stores.host(MAP)

    catalogue = settings.catalogue
    shards = ShardUpstreams(settings, upstreams.factory, (), catalogue_host)
    loop = asyncio.get_running_loop()
    async with stores.connect(MAP, stores.roles.reader) as connection:
        source = DirectSource(operator, connection)
        parts = OpenerParts(
            "tenants",
            source,
            shards,
            Parking(settings.park_max, catalogue.park_timeout_seconds, counts),
            counts,
            "proxy-1/17",
            catalogue.validate,
            settings.upstream.connect_timeout_seconds,
            loop.time,
            lambda: True,
        )
        sidecar = Sidecar(operator, source, parts, counts)
        try:
            yield sidecar
        finally:
            for session in sidecar.sessions:
                session.stream.transport.abort()
            shards.close()
            upstreams.close()
            await registry.close()
