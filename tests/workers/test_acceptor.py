"""The acceptor: what it accepts is passed on, or held until a worker takes it."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from proxy.config import ListenSettings
from proxy.workers.acceptor import Acceptor
from tests.support.running import captured_log, eventually, nothing_left


class Passed:
    """Takes connections in place of workers, unless it is set not to."""

    def __init__(self) -> None:
        self.takes = True
        self.asked = 0
        self.peers: list[object] = []

    def __call__(self, client: socket.socket) -> bool:
        self.asked += 1
        if self.takes:
            self.peers.append(client.getpeername())
        return self.takes


@asynccontextmanager
async def opened(passed: Passed, **listen: object) -> AsyncIterator[tuple[Acceptor, str, int]]:
    settings = ListenSettings.model_validate({"host": "127.0.0.1", "port": 0, **listen})
    acceptor = Acceptor(settings, passed)
    ((host, port), *_) = acceptor.open()
    try:
        yield acceptor, host, port
    finally:
        acceptor.close()


async def connected(host: str, port: int, count: int) -> list[socket.socket]:
    """Connect this many clients."""
    loop = asyncio.get_running_loop()
    clients = [socket.socket() for _ in range(count)]
    for client in clients:
        client.setblocking(False)
        await loop.sock_connect(client, (host, port))
    return clients


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_clients_wait_in_the_backlog_until_it_starts_and_each_is_passed_once() -> None:
    passed = Passed()
    async with nothing_left(), opened(passed) as (acceptor, host, port):
        clients = await connected(host, port, 40)  # more than are accepted at a time
        assert passed.asked == 0
        acceptor.start()
        await eventually(lambda: len(passed.peers) == 40, "all are passed on")
        assert sorted(map(str, passed.peers)) == sorted(str(one.getsockname()) for one in clients)
        for client in clients:
            client.close()


async def test_a_connection_that_no_worker_takes_is_held_and_passed_later() -> None:
    passed = Passed()
    passed.takes = False
    async with nothing_left(), opened(passed) as (acceptor, host, port):
        acceptor.start()
        clients = await connected(host, port, 3)
        await eventually(lambda: passed.asked >= 3, "it tries again and again")
        passed.takes = True
        await eventually(lambda: len(passed.peers) == 3, "all are passed on")
        assert passed.peers[0] == clients[0].getsockname(), "the one that was held is first"
        for client in clients:
            client.close()


async def test_when_it_is_closed_a_held_connection_ends_and_the_port_is_free() -> None:
    passed = Passed()
    passed.takes = False
    async with nothing_left(), opened(passed) as (acceptor, host, port):
        acceptor.start()
        (client,) = await connected(host, port, 1)
        await eventually(lambda: passed.asked, "it is held")
        acceptor.close()
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        client.close()
        socket.create_server((host, port)).close()
        acceptor.close()  # may be repeated


async def test_a_unix_socket_is_passed_on_like_tcp_and_removed_at_the_end(tmp_path: Path) -> None:
    passed = Passed()
    where = {"host": "", "port": 6000, "unix_socket_directory": str(tmp_path)}
    async with opened(passed, **where) as (acceptor, host, port):
        assert (host, port) == (str(tmp_path), 6000)
        acceptor.start()
        _, writer = await asyncio.open_unix_connection(str(tmp_path / ".s.PGSQL.6000"))
        await eventually(lambda: passed.asked == 1, "it is passed on")
        writer.close()
    assert names_in(tmp_path) == []


async def test_a_failure_to_accept_is_logged_once_and_ends_nothing() -> None:
    passed = Passed()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with captured_log() as log:
        async with opened(passed) as (acceptor, host, port):
            acceptor.start()
            (client,) = await connected(host, port, 1)
            await eventually(lambda: passed.asked == 1, "the first is passed on")
            later = socket.socket()
            later.setblocking(False)
            # No descriptor beyond those that are open.
            resource.setrlimit(resource.RLIMIT_NOFILE, (later.fileno() + 1, hard))
            try:
                await asyncio.get_running_loop().sock_connect(later, (host, port))
                await eventually(lambda: log.events("cannot accept"), "it is noticed")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await eventually(lambda: passed.asked == 2, "it is passed on as soon as it can be")
            client.close()
            later.close()
    (line,) = log.events("cannot accept")
    assert "open files" in line["error"]
