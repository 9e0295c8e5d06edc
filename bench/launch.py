"""Starts the programs between client and PostgreSQL, each configured as a user would.

The proxy is the real command in a process of its own; it mints its tokens in an emulated workspace.
PgBouncer is set up as the alternative to it: session mode, TLS to the server, no authentication of
clients. HAProxy forwards TCP and takes no part in TLS.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from psycopg import pq
from psycopg.conninfo import make_conninfo

from bench.child_processes import (
    LOOPBACK,
    ChildProcess,
    child,
    free_port,
    private_directory,
    unprivileged_account,
)
from bench.errors import BenchError
from bench.postgres import CONNECT_SECONDS_MAX, HOST, ServerAddress
from bench.process_usage import descendants
from bench.systems import BASE, HAPROXY, PGBOUNCER, PROXY, System
from bench.workspace import ENDPOINT
from proxy.emulator.cluster import CLIENT_ID, DATABASE
from proxy.emulator.lakebase import CLIENT_SECRET

SESSIONS_MAX: Final = 5200  # 5,000 idle ones and some more

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
    address: ServerAddress,
    directory: Path,
    workspace_url: str,
    more: Mapping[str, str] | None = None,
    *,
    base: Path | None = None,
    name: str = PROXY,
) -> Iterator[System]:
    """Run the proxy while the block runs, with default settings except names and addresses.

    `more` are further settings, by the name of their variable without its prefix. With `base` it is
    the proxy that `make setup` has installed in that checkout.
    """
    with proxy_process(address, directory, workspace_url, more, base=base) as started:
        started.wait_until(lambda: _serving_port(started) is not None)
        pids = (started.pid, *descendants(started.pid))
        yield System(BASE if base else name, local_parameters(_serving_port(started)), pids)


def proxy_process(
    address: ServerAddress,
    directory: Path,
    workspace_url: str,
    more: Mapping[str, str] | None = None,
    *,
    base: Path | None = None,
    prefix: Sequence[str | Path] = (),
) -> AbstractContextManager[ChildProcess]:
    """Run the proxy as `proxy` does, without waiting until it serves. `prefix` runs its command."""
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
        "UPSTREAM__PORT": str(address.port),
        "UPSTREAM__SSL_ROOT_CERT": str(address.ca_file),
        "SHUTDOWN__DRAIN_SECONDS": "0",
        "LOG__FORMAT": "json",
    } | dict(more or {})
    environment = {f"LAKEBASE_PROXY_{name}": value for name, value in settings.items()}
    # No personal Databricks account, and no HTTP proxy before the emulated workspace.
    environment |= {"DATABRICKS_CONFIG_FILE": os.devnull, "NO_PROXY": LOOPBACK}
    program = [sys.executable, "-m", "proxy"] if base is None else [installed_in(base)]
    return child([*prefix, *program, "run"], _log(directory, "proxy"), environment=environment)


def installed_in(checkout: Path) -> Path:
    """Return the proxy that `make setup` has installed in a checkout."""
    return checkout.absolute() / ".venv/bin/lakebase-auth-proxy"


@contextmanager
def pgbouncer(address: ServerAddress, directory: Path, program: str) -> Iterator[System]:
    """Run PgBouncer while the block runs."""
    account, port = unprivileged_account(), free_port()
    log = _log(directory, "pgbouncer")
    home = private_directory(log.with_suffix(""), account)
    configuration = home / "pgbouncer.ini"
    configuration.write_text(
        _PGBOUNCER_INI.format(
            address=LOOPBACK,
            upstream_port=address.port,
            user=CLIENT_ID,
            port=port,
            admin=_APPLICATION,
            sessions_max=SESSIONS_MAX,
        )
    )
    parameters = local_parameters(port)
    with child([program, configuration], log, account=account) as started:
        _wait_until_serving(started, parameters)
        yield System(PGBOUNCER, parameters, (started.pid,))


def empty_pool(system: System) -> None:
    """Make PgBouncer close its pooled server connections. Raises BenchError."""
    if system.name != PGBOUNCER:
        return
    admin = pq.PGconn.connect(
        make_conninfo(**(system.parameters | {"dbname": "pgbouncer"})).encode()
    )
    status = admin.exec_(b"RECONNECT").status
    message = admin.error_message.decode(errors="replace")
    admin.finish()
    if status != pq.ExecStatus.COMMAND_OK:
        raise BenchError(f"PgBouncer did not empty its pool: {message}")


@contextmanager
def haproxy(address: ServerAddress, directory: Path, program: str) -> Iterator[System]:
    """Run HAProxy while the block runs."""
    account, port = unprivileged_account(), free_port()
    log = _log(directory, "haproxy")
    home = private_directory(log.with_suffix(""), account)
    configuration = home / "haproxy.cfg"
    configuration.write_text(
        _HAPROXY_CFG.format(
            address=LOOPBACK, port=port, upstream_port=address.port, sessions_max=SESSIONS_MAX
        )
    )
    parameters = ServerAddress(port, address.ca_file).libpq_parameters
    with child([program, "-db", "-f", configuration], log, account=account) as started:
        _wait_until_serving(started, parameters)
        yield System(HAPROXY, parameters, (started.pid,))


def find_program(program: str) -> str | None:
    """Return the path of a server's program; Debian keeps it off an ordinary user's PATH."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin")


def _wait_until_serving(started: ChildProcess, parameters: dict[str, str]) -> None:
    conninfo = make_conninfo(**parameters).encode()
    started.wait_until(lambda: pq.PGconn.ping(conninfo) == pq.Ping.OK)


def local_parameters(port: int | None) -> dict[str, str]:
    """Return the libpq parameters of an application that connects to a local sidecar."""
    return {
        "host": LOOPBACK,
        "port": str(port),
        "user": _APPLICATION,
        "dbname": DATABASE,
        "sslmode": "disable",
        "gssencmode": "disable",
        "connect_timeout": CONNECT_SECONDS_MAX,
    }


def serving_line(started: ChildProcess) -> dict[str, Any] | None:
    """Return the line of its JSON log with which the proxy serves, once the log has it."""
    for line in started.log.read_text(errors="replace").splitlines():
        if line.startswith("{") and (found := json.loads(line))["event"] == "serving":
            return dict(found)
    return None


def _serving_port(started: ChildProcess) -> int | None:
    line = serving_line(started)
    return None if line is None else int(line["port"])


def _log(directory: Path, name: str) -> Path:
    """Return an unused name for a log file: a program is started several times in a run."""
    number = 1
    while (path := directory / f"{name}-{number}.log").exists():
        number += 1
    return path
