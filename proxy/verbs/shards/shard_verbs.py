"""`shards add-shard`, `remove-shard`, `sessions`: the shards of a map, and who is on them."""

from collections.abc import Mapping
from typing import Final

from proxy.catalogue import store
from proxy.catalogue.bounds import parse_bounds, show_bounds
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.model import Mapping as MappingRow
from proxy.catalogue.shard_store import LiveSession, read_sessions
from proxy.catalogue.store import Span
from proxy.verbs.shards.arguments import Arguments, Syntax
from proxy.verbs.shards.output import table
from proxy.verbs.shards.verb import Call, Json, Verb

_COLUMNS: Final = ("shard", "pid", "low", "high", "epoch", "proxy", "since")


async def _sessions(call: Call) -> None:
    call.output.progress("reading the map")
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection)
        mapping = await _given_mapping(call, connection, owner)
        shards = await _asked_shards(call, connection, owner, mapping)
    rows: list[Json] = []
    for shard in shards:
        call.output.progress(f"asking shard {shard.name}")
        async with call.administration.shard(shard) as connection:
            found = await read_sessions(connection, owner.map_id)
        rows += [
            _session_facts(one, shard, owner)
            for one in found
            if mapping is None or one.mapping_id == mapping.mapping_id
        ]
    cells = [["" if row[name] is None else str(row[name]) for name in _COLUMNS] for row in rows]
    call.output.answer({"sessions": rows}, table(_COLUMNS, cells))


async def _given_mapping(
    call: Call, connection: Connection, owner: CatalogueMap
) -> MappingRow | None:
    """Return the mapping of RANGE, None without one. Raises CatalogueError and ProxyError."""
    if not call.arguments.words:
        return None
    lo, hi = parse_bounds(call.arguments.words, owner.spec)
    found = await store.read_mappings(connection, owner.map_id, Span(lo, hi), 1)
    if not found or (found[0].lo, found[0].hi) != (lo, hi):
        text = f"the map {owner.name} has no mapping with exactly these bounds"
        raise CatalogueError(Reason.UNKNOWN_MAPPING, text, "`shards show` prints the mappings.")
    return found[0]


async def _asked_shards(
    call: Call, connection: Connection, owner: CatalogueMap, mapping: MappingRow | None
) -> list[Shard]:
    if (name := call.arguments.shard()) is not None:
        return [await store.read_shard(connection, owner, name)]
    if mapping is not None:
        return await store.shards_by_id(connection, [mapping.shard_id])
    return await store.read_shards(connection, owner.map_id)


def _session_facts(session: LiveSession, shard: Shard, owner: CatalogueMap) -> Json:
    """Return a session as JSON has it; one for a whole shard has neither bounds nor epoch."""
    low: str | None = None
    high: str | None = None
    if session.lo is not None:
        low, high = show_bounds(owner.spec, session.lo, session.hi)
    return {
        "shard": shard.name,
        "pid": session.pid,
        "low": low,
        "high": high,
        "epoch": session.epoch,
        "proxy": session.proxy,
        "since": session.since.isoformat(),
    }


VERBS: Final[Mapping[str, Verb]] = {
    "sessions": Verb(
        Syntax("sessions [RANGE] [--shard NAME]", 0, 2, options=("shard",)),
        _sessions,
        Arguments.shard,
    ),
}
