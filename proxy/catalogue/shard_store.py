"""Reading what a shard knows of itself, and the rights that its administrator needs.

For: identity, local mappings, live sessions, and the statements that grant what is missing. Not
for: fencing and ending sessions (`fence`), or writing local rows (`operations`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import Connection, Status

_SESSIONS: Final = """
select s.pid, s.mapping_id, s.epoch, s.proxy, s.backend_start, m.lo, m.hi
from shardmap_local.live_session s
left join shardmap_local.mapping m on m.mapping_id = s.mapping_id
where m.map_id = $1 or s.mapping_id is null
order by m.lo nulls first, s.backend_start, s.pid"""

_FIND: Final = """
select mapping_id, lo, hi, status, epoch from (
  select * from shardmap_local.mapping where map_id = $1 and lo <= $2 order by lo desc limit 1
) m where hi is null or hi > $2"""

# The function that ends a session of the login with the oid {0}: PostgreSQL's own where the
# administrator may signal it, or the one that the login has left for it. Null: neither.
WAY_TO_END: Final = """
case when pg_catalog.pg_has_role(current_user, 'pg_signal_backend', 'usage')
       or pg_catalog.pg_has_role(current_user, {0}, 'usage')
     then 'pg_catalog.pg_terminate_backend'
     when pg_catalog.has_function_privilege(pg_catalog.to_regprocedure(
       pg_catalog.format('shardmap_local.end_session_%s(int)', {0})), 'execute')
     then pg_catalog.format('shardmap_local.end_session_%s', {0})
end"""
# What may see when a session of $1 began, and what may end it. A superuser has every role.
_RIGHTS: Final = f"""
select r.oid, pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'usage')
    or pg_catalog.pg_has_role(current_user, r.oid, 'usage') as sees,
  {WAY_TO_END.format("r.oid")} is not null as ends
from pg_catalog.pg_roles r where r.rolname = $1"""  # noqa: S608 - constants


# Of a role that exists.
_MAY_BE_ADMITTED: Final = """
select pg_catalog.has_schema_privilege($1, 'shardmap_local', 'usage')
  and pg_catalog.has_function_privilege(
    $1, pg_catalog.to_regproc('shardmap_local.admit'), 'execute')
"""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which shard of which map a database says it is."""

    map_id: UUID
    map_name: str
    shard_id: UUID
    location: str
    status: Status


@dataclass(frozen=True, slots=True)
class LocalMapping:
    """A mapping as its shard has it: the shard's row decides whether a session may start."""

    mapping_id: UUID
    lo: bytes
    hi: bytes | None
    status: Status
    epoch: int


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A session that is registered and alive. Without a mapping it is one for the whole shard."""

    pid: int
    mapping_id: UUID | None
    lo: bytes | None
    hi: bytes | None
    epoch: int | None
    proxy: str
    since: datetime


async def read_identities(connection: Connection) -> list[Identity]:
    """Return the maps that this database is a shard of."""
    rows = await connection.fetch(
        "select map_id, map_name, shard_id, location, status from shardmap_local.identity"
    )
    return [
        Identity(
            row["map_id"], row["map_name"], row["shard_id"], row["location"], Status(row["status"])
        )
        for row in rows
    ]


async def find_local_mapping(
    connection: Connection, map_id: UUID, routing_key: bytes
) -> LocalMapping | None:
    """Return the shard's own mapping that covers a key."""
    row = await connection.fetchrow(_FIND, map_id, routing_key)
    if row is None:
        return None
    return LocalMapping(
        row["mapping_id"], row["lo"], row["hi"], Status(row["status"]), row["epoch"]
    )


async def read_sessions(connection: Connection, map_id: UUID) -> list[LiveSession]:
    """Return the live sessions of a map's mappings, and those for the whole shard."""
    rows = await connection.fetch(_SESSIONS, map_id)
    return [
        LiveSession(
            row["pid"],
            row["mapping_id"],
            row["lo"],
            row["hi"],
            row["epoch"],
            row["proxy"],
            row["backend_start"],
        )
        for row in rows
    ]


# -- rights --------------------------------------------------------------------------------------


