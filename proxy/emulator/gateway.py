"""The TLS gateway: one port that serves every endpoint of a workspace, selected by SNI.

This file listens and tracks the connections; `connection` serves one. `gateway_state` is the state
that they share, which tests read and set.
"""

import asyncio
from collections.abc import Iterable
from typing import Final, Self

from proxy.emulator.certificates import Certificates
from proxy.emulator.connection import Connection
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.gateway_state import GatewayState, Record
from proxy.emulator.held_port import HeldPort
from proxy.emulator.streams import READ_BYTES_MAX, Stream
from proxy.emulator.tokens import TokenIssuer

# How many connections may wait for the accept loop.
BACKLOG: Final = 1024


class Gateway(GatewayState):
    """The gateway, on a port of its own; use it with `async with`."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        certificates: Certificates,
        issuer: TokenIssuer,
        port: int = 0,
    ) -> None:
        """The gateway accepts tokens of `issuer` only. Port 0 is one that the system chooses."""
        super().__init__(endpoints, certificates, issuer)
        self._port = HeldPort(port)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The number of the port, 0 before it is opened."""
        return self._port.number

    async def refuse_connections(self) -> None:
        """Refuse new connections until `accept_connections`; sessions continue."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._port.hold()

    async def accept_connections(self) -> None:
        """Accept connections again, on the same port."""
        listener = self._port.take()
        if listener is not None:
            self._server = await asyncio.start_server(
                self._accept, sock=listener, limit=READ_BYTES_MAX, backlog=BACKLOG
            )

    async def __aenter__(self) -> Self:
        self._port.hold()
        await self.accept_connections()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse_connections()
        self._port.close()
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
