"""A client that speaks raw bytes to the proxy, in the clear, and times what it reads.

For: what drivers never do. Not for TLS (`raw_client`). Every wait is bounded.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    BackendKeyData,
    BackendMessage,
    ErrorResponse,
    Frame,
    ReadyForQuery,
    decode_backend,
)
from proxy.wire.startup import V3_0, ProtocolVersion, StartupMessage
from tests.support.running import USER, Listening
from tests.support.secret_canaries import look_at_answer

WAIT_SECONDS_MAX: Final = 10.0
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_READ_BYTES: Final = 256 * 1024


class PlainClient:
    """One TCP connection. Nothing is read from the socket that was not asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._framing = MessageReader(1 << 30)

    async def send(self, content: bytes) -> None:
        """Send all of it."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await asyncio.get_running_loop().sock_sendall(self.sock, content)

    async def receive(self, seconds_max: float = WAIT_SECONDS_MAX) -> bytes:
        """Return some bytes, none at the end. Raises TimeoutError when nothing comes."""
        async with asyncio.timeout(seconds_max):
            received = await asyncio.get_running_loop().sock_recv(self.sock, _READ_BYTES)
        look_at_answer(received)
        return received

    async def receive_rest(self) -> bytes:
        """Return everything up to the end."""
        rest = bytearray()
        while received := await self.receive():
            rest += received
        return bytes(rest)

    async def message(self) -> BackendMessage | Frame:
        """Return the next message. Raises EOFError at the end."""
        while (frame := self._framing.next()) is None:
            received = await self.receive()
            if not received:
                raise EOFError
            self._framing.feed(received)
        return decode_backend(frame)

    async def error(self) -> ErrorResponse:
        """Return the next ErrorResponse. Raises EOFError if there is none."""
        while True:
            message = await self.message()
            if isinstance(message, ErrorResponse):
                return message

    async def start_up(self, version: ProtocolVersion = V3_0) -> BackendKeyData | None:
        """Send a StartupMessage and read up to ReadyForQuery; return the cancel key."""
        await self.send(startup(version))
        key: BackendKeyData | None = None
        while not isinstance(message := await self.message(), ReadyForQuery):
            assert not isinstance(message, ErrorResponse), message
            if isinstance(message, BackendKeyData):
                key = message
        return key

    async def query(self, sql: str) -> None:
        """Send a simple Query."""
        await self.send(query(sql))

    def close(self) -> None:
        """End with FIN."""
        self.sock.close()

    def reset(self) -> None:
        """End with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.sock.close()


def startup(version: ProtocolVersion = V3_0, **parameters: str) -> bytes:
    """Return a StartupMessage of an ordinary client."""
    pairs = {"user": USER, **parameters}
    return StartupMessage(
        version, tuple((name.encode(), value.encode()) for name, value in pairs.items())
    ).encode()


def query(sql: str) -> bytes:
    """Return a simple Query."""
    return Frame(b"Q", sql.encode() + b"\0").encode()


@asynccontextmanager
async def plain_client(
    proxy: Listening, *, receive_buffer_bytes: int = 0
) -> AsyncIterator[PlainClient]:
    """Connect; close at the end if the test did not. A small buffer makes a slow reader felt."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            where = (proxy.listen_host, proxy.listen_port)
            await asyncio.get_running_loop().sock_connect(sock, where)
        yield PlainClient(sock)
