"""The SQL that gives a Databricks identity a role on a branch, and what an application needs there.

For: a person who pastes it as the owner of the database. Nothing here runs it.
"""

from typing import Final

from proxy.errors import identity_kind

SCHEMA_GRANTS: Final = ("USAGE", "CREATE")
TABLE_GRANTS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")


def role_statements(role: str, database: str) -> list[str]:
    """Return the statements: the role, then its grants on the database and on schema public."""
    name, kind = _identifier(role), identity_kind(role)
    defaults = "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT"
    return [
        "CREATE EXTENSION IF NOT EXISTS databricks_auth;",
        f"SELECT databricks_create_role({_literal(role)}, '{kind}');",
        f"GRANT CONNECT ON DATABASE {_identifier(database)} TO {name};",
        grant_on_schema(role),
        grant_on_tables(role),
        f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {name};",
        f"{defaults} {', '.join(TABLE_GRANTS)} ON TABLES TO {name};",
        f"{defaults} USAGE, SELECT ON SEQUENCES TO {name};",
    ]


def grant_on_schema(role: str) -> str:
    """Return the statement for schema public."""
    return f"GRANT {', '.join(SCHEMA_GRANTS)} ON SCHEMA public TO {_identifier(role)};"


def grant_on_tables(role: str) -> str:
    """Return the statement for the tables that schema public has now."""
    tables = "ALL TABLES IN SCHEMA public"
    return f"GRANT {', '.join(TABLE_GRANTS)} ON {tables} TO {_identifier(role)};"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
