"""The same application with the sidecar: nothing in it is about tokens.

With an argument it connects to the database of the tenant that has this shard key.
"""

import os
import sys

from psycopg_pool import ConnectionPool

database = "@".join([os.environ["PGDATABASE"], *sys.argv[1:]])
# TLS ends at the sidecar, which is on loopback. The rest comes from PGHOST, PGPORT and PGUSER.
where = {"dbname": database, "sslmode": "disable"}
with (
    ConnectionPool(kwargs=where, min_size=1, max_size=10, open=True) as pool,
    pool.connection() as connection,
):
    print(*connection.execute("SELECT current_user, current_database()").fetchone())
