"""A catalogue, and the settings of a proxy that follows it, for the benchmarks of shard maps.

PostgreSQL with its own TLS, which asks for a password in clear, as Lakebase does. The catalogue is
a database of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.child_processes import LOOPBACK, child
from bench.launch import serving_line
from bench.postgres import HOST, Postgres
from tests.support.running import toml

ADMIN: Final = "map_admin"
READER: Final = "map_reader"
SESSION: Final = "app_session"
CATALOGUE: Final = "shardmap"
SHARD: Final = "app"
_PASSWORD: Final = "not-a-real-password"  # noqa: S105
# Checked at each login: that of a SCRAM verifier would cost as much as a session.
_LOGIN: Final = "hostssl all all 127.0.0.1/32 password\nlocal all all trust\n"
Sections = dict[str, dict[str, object]]


def prepare(server: Postgres, folder: Path) -> None:
    """Make the three roles, and the databases of the catalogue and of a shard."""
    for role in (ADMIN, READER, SESSION):
        server.sql(
            f"set password_encryption = 'md5'; create role {role} login password '{_PASSWORD}'",
            database="postgres",
        )
    server.sql(f"grant pg_read_all_stats, pg_signal_backend to {ADMIN}", database="postgres")
    for database in (CATALOGUE, SHARD):
        server.sql(f"create database {database} owner {ADMIN}", database="postgres")
    data = Path(server.sql("show data_directory", database="postgres").strip())
    (data / "pg_hba.conf").write_text(_LOGIN)
    server.sql("select pg_reload_conf()", database="postgres")
    (folder / "password").write_text(_PASSWORD)


def settings(server: Postgres, folder: Path, role: str) -> Sections:
    """Return the settings of a proxy whose sessions log in as this role, or of an administrator."""
    return {
        "listen": {"port": 0},
        "admin": {"enabled": False},
        "credentials": {"password_file": str(folder / "password")},
        "upstream": {
            "user": role,
            "port": server.address.port,
            "database": SHARD,
            "ssl_root_cert": str(server.address.ca_file),
        },
        "targets.main": {
            "host": HOST,
            "hostaddr": LOOPBACK,
            "database": CATALOGUE,
            "user": ADMIN if role == ADMIN else READER,
        },
        "catalogue": {"target": "main", "shard_hostaddr": LOOPBACK},
        "routing": {"shard_map": "tenants"},
        "shard_maps.tenants": {"catalogue": True},
        "log": {"format": "json"},
    }


def write(folder: Path, name: str, sections: Sections) -> Path:
    """Write settings to a file, and return its path."""
    path = folder / f"{name}.toml"
    path.write_text(toml(sections))
    return path


@contextmanager
def serving(program: Sequence[str | Path], file: Path, name: str) -> Iterator[tuple[int, int]]:
    """Run a proxy while the block runs; yield its process and its port."""
    with child([*program, "run", "--config", file], file.with_suffix(f".{name}.log")) as started:
        started.wait_until(lambda: serving_line(started) is not None)
        line = serving_line(started)
        assert line is not None
        yield started.pid, int(line["port"])
