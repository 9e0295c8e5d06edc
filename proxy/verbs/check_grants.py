"""What a role lacks on schema `public`, with the SQL that grants it.

For: a note of `check`. It is no failure: a role may have a schema of its own, or only read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from proxy.verbs.role_sql import SCHEMA_GRANTS, TABLE_GRANTS, grant_on_schema, grant_on_tables

TABLES_SHOWN_MAX: Final = 3
# A database with a hundred thousand tables takes a second.
GRANTS_SECONDS_MAX: Final = 10.0

# Who may use a partitioned table needs no grant on its partitions, and the tables of an extension
# are its own. What is dropped meanwhile has no privileges: NULL.
_QUERY: Final = f"""
SELECT
  ARRAY(
    SELECT wanted FROM pg_catalog.unnest($1::text[]) wanted
    WHERE NOT pg_catalog.has_schema_privilege(n.oid, wanted)
  ),
  pg_catalog.count(c.oid),
  (pg_catalog.array_agg(c.relname::text ORDER BY c.relname))[:{TABLES_SHOWN_MAX}]
FROM pg_catalog.pg_namespace n
LEFT JOIN pg_catalog.pg_class c
  ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend d
    WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
  )
  AND EXISTS (
    SELECT FROM pg_catalog.unnest($2::text[]) wanted
    WHERE NOT pg_catalog.has_table_privilege(c.oid, wanted)
  )
WHERE n.nspname = 'public'
GROUP BY n.oid
"""  # noqa: S608 - a constant


@dataclass(frozen=True, slots=True)
class Missing:
    """What a role lacks: privileges on the schema, and tables that it may not read or write."""

    role: str
    privileges: Sequence[str]
    tables: int
    first_tables: Sequence[str]

    def note(self) -> str:
        """Return a line on what is missing, and the statements that grant it; empty if nothing."""
        lacks, grants = [], []
        if self.privileges:
            lacks.append(f"lacks {' and '.join(self.privileges)} on schema public")
            grants.append(grant_on_schema(self.role))
        if self.tables:
            names = ", ".join(map(_shown, self.first_tables))
            names += ", ..." if self.tables > len(self.first_tables) else ""
            tables = "1 table" if self.tables == 1 else f"{self.tables} tables"
            lacks.append(f"may not read or write {tables} there ({names})")
            grants.append(grant_on_tables(self.role))
        if not lacks:
            return ""
        first = f"the role {' and '.join(lacks)}; if it needs to, the owner runs:"
        return "\n".join([first, *grants])


async def missing_grants(connection: Any, role: str) -> Missing:
    """Return what the role of a connection of asyncpg lacks. Raises what asyncpg does."""
    wanted = (list(SCHEMA_GRANTS), list(TABLE_GRANTS))
    row = await connection.fetchrow(_QUERY, *wanted, timeout=GRANTS_SECONDS_MAX)
    if row is None:  # the database has no schema public
        return Missing(role, (), 0, ())
    privileges, tables, first_tables = row
    return Missing(role, privileges, tables, first_tables if tables else ())


def _shown(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)
