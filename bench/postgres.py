"""A real PostgreSQL with TLS on a loopback port: the upstream of every system.

It trusts every login over TLS, so a token is accepted like any other password. The wheel that the
demo uses is built without TLS, and so are its psql and pgbench; these are the distribution's
(Debian: `apt-get install postgresql`).
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trustme
from psycopg import pq
from psycopg.conninfo import make_conninfo

from bench.child_processes import (
    LOOPBACK,
    child,
    free_port,
    private_directory,
    run,
    unprivileged_account,
)
from bench.errors import BenchError
from proxy.emulator.cluster import CLIENT_ID, DATABASE

HOST: Final = "upstream.bench.test"  # what the certificate names; no resolver is asked
CONNECT_SECONDS_MAX: Final = "30"  # without it libpq waits for ever and ignores Ctrl-C
PGBENCH_SCALE: Final = 10  # 1,000,000 accounts: in memory, and a second to make
_CERTIFICATE: Final = "server.pem"
_PRIVATE_KEY: Final = "server.key"
_INITDB_SECONDS_MAX: Final = 60.0
_SQL_SECONDS_MAX: Final = 120.0
_SETTLE_SECONDS: Final = 0.1
_SETTLE_SECONDS_MAX: Final = 30.0
_SESSIONS: Final = b"SELECT count(*) FROM pg_stat_activity"

_SETTINGS: Final = {
    "listen_addresses": LOOPBACK,
    "max_connections": "2500",  # 1,000 idle ones of the proxy, then of PgBouncer
    "shared_buffers": "256MB",
    "ssl": "on",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",  # it would add load to whatever is measured then
}


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The loopback port of a server with TLS, and the authority of its certificate."""

    port: int
    ca_file: Path

    @property
    def libpq_parameters(self) -> dict[str, str]:
        """The parameters of a verified TLS connection that sends a token."""
        return {
            "host": HOST,
            "hostaddr": LOOPBACK,
            "port": str(self.port),
            "user": CLIENT_ID,
            "password": "not-a-real-token",
            "dbname": DATABASE,
            "sslmode": "verify-full",
            "sslrootcert": str(self.ca_file),
            "gssencmode": "disable",
            "connect_timeout": CONNECT_SECONDS_MAX,
        }


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server."""

    binaries: Path
    address: ServerAddress
    certificate: Path  # and `private_key`: `idle_upstream` has them, too
    private_key: Path
    socket_directory: Path
    scratch: Path

    def wait_until_sessions_end(self) -> None:
        """Wait until the server has no session left of a closed connection. Raises BenchError."""
        local = {"host": str(self.socket_directory), "port": str(self.address.port)}
        conninfo = make_conninfo(**local, user="postgres", dbname="postgres").encode()
        session = pq.PGconn.connect(conninfo)
        deadline, before = time.monotonic() + _SETTLE_SECONDS_MAX, None
        try:
            # Sessions of a pool stay open: their number is unknown, but constant.
            while (now := session.exec_(_SESSIONS).get_value(0, 0)) != before:
                if time.monotonic() > deadline:
                    raise BenchError("the number of the server's sessions keeps changing")
                before = now
                time.sleep(_SETTLE_SECONDS)
        finally:
            session.finish()

    def sql(self, script: str, *, database: str = DATABASE) -> str:
        """Run a script as the superuser. Raises BenchError."""
        command = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", script]
        return self._local(command, "postgres", database)

    def _local(self, command: list[str], user: str, database: str) -> str:
        environment = {
            "PGHOST": str(self.socket_directory),
            "PGPORT": str(self.address.port),
            "PGUSER": user,
            "PGDATABASE": database,
        }
        program = self.binaries / command[0]
        return run(
            [program, *command[1:]],
            self.scratch / f"{command[0]}.log",
            environment=environment,
            seconds_max=_SQL_SECONDS_MAX,
        )

    def prepare(self) -> None:
        """Create the role, the database and the tables."""
        self.sql(f'CREATE ROLE "{CLIENT_ID}" LOGIN', database="postgres")
        self.sql(f'CREATE DATABASE {DATABASE} OWNER "{CLIENT_ID}"', database="postgres")
        initialise = ["pgbench", "-i", "-q", "-s", str(PGBENCH_SCALE), "--unlogged-tables"]
        self._local(initialise, CLIENT_ID, DATABASE)
        self.sql("VACUUM ANALYZE")
        self.sql(
            f'CREATE TABLE copy_sink (value text); ALTER TABLE copy_sink OWNER TO "{CLIENT_ID}"'
        )


@contextmanager
def postgres(directory: Path) -> Iterator[Postgres]:
    """Run a server while the block runs. Raises BenchError if no installation has TLS."""
    binaries, account, port = find_binaries(), unprivileged_account(), free_port()
    home = private_directory(directory / "postgres", account)
    ca_file = write_certificate(directory, home)
    settings = _SETTINGS | {
        "port": str(port),
        "unix_socket_directories": str(home),
        "ssl_cert_file": str(home / _CERTIFICATE),
        "ssl_key_file": str(home / _PRIVATE_KEY),
    }
    data = home / "data"
    initdb: list[str | Path] = [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust"]
    run(
        [*initdb, "--encoding=UTF8", "--locale=C", "--no-sync"],
        directory / "initdb.log",
        account=account,
        seconds_max=_INITDB_SECONDS_MAX,
    )
    (data / "pg_hba.conf").write_text("local all all trust\nhostssl all all 127.0.0.1/32 trust\n")
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    command: list[str | Path] = [binaries / "postgres", "-D", data, *options]
    log, fast = directory / "postgres.log", signal.SIGINT  # a fast shutdown ends its sessions
    with child(command, log, account=account, stop_signal=fast) as server:
        conninfo = f"host={home} port={port} user=postgres dbname=postgres".encode()
        server.wait_until(lambda: pq.PGconn.ping(conninfo) == pq.Ping.OK)
        running = Postgres(
            binaries,
            ServerAddress(port, ca_file),
            certificate=home / _CERTIFICATE,
            private_key=home / _PRIVATE_KEY,
            socket_directory=home,
            scratch=directory,
        )
        running.prepare()
        yield running


def find_binaries() -> Path:
    """Return the directory of the newest installation with TLS, server and clients."""
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name)
    )
    on_path = shutil.which("postgres")
    if on_path is not None:
        candidates.append(Path(on_path).resolve().parent)
    for binaries in reversed(candidates):
        programs = [binaries / name for name in ("postgres", "initdb", "psql", "pgbench")]
        if all(program.exists() for program in programs) and b"libssl" in programs[0].read_bytes():
            return binaries
    raise BenchError(
        "no PostgreSQL with TLS here (the demo's wheel is built without); "
        "Debian: apt-get install postgresql"
    )


def write_certificate(directory: Path, home: Path) -> Path:
    """Write a certificate and key for the server; return the authority's file for its clients."""
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST)
    ca_file = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    owner = home.stat()
    for name, blobs in (
        (_CERTIFICATE, certificate.cert_chain_pems),
        (_PRIVATE_KEY, [certificate.private_key_pem]),
    ):
        path = home / name
        path.touch(mode=0o600)
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        os.chown(path, owner.st_uid, owner.st_gid)
    return ca_file