def quoted(name: str) -> str:
    """Return an identifier as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def reader_statements(role: str, *, revoke: bool = False) -> list[str]:
    """Return what grants the reading of the catalogue to a login, or revokes it."""
    verb, word = ("revoke", "from") if revoke else ("grant", "to")
    tables = ", ".join(
        f"shardmap.{name}" for name in ("store_version", "shard_map", "shard", "mapping")
    )
    return [
        f"{verb} usage on schema shardmap {word} {quoted(role)}",
        f"{verb} select on {tables} {word} {quoted(role)}",
    ]


def session_statements(role: str, *, revoke: bool = False) -> list[str]:
    """Return what lets a login be admitted in a shard, or no longer."""
    verb, word = ("revoke", "from") if revoke else ("grant", "to")
    return [
        f"{verb} usage on schema shardmap_local {word} {quoted(role)}",
        f"{verb} execute on function shardmap_local.admit {word} {quoted(role)}",
    ]


def end_session_statements(role: str, oid: int, admin: str) -> list[str]:
    """Return what a login runs itself, so that the administrator may end its sessions.

    PostgreSQL lets a login end its own sessions, and no others.
    """
    name = f"shardmap_local.end_session_{oid}(int)"
    create = (
        f"create function shardmap_local.end_session_{oid}(int) returns boolean"
        " language sql security definer set search_path = pg_catalog, pg_temp"
        " as 'select pg_catalog.pg_terminate_backend($1)'"
    )
    return [
        f"grant usage, create on schema shardmap_local to {quoted(role)}",
        f"-- the next three as {quoted(role)}:",
        create,
        f"revoke all on function {name} from public",
        f"grant execute on function {name} to {quoted(admin)}",
        f"-- and again as {quoted(admin)}:",
        f"revoke create on schema shardmap_local from {quoted(role)}",
    ]


@dataclass(frozen=True, slots=True)
class MissingRight:
    """A right over a login's sessions that the administrator lacks, and what would grant it."""

    what: str
    statements: tuple[str, ...]


async def role_exists(connection: Connection, role: str) -> bool:
    """Return whether the server has this role."""
    query = "select exists (select from pg_catalog.pg_roles where rolname = $1)"
    return bool(await connection.fetchval(query, role))


async def check_role(connection: Connection, role: str, where: str) -> None:
    """Check that a login exists. Raises CatalogueError: RIGHTS_MISSING, with the way to make it."""
    if not await role_exists(connection, role):
        text = f"{where} has no role {role}"
        hint = (
            f"create role {quoted(role)} login; for a Databricks identity: databricks_create_role"
        )
        raise CatalogueError(Reason.RIGHTS_MISSING, text, hint)


async def missing_rights(connection: Connection, role: str) -> list[MissingRight]:
    """Return which rights over a login's sessions the administrator lacks in this shard."""
    row = await connection.fetchrow(_RIGHTS, role)
    if row is None:
        return []
    admin: str = await connection.fetchval("select current_user::text")
    missing = []
    if not row["sees"]:
        grant = f"grant pg_read_all_stats to {quoted(admin)}"
        member = f"-- or: grant {quoted(role)} to {quoted(admin)}"
        missing.append(MissingRight("see the start of its sessions", (grant, member)))
    if not row["ends"]:
        own = end_session_statements(role, row["oid"], admin)
        grant = f"grant pg_signal_backend to {quoted(admin)}"
        missing.append(MissingRight("end its sessions", (grant, "-- or:", *own)))
    return missing


async def check_grants(connection: Connection, roles: Sequence[str], where: str) -> None:
    """Check that these logins may be admitted. Raises CatalogueError: RIGHTS_MISSING."""
    for role in roles:
        if not await connection.fetchval(_MAY_BE_ADMITTED, role):
            text = f"{where}: {role} may not be admitted there"
            raise CatalogueError(Reason.RIGHTS_MISSING, text, ";\n".join(session_statements(role)))


async def check_rights(connection: Connection, roles: Sequence[str], where: str) -> None:
    """Check that the administrator may see and end the sessions of these logins.

    Raises CatalogueError (RIGHTS_MISSING), with the SQL that grants what is missing.
    """
    for role in roles:
        await check_role(connection, role, where)
        for right in await missing_rights(connection, role):
            text = f"{where}: the administrator may not {right.what}, those of {role}"
            raise CatalogueError(Reason.RIGHTS_MISSING, text, ";\n".join(right.statements))
