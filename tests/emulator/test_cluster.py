"""The cluster: it starts, serves, and leaves no process or file, however it ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from proxy.emulator.cluster import (
    CLIENT_ID,
    DATABASE,
    GROUP,
    Cluster,
    ClusterError,
    running,
    start_together,
    stop_together,
)
from proxy.wire.startup import SSLRequest
from tests.support.closed_checkout import ClosedCheckout
from tests.support.proxy_process import ROOT

DEADLINE_SECONDS = 10.0


def test_each_shard_tells_its_name(clusters: Mapping[str, Cluster]) -> None:
    for name, cluster in clusters.items():
        assert cluster.execute("SELECT name FROM shard_identity", user=CLIENT_ID) == name


def test_the_service_principal_owns_the_database_and_is_no_superuser(
    clusters: Mapping[str, Cluster],
) -> None:
    sql = "CREATE TABLE owned (); DROP TABLE owned; SHOW is_superuser; SELECT current_database()"
    assert clusters["one"].execute(sql, user=CLIENT_ID).split() == ["off", DATABASE]
    assert clusters["one"].execute("SELECT 1", user=GROUP) == "1"


def test_what_the_documentation_says_about_missing_roles_works(
    clusters: Mapping[str, Cluster], scratch_database: str
) -> None:
    role = "0dd0dd0d-0000-4000-8000-000000000001"
    cluster = clusters["one"]
    cluster.execute(
        f"CREATE EXTENSION IF NOT EXISTS databricks_auth;"
        f"SELECT databricks_create_role('{role}', 'SERVICE_PRINCIPAL');",
        database=scratch_database,
        user=CLIENT_ID,
    )
    try:
        assert cluster.execute("SELECT current_user", user=role) == role
    finally:
        cluster.execute(f'DROP ROLE "{role}"')


def test_logical_replication_and_many_connections_are_possible(
    clusters: Mapping[str, Cluster],
) -> None:
    shown = clusters["one"].execute("SHOW wal_level; SHOW max_connections")
    assert shown.split() == ["logical", "300"]


def test_a_statement_that_fails_raises_what_postgres_said(clusters: Mapping[str, Cluster]) -> None:
    with pytest.raises(ClusterError, match='relation "no_such_table" does not exist'):
        clusters["one"].execute("SELECT * FROM no_such_table")


def test_a_cluster_that_does_not_run_has_no_directory() -> None:
    with pytest.raises(ClusterError, match="not running"):
        _ = Cluster().directory


def test_stop_leaves_no_process_socket_or_directory() -> None:
    cluster = Cluster(version=18)
    with cluster:
        assert cluster.execute("SHOW server_version").startswith("18.")
        directory = cluster.directory
        pid = _postmaster(directory)
    assert not directory.exists()
    assert not _lives(pid)
    cluster.stop()


def test_a_setting_that_postgres_refuses_fails_the_start_and_leaves_nothing() -> None:
    before = _directories()
    with pytest.raises(ClusterError, match=r"(?s)postgres failed.*no_such_setting"):
        start_together([Cluster(settings={"no_such_setting": "1"}), Cluster()])
    assert _directories() == before


def test_no_clusters_are_started_and_stopped_in_no_time() -> None:
    start_together([])
    stop_together([])


async def test_a_cancelled_start_leaves_nothing() -> None:
    before = _directories()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), running([Cluster()]):
            pytest.fail("it cannot be that fast")
    assert _directories() == before


def test_a_process_that_is_killed_leaves_nothing() -> None:
    """The shell that supervises the server cleans up when the other end of its pipe is closed."""
    _start_and_kill(sys.executable, cwd=ROOT, version=16)


@pytest.mark.parametrize("version", [16, 18])
def test_a_cluster_starts_from_a_closed_folder_and_leaves_nothing(
    closed_checkout: ClosedCheckout, version: int
) -> None:
    """The server's user could not read the libraries that the wheel has beside its package.

    When the process was killed, a copy that belonged to root stayed.
    """
    command = (*closed_checkout.user, closed_checkout.python)
    _start_and_kill(*command, cwd=closed_checkout.folder, version=version)


def _start_and_kill(*python: str, cwd: Path, version: int) -> None:
    """Run a cluster in a process that is killed; `-c` imports from where it runs."""
    program = (
        "from proxy.emulator.cluster import Cluster\n"
        f"cluster = Cluster(version={version}); cluster.start()\n"
        "cluster.execute('LOAD $$libpqwalreceiver$$')\n"  # a module that needs libpq
        "print(cluster.directory, flush=True)\n"
        "input()\n"
    )
    child = subprocess.Popen(
        [*python, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd
    )
    with child:
        assert child.stdout is not None
        directory = Path(child.stdout.readline().strip())
        pid = _postmaster(directory)
        child.send_signal(signal.SIGKILL)
    assert _eventually(lambda: not _lives(pid) and not directory.exists())


def _directories() -> set[str]:
    return {path.name for path in Path("/tmp").glob(f"lakebase-{os.getpid()}-*")}


def _eventually(happened: Callable[[], bool]) -> bool:
    """Poll until it happened: there is no event for the end of a process that is not a child."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.01)
    return True


def _postmaster(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_restart_ends_sessions_and_the_server_serves_again_on_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Cluster(settings={"listen_addresses": "127.0.0.1", "port": str(port)}) as cluster:
        began = cluster.execute("SELECT pg_postmaster_start_time()")
        with socket.create_connection(("127.0.0.1", port)) as session:
            session.settimeout(DEADLINE_SECONDS)
            session.sendall(SSLRequest().encode())
            # A server that accepts it while it stops would wait a minute for its StartupMessage.
            assert session.recv(1) == b"N"
            cluster.restart()
            assert session.recv(1) == b""
        assert cluster.execute("SELECT pg_postmaster_start_time()") != began
        socket.create_connection(("127.0.0.1", port)).close()
        directory = cluster.directory
    assert not directory.exists()
