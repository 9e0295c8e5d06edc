"""A catalogue in a real PostgreSQL that a `FollowedMap` follows, its questions counted.

For: a map with rows, connections that can be refused or ended, changes with plain SQL. Not for: the
dialer's part; connections are direct.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast
from uuid import UUID

from proxy.catalogue.catalogue_reader import OpenReader, open_reader
from proxy.catalogue.followed_map import FollowedMap
from proxy.catalogue.map_state import Change, Times
from proxy.catalogue.model import Located
from proxy.catalogue.schema import migrate_catalogue
from proxy.config import Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import KeyType, parse_key
from proxy.upstream.upstreams import SessionOpener
from tests.support.catalogue import MAP, Stores, insert_map, insert_mapping, insert_shard

SECONDS_MAX: Final = 30.0
APPLICATION: Final = "followed"


def key(value: int) -> bytes:
    return parse_key(str(value), KeyType.INT4)


@dataclass(slots=True)
class FollowedCatalogue:
    """A range map `tenants` over int4 with two shards: [0,10) one, [20,30) two."""

    stores: Stores
    admin: Any
    map_id: UUID
    shards: list[UUID] = field(default_factory=list)
    mappings: list[UUID] = field(default_factory=list)
    queries: Counter[str] = field(default_factory=Counter)
    opened: int = 0
    open_now: int = 0
    is_down: bool = False
    paused: asyncio.Event | None = None

    @property
    def open(self) -> OpenReader:
        """The opener of readers, as the reader's role."""
        return open_reader(self._connect, cast(SessionOpener, None), self._count)

    def _count(self, purpose: str) -> None:
        self.queries[purpose] += 1

    @asynccontextmanager
    async def _connect(self, _opener: SessionOpener) -> AsyncIterator[Any]:
        if self.paused is not None:
            await self.paused.wait()
        if self.is_down:
            raise ProxyError(ErrorKind.UPSTREAM_UNREACHABLE, "refused")
        async with self.stores.connect(MAP, self.stores.roles.reader) as connection:
            self.opened += 1
            self.open_now += 1
            try:
                yield connection
            finally:
                self.open_now -= 1

    def end_connections(self) -> None:
        """End the reader's connections, as a restart does; blocks."""
        reader = self.stores.roles.reader
        sql = f"select pg_terminate_backend(pid) from pg_stat_activity where usename = '{reader}'"
        self.stores.execute(MAP, sql)

    def settings(self, **catalogue: object) -> Settings:
        return self.stores.settings(self.stores.roles.session, catalogue=catalogue)

    def followed(self, times: Times | None = None, **catalogue: object) -> FollowedMap:
        return FollowedMap(
            self.settings(**catalogue), self.open, times or real_times(), self._count
        )

    async def insert(self, shard: int, low: int, high: int | None) -> UUID:
        hi = None if high is None else key(high)
        return await insert_mapping(self.admin, self.map_id, self.shards[shard], key(low), hi)

    async def execute(self, sql: str, *arguments: object) -> None:
        await self.admin.execute(sql, *arguments)

    async def delete(self, mapping_id: UUID) -> None:
        await self.execute("delete from shardmap.mapping where mapping_id = $1", mapping_id)

    async def set_status(self, mapping_id: UUID, status: str) -> None:
        sql = "update shardmap.mapping set status = $2, epoch = epoch + 1 where mapping_id = $1"
        await self.execute(sql, mapping_id, status)

    async def version(self) -> int:
        sql = "select version from shardmap.shard_map where map_id = $1"
        return int(await self.admin.fetchval(sql, self.map_id))

    async def notify(self, payload: str) -> None:
        await self.execute("select pg_notify('shardmap', $1)", payload)


def real_times() -> Times:
    return Times(time.monotonic, lambda: 0.5, asyncio.sleep)


def short_times() -> Times:
    """Return real times, in which a long wait is a short one."""

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.05))

    return replace(real_times(), sleep=sleep)


@asynccontextmanager
async def filled(stores: Stores) -> AsyncIterator[FollowedCatalogue]:
    async with stores.connect(MAP) as admin:
        await migrate_catalogue(admin)
        reader = f'"{stores.roles.reader}"'
        tables = ", ".join(
            f"shardmap.{name}" for name in ("store_version", "shard_map", "shard", "mapping")
        )
        await admin.execute(f"grant usage on schema shardmap to {reader}")
        await admin.execute(f"grant select on {tables} to {reader}")
        map_id = await insert_map(admin)
        catalogue = FollowedCatalogue(stores, admin, map_id)
        for name in ("one", "two"):
            catalogue.shards.append(
                await insert_shard(admin, map_id, name, f"{name}.example.com", "app")
            )
        catalogue.mappings.append(await catalogue.insert(0, 0, 10))
        catalogue.mappings.append(await catalogue.insert(1, 20, 30))
        yield catalogue


@asynccontextmanager
async def running(followed: FollowedMap, *, loaded: bool = True) -> AsyncIterator[FollowedMap]:
    """Run it while the block runs; `loaded`: wait until it is."""
    task = asyncio.get_running_loop().create_task(followed.run())
    try:
        if loaded:
            async with asyncio.timeout(SECONDS_MAX):
                await followed.wait_until_loaded()
        yield followed
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], followed: FollowedMap) -> None:
    """Wait until something holds, looking after each change and now and then."""
    changed = asyncio.Event()
    unsubscribe = followed.subscribe(lambda _change: changed.set())
    try:
        async with asyncio.timeout(SECONDS_MAX):
            while not condition():
                changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await changed.wait()
    finally:
        unsubscribe()


def where(followed: FollowedMap, value: int) -> str | None:
    """Return the name of the shard that a key is known to be in."""
    located: Located | None = followed.source.peek(key(value))
    return None if located is None else located.shard.name


class Changes:
    """Collects what a subscriber is told."""

    def __init__(self, followed: FollowedMap) -> None:
        self.seen: list[Change] = []
        followed.subscribe(self.seen.append)

    @property
    def everything(self) -> bool:
        return any(change.mapping_ids is None for change in self.seen)

    @property
    def mapping_ids(self) -> set[UUID]:
        return {one for change in self.seen for one in change.mapping_ids or ()}
