"""The SQL that gives a Databricks identity a role on a branch, and what an application needs there.

For: a person who pastes it as the owner of the database. Nothing here runs it.
"""

from proxy.errors import identity_kind


def role_statements(role: str, database: str) -> list[str]:
    """Return the statements: the role, then its grants on the database and on schema public."""
    name, kind = _identifier(role), identity_kind(role)
    defaults = "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT"
    return [
        "CREATE EXTENSION IF NOT EXISTS databricks_auth;",
        f"SELECT databricks_create_role({_literal(role)}, '{kind}');",
        f"GRANT CONNECT ON DATABASE {_identifier(database)} TO {name};",
        f"GRANT USAGE, CREATE ON SCHEMA public TO {name};",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name};",
        f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {name};",
        f"{defaults} SELECT, INSERT, UPDATE, DELETE ON TABLES TO {name};",
        f"{defaults} USAGE, SELECT ON SEQUENCES TO {name};",
    ]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
