"""The gateway's connection to Postgres: trusted, over the cluster's unix socket.

It sends what the gateway writes and returns what Postgres answers. `connection` decides what of it
the client receives.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from proxy.emulator.gateway_state import BackendSession
from proxy.emulator.streams import READ_BYTES_MAX
from proxy.wire import messages
from proxy.wire.framing import MessageReader
from proxy.wire.messages import Frame
from proxy.wire.startup import V3_0, CancelRequest, StartupMessage

MESSAGE_BYTES_MAX: Final = 1024 * 1024  # one message before ReadyForQuery


class BackendGone(Exception):
    """Postgres does not answer: the cluster is stopped, or it ended the connection."""


class Backend:
    """One connection to Postgres, on a bare socket.

    An asyncio transport closes after a failed write, and would discard unread data: the last
    messages that Postgres sent before it ended the session.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._framing = MessageReader(MESSAGE_BYTES_MAX)

    async def message(self) -> Frame:
        """Return the next message of the login. Raises BackendGone."""
        while (frame := self._framing.next()) is None:
            received = await self.read()
            if not received:
                raise BackendGone
            self._framing.feed(received)
        return frame

    async def read(self) -> bytes:
        """Return the bytes that have arrived, or b"" after Postgres ended the connection."""
        try:
            return await self._loop.sock_recv(self._socket, READ_BYTES_MAX)
        except OSError:
            return b""

    async def write(self, content: bytes) -> None:
        """Send, and wait while Postgres does not read. Discard the bytes if it has ended."""
        with contextlib.suppress(OSError):
            await self._loop.sock_sendall(self._socket, content)


@asynccontextmanager
async def connected(socket_path: str) -> AsyncIterator[Backend]:
    """Open a connection to Postgres for the block. Raises BackendGone if no server listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, socket_path)
        except OSError as error:
            raise BackendGone from error
        yield Backend(connection)


async def deliver_cancel(session: BackendSession) -> None:
    """Send Postgres a CancelRequest with its own key, and wait until it has been processed."""
    with contextlib.suppress(BackendGone):
        async with connected(session.socket_path) as backend:
            await backend.write(CancelRequest(session.key.pid, session.key.key).encode())
            await backend.read()


async def role_exists(socket_path: str, role: str) -> bool:
    """Return whether Postgres has the role, by starting a login as it. Raises BackendGone."""
    async with connected(socket_path) as backend:
        pairs = ((b"user", role.encode()), (b"database", b"postgres"))
        await backend.write(StartupMessage(V3_0, pairs).encode())
        await backend.message()  # AuthenticationOk comes first, even for an unknown role
        answer = messages.decode_backend(await backend.message())
        return not isinstance(answer, messages.ErrorResponse)
