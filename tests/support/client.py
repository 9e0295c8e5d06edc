"""A client that speaks raw bytes and Postgres messages: for what drivers never do.

Whatever it receives is searched for secrets.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self, TypeVar

from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    BackendKeyData,
    ErrorResponse,
    Frame,
    PasswordMessage,
    ReadyForQuery,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, ProtocolVersion, SSLRequest, StartupMessage
from tests.support.peer import WAIT_SECONDS_MAX, Peer
from tests.support.running import USER, Listening
from tests.support.secret_canaries import look_at_answer

Address = tuple[str, int] | str
"""Host and port, or the path of a unix socket."""

C = TypeVar("C", bound="Client")


class Client(Peer):
    """One connection to a proxy, to the emulator, or to PostgreSQL."""

    @classmethod
    async def connect(cls, address: Address, *, receive_buffer_bytes: int = 0) -> Self:
        """Connect, by TCP or to a unix socket. A small buffer makes a slow reader felt."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        client = cls(socket.socket(family, socket.SOCK_STREAM))
        if receive_buffer_bytes:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                await asyncio.get_running_loop().sock_connect(client.sock, address)
        except BaseException:
            client.abort()
            raise
        return client

    async def receive_new(self, seconds_max: float | None = WAIT_SECONDS_MAX) -> bytes:
        """Return bytes that have not been received yet; search them for secrets."""
        received = await super().receive_new(seconds_max)
        look_at_answer(received)
        return received

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

    async def show_token(self, token: str) -> None:
        """Answer the request for a cleartext password, which must come now."""
        assert await self.message() == AuthenticationCleartextPassword()
        await self.send(PasswordMessage(Secret(token.encode())).encode())

    async def request_tls(self, ca_file: Path, server_name: str | None) -> None:
        """Send SSLRequest, which must be answered S, and shake hands."""
        await self.send(SSLRequest().encode())
        assert await self.receive_exactly(1) == b"S"
        await self.start_tls(ca_file, server_name)

    async def start_tls(self, ca_file: Path, server_name: str | None) -> None:
        """Shake hands; without a server name there is no SNI and no check of the name."""
        context = ssl.create_default_context(cafile=str(ca_file))
        context.check_hostname = server_name is not None
        self.server_name = server_name
        await self.handshake(context, server_side=False)


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
async def connected(
    kind: type[C], address: Address, *, receive_buffer_bytes: int = 0
) -> AsyncIterator[C]:
    """Connect a client; drop the connection at the end if the test has not ended it."""
    client = await kind.connect(address, receive_buffer_bytes=receive_buffer_bytes)
    try:
        yield client
    finally:
        client.abort()


@asynccontextmanager
async def plain_client(proxy: Listening, *, receive_buffer_bytes: int = 0) -> AsyncIterator[Client]:
    """Connect to a proxy, without TLS."""
    address = (proxy.listen_host, proxy.listen_port)
    async with connected(Client, address, receive_buffer_bytes=receive_buffer_bytes) as client:
        yield client
