"""A map over the two shards of `stores`, made and changed with SQL in the order of operations.

For: tests of the sidecar, which sees only what the catalogue and the shards show. Each change is
local before it is in the catalogue, and raises the epoch. Not for: the operations themselves.
"""

import uuid
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from proxy.catalogue.schema import migrate_catalogue, migrate_shard
from proxy.emulator.cluster import quoted
from proxy.routing.shard_map import Kind, MapKeys, MapSpec
from tests.support.catalogue import MAP, SHARD_NAMES, Stores

MAP_NAME: Final = "tenants"
# Rows are changed as this says, or at once where a test stops half-way.
KILL: Final = "kill"


@dataclass(frozen=True, slots=True)
class Placed:
    """A mapping that the operator made."""

    mapping_id: UUID
    lo: bytes
    hi: bytes | None
    shard: str


class Operator:
    """The administrator of one map. Keys are given as text, as in a configuration."""

    def __init__(self, stores: Stores, spec: MapSpec, name: str = MAP_NAME) -> None:
        self.name = name
        self.stores = stores
        self.spec = spec
        self.keys = MapKeys(spec)
        self.map_id = uuid.uuid4()
        self.shard_ids = {name: uuid.uuid4() for name in SHARD_NAMES}
        self.placed: dict[UUID, Placed] = {}

    async def install(self, *, grants: bool = True) -> None:
        """Install the schemas, the map and its two shards, and give reader and session rights."""
        async with self.stores.connect(MAP) as catalogue:
            await migrate_catalogue(catalogue)
            reader = quoted(self.stores.roles.reader)
            await catalogue.execute(f"grant usage on schema shardmap to {reader}")
            await catalogue.execute(f"grant select on all tables in schema shardmap to {reader}")
        await self.register(grants=grants)

    async def register(self, *, grants: bool = True) -> None:
        """Add the map and its two shards where the catalogue's schema is installed."""
        spec = self.spec
        async with self.stores.connect(MAP) as catalogue:
            await catalogue.execute(
                "insert into shardmap.shard_map (map_id, name, kind, key_type, normalise)"
                " values ($1, $2, $3, $4, $5)",
                *(self.map_id, self.name, spec.kind, spec.key_type, spec.normalise),
            )
            for name in SHARD_NAMES:
                await self._register(catalogue, name)
        for name in SHARD_NAMES:
            await self._provision(name, grants=grants)

    def location(self, name: str) -> str:
        """Return the location of a shard, as its own schema has it."""
        stores = self.stores
        return f"{stores.host(name)}:{stores.lakebase.port}/{stores.database}"

    async def add(self, low: str, high: str | None, shard: str) -> Placed:
        """Add a mapping that is online. `high` is None for +inf; of a list, `low` is the key."""
        lo = b"" if low == "-inf" else self.keys.parse_key(low)
        hi = None if high is None else self.keys.parse_key(high)
        if self.spec.kind is Kind.LIST:
            hi = lo + b"\0"
        placed = Placed(uuid.uuid4(), lo, hi, shard)
        self.placed[placed.mapping_id] = placed
        await self._local(shard, _INSERT_LOCAL, placed.mapping_id, self.map_id, lo, hi, "online", 1)
        await self.catalogue(
            "insert into shardmap.mapping (mapping_id, map_id, shard_id, lo, hi)"
            " values ($1, $2, $3, $4, $5)",
            *(placed.mapping_id, self.map_id, self.shard_ids[shard], lo, hi),
        )
        return placed

    async def offline(
        self,
        placed: Placed,
        sessions: str = KILL,
        *,
        seconds: float = 60,
        ends: bool = True,
        announces: bool = True,
    ) -> None:
        """Take a mapping offline: the fence, the announcement, the end of its sessions."""
        await self.fence(placed)
        if announces:
            await self.catalogue(
                "update shardmap.mapping set status = 'offline', epoch = epoch + 1, sessions = $2,"
                " drain_until = case $2 when 'drain' then now() + $3 * interval '1 s' end"
                " where mapping_id = $1",
                *(placed.mapping_id, sessions, seconds),
            )
        if ends and sessions == KILL:
            await self.end_sessions(placed)

    async def fence(self, placed: Placed) -> None:
        """Take a mapping offline in its shard alone."""
        await self._local(
            placed.shard,
            "update shardmap_local.mapping set status = 'offline', epoch = epoch + 1"
            " where mapping_id = $1",
            placed.mapping_id,
        )

    async def end_sessions(self, placed: Placed) -> None:
        """End the sessions that are registered for a mapping."""
        await self._local(
            placed.shard,
            "select pg_terminate_backend(pid) from shardmap_local.live_session"
            " where mapping_id = $1",
            placed.mapping_id,
        )

    async def online(self, placed: Placed) -> None:
        """Take a mapping online again."""
        await self._local(
            placed.shard,
            "update shardmap_local.mapping set status = 'online', epoch = epoch + 1"
            " where mapping_id = $1",
            placed.mapping_id,
        )
        await self.catalogue(
            "update shardmap.mapping set status = 'online', epoch = epoch + 1"
            " where mapping_id = $1",
            placed.mapping_id,
        )

    async def move(self, placed: Placed, shard: str, *, ends: bool = True) -> Placed:
        """Move a mapping to another shard, without rows. Returns it as it is then."""
        await self.offline(placed, ends=ends)
        epoch = await self.epoch(placed)
        await self._local(
            placed.shard,
            "delete from shardmap_local.mapping where mapping_id = $1",
            placed.mapping_id,
        )
        moved = Placed(placed.mapping_id, placed.lo, placed.hi, shard)
        self.placed[moved.mapping_id] = moved
        await self._local(
            shard,
            _INSERT_LOCAL,
            *(moved.mapping_id, self.map_id, moved.lo, moved.hi, "online", epoch + 1),
        )
        await self.catalogue(
            "update shardmap.mapping set status = 'online', shard_id = $2, epoch = epoch + 1"
            " where mapping_id = $1",
            *(moved.mapping_id, self.shard_ids[shard]),
        )
        return moved

    async def delete(self, placed: Placed) -> None:
        """Delete a mapping, first in the shard."""
        await self._local(
            placed.shard,
            "delete from shardmap_local.mapping where mapping_id = $1",
            placed.mapping_id,
        )
        await self.catalogue(
            "delete from shardmap.mapping where mapping_id = $1", placed.mapping_id
        )

    async def shard_status(self, name: str, status: str, *, announces: bool = True) -> None:
        """Set a shard's own status, first in the shard."""
        await self._local(
            name,
            "update shardmap_local.identity set status = $2 where map_id = $1",
            *(self.map_id, status),
        )
        if announces:
            await self.catalogue(
                "update shardmap.shard set status = $2 where shard_id = $1",
                *(self.shard_ids[name], status),
            )

    async def epoch(self, placed: Placed) -> int:
        """Return a mapping's epoch in the catalogue."""
        async with self.stores.connect(MAP) as catalogue:
            epoch: int = await catalogue.fetchval(
                "select epoch from shardmap.mapping where mapping_id = $1", placed.mapping_id
            )
            return epoch

    async def registered(self, shard: str) -> list[MappingOf[str, Any]]:
        """Return the live sessions that are registered in a shard."""
        async with self.stores.connect(shard) as local:
            rows = await local.fetch("select * from shardmap_local.live_session")
            return [dict(row) for row in rows]

    async def catalogue(self, sql: str, *arguments: object) -> None:
        """Run a statement in the catalogue, as administrator."""
        async with self.stores.connect(MAP) as catalogue:
            await catalogue.execute(sql, *arguments)

    async def _local(self, shard: str, sql: str, *arguments: object) -> None:
        async with self.stores.connect(shard) as local:
            await local.execute(sql, *arguments)

    async def _register(self, catalogue: Any, name: str) -> None:
        stores = self.stores
        await catalogue.execute(
            "insert into shardmap.shard (shard_id, map_id, name, host, port, dbname, endpoint)"
            " values ($1, $2, $3, $4, $5, $6, $7)",
            *(self.shard_ids[name], self.map_id, name, stores.host(name), stores.lakebase.port),
            *(stores.database, stores.endpoint(name)),
        )

    async def _provision(self, name: str, *, grants: bool) -> None:
        spec, session = self.spec, quoted(self.stores.roles.session)
        async with self.stores.connect(name) as local:
            await migrate_shard(local, f"shard {name}")
            await local.execute(
                "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
                " hash_version, shard_id, location, version)"
                " values ($1, $2, $3, $4, $5, 1, $6, $7, 1)",
                *(self.map_id, self.name, spec.kind, spec.key_type, spec.normalise),
                *(self.shard_ids[name], self.location(name)),
            )
            if grants:
                await local.execute(f"grant usage on schema shardmap_local to {session}")
                await local.execute(f"grant execute on function shardmap_local.admit to {session}")


_INSERT_LOCAL: Final = (
    "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch)"
    " values ($1, $2, $3, $4, $5, $6)"
)
