"""A real PostgreSQL that speaks TLS on a loopback port: what every contender leads to.

It trusts every login over TLS, so that a token is accepted like any other password: what is
measured is the way to it. The wheel that the demo uses is built without TLS, as are its psql and
pgbench; these are the distribution's (Debian: `apt-get install postgresql`).
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

from bench.children import LOOPBACK, child, free_port, private_directory, run, unprivileged
from bench.errors import BenchError
from proxy.emulator.cluster import CLIENT_ID, DATABASE

HOST: Final = "upstream.bench.test"  # what the certificate names; no resolver is asked
CONNECT_SECONDS_MAX: Final = "30"  # libpq waits without it for ever, deaf to Ctrl-C
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
    "autovacuum": "off",  # it would be measured along with whoever is next
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where something that speaks Postgres with TLS listens, and who vouches for it."""

    port: int
    ca_file: Path

    @property
    def direct(self) -> dict[str, str]:
        """libpq parameters for a verified TLS connection with the token in hand."""
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
    place: Place
    certificate: Path  # with `private_key`, for another that stands in for the server
    private_key: Path
    socket_directory: Path
    scratch: Path

    def settle(self) -> None:
        """Wait until the sessions that ended are gone from the server, too. Raises BenchError."""
        local = {"host": str(self.socket_directory), "port": str(self.place.port)}
        target = make_conninfo(**local, user="postgres", dbname="postgres").encode()
        session = pq.PGconn.connect(target)
        deadline, before = time.monotonic() + _SETTLE_SECONDS_MAX, None
        try:
            # Those that stay are idle in somebody's pool: their number is not known, but stands.
            while (now := session.exec_(_SESSIONS).get_value(0, 0)) != before:
                if time.monotonic() > deadline:
                    raise BenchError("sessions keep ending: the server does not settle")
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
            "PGPORT": str(self.place.port),
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
        """Make the role, the database and the tables that are read and written."""
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
    """Run a server while the block runs. Raises BenchError when there is none with TLS."""
    binaries, account, port = find_binaries(), unprivileged(), free_port()
    home = private_directory(directory / "postgres", account)
    ca_file = _certify(directory, home)
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
        target = f"host={home} port={port} user=postgres dbname=postgres".encode()
        server.wait_until(lambda: pq.PGconn.ping(target) == pq.Ping.OK)
        running = Postgres(
            binaries,
            Place(port, ca_file),
            certificate=home / _CERTIFICATE,
            private_key=home / _PRIVATE_KEY,
            socket_directory=home,
            scratch=directory,
        )
        running.prepare()
        yield running


def find_binaries() -> Path:
    """Return the newest installation that has TLS, server and clients in one directory."""
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


def _certify(directory: Path, home: Path) -> Path:
    """Write a certificate and its key for the server, and the authority's for its clients."""
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
