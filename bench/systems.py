"""The ways to the same PostgreSQL: direct, through PgBouncer, through the proxy, through HAProxy.

A contender is what a client connects to and the processes in between; `starting.py` runs them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

from psycopg.conninfo import make_conninfo

from bench.accounting import CPU, cpu
from bench.postgres import Place

DIRECT: Final = "direct"
PGBOUNCER: Final = "pgbouncer"
PROXY: Final = "proxy"
BASE: Final = "base"  # the proxy of another checkout
# The floor: it passes the client's own TLS on, so that its CPU is that of two sockets alone.
HAPROXY: Final = "haproxy"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to Postgres; `pids` are the processes in between, the first is their parent."""

    name: str
    parameters: dict[str, str]
    pids: tuple[int, ...] = ()

    @property
    def conninfo(self) -> bytes:
        """The parameters as libpq reads them."""
        return make_conninfo(**self.parameters).encode()

    @property
    def environment(self) -> dict[str, str]:
        """The parameters as psql and pgbench take them."""
        renamed = {"dbname": "DATABASE"}
        pairs = self.parameters.items()
        return {f"PG{renamed.get(name, name.upper())}": value for name, value in pairs}

    def cpu(self) -> CPU | None:
        """Return what the processes in between have spent; None if there is none."""
        return reduce(add, (cpu(pid) for pid in self.pids)) if self.pids else None


Start = Callable[[], AbstractContextManager[Contender]]


def direct(place: Place) -> Contender:
    """Return the limit: the client's own TLS connection."""
    return Contender(DIRECT, place.direct)
