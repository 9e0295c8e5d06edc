"""Verifying and rebuilding a large catalogue of two shards: `python -m bench.catalogue_recovery`.

Measures `verify` of both shards, with nothing and with every mapping different, and the rebuild of
a catalogue that was lost: seconds, and the memory of the process. PostgreSQL is the emulator's own;
connections to it are direct. What is measured runs in processes of its own.
"""

import argparse
import asyncio
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import asyncpg

from proxy.catalogue import store
from proxy.catalogue.differences import Digest
from proxy.catalogue.model import CatalogueMap, Shard
from proxy.catalogue.operation import Tools
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operations import Operator
from proxy.catalogue.rebuild import Rebuild
from proxy.catalogue.schema import migrate_catalogue, migrate_shard
from proxy.catalogue.verify import verification
from proxy.emulator.cluster import Cluster
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec

MAPPINGS: Final = 1_000_000
_SHARDS: Final = ("one", "two")
_PARTS: Final = ("verify", "verify", "rebuild")

_MAP: Final = CatalogueMap(UUID(int=1), "m", MapSpec(Kind.RANGE, KeyType.INT8), 1)
_MAP_VALUES: Final = "values ($1, 'm', 'range', 'int8')"
_INSERT_MAP: Final = f"insert into shardmap.shard_map (map_id, name, kind, key_type) {_MAP_VALUES}"
_INSERT_SHARD: Final = (
    "insert into shardmap.shard (shard_id, map_id, name, host, port, dbname)"
    " values ($1, $2, $3, $4, $5, $6)"
)
_INSERT_IDENTITY: Final = (
    "insert into shardmap_local.identity (map_id, map_name, kind, key_type, normalise,"
    " hash_version, shard_id, location, version)"
    " values ($1, 'm', 'range', 'int8', 'none', 1, $2, $3, 1)"
)
_NUMBERS: Final = """
(select md5(n::text)::uuid as id, n, int8send(n * 10 # sign) as lo,
   int8send((n + 1) * 10 # sign) as hi
 from generate_series(0::int8, $1::int8 - 1) n cross join (select 1::int8 << 63 as sign) i) r"""
_ROWS: Final = f"""
insert into shardmap.mapping (mapping_id, map_id, shard_id, lo, hi)
select id, $2, case n % 2 when 0 then $3::uuid else $4::uuid end, lo, hi from {_NUMBERS}"""  # noqa: S608
_LOCAL_ROWS: Final = f"""
insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch)
select id, $2, lo, hi, 'online', 1 from {_NUMBERS} where n % 2 = $3"""  # noqa: S608


def shard(name: str) -> Shard:
    """Return the row of a shard."""
    number = _SHARDS.index(name)
    return Shard(UUID(int=number + 2), _MAP.map_id, name, f"{name}.example.com", 5432, "app")


class Direct:
    """Connections to the servers, by the directories of their sockets."""

    def __init__(self, directories: dict[str, str]) -> None:
        self._directories = directories

    @asynccontextmanager
    async def _connect(self, name: str) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(
            host=self._directories[name],
            user="postgres",
            database="postgres",
            password="",
            ssl=False,
            statement_cache_size=0,
        )
        try:
            yield connection
        finally:
            await connection.close()

    def catalogue(self) -> Any:
        """Connect to the catalogue."""
        return self._connect("map")

    def shard(self, asked: Shard) -> Any:
        """Connect to a shard."""
        return self._connect(asked.name)


async def fill(servers: Direct, mappings: int) -> None:
    """Install the map on all three servers."""
    async with servers.catalogue() as connection:
        await migrate_catalogue(connection)
        await connection.execute(_INSERT_MAP, _MAP.map_id)
        for name in _SHARDS:
            await insert_shard(connection, shard(name))
        ids = [shard(name).shard_id for name in _SHARDS]
        await connection.execute(_ROWS, mappings, _MAP.map_id, *ids, timeout=600)
        await connection.execute("analyze shardmap.mapping")
    for number, name in enumerate(_SHARDS):
        async with servers.shard(shard(name)) as connection:
            await migrate_shard(connection, name)
            values = (_MAP.map_id, shard(name).shard_id, shard(name).location)
            await connection.execute(_INSERT_IDENTITY, *values)
            await connection.execute(_LOCAL_ROWS, mappings, _MAP.map_id, number, timeout=600)
            await connection.execute("analyze shardmap_local.mapping")


async def insert_shard(connection: Any, one: Shard) -> None:
    """Insert a shard's row."""
    values = (one.shard_id, one.map_id, one.name, one.host, one.port, one.database)
    await connection.execute(_INSERT_SHARD, *values)


async def verify(servers: Direct) -> int:
    """Verify both shards; return the number of differences."""
    count = 0
    for name in _SHARDS:
        digest = Digest(_MAP.map_id, shard(name).shard_id)
        async with verification(servers, _MAP, shard(name)) as verified:
            async for one in verified.differences():
                digest.add(one)
                count += 1
    return count


async def rebuild(servers: Direct) -> int:
    """Rebuild the catalogue; return the number of mappings."""
    tools = Tools(servers, asyncio.sleep, lambda: datetime.now(UTC), time.monotonic, lambda _: None)
    async with Operator(tools, KINDS, store.map_by_id, owner="bench") as operator:
        operation = Rebuild(_MAP)
        await operator.run(operation)
    return operation.row_changes.repaired


async def lose(servers: Direct) -> None:
    """Lose the catalogue, and attach both shards to a new one."""
    async with servers.catalogue() as connection:
        await connection.execute("drop schema shardmap cascade")
        await migrate_catalogue(connection)
        await connection.execute(_INSERT_MAP, _MAP.map_id)
        for name in _SHARDS:
            await insert_shard(connection, shard(name))


def measured(part: str, directories: dict[str, str]) -> None:
    """Run a part in this process, and print what it took."""
    servers = Direct(directories)
    began = time.monotonic()
    count = asyncio.run({"verify": verify, "rebuild": rebuild}[part](servers))
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    text = f"{count:,} rows, {seconds:.1f} s, {used.ru_utime:.1f} s of CPU"
    sys.stdout.write(f"{part}: {text}, {used.ru_maxrss / 1000:.0f} MB\n")


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mappings", type=int, default=MAPPINGS)
    parser.add_argument("--part", choices=sorted(set(_PARTS)))
    parser.add_argument("--directories", nargs=3)
    arguments = parser.parse_args()
    names = ("map", *_SHARDS)
    if arguments.part:
        measured(arguments.part, dict(zip(names, arguments.directories, strict=True)))
        return
    with ExitStack() as stack:
        clusters = [stack.enter_context(Cluster(name, version=18)) for name in names]
        directories = {name: str(one.directory) for name, one in zip(names, clusters, strict=True)}
        servers = Direct(directories)
        asyncio.run(fill(servers, arguments.mappings))
        for number, part in enumerate(_PARTS):
            if number == 1:  # every mapping differs
                for name in _SHARDS:
                    clusters[names.index(name)].execute(
                        "update shardmap_local.mapping set epoch = 2", database="postgres"
                    )
            if part == "rebuild":
                asyncio.run(lose(servers))
            command = [sys.executable, "-m", "bench.catalogue_recovery", "--part", part]
            command += ["--directories", *directories.values()]
            subprocess.run(command, check=True)  # noqa: S603


if __name__ == "__main__":
    main()
