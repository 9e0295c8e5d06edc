"""The systems that are compared: a direct connection, PgBouncer, the proxy, HAProxy.

A system is what a client connects to, and the processes between it and PostgreSQL. `launch.py`
starts them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

from psycopg.conninfo import make_conninfo

from bench.postgres import ServerAddress
from bench.process_usage import CPUTime, cpu_time

DIRECT: Final = "direct"
PGBOUNCER: Final = "pgbouncer"
PROXY: Final = "proxy"
POOLED: Final = "pooled"  # the proxy with `pool = "session"`
BASE: Final = "base"  # the proxy of another checkout
# The floor: it forwards the client's own TLS, so its CPU time is that of two sockets alone.
HAPROXY: Final = "haproxy"


@dataclass(frozen=True, slots=True)
class System:
    """One system; `pids` are its processes, the parent first. A direct connection has none."""

    name: str
    parameters: dict[str, str]
    pids: tuple[int, ...] = ()

    @property
    def conninfo(self) -> bytes:
        """The parameters as a connection string."""
        return make_conninfo(**self.parameters).encode()

    @property
    def environment(self) -> dict[str, str]:
        """The parameters as environment variables, for psql and pgbench."""
        renamed = {"dbname": "DATABASE"}
        pairs = self.parameters.items()
        return {f"PG{renamed.get(name, name.upper())}": value for name, value in pairs}

    def cpu_time(self) -> CPUTime | None:
        """Return what its processes have used; None if it has none."""
        return reduce(add, (cpu_time(pid) for pid in self.pids)) if self.pids else None


StartSystem = Callable[[], AbstractContextManager[System]]


def direct(address: ServerAddress) -> System:
    """Return the system without a proxy: the client's own TLS connection."""
    return System(DIRECT, address.libpq_parameters)
