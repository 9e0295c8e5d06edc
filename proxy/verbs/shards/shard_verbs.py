"""`shards add-shard`, `alter-shard`, `remove-shard`, `sessions`: shards, and who is on them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from proxy.addresses import is_pooled_host, is_read_only_host
from proxy.catalogue import store
from proxy.catalogue.alter_shard import AlterShard, ShardChanges
from proxy.catalogue.bounds import parse_bounds, show_bounds
from proxy.catalogue.errors import CatalogueError, Reason, translated
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.model import Mapping as MappingRow
from proxy.catalogue.operation import Unchanged, check_identity
from proxy.catalogue.pending_elsewhere import lead_pending
from proxy.catalogue.shard_operations import AddShard, RemoveShard, new_shard
from proxy.catalogue.shard_store import LiveSession, read_sessions
from proxy.catalogue.store import Span
from proxy.config import UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.verbs.shards.arguments import Arguments, shard_name, syntax
from proxy.verbs.shards.operating import counted_shard, run
from proxy.verbs.shards.output import table
from proxy.verbs.shards.verb import Call, Json, Verb, shard_facts
from proxy.verbs.syntax import UsageError

_PORT: Final = 5432
_COLUMNS: Final = ("shard", "pid", "low", "high", "epoch", "proxy", "since")


# -- add-shard, remove-shard ---------------------------------------------------------------------


def judge_location(arguments: Arguments) -> None:
    """Raise UsageError for a name or a location that no shard may have."""
    shard_name(arguments.words[0])
    host, endpoint, instance = (arguments.get(name) for name in ("host", "endpoint", "instance"))
    arguments.number("port", 1, 65535)
    if endpoint and instance:
        raise UsageError("--endpoint and --instance exclude each other")
    if not (host or endpoint or instance):
        raise UsageError("a shard needs --host, or --endpoint or --instance to look it up")
    for name in ("host", "database", "endpoint", "instance", "workspace"):
        if (value := arguments.get(name)) is not None:
            _check(name, value)


def _check(name: str, value: str) -> None:
    """Raise UsageError for a value that no shard may have."""
    try:
        UpstreamSettings.model_validate({name: value})
    except ValueError:  # its text is for a file's author
        raise UsageError(f"--{name} is not valid") from None
    if not value:
        raise UsageError(f"--{name} is empty")


def _check_host(host: str) -> None:
    """Raise CatalogueError (POOLER_HOST, READ_ONLY_HOST) for a host that no shard may have."""
    if is_pooled_host(host):
        text = f"{host} is a pooler's host, where a session does not keep its connection"
        raise CatalogueError(Reason.POOLER_HOST, text, "Use the direct host.")
    if is_read_only_host(host):
        text = f"{host} is a read-only host, where no session can register"
        raise CatalogueError(Reason.READ_ONLY_HOST, text, "Use the read-write host.")


async def _add_shard(call: Call) -> None:
    name, host = call.arguments.words[0], await given_host(call)

    async def make(_: Connection, owner: CatalogueMap) -> AddShard:
        return AddShard(owner, await given_shard(call, owner, host))

    call.output.progress(f"adding the shard {name}")
    done = await run(call, make)
    if done is not None:
        shard = done.operation.shard
        lines = [f"added the shard {name} at {shard.location}"]
        call.output.answer({"shard": shard_facts(shard, 0)}, lines)


async def given_host(call: Call) -> str:
    """Return the host that is given, or looked up. Raises CatalogueError."""
    host = call.arguments.get("host") or ""
    _check_host(host)
    given = (call.arguments.get(name) or "" for name in ("endpoint", "instance", "workspace"))
    host = host or await _host_of(call, *given)
    _check_host(host)
    return host


async def given_shard(call: Call, owner: CatalogueMap, host: str) -> Shard:
    """Return the row of the shard that is given. Raises CatalogueError if it may not be dialled."""
    shard = _row(call, owner, host)
    await call.administration.check_shard(shard)
    return shard


async def _host_of(call: Call, endpoint: str, instance: str, workspace: str) -> str:
    """Return the host of an endpoint or an instance. Raises CatalogueError."""
    call.output.progress("looking up the host")
    settings = call.settings
    if workspace and workspace not in settings.workspaces:
        raise translated(ProxyError(ErrorKind.WORKSPACE_UNKNOWN, workspace), "--workspace")
    given = UpstreamSettings(endpoint=endpoint, instance=instance, workspace=workspace)
    return await call.administration.host_of(given.inheriting(settings.upstream))


def _row(call: Call, owner: CatalogueMap, host: str) -> Shard:
    """Return the row of the shard to add."""
    arguments = call.arguments
    return new_shard(
        owner,
        arguments.words[0],
        host,
        arguments.number("port", 1, 65535, _PORT) or _PORT,
        arguments.get("database") or call.settings.upstream.database,
        endpoint=arguments.get("endpoint") or "",
        instance=arguments.get("instance") or "",
        workspace=arguments.get("workspace") or "",
    )


async def _remove_shard(call: Call) -> None:
    name = call.arguments.words[0]

    async def make(_: Connection, owner: CatalogueMap) -> RemoveShard:
        return RemoveShard(owner, name)

    call.output.progress(f"removing the shard {name}")
    done = await run(call, make)
    if done is not None:
        shard = done.operation.shard
        lines = [f"removed the shard {name} at {shard.location}"]
        call.output.answer({"shard": shard_facts(shard, 0)}, lines)


# -- alter-shard ---------------------------------------------------------------------------------


def _judge_alter(arguments: Arguments) -> None:
    """Raise UsageError for what no shard may have. Empty is none, of what may be none."""
    shard_name(arguments.words[0])
    arguments.expect()
    if (name := arguments.get("rename")) is not None:
        shard_name(name)
    if arguments.get("endpoint") and arguments.get("instance"):
        raise UsageError("--endpoint and --instance exclude each other")
    given = {name: arguments.get(name) for name in ("endpoint", "instance", "workspace")}
    for name, value in given.items():
        if value:
            _check(name, value)
    if arguments.get("rename") is None and not any(one is not None for one in given.values()):
        raise UsageError("alter-shard needs --endpoint, --instance, --workspace or --rename")


async def _alter_shard(call: Call) -> None:
    arguments = call.arguments
    name, expect = arguments.words[0], arguments.expect()
    endpoint, instance = arguments.get("endpoint"), arguments.get("instance")
    changes = ShardChanges(
        arguments.get("rename"),
        endpoint or (None if instance else endpoint),
        instance or (None if endpoint else instance),
        arguments.get("workspace"),
    )

    async def make(connection: Connection, owner: CatalogueMap) -> AlterShard:
        operation = AlterShard(owner, name, changes, expect=expect)
        await operation.find(connection)
        await _check_reached(call, owner, operation.after)
        if not arguments.dry_run:
            with suppress(Unchanged):
                await operation.check_values(connection)
                before, after = operation.before, operation.after
                led = await lead_pending(call.administration, owner, before, after)
                if led and expect is not None:  # the row has been written with them
                    return AlterShard(owner, name, changes, expect=expect + 1)
        return operation

    call.output.progress(f"changing the shard {name}")
    done = await run(call, make)
    if done is not None:
        after = done.operation.after
        was = "" if done.changed else " already"
        lines = [f"shard {after.name} is{was} as asked (version {after.version})"]
        call.output.answer({"shard": await counted_shard(call, done.map, after)}, lines)


async def _check_reached(call: Call, owner: CatalogueMap, shard: Shard) -> None:
    """Check that a row leads to the shard. Raises CatalogueError.

    A token for another resource may serve, so that of the row is looked up.
    """
    if shard.endpoint or shard.instance:
        await _host_of(call, shard.endpoint, shard.instance, shard.workspace)
    async with call.administration.shard(shard) as there:
        await check_identity(there, owner, shard)


# -- sessions ------------------------------------------------------------------------------------


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


LOCATION_USAGE: Final = (
    "NAME [--host H] [--port N] [--database D] [--endpoint E | --instance I] [--workspace W]"
)
LOCATION_OPTIONS: Final = ("host", "port", "database", "endpoint", "instance", "workspace")

_ADD: Final = syntax(f"add-shard {LOCATION_USAGE}", 1, 1, options=LOCATION_OPTIONS, writes=True)
_ALTER: Final = syntax(
    "alter-shard NAME [--endpoint E | --instance I] [--workspace W] [--rename NEW]"
    " [--expect VERSION]",
    1,
    1,
    options=("endpoint", "instance", "workspace", "rename", "expect"),
    writes=True,
)
VERBS: Final[Mapping[str, Verb]] = {
    "alter-shard": Verb(_ALTER, _alter_shard, _judge_alter),
    "add-shard": Verb(_ADD, _add_shard, judge_location),
    "remove-shard": Verb(
        syntax("remove-shard NAME", 1, 1, writes=True),
        _remove_shard,
        lambda arguments: shard_name(arguments.words[0]),
    ),
    "sessions": Verb(
        syntax("sessions [RANGE] [--shard NAME]", 0, 2, options=("shard",)),
        _sessions,
        Arguments.shard,
    ),
}
