"""The unix socket listener: where drivers look for it, who may use it, how it comes and goes (W37).

`listen.unix_socket_directory` and `unix_socket_mode`. The rest of the protocol is the same as over
TCP, but for encryption, which is not needed inside one machine.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psycopg
import pytest
import trustme

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.transport.sockets import listen_unix
from proxy.wire.messages import ReadyForQuery
from proxy.wire.startup import CancelRequest
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.admin_address import ask
from tests.support.client import Client, plain_client, query, startup
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually, libpq, nothing_left, psql_path, query_runs

SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
GSSENC_REQUEST = bytes.fromhex("00000008 04d21630")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: a socket's path has a bound of 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="lap-"))
    yield made
    shutil.rmtree(made)


def at(directory: Path, **more: object) -> dict[str, object]:
    return {"unix_socket_directory": str(directory), **more}


def path_of(proxy: App, directory: Path) -> Path:
    return directory / f".s.PGSQL.{proxy.listen_port}"


@asynccontextmanager
async def unix_client(path: Path) -> AsyncIterator[Client]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        yield Client(sock)


def free_port() -> int:
    """Return a port that was free a moment ago: a socket's name needs one beforehand."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def left_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def dead_socket(path: Path) -> None:
    """Leave a socket as a process does that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
    assert path.is_socket()


# -- the protocol over it --------------------------------------------------------------------------


async def test_w37_drivers_find_the_socket_by_its_directory(
    start_proxy: StartProxy, directory: Path, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen=at(directory))
    where = libpq(proxy, host=str(directory))
    async with await psycopg.AsyncConnection.connect(**where) as connection:
        row = await (await connection.execute("SELECT current_user")).fetchone()
        assert row == (lakebase.client_id,)
        assert connection.info.host == str(directory)
    other = await asyncpg.connect(
        host=str(directory), port=proxy.listen_port, user="anyone", database="databricks_postgres"
    )
    assert await other.fetchval("SELECT 1") == 1
    await other.close()
    whom = ("-X", "-U", "anyone", "-d", "databricks_postgres", "-At", "-c", "SELECT 'psql'")
    port = str(proxy.listen_port)
    result = await run_to_end(psql_path(), "-h", str(directory), "-p", port, *whom)
    assert result == (0, "psql\n", "")


async def test_w37_tcp_is_served_beside_it(start_proxy: StartProxy, directory: Path) -> None:
    proxy = await start_proxy(listen=at(directory))
    async with plain_client(proxy) as tcp, unix_client(path_of(proxy, directory)) as unix:
        await tcp.start_up()
        await unix.start_up()


async def test_w37_without_tcp_the_socket_is_the_only_way_in(
    start_process: StartProcess, directory: Path
) -> None:
    port = free_port()
    listen = at(directory, host="", port=port)
    proxy = await start_process(listen=listen, admin={"enabled": True})
    # What it calls its host is what drivers take for one.
    assert (proxy.listen_host, proxy.listen_port) == (str(directory), port)
    async with await psycopg.AsyncConnection.connect(**libpq(proxy)) as connection:
        await connection.execute("SELECT 1")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    answer = await ask(int(proxy.events("serving")[0]["admin_port"]), "/status")
    assert json.loads(answer.body)["listen"] == f"{directory}/.s.PGSQL.{port}"
    proxy.send(signal.SIGTERM)
    assert await proxy.ended() == 0
    assert left_in(directory) == []


@pytest.mark.parametrize("certificate", [False, True], ids=["no certificate", "certificate"])
async def test_w37_encryption_requests_are_answered_n_certificate_or_not(
    start_proxy: StartProxy, directory: Path, certificate: bool
) -> None:
    listen = at(directory)
    if certificate:
        issued = trustme.CA().issue_cert("localhost")
        chain, key = directory / "chain.pem", directory / "key.pem"
        issued.cert_chain_pems[0].write_to_path(str(chain))
        issued.private_key_pem.write_to_path(str(key))
        listen |= {"tls_certificate": str(chain), "tls_key": str(key)}
    proxy = await start_proxy(listen=listen)
    path = path_of(proxy, directory)
    async with unix_client(path) as client:
        for request in (SSL_REQUEST, GSSENC_REQUEST):
            await client.send(request)
            assert await client.receive() == b"\x4e"
        await client.start_up()
    async with unix_client(path) as client:  # and nothing begins with TLS (W5)
        await client.send(b"\x16")
        assert await client.receive_rest() == b""
    if certificate:
        async with plain_client(proxy) as client:
            await client.send(SSL_REQUEST)
            assert await client.receive() == b"\x53"


async def test_w37_the_rest_of_the_list_holds_there_too(
    start_proxy: StartProxy, directory: Path, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen=at(directory))
    path = path_of(proxy, directory)
    async with unix_client(path) as client:  # W2
        for byte in startup():
            await client.send(bytes((byte,)))
        while not isinstance(await client.message(), ReadyForQuery):
            pass
    for wrong in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\7", b"\xff\xff\xff\xff"):  # W4, W6
        async with unix_client(path) as client:
            await client.send(wrong)
            assert await client.receive_rest() == b""
    async with unix_client(path) as client:  # W10
        await client.send(bytes.fromhex("00000009 00040000 00"))
        assert (await client.error()).sqlstate == "0A000"
    async with unix_client(path) as client:  # W38, W39
        key = await client.start_up()
        assert key is not None
        await client.query("SELECT pg_sleep(60)")
        await query_runs(lakebase)
        async with unix_client(path) as canceller:
            await canceller.send(CancelRequest(key.pid, key.key).encode())
            assert await canceller.receive_rest() == b""
        assert (await client.error()).sqlstate == "57014"
        lakebase["one"].endpoint.end_sessions()  # W34
        assert (await client.error()).sqlstate == "57P01"
        assert await client.receive_rest() == b""


async def test_w35_a_client_that_vanishes_from_it_has_its_query_cancelled(
    start_proxy: StartProxy, directory: Path, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen=at(directory), upstream={"cancel_method": "cancel_request"})
    async with unix_client(path_of(proxy, directory)) as client:
        await client.start_up()
        await client.query("SELECT pg_sleep(60)")
        await query_runs(lakebase)
        client.close()
    await lakebase.gateway.until(lambda: any(r.cancel_known for r in lakebase.gateway.cancels))


async def test_w32_much_passes_both_ways(start_proxy: StartProxy, directory: Path) -> None:
    proxy = await start_proxy(listen=at(directory))
    text = "x" * 1_000_000
    async with unix_client(path_of(proxy, directory)) as client:
        await client.start_up()
        sending = asyncio.create_task(client.send(query(f"SELECT '{text}'") * 8))
        received, answers = 0, 0
        while answers < 8:
            portion = await client.receive()
            received += len(portion)
            answers += portion.count(b"Z\0\0\0\x05I")
        await sending
    assert received > 8 * len(text)


# -- who may use it --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["0600", "660", "0777", "0000"])
async def test_w37_the_socket_has_its_mode_whatever_the_umask(
    start_proxy: StartProxy, directory: Path, mode: str
) -> None:
    before = os.umask(0o027)
    try:
        proxy = await start_proxy(listen=at(directory, unix_socket_mode=mode))
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(path_of(proxy, directory).stat().st_mode) == int(mode, 8)


def test_w37_the_socket_is_never_more_open_than_its_mode(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mode that is set only after the bind leaves a moment in which anybody may connect: this
    # looks at what bind itself has made.
    made: list[int] = []
    path = directory / "s"

    class Watched(socket.socket):
        def bind(self, address: str) -> None:  # type: ignore[override]
            super().bind(address)
            made.append(stat.S_IMODE(path.stat().st_mode))

    before = os.umask(0)
    try:
        monkeypatch.setattr(socket, "socket", Watched)
        listen_unix(path, 0o600, 1).close()
    finally:
        os.umask(before)
    assert made == [0o600]


# -- how it comes and goes -------------------------------------------------------------------------


async def test_w37_a_socket_that_a_dead_process_left_is_replaced(
    start_proxy: StartProxy, directory: Path
) -> None:
    port = free_port()
    dead_socket(directory / f".s.PGSQL.{port}")
    proxy = await start_proxy(listen=at(directory, port=port))
    async with unix_client(path_of(proxy, directory)) as client:
        await client.start_up()


async def test_w37_the_socket_of_a_live_process_is_refused_and_left_alone(
    start_proxy: StartProxy, directory: Path
) -> None:
    port = free_port()
    path = directory / f".s.PGSQL.{port}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as live:
        live.bind(str(path))
        live.listen()
        async with nothing_left():
            with pytest.raises(OSError, match="another process listens on"):
                await start_proxy(listen=at(directory, port=port))
            with pytest.raises(ConnectionRefusedError):  # nor is TCP left open
                socket.create_connection(("127.0.0.1", port), 1)
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))


async def test_w37_a_live_process_that_accepts_no_client_is_refused_and_not_waited_for(
    directory: Path,
) -> None:
    # To connect to a socket whose backlog is full blocks: the start of the proxy hung for ever.
    path = directory / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as live:
        live.bind(str(path))
        live.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(8)]
        try:
            for client in waiting:
                client.setblocking(False)
                try:
                    client.connect(str(path))
                except BlockingIOError:
                    break
            else:
                pytest.skip("this kernel's backlog has no end")
            async with asyncio.timeout(5):
                with pytest.raises(OSError, match="another process listens on"):
                    await asyncio.to_thread(listen_unix, path, 0o600, 1)
        finally:
            for client in waiting:
                client.close()
        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "link to nothing"])
async def test_w37_what_is_no_socket_is_refused_and_left_alone(
    start_proxy: StartProxy, directory: Path, kind: str
) -> None:
    port = free_port()
    path = directory / f".s.PGSQL.{port}"
    if kind == "file":
        path.write_text("kept")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(directory / "absent")
    with pytest.raises(OSError, match="is not a socket"):
        await start_proxy(listen=at(directory, port=port))
    assert path.lstat()


async def test_w37_a_directory_that_is_not_there_is_an_os_error(
    start_proxy: StartProxy, directory: Path
) -> None:
    async with nothing_left():
        with pytest.raises(FileNotFoundError):
            await start_proxy(listen=at(directory / "absent"))


async def test_w37_the_socket_is_gone_once_the_proxy_drains(
    start_proxy: StartProxy, directory: Path
) -> None:
    proxy = await start_proxy(listen=at(directory))
    path = path_of(proxy, directory)
    async with unix_client(path) as client:
        await client.start_up()
        await client.query("BEGIN")
        await client.messages_until(ReadyForQuery)
        draining = asyncio.create_task(proxy.drain(10))
        await eventually(lambda: not path.exists(), "the socket is gone")
        await client.query("SELECT 'still served'")
        assert b"still served" in await client.receive()
        client.close()
        assert await draining == 0
    assert left_in(directory) == []


@pytest.mark.slow
async def test_w37_a_process_removes_its_socket_at_its_end_and_replaces_that_of_a_killed_one(
    start_process: StartProcess, directory: Path
) -> None:
    killed = await start_process(listen=at(directory, port=free_port()))
    path = directory / f".s.PGSQL.{killed.listen_port}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    killed.send(signal.SIGKILL)
    await killed.ended()
    assert path.is_socket()
    heir = await start_process(listen=at(directory, port=killed.listen_port))
    async with unix_client(path) as client:
        await client.start_up()
    heir.send(signal.SIGTERM)
    assert await heir.ended() == 0
    assert left_in(directory) == []
