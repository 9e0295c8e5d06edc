"""`shards create`, `drop`, `list`, `show`: the maps of a catalogue, and what is in one.

Creating and dropping a map is one transaction of the catalogue: a map without shards is nowhere
else.
"""

from collections.abc import Mapping
from typing import Final

import asyncpg

from proxy.catalogue import store
from proxy.catalogue.bounds import parse_bound
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection
from proxy.catalogue.store import Span
from proxy.catalogue.transactions import transaction
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec
from proxy.verbs.shards.arguments import Arguments, map_name, one_of, syntax
from proxy.verbs.shards.output import described, table
from proxy.verbs.shards.verb import Call, Verb, map_facts, mapping_facts, shard_facts
from proxy.verbs.syntax import UsageError

_LIMIT_MAX: Final = 1 << 62
_COLUMNS: Final = ("name", "kind", "key_type", "normalise", "version", "shards", "mappings")
_SHARD_COLUMNS: Final = ("name", "host", "port", "database", "status", "version", "mappings")


# -- create, drop --------------------------------------------------------------------------------


def _spec(arguments: Arguments) -> MapSpec:
    """Return kind, key type and normalise of a new map. Raises UsageError."""
    map_name(arguments.words[0])
    kind, key_type = arguments.get("kind"), arguments.get("key-type")
    if kind is None or key_type is None:
        raise UsageError("create needs --kind and --key-type")
    normalise = one_of("--normalise", arguments.get("normalise") or "none", list(Normalise))
    spec = MapSpec(
        Kind(one_of("--kind", kind, list(Kind))),
        KeyType(one_of("--key-type", key_type, list(KeyType))),
        Normalise(normalise),
    )
    if spec.normalise is not Normalise.NONE and spec.key_type is not KeyType.TEXT:
        raise UsageError("--normalise is for keys of type text")
    return spec


async def _create(call: Call) -> None:
    name, spec = call.arguments.words[0], _spec(call.arguments)
    call.output.progress(f"creating the map {name}")
    async with call.administration.catalogue() as connection:
        await store.check_store(connection, writes=True)
        async with transaction(connection):
            await _check_name(connection, name)
            if call.arguments.dry_run:
                call.output.plan([f"create the {spec.kind} map {name} of {spec.key_type} keys"])
                return
            await _insert(connection, name, spec)
        created = await store.read_map(connection, name)
    facts = map_facts(created)
    call.output.answer({"map": facts}, [f"created the map {name}", *described(facts)])


async def _check_name(connection: Connection, name: str) -> None:
    """Raise CatalogueError (EXISTS) for a name that is taken, in any case."""
    query = "select name from shardmap.shard_map where lower(name) = lower($1)"
    taken = await connection.fetchval(query, name)
    if taken is not None:
        text = f"the catalogue has a map {taken}"
        raise CatalogueError(Reason.EXISTS, text, "Names that differ only in case are the same.")


async def _insert(connection: Connection, name: str, spec: MapSpec) -> None:
    try:
        await connection.execute(
            "insert into shardmap.shard_map (name, kind, key_type, normalise)"
            " values ($1, $2, $3, $4)",
            name,
            *(str(word) for word in (spec.kind, spec.key_type, spec.normalise)),
        )
    except asyncpg.UniqueViolationError:  # by another administrator, at the same moment
        raise CatalogueError(Reason.EXISTS, f"the catalogue has a map {name}") from None


async def _drop(call: Call) -> None:
    name = call.arguments.words[0]
    call.output.progress(f"dropping the map {name}")
    async with call.administration.catalogue() as connection:
        await store.check_store(connection, writes=True)
        async with transaction(connection):
            dropped = await store.read_map(connection, name)
            # New shards and operations of the map wait for this.
            query = "select from shardmap.shard_map where map_id = $1 for update"
            await connection.execute(query, dropped.map_id)
            await _check_empty(connection, dropped)
            if call.arguments.dry_run:
                call.output.plan([f"drop the map {name}"])
                return
            query = "delete from shardmap.shard_map where map_id = $1"
            await connection.execute(query, dropped.map_id)
    call.output.answer({"map": map_facts(dropped)}, [f"dropped the map {name}"])


