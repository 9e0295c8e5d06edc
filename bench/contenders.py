"""The ways to the same PostgreSQL: direct, through PgBouncer, through the proxy.

The proxy is the real command in a process of its own; it logs in to a stand-in workspace and
mints its tokens there. PgBouncer is what a user would put in its place: session mode, TLS to the
server, no authentication of clients.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from psycopg import pq
from psycopg.conninfo import make_conninfo

from bench.children import LOOPBACK, Child, child, free_port, private_directory, unprivileged
from bench.postgres import CONNECT_SECONDS_MAX, HOST, Postgres
from bench.workspace import ENDPOINT
from proxy.standin.cluster import CLIENT_ID, DATABASE
from proxy.standin.lakebase import CLIENT_SECRET

DIRECT: Final = "direct"
PGBOUNCER: Final = "pgbouncer"
PROXY: Final = "proxy"

SESSIONS_MAX: Final = 1100  # 1,000 idle ones and some to look at them

_PGBOUNCER_INI: Final = """\
[databases]
* = host={address} port={upstream_port} user={user}
[pgbouncer]
listen_addr = {address}
listen_port = {port}
unix_socket_dir =
pool_mode = session
auth_type = any
server_tls_sslmode = require
max_client_conn = {sessions_max}
default_pool_size = {sessions_max}
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to Postgres; `pid` is the process in between, if there is one."""

    name: str
    parameters: dict[str, str]
    pid: int | None = None

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


Start = Callable[[], AbstractContextManager[Contender]]


def direct(upstream: Postgres) -> Contender:
    """Return the limit: the client's own TLS connection."""
    return Contender(DIRECT, upstream.direct)


@contextmanager
def proxy(upstream: Postgres, directory: Path, workspace_url: str) -> Iterator[Contender]:
    """Run the proxy while the block runs, with its defaults but for names, ports and places."""
    settings = {
        "LISTEN__PORT": "0",
        "LISTEN__MAX_CONNECTIONS": str(SESSIONS_MAX),
        "ADMIN__PORT": "0",
        "WORKSPACE__HOST": workspace_url,
        "WORKSPACE__CLIENT_ID": CLIENT_ID,
        "WORKSPACE__CLIENT_SECRET": CLIENT_SECRET,
        "WORKSPACE__AUTH_TYPE": "oauth-m2m",
        "UPSTREAM__ENDPOINT": ENDPOINT,
        "UPSTREAM__HOST": HOST,
        "UPSTREAM__HOSTADDR": LOOPBACK,
        "UPSTREAM__PORT": str(upstream.port),
        "UPSTREAM__SSL_ROOT_CERT": str(upstream.ca_file),
        "SHUTDOWN__DRAIN_SECONDS": "0",
        "LOG__FORMAT": "json",
    }
    environment = {f"LAKEBASE_PROXY_{name}": value for name, value in settings.items()}
    # Nothing of a person's own account, and no HTTP proxy on the way to the stand-in.
    environment |= {"DATABRICKS_CONFIG_FILE": os.devnull, "NO_PROXY": LOOPBACK}
    command = [sys.executable, "-m", "proxy", "run"]
    with child(command, _log(directory, "proxy"), environment=environment) as started:
        started.wait_until(lambda: _serving_port(started) is not None)
        yield Contender(PROXY, _plain(_serving_port(started)), started.pid)


@contextmanager
def pgbouncer(upstream: Postgres, directory: Path, program: str) -> Iterator[Contender]:
    """Run PgBouncer while the block runs."""
    account, port = unprivileged(), free_port()
    log = _log(directory, "pgbouncer")
    home = private_directory(log.with_suffix(""), account)
    configuration = home / "pgbouncer.ini"
    configuration.write_text(
        _PGBOUNCER_INI.format(
            address=LOOPBACK,
            upstream_port=upstream.port,
            user=CLIENT_ID,
            port=port,
            sessions_max=SESSIONS_MAX,
        )
    )
    contender = _plain(port)
    with child([program, configuration], log, account=account) as started:
        target = make_conninfo(**contender).encode()
        started.wait_until(lambda: pq.PGconn.ping(target) == pq.Ping.OK)
        yield Contender(PGBOUNCER, contender, started.pid)


def find_pgbouncer() -> str | None:
    """Return PgBouncer's program, which the distribution keeps from the path of ordinary users."""
    return shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")


def _plain(port: int | None) -> dict[str, str]:
    """Return libpq parameters for a local connection, as an application behind a sidecar has."""
    return {
        "host": LOOPBACK,
        "port": str(port),
        "user": "application",
        "dbname": DATABASE,
        "sslmode": "disable",
        "gssencmode": "disable",
        "connect_timeout": CONNECT_SECONDS_MAX,
    }


def _serving_port(started: Child) -> int | None:
    """Return the port that the proxy says it listens on, once it has said so."""
    for line in started.log.read_text().splitlines():
        if '"serving"' in line:
            port: int = json.loads(line)["port"]
            return port
    return None


def _log(directory: Path, name: str) -> Path:
    """Return the first log file of this name that is not taken: programs are started anew."""
    number = 1
    while (path := directory / f"{name}-{number}.log").exists():
        number += 1
    return path
