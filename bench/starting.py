"""Runs the programs that stand between client and Postgres, each as its user would.

The proxy is the real command in a process of its own; it logs in to a stand-in workspace and
mints its tokens there. PgBouncer is what a user would put in its place: session mode, TLS to the
server, no authentication of clients. HAProxy passes TCP on and takes no part in TLS.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from psycopg import pq
from psycopg.conninfo import make_conninfo

from bench.accounting import descendants
from bench.children import LOOPBACK, Child, child, free_port, private_directory, unprivileged
from bench.errors import BenchError
from bench.postgres import CONNECT_SECONDS_MAX, HOST, Place
from bench.systems import BASE, HAPROXY, PGBOUNCER, PROXY, Contender
from bench.workspace import ENDPOINT
from proxy.emulator.cluster import CLIENT_ID, DATABASE
from proxy.emulator.lakebase import CLIENT_SECRET

SESSIONS_MAX: Final = 5200  # 5,000 idle ones and some to look at them

_PGBOUNCER_INI: Final = """\
[databases]
* = host={address} port={upstream_port} user={user}
[pgbouncer]
listen_addr = {address}
listen_port = {port}
unix_socket_dir =
pool_mode = session
auth_type = any
admin_users = {admin}
server_tls_sslmode = require
max_client_conn = {sessions_max}
default_pool_size = {sessions_max}
"""
_APPLICATION: Final = "application"  # the user that a client names

_HAPROXY_CFG: Final = """\
global
  nbthread 1
  maxconn {sessions_max}
defaults
  mode tcp
  timeout connect 30s
  timeout client 1h
  timeout server 1h
listen postgres
  bind {address}:{port}
  server upstream {address}:{upstream_port}
"""


@contextmanager
def proxy(
    place: Place,
    directory: Path,
    workspace_url: str,
    more: Mapping[str, str] | None = None,
    *,
    base: Path | None = None,
) -> Iterator[Contender]:
    """Run the proxy while the block runs, with its defaults but for names, ports and places.

    `more` are settings beyond these, by the name of their variable without its prefix. With `base`
    it is the proxy of that checkout, which `make setup` has installed there.
    """
    with proxy_process(place, directory, workspace_url, more, base=base) as started:
        started.wait_until(lambda: _serving_port(started) is not None)
        pids = (started.pid, *descendants(started.pid))
        yield Contender(BASE if base else PROXY, _plain(_serving_port(started)), pids)


def proxy_process(
    place: Place,
    directory: Path,
    workspace_url: str,
    more: Mapping[str, str] | None = None,
    *,
    base: Path | None = None,
) -> AbstractContextManager[Child]:
    """Run the proxy, as `proxy` does, and do not wait until it serves."""
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
        "UPSTREAM__PORT": str(place.port),
        "UPSTREAM__SSL_ROOT_CERT": str(place.ca_file),
        "SHUTDOWN__DRAIN_SECONDS": "0",
        "LOG__FORMAT": "json",
    } | dict(more or {})
    environment = {f"LAKEBASE_PROXY_{name}": value for name, value in settings.items()}
    # Nothing of a person's own account, and no HTTP proxy on the way to the stand-in.
    environment |= {"DATABRICKS_CONFIG_FILE": os.devnull, "NO_PROXY": LOOPBACK}
    program = [sys.executable, "-m", "proxy"] if base is None else [installed_in(base)]
    return child([*program, "run"], _log(directory, "proxy"), environment=environment)


def installed_in(checkout: Path) -> Path:
    """Return the proxy that `make setup` has installed in a checkout."""
    return checkout.absolute() / ".venv/bin/lakebase-auth-proxy"


@contextmanager
def pgbouncer(place: Place, directory: Path, program: str) -> Iterator[Contender]:
    """Run PgBouncer while the block runs."""
    account, port = unprivileged(), free_port()
    log = _log(directory, "pgbouncer")
    home = private_directory(log.with_suffix(""), account)
    configuration = home / "pgbouncer.ini"
    configuration.write_text(
        _PGBOUNCER_INI.format(
            address=LOOPBACK,
            upstream_port=place.port,
            user=CLIENT_ID,
            port=port,
            admin=_APPLICATION,
            sessions_max=SESSIONS_MAX,
        )
    )
    contender = _plain(port)
    with child([program, configuration], log, account=account) as started:
        _wait_for(started, contender)
        yield Contender(PGBOUNCER, contender, (started.pid,))


def empty_pool(contender: Contender) -> None:
    """Have PgBouncer close the server connections that it keeps. Raises BenchError."""
    if contender.name != PGBOUNCER:
        return
    admin = pq.PGconn.connect(
        make_conninfo(**(contender.parameters | {"dbname": "pgbouncer"})).encode()
    )
    answered = admin.exec_(b"RECONNECT").status
    message = admin.error_message.decode(errors="replace")
    admin.finish()
    if answered != pq.ExecStatus.COMMAND_OK:
        raise BenchError(f"PgBouncer keeps its pool: {message}")


@contextmanager
def haproxy(place: Place, directory: Path, program: str) -> Iterator[Contender]:
    """Run HAProxy while the block runs."""
    account, port = unprivileged(), free_port()
    log = _log(directory, "haproxy")
    home = private_directory(log.with_suffix(""), account)
    configuration = home / "haproxy.cfg"
    configuration.write_text(
        _HAPROXY_CFG.format(
            address=LOOPBACK, port=port, upstream_port=place.port, sessions_max=SESSIONS_MAX
        )
    )
    contender = Place(port, place.ca_file).direct
    with child([program, "-db", "-f", configuration], log, account=account) as started:
        _wait_for(started, contender)
        yield Contender(HAPROXY, contender, (started.pid,))


def find(program: str) -> str | None:
    """Return a server's program, which the distribution keeps from the path of ordinary users."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")


def _wait_for(started: Child, parameters: dict[str, str]) -> None:
    target = make_conninfo(**parameters).encode()
    started.wait_until(lambda: pq.PGconn.ping(target) == pq.Ping.OK)


def _plain(port: int | None) -> dict[str, str]:
    """Return libpq parameters for a local connection, as an application behind a sidecar has."""
    return {
        "host": LOOPBACK,
        "port": str(port),
        "user": _APPLICATION,
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
