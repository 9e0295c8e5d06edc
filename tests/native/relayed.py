"""A relay over real sockets, with lanes or without, and the two peers whose bytes it carries.

For: deciding what is in which kernel's buffer at which moment, so the client is a bare socket.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from proxy import native
from proxy.session.end_reason import RelayEnd
from proxy.session.fast_path import watched_lanes
from proxy.session.relay import Relay
from proxy.transport.stream import StartupStream
from tests.transport.peers import Contexts, Peer, linked, secured

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

WAIT_SECONDS_MAX: Final = 10.0
# What the ends of a connection hold where a peer that reads nothing is to be full soon; less than
# a segment of the loopback, which is 64 KiB, would make each wait for a timer.
SMALL_BUFFER_BYTES: Final = 128 * 1024


class Client:
    """The far end of the client's connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, content: bytes) -> None:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await asyncio.get_running_loop().sock_sendall(self.sock, content)

    async def receive(self, count: int = 65536) -> bytes:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await asyncio.get_running_loop().sock_recv(self.sock, count)

    async def receive_exactly(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            piece = await self.receive(min(count - len(received), 65536))
            assert piece, f"ended after {len(received)} bytes"
            received += piece
        return bytes(received)

    async def receive_all(self) -> bytes:
        received = bytearray()
        while piece := await self.receive():
            received += piece
        return bytes(received)

    def receive_now(self) -> bytes:
        """Take what the kernel has, without a turn of the event loop."""
        received = bytearray()
        try:
            while piece := self.sock.recv(65536):
                received += piece
        except BlockingIOError:
            pass
        return bytes(received)

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@dataclass
class Relayed:
    """A relay that runs, and its two peers."""

    client: Client
    upstream: Peer
    client_transport: asyncio.Transport
    upstream_transport: asyncio.Transport
    relay: Relay
    lanes: "Lanes"
    running: asyncio.Task[RelayEnd]

    def stall_upstream(self) -> None:
        """Stop the upstream's reading."""
        cast("asyncio.Transport", self.upstream.writer.transport).pause_reading()

    def let_upstream_read(self) -> None:
        cast("asyncio.Transport", self.upstream.writer.transport).resume_reading()

    async def end(self) -> RelayEnd:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await self.running


@asynccontextmanager
async def relayed(
    *,
    laned: bool = True,
    tls: Contexts | None = None,
    small: bool = False,
    first: bytes = b"",
    closed: bool = False,
) -> AsyncIterator[Relayed]:
    """Run a relay; `tls` is on its upstream. With `small` buffers a peer that reads nothing is
    full soon. `first` is written to the client before the relay gets its connection. `closed`
    lanes take no new one."""
    async with AsyncExitStack() as stack:
        lanes = stack.enter_context(watched_lanes())
        if closed:
            lanes = native.lanes.Lanes()
            lanes.close()
        upstream_stream, upstream = await stack.enter_async_context(
            linked() if tls is None else secured(tls, server_side=False)
        )
        client_stream, client = await _client(small=small)
        if small:
            make_small(upstream_stream.transport.get_extra_info("socket"))
            make_small(upstream.writer.get_extra_info("socket"))
        relay = Relay(
            client_stream.transport, upstream_stream.transport, lanes=lanes if laned else None
        )
        client_stream.write(first)
        relay.from_upstream.data_received(upstream_stream.hand_over(relay.from_upstream))
        relay.from_client.data_received(client_stream.hand_over(relay.from_client))
        running = asyncio.create_task(relay.run())
        await asyncio.sleep(0)  # it begins
        try:
            yield Relayed(
                client,
                upstream,
                client_stream.transport,
                upstream_stream.transport,
                relay,
                cast("Lanes", lanes),
                running,
            )
        finally:
            running.cancel()
            await asyncio.wait((running,))
            client.sock.close()
            await asyncio.sleep(0)


async def _client(*, small: bool) -> tuple[StartupStream, Client]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.socket()
        for end in (server, far) if small else ():
            make_small(end)  # before it is connected: a window that was offered is not taken back
        far.connect(server.getsockname())
        near, _ = server.accept()
    _, stream = await asyncio.get_running_loop().create_connection(StartupStream, sock=near)
    return stream, Client(far)


def make_small(sock: socket.socket) -> None:
    """Give one end of a connection small buffers."""
    for name in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, name, SMALL_BUFFER_BYTES)


def pythons(tls: Contexts) -> Contexts:
    """Return the same contexts with Python's for the end under test."""
    return Contexts(tls.server, tls.client, tls.authority)
