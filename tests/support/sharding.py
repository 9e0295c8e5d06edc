"""Settings that route by shard keys to the emulator's shards, and queries that show the shard.

For: sections for `start_proxy` and `start_process`, and one question to `shard_identity`. Not for:
what a shard map means (`tests/routing`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import asyncpg
import psycopg

from proxy.emulator.endpoints import Endpoint
from proxy.emulator.lakebase import Lakebase
from tests.support.running import Listening, asyncpg_arguments, libpq

KEYS_A_SHARD: Final = 1000
TABLE: Final = "SELECT name FROM shard_identity"

Section = dict[str, object]


def target(lakebase: Lakebase, endpoint: Endpoint, **more: object) -> Section:
    """Return a target that is an Autoscaling endpoint or a Provisioned instance."""
    where = "endpoint" if endpoint.name.startswith("projects/") else "instance"
    return {where: endpoint.name, "hostaddr": lakebase.host_address, **more}


def targets(lakebase: Lakebase) -> dict[str, Section]:
    """Return a target for each shard, named like it."""
    return {shard.name: target(lakebase, shard.endpoint) for shard in lakebase.shards}


def ranges(names: Sequence[str]) -> list[Section]:
    """Return mappings of a range map: 0 to 999 are on the first target, and so on."""
    return [
        {"low": n * KEYS_A_SHARD, "high": (n + 1) * KEYS_A_SHARD, "target": name}
        for n, name in enumerate(names)
    ]


def range_map(names: Sequence[str]) -> Section:
    """Return a shard map of int8 keys over these targets."""
    return {"kind": "range", "key_type": "int8", "mappings": ranges(names)}


def list_map(points: Mapping[str, str]) -> Section:
    """Return a shard map of text keys: the target of each key."""
    mappings = [{"key": key, "target": name} for key, name in points.items()]
    return {"kind": "list", "key_type": "text", "mappings": mappings}


def sharded(
    lakebase: Lakebase, shard_map: Section | None = None, **routing: object
) -> dict[str, Section]:
    """Return sections that route by a map (default: by ranges) to the emulator's shards."""
    names = [shard.name for shard in lakebase.shards]
    return {
        "targets": dict(targets(lakebase)),
        "shard_maps": {"tenants": shard_map or range_map(names)},
        "routing": {"shard_map": "tenants", **routing},
    }


async def shard_by_psycopg(proxy: Listening, sql: str = TABLE, **more: Any) -> Any:
    """Return what one statement answers; `more` is what libpq is told besides."""
    connect = psycopg.AsyncConnection.connect
    async with await connect(**libpq(proxy, **more)) as connection:
        row = await (await connection.execute(sql.encode())).fetchone()
    assert row is not None
    return row[0]


async def shard_by_asyncpg(proxy: Listening, sql: str = TABLE, **more: Any) -> Any:
    """Return what one statement answers; `more` is what asyncpg is told besides."""
    connection = await asyncpg.connect(**asyncpg_arguments(proxy, **more))
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()
