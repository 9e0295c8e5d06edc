"""SQLAlchemy's pool alone, for drivers that have none: what broke in use is thrown away."""

import commands
from sqlalchemy.pool import QueuePool


class Pool:
    """Twenty connections; `one(connection, sql, parameters)` is the driver's way to ask."""

    def __init__(self, open_one, one):
        self._pool = QueuePool(open_one, pool_size=commands.POOL, max_overflow=0)
        self._one = one

    def asked(self, sql, parameters=(), meet=lambda: None):
        """Return the value of a row, from a connection that is kept until `meet` returns."""
        connection = self._pool.connect()
        try:
            (value,) = self._one(connection, sql, parameters)
            meet()
            return value
        except Exception:
            connection.invalidate()
            raise
        finally:
            connection.close()  # which gives it back

    def hold(self, meet):
        """Return the number of a backend."""
        return self.asked(commands.PID, meet=meet)

    def close(self):
        """Close all connections."""
        self._pool.dispose()