async def _check_empty(connection: Connection, dropped: CatalogueMap) -> None:
    """Raise CatalogueError: NOT_EMPTY, OPERATION_PENDING."""
    query = "select op_id from shardmap.op_log where map_id = $1 limit 1"
    pending = await connection.fetchval(query, dropped.map_id)
    if pending is not None:
        text = f"the map {dropped.name} has the pending operation {pending}"
        raise CatalogueError(Reason.OPERATION_PENDING, text, "See `shards ops`.")
    shards = await store.read_shards(connection, dropped.map_id)
    if shards:
        text = f"the map {dropped.name} has {len(shards)} shards"
        hint = "`shards remove-shard` removes one that has no mappings."
        raise CatalogueError(Reason.NOT_EMPTY, text, hint)


# -- list, show ----------------------------------------------------------------------------------


async def _list(call: Call) -> None:
    call.output.progress("reading the maps")
    async with call.administration.catalogue() as connection:
        await store.check_store(connection)
        if "locations" in call.arguments.switches:
            found = await store.read_locations(connection)
            rows = [(one.host, one.port, one.database, one.shards) for one in found]
            names = ("host", "port", "database", "shards")
            facts = [dict(zip(names, row, strict=True)) for row in rows]
            call.output.answer({"locations": facts}, table(names, rows))
            return
        maps = [
            {**map_facts(one.map), "shards": one.shards, "mappings": one.mappings}
            for one in await store.read_maps(connection)
        ]
    lines = table(_COLUMNS, [[str(one[name]) for name in _COLUMNS] for one in maps])
    call.output.answer({"maps": maps}, lines)


def _judge_show(arguments: Arguments) -> None:
    arguments.shard()
    arguments.number("limit", 0, _LIMIT_MAX)


async def _show(call: Call) -> None:
    arguments = call.arguments
    call.output.progress("reading the map")
    limit = arguments.number("limit", 0, _LIMIT_MAX)
    async with (
        call.administration.catalogue() as connection,
        transaction(connection, read_only=True),
    ):
        shown = await call.read_map(connection)
        low, high = _span(arguments, shown.spec)
        shards = await store.read_shards(connection, shown.map_id)
        if (name := arguments.shard()) is not None:
            shards = [await store.read_shard(connection, shown, name)]
        counts = await store.count_mappings(connection, shown.map_id)
        shard_rows = [shard_facts(one, counts.get(one.shard_id, 0)) for one in shards]
        facts = {"map": map_facts(shown), "shards": shard_rows}
        cells = [[str(row[column]) for column in _SHARD_COLUMNS] for row in shard_rows]
        lines = [*described(map_facts(shown)), "", *table(_SHARD_COLUMNS, cells), ""]
        names = {one.shard_id: one.name for one in shards}
        span = Span(low, high, shards[0].shard_id if name is not None else None)
        with call.output.many(facts, "mappings", lines) as rows:
            read = 0
            async for chunk in store.stream_mappings(connection, shown.map_id, span, limit):
                rows.add([mapping_facts(one, shown.spec, names) for one in chunk])
                read += len(chunk)
                call.output.progress(f"reading the mappings: {read}")


def _span(arguments: Arguments, spec: MapSpec) -> tuple[bytes, bytes | None]:
    """Return the bounds of --from and --to. Raises ProxyError, and CatalogueError."""
    low = parse_bound(arguments.get("from") or "-inf", spec)
    high = parse_bound(arguments.get("to") or "+inf", spec)
    if low is None or (high is not None and low >= high):
        raise CatalogueError(Reason.INVALID_BOUNDS, "--from is not below --to")
    return low, high


_CREATE: Final = syntax(
    "create NAME --kind KIND --key-type TYPE [--normalise N]",
    1,
    1,
    options=("kind", "key-type", "normalise"),
    writes=True,
)
_SHOW: Final = syntax(
    "show [--shard NAME] [--from LOW] [--to HIGH] [--limit N]",
    options=("shard", "from", "to", "limit"),
)
VERBS: Final[Mapping[str, Verb]] = {
    "create": Verb(_CREATE, _create, _spec, of_a_map=lambda _: False),
    "drop": Verb(
        syntax("drop NAME", 1, 1, writes=True),
        _drop,
        lambda arguments: map_name(arguments.words[0]),
        of_a_map=lambda _: False,
    ),
    "list": Verb(
        syntax("list [--locations]", switches=("locations",)), _list, of_a_map=lambda _: False
    ),
    "show": Verb(_SHOW, _show, _judge_show),
}
