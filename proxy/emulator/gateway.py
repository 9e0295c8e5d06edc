"""The TLS gateway: one port that serves every endpoint of a workspace, selected by SNI.

This file listens and tracks the connections; `connection` serves one. `gateway_state` is the state
that they share, which tests read and set.
"""

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from proxy.emulator.certificates import Certificates
from proxy.emulator.connection import Connection
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.gateway_state import GatewayState, Record
from proxy.emulator.streams import READ_BYTES_MAX, Stream
from proxy.emulator.tokens import TokenIssuer

LOOPBACK: Final = "127.0.0.1"
# How many connections may wait for the accept loop.
BACKLOG: Final = 1024


class Gateway(GatewayState):
    """The gateway, on a port of its own; use it with `async with`."""

    def __init__(
        self, endpoints: Iterable[Endpoint], certificates: Certificates, issuer: TokenIssuer
    ) -> None:
        """The gateway accepts tokens of `issuer` only."""
        super().__init__(endpoints, certificates, issuer)
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def refuse_connections(self) -> None:
        """Close the port: new connections are refused, sessions continue. Reopen it with
        `accept_connections`, on the same port number."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept_connections(self) -> None:
        """Open the port, with the same number as before if there was one."""
        if self._server is None:
            self._server = await asyncio.start_server(
                self._accept, LOOPBACK, self.port, limit=READ_BYTES_MAX, backlog=BACKLOG
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def __aenter__(self) -> Self:
        await self.accept_connections()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.refuse_connections()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        if connections:
            await asyncio.wait(connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        record = Record()
        self.records.append(record)
        self.accepted += 1
        self.changed()
        try:
            await Connection(self, Stream(reader, writer), record).run()
        except asyncio.CancelledError:
            pass  # the gateway stops; the stream has been released
        finally:
            self._connections.discard(connection)
