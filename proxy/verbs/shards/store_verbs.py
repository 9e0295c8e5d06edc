"""`shards init`, `upgrade`, `grant`, `revoke`: the schemas, and who may use them."""

from collections.abc import Mapping
from typing import Final

from proxy.catalogue import store
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.role_operations import GrantSession, RevokeSession
from proxy.catalogue.schema import (
    CATALOGUE,
    CURRENT,
    StoreVersion,
    catalogue_version,
    check_may_create,
    check_readable,
    migrate_catalogue,
    migrate_shard,
    shard_version,
)
from proxy.catalogue.shard_store import (
    check_role,
    missing_rights,
    reader_statements,
    session_statements,
)
from proxy.catalogue.transactions import transaction
from proxy.verbs.shards.arguments import Arguments, one_of, syntax
from proxy.verbs.shards.operating import run
from proxy.verbs.shards.output import table
from proxy.verbs.shards.verb import Call, Verb, chosen_map
from proxy.verbs.syntax import UsageError

_READER, _SESSION = "reader", "session"
# PostgreSQL truncates longer names.
_ROLE_BYTES_MAX: Final = 63


# -- init, upgrade -------------------------------------------------------------------------------


async def _init(call: Call) -> None:
    call.output.progress("installing the catalogue's schema")
    async with call.administration.catalogue() as connection:
        before = await catalogue_version(connection)
        if before is not None:
            check_readable(before)
            if call.arguments.dry_run:
                call.output.plan([])
            else:
                facts = {"created": False, "store": str(before)}
                call.output.answer(facts, [f"the catalogue is there, in version {before}"])
            return
        await _check_no_shard(connection)
        if call.arguments.dry_run:
            await check_may_create(connection, CATALOGUE)
            call.output.plan([f"install the schema shardmap, version {CURRENT}"])
            return
        created = await migrate_catalogue(connection) is None  # another one may have been faster
    facts = {"created": created, "store": str(CURRENT)}
    call.output.answer(facts, [f"installed the catalogue, version {CURRENT}"])


async def _check_no_shard(connection: Connection) -> None:
    query = "select pg_catalog.to_regnamespace('shardmap_local') is not null"
    if await connection.fetchval(query):
        text = "the database is a shard, and may not be a catalogue as well"
        hint = "Another database of the same server may."
        raise CatalogueError(Reason.CATALOGUE_IS_SHARD, text, hint)


def _judge_upgrade(arguments: Arguments) -> None:
    if arguments.shard() is not None and "all" in arguments.switches:
        raise UsageError("--shard and --all exclude each other")


def _upgrades_shards(arguments: Arguments) -> bool:
    return arguments.get("shard") is not None or "all" in arguments.switches


async def _upgrade(call: Call) -> None:
    plan = []
    call.output.progress("migrating the catalogue")
    async with call.administration.catalogue() as connection:
        before = await catalogue_version(connection)
        check_readable(before)
        if before is not None and before < CURRENT:
            plan.append(f"migrate {CATALOGUE} from {before} to {CURRENT}")
            if not call.arguments.dry_run:
                await migrate_catalogue(connection)
        shards = await _shards_to_upgrade(call, connection)
    upgraded = []
    for shard in shards:
        call.output.progress(f"migrating shard {shard.name}")
        found = await _upgrade_shard(call, shard)
        if found != CURRENT:
            plan.append(f"migrate shard {shard.name} from {found} to {CURRENT}")
        upgraded.append((shard.name, str(found), str(max(found, CURRENT))))
    if call.arguments.dry_run:
        call.output.plan(plan)
        return
    version = str(max(before or CURRENT, CURRENT))
    rows = [dict(zip(("shard", "from", "to"), row, strict=True)) for row in upgraded]
    lines = [f"{CATALOGUE} is in version {version}", *table(("shard", "from", "to"), upgraded)]
    call.output.answer({"store": version, "shards": rows}, lines)


async def _shards_to_upgrade(call: Call, connection: Connection) -> list[Shard]:
    if not _upgrades_shards(call.arguments):
        return []
    one = await store.read_map(connection, chosen_map(call.arguments, call.settings))
    if (name := call.arguments.shard()) is not None:
        return [await store.read_shard(connection, one, name)]
    return await store.read_shards(connection, one.map_id)


