"""An application that gets its own tokens: one for each connection that its pool opens."""

import os

import psycopg
from databricks.sdk import WorkspaceClient
from psycopg_pool import ConnectionPool

# Reads DATABRICKS_HOST, DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET.
workspace = WorkspaceClient()
LIFETIME_SECONDS = 45 * 60  # shorter than a token's hour


class TokenConnection(psycopg.Connection):
    """A connection whose password is a new token."""

    @classmethod
    def connect(cls, conninfo="", **parameters):
        endpoint = os.environ["ENDPOINT_NAME"]
        credential = workspace.postgres.generate_database_credential(endpoint=endpoint)
        return super().connect(conninfo, password=credential.token, **parameters)


# Host, port, database, user, and how TLS is verified come from PGHOST, PGPORT, PGDATABASE, PGUSER,
# PGSSLMODE and PGSSLROOTCERT.
with (
    ConnectionPool(
        "",
        connection_class=TokenConnection,
        min_size=1,
        max_size=10,
        max_lifetime=LIFETIME_SECONDS,
        open=True,
    ) as pool,
    pool.connection() as connection,
):
    print(*connection.execute("SELECT current_user, current_database()").fetchone())
