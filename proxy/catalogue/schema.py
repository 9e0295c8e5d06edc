"""The two schemas: installing them, migrating them, and which versions this proxy works with.

For: `shardmap` in the catalogue and `shardmap_local` in a shard. Not for: their rows (`store`,
`shard_store`).

A migration is a file `schema/SIDE_N.sql`, applied in a transaction of its own in the order of N.
Its number gives the version that it brings. Any store of our major version can be read; to write to
one, its minor version must be ours or later.
"""

from dataclasses import dataclass
from importlib.resources import files
from typing import Final, NamedTuple

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import STORE_MAJOR, STORE_MINOR, Connection
from proxy.catalogue.transactions import transaction

# Two administrators who install at the same moment wait for each other. Any number will do.
_INSTALL_LOCK: Final = 0x5AD_3A9

CATALOGUE: Final = "the catalogue"


class StoreVersion(NamedTuple):
    """The version of an installed schema."""

    major: int
    minor: int

    def __str__(self) -> str:
        """Return the version as people read it, as in 1.0."""
        return f"{self.major}.{self.minor}"


CURRENT: Final = StoreVersion(STORE_MAJOR, STORE_MINOR)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file, and the version of the schema after it."""

    file: str
    version: StoreVersion

    def sql(self) -> str:
        """Return the statements."""
        return files(__package__).joinpath("schema", self.file).read_text(encoding="utf-8")


# In order. A file that has been released never changes.
_CATALOGUE_MIGRATIONS: Final = (Migration("catalogue_1.sql", StoreVersion(1, 0)),)
_SHARD_MIGRATIONS: Final = (Migration("shard_1.sql", StoreVersion(1, 0)),)


# -- versions ------------------------------------------------------------------------------------


async def catalogue_version(connection: Connection) -> StoreVersion | None:
    """Return the version of the catalogue's schema; None if it is not installed."""
    if not await _exists(connection, "shardmap.store_version"):
        return None
    row = await connection.fetchrow("select major, minor from shardmap.store_version")
    return None if row is None else StoreVersion(*row)


async def shard_version(connection: Connection) -> StoreVersion | None:
    """Return the version of the shard's schema; None if it is not installed, or has no map.

    Each map's row has it. They differ only for as long as a migration has not committed.
    """
    if not await _exists(connection, "shardmap_local.identity"):
        return None
    row = await connection.fetchrow(
        "select store_major, store_minor from shardmap_local.identity"
        " order by store_major, store_minor limit 1"
    )
    return None if row is None else StoreVersion(*row)


def check_readable(version: StoreVersion | None, where: str = CATALOGUE) -> None:
    """Raise CatalogueError (STORE_MISSING, STORE_VERSION) for a schema that cannot be read."""
    if version is None:
        command = "init" if where == CATALOGUE else "add-shard"
        raise CatalogueError(
            Reason.STORE_MISSING,
            f"{where} has no shard map's schema",
            f"Is it the right database? lakebase-auth-proxy shards {command} installs it.",
        )
    if version.major > CURRENT.major:
        raise _wrong_version(version, where, "Upgrade lakebase-auth-proxy.")
    if version.major < CURRENT.major:
        raise _wrong_version(version, where, _UPGRADE_STORE)


def check_writable(version: StoreVersion | None, where: str = CATALOGUE) -> None:
    """Raise CatalogueError as `check_readable`, and for a schema that is older than we write."""
    check_readable(version, where)
    if version is not None and version < CURRENT:
        raise _wrong_version(version, where, _UPGRADE_STORE)


_UPGRADE_STORE: Final = "Upgrade the schema: lakebase-auth-proxy shards upgrade --all."


def _wrong_version(version: StoreVersion, where: str, hint: str) -> CatalogueError:
    text = f"{where} has the schema of version {version}, and this program's is {CURRENT}"
    return CatalogueError(Reason.STORE_VERSION, text, hint)


# -- installing ----------------------------------------------------------------------------------


async def migrate_catalogue(connection: Connection) -> StoreVersion | None:
    """Install the catalogue's schema, or migrate it. Return the version before, None if none.

    Raises CatalogueError for a schema of a later major version or that is not ours.
    """
    async with transaction(connection):
        await connection.execute("select pg_advisory_xact_lock($1)", _INSTALL_LOCK)
        before = await catalogue_version(connection)
        if before is None:
            await _check_name_is_free(connection, "shardmap")
            await check_may_create(connection, CATALOGUE)
        else:
            _check_not_later(before, CATALOGUE)
        for migration in _missing(_CATALOGUE_MIGRATIONS, before):
            await connection.execute(migration.sql())
            await connection.execute(
                "update shardmap.store_version set major = $1, minor = $2", *migration.version
            )
    return before


async def migrate_shard(connection: Connection, where: str) -> StoreVersion | None:
    """Install a shard's schema, or migrate it. Return the version before; None: it had no map.

    `where` names the shard. Raises CatalogueError as `migrate_catalogue`.
    """
    async with transaction(connection):
        await connection.execute("select pg_advisory_xact_lock($1)", _INSTALL_LOCK)
        before = await shard_version(connection)
        if before is not None:
            _check_not_later(before, where)
        elif not await _exists(connection, "shardmap_local.identity"):
            await _check_name_is_free(connection, "shardmap_local")
            await check_may_create(connection, where)
        for migration in _missing(_SHARD_MIGRATIONS, before):
            await connection.execute(migration.sql())
            await connection.execute(
                "update shardmap_local.identity set store_major = $1, store_minor = $2",
                *migration.version,
            )
    return before


def _missing(
    migrations: tuple[Migration, ...], before: StoreVersion | None
) -> tuple[Migration, ...]:
    return tuple(one for one in migrations if before is None or one.version > before)


def _check_not_later(version: StoreVersion, where: str) -> None:
    if version.major > CURRENT.major:
        check_readable(version, where)


async def _check_name_is_free(connection: Connection, schema: str) -> None:
    taken = await connection.fetchval("select to_regnamespace($1::text) is not null", schema)
    if taken:
        text = f"the database has a schema {schema} that this program did not install"
        raise CatalogueError(Reason.STORE_MISSING, text, "Use another database, or rename it.")


async def check_may_create(connection: Connection, where: str) -> None:
    """Check that the role may create a schema. Raises CatalogueError (RIGHTS_MISSING)."""
    row = await connection.fetchrow(
        "select pg_catalog.quote_ident(pg_catalog.current_database()) as database,"
        " pg_catalog.quote_ident(current_user) as role,"
        " pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create') as may"
    )
    if not row["may"]:
        text = f"{where}: the role {row['role']} may not create a schema"
        hint = f"grant create on database {row['database']} to {row['role']}"
        raise CatalogueError(Reason.RIGHTS_MISSING, text, hint)


async def _exists(connection: Connection, table: str) -> bool:
    return bool(
        await connection.fetchval("select pg_catalog.to_regclass($1::text) is not null", table)
    )
