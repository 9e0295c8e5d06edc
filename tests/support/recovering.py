"""Verifying and repairing the shards of `Operating`, and damage of both sides.

For: tests of recovery. Not for: the verbs, which tests call as processes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from uuid import UUID, uuid4

from proxy.catalogue.attach import Attach, read_found
from proxy.catalogue.detach import Detach
from proxy.catalogue.differences import Difference, Digest, bounds_of
from proxy.catalogue.model import Shard, Status
from proxy.catalogue.operation import Reach, pass_by
from proxy.catalogue.repair import Asked, Repair, Source, read_differences
from proxy.catalogue.schema import migrate_catalogue
from proxy.catalogue.store import find_map, insert_hidden_map, shard_of
from tests.support.catalogue import MAP, SHARD_NAMES
from tests.support.operating import Operating

SIDES: Final = ("catalogue", "shard")
RENAMED: Final = "renamed.example.com"
_INSERT: Final = (
    "insert into shardmap_local.mapping (mapping_id, map_id, lo, hi, status, epoch)"
    " values ($1, $2, $3, $4, $5, $6)"
)


async def shard_row(operating: Operating, name: str) -> Shard:
    """Return a shard as the catalogue has it."""
    (row,) = await operating.fetch(MAP, "select * from shardmap.shard where name = $1", name)
    return shard_of(row)


async def differences(operating: Operating, name: str) -> list[Difference]:
    """Return what `verify` finds."""
    shard = await shard_row(operating, name)
    return await read_differences(operating.databases, operating.map, shard)


async def told(operating: Operating, name: str) -> list[tuple[str, str]]:
    """Return the bounds of what `verify` finds."""
    return [bounds_of(operating.map.spec, one) for one in await differences(operating, name)]


async def report_of(operating: Operating, name: str, found: Sequence[Difference]) -> str:
    """Return the report of these differences."""
    digest = Digest(operating.map.map_id, (await shard_row(operating, name)).shard_id)
    for one in found:
        digest.add(one)
    return digest.text()


async def repairing(
    operating: Operating,
    name: str,
    source: str,
    *ranges: tuple[str, str],
    report: str = "",
    token: UUID | None = None,
) -> Repair:
    """Return a repair of what differs now."""
    found = await differences(operating, name)
    report = report or await report_of(operating, name, found)
    return Repair(operating.map, name, Asked(Source(source), report, ranges, token), found)


async def repair(
    operating: Operating,
    name: str,
    source: str,
    *ranges: tuple[str, str],
    reach: Reach = pass_by,
) -> Repair:
    """Repair what differs now."""
    operation = await repairing(operating, name, source, *ranges)
    await operating.run(operation, reach)
    return operation


async def insert_local(
    operating: Operating,
    name: str,
    low: int | bytes | None,
    high: int | bytes | None,
    *,
    status: str = "online",
    epoch: int = 1,
    mapping_id: UUID | None = None,
) -> UUID:
    """Insert a row into a shard's own map; bounds may be any bytes."""
    lo = low if isinstance(low, bytes) else operating.bounds(low, None)[0]
    hi = high if isinstance(high, bytes) else operating.bounds(None, high)[1]
    made = mapping_id or uuid4()
    values = (made, operating.map.map_id, lo, hi, status, epoch)
    await operating.fetch(name, _INSERT, *values)
    return made


async def saved(operating: Operating, name: str) -> list[tuple[str, list[Any]]]:
    """Return all that a server has of shard maps, for `restore`."""
    tables = (
        ("shardmap.shard_map", "shardmap.shard", "shardmap.mapping", "shardmap.op_log")
        if name == MAP
        else ("shardmap_local.identity", "shardmap_local.mapping")
    )
    found = []
    for table in tables:
        rows = await operating.fetch(name, f"select row_to_json(t)::text as row from {table} t")
        found.append((table, [row["row"] for row in rows]))
    return found


async def restore(operating: Operating, name: str, kept: list[tuple[str, list[Any]]]) -> None:
    """Set a server back to what was saved."""
    for table, _ in reversed(kept):
        await operating.fetch(name, f"delete from {table}")
    for table, rows in kept:
        columns = ", ".join(
            row["attname"]
            for row in await operating.fetch(
                name,
                "select attname from pg_attribute where attrelid = $1::text::regclass"
                " and attnum > 0 and not attisdropped and attgenerated = '' order by attnum",
                table,
            )
        )
        await operating.fetch(
            name,
            f"insert into {table} ({columns}) select {columns}"
            f" from unnest($1::text[]) as r (r),"
            f" lateral json_populate_record(null::{table}, r::json)",
            rows,
        )


async def check_equal(operating: Operating) -> None:
    """Fail unless verify finds nothing on any shard, and all invariants hold."""
    await operating.check_settled()
    for name in SHARD_NAMES:
        assert await told(operating, name) == []


# -- a catalogue that is lost --------------------------------------------------------------------


async def lose_catalogue(operating: Operating) -> None:
    """Drop the catalogue's schema, and install it anew."""
    await operating.fetch(MAP, "drop schema shardmap cascade")
    async with operating.stores.connect(MAP) as catalogue:
        await migrate_catalogue(catalogue)


async def detached(operating: Operating, name: str, *, force: bool = True) -> Detach:
    """Detach a shard."""
    operation = Detach(operating.map, name, force=force)
    await operating.run(operation)
    return operation


async def attaching(
    operating: Operating,
    name: str,
    *,
    at: str = "",
    new_identity: bool = False,
    moved: bool = False,
) -> Attach:
    """Return the operation that attaches a shard; the map is added, hidden, if it is lost.

    `at` is a server's name that leads to the shard as well.
    """
    stores = operating.stores
    host = stores.host(at or name)
    shard = replace(operating.shards[name], host=host, name=at or name)
    async with operating.databases.shard(shard) as connection:
        found_map, found = await read_found(connection, shard, operating.map.name, None)
    async with stores.connect(MAP) as catalogue:
        if await find_map(catalogue, operating.map.name) is None:
            await insert_hidden_map(catalogue, found_map)
    shard_id = uuid4() if new_identity else found.itself.shard_id
    shard = replace(shard, shard_id=shard_id, status=Status.ONLINE, version=1)
    return Attach(operating.map, shard, found, new_identity=new_identity, moved=moved)