async def _upgrade_shard(call: Call, shard: Shard) -> StoreVersion:
    """Migrate a shard, unless it is a dry run. Return its version before. Raises CatalogueError."""
    where = f"shard {shard.name}"
    async with call.administration.shard(shard) as connection:
        found = await shard_version(connection)
        check_readable(found, where)
        assert found is not None, "it is readable"
        if found < CURRENT and not call.arguments.dry_run:
            await migrate_shard(connection, where)
        return found


# -- grant, revoke -------------------------------------------------------------------------------


def _judge_grant(arguments: Arguments) -> None:
    what, role = arguments.words
    one_of("what is granted", what, (_READER, _SESSION))
    if not role or "\0" in role or len(role.encode()) > _ROLE_BYTES_MAX:
        raise UsageError(f"a role's name has 1 to {_ROLE_BYTES_MAX} bytes")


def _is_of_map(arguments: Arguments) -> bool:
    return arguments.words[:1] == (_SESSION,)


async def _grant(call: Call) -> None:
    await _change_rights(call, revoke=False)


async def _revoke(call: Call) -> None:
    await _change_rights(call, revoke=True)


async def _change_rights(call: Call, *, revoke: bool) -> None:
    what, role = call.arguments.words
    if what == _SESSION:
        await _change_sessions(call, role, revoke=revoke)
        return
    statements = reader_statements(role, revoke=revoke)
    if "sql" in call.arguments.switches:
        call.output.answer({"statements": statements}, [f"{one};" for one in statements])
        return
    call.output.progress(f"changing the rights of {role}")
    async with call.administration.catalogue() as connection:
        await store.check_store(connection, writes=True)
        await check_role(connection, role, CATALOGUE)
        if call.arguments.dry_run:
            call.output.plan([f"in {CATALOGUE}: {one}" for one in statements])
            return
        async with transaction(connection):
            for statement in statements:
                await connection.execute(statement)
    done = f"{role} may {'no longer read' if revoke else 'read'} the catalogue"
    call.output.answer({"statements": statements}, [done])


async def _change_sessions(call: Call, role: str, *, revoke: bool) -> None:
    """Change whether a login is admitted, in every shard of the map or in none."""
    kind = RevokeSession if revoke else GrantSession
    statements = session_statements(role, revoke=revoke)
    if "sql" in call.arguments.switches:
        statements += [] if revoke else await _missing_rights(call, role)
        lines = [one if one.startswith("--") else f"{one};" for one in statements]
        call.output.answer({"statements": statements}, lines)
        return

    async def make(_: Connection, owner: CatalogueMap) -> GrantSession | RevokeSession:
        return kind(owner, role)

    done = await run(call, make)
    if done is not None:
        names = ", ".join(shard.name for shard in done.operation.shards) or "no shard yet"
        said = f"{role} is {'no longer ' if revoke else ''}admitted by the map {done.map.name}"
        call.output.answer({"statements": statements}, [f"{said}: {names}"])


async def _missing_rights(call: Call, role: str) -> list[str]:
    """Return what grants the administrator the rights over a login's sessions, shard by shard."""
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection)
        shards = await store.read_shards(connection, owner.map_id)
    statements = []
    for shard in shards:
        call.output.progress(f"asking shard {shard.name}")
        async with call.administration.shard(shard) as connection:
            missing = await missing_rights(connection, role)
        for right in missing:
            statements += [f"-- in shard {shard.name}, to {right.what}:", *right.statements]
    return statements


_GRANTED: Final = f"{_READER} ROLE | {_SESSION} ROLE [--sql]"
VERBS: Final[Mapping[str, Verb]] = {
    "init": Verb(syntax("init", writes=True), _init, of_a_map=lambda _: False),
    "upgrade": Verb(
        syntax(
            "upgrade [--shard NAME | --all]", options=("shard",), switches=("all",), writes=True
        ),
        _upgrade,
        _judge_upgrade,
        of_a_map=_upgrades_shards,
    ),
    "grant": Verb(
        syntax(f"grant {_GRANTED}", 2, 2, switches=("sql",), writes=True),
        _grant,
        _judge_grant,
        of_a_map=_is_of_map,
    ),
    "revoke": Verb(
        syntax(f"revoke {_GRANTED}", 2, 2, switches=("sql",), writes=True),
        _revoke,
        _judge_grant,
        of_a_map=_is_of_map,
    ),
}
