"""Passing connections over a socket: what a worker receives, and what happens when it does not."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.config import ListenSettings
from proxy.server.metric_labels import build_metrics
from proxy.session.drain import OpenSession
from proxy.session.listener import Listener
from proxy.session.slots import Slots
from proxy.transport.stream import StartupStream
from proxy.workers.connection_socket import (
    ReceivedConnections,
    connection_socket_pair,
    send_connection,
)
from tests.support.running import captured_log, eventually, nothing_left


class Receiving:
    """A worker's side whose sessions echo, and our end of its socket."""

    def __init__(self) -> None:
        self.socket, its_socket = connection_socket_pair()
        self.ended = 0
        metrics = build_metrics()
        self._listener = Listener(ListenSettings(), Slots(10), metrics, self._echo)
        self.received = ReceivedConnections(its_socket, self._listener, self._count_end)

    def send(self, connection_id: int) -> socket.socket:
        """Pass a connection; return the client's end of it."""
        client, served = socket.socketpair()
        client.setblocking(False)
        with served:
            assert send_connection(self.socket, served, connection_id)
        return client

    async def _echo(self, stream: StartupStream, _entry: OpenSession) -> None:
        while data := await stream.receive():
            stream.write(data)
        await stream.close()

    def _count_end(self) -> None:
        self.ended += 1


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiving]:
    worker = Receiving()
    async with nothing_left():
        with worker.socket:
            async with worker.received.accepting() as addresses:
                assert addresses == ()
                yield worker


async def echoed(client: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"x")
    async with asyncio.timeout(10):
        return await loop.sock_recv(client, 10)


async def test_a_connection_is_served_and_its_end_is_counted() -> None:
    async with receiving() as worker:
        one, other = worker.send(1), worker.send(2)
        assert await echoed(one) == await echoed(other) == b"x"
        one.close()
        await eventually(lambda: worker.ended == 1, "its end is counted")
        assert await echoed(other) == b"x"
        other.close()
        await eventually(lambda: worker.ended == 2, "both are")


async def test_a_drain_serves_first_what_was_passed_before_and_takes_no_more() -> None:
    async with receiving() as worker:
        with captured_log() as log:
            client = worker.send(1)
            draining = asyncio.ensure_future(worker.received.drain(10))
            assert await echoed(client) == b"x"
            with client, socket.socket() as late:
                assert not send_connection(worker.socket, late, 2)
            assert await draining == 0
        assert log.above_info() == []
        assert worker.ended == 1


async def test_when_the_supervisor_closes_its_end_sessions_go_on() -> None:
    async with receiving() as worker:
        with worker.send(1) as client:
            worker.socket.close()
            assert await echoed(client) == b"x"


async def test_what_is_left_at_the_end_is_ended() -> None:
    async with receiving() as worker:
        client = worker.send(1)
        assert await echoed(client) == b"x"
    with client:
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
    assert worker.ended == 1


async def test_a_worker_without_descriptors_counts_the_connection_that_it_lost() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with captured_log() as log:
        async with receiving() as worker:
            with worker.send(1) as client:
                assert await echoed(client) == b"x"
                lost = worker.send(2)  # received below, when no descriptor is left
                resource.setrlimit(resource.RLIMIT_NOFILE, (lost.fileno(), hard))
                try:
                    await eventually(lambda: worker.ended == 1, "it is counted")
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                lost.close()
                assert await echoed(client) == b"x"
    assert log.events("connections are lost: no file descriptor is left")


async def test_a_worker_that_receives_nothing_takes_no_more_than_its_socket_holds() -> None:
    ours, theirs = connection_socket_pair()
    with ours, theirs, socket.socket() as client:
        while send_connection(ours, client, 1):  # ends: the kernel bounds it
            pass
    with socket.socket() as client:
        assert not send_connection(ours, client, 1), "nor one that is dead"
