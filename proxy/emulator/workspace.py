"""The workspace API over HTTP, for an unmodified databricks-sdk.

`api` returns the replies. This file listens, counts the calls, and replaces replies by the faults
that a test injects. It listens on an ephemeral port of 127.0.0.1 in plain HTTP, and changes neither
signal handlers nor the logging configuration. With a TLS context it is HTTPS.
"""

import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from email.utils import formatdate
from typing import Final, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from proxy.emulator.api import TTL_SECONDS_MAX, Api, ApiRequest, Call, Mint
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.faults import ENDLESS, HANG, NOT_FOUND, FaultList, Hang, Reply
from proxy.emulator.held_port import LOOPBACK, HeldPort
from proxy.emulator.tokens import Purpose

# No reply takes longer. Requests that hang are released before the wait.
_STOP_SECONDS_MAX: Final = 1.0
_DRIP_SECONDS: Final = 0.2


class Workspace:
    """One workspace and its HTTP server; use it with `async with`."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        clients: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.time,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`clients` maps client ids to secrets; `clock` returns seconds since the epoch."""
        self.api = Api(endpoints, clients, clock)
        self.calls: Counter[Call] = Counter()
        self._clock = clock
        self._tls = tls
        self._faults: FaultList[Call, Reply | Hang] = FaultList()
        self._released = asyncio.Event()
        self._changed = asyncio.Condition()
        self._port = HeldPort()
        self._server: uvicorn.Server | None = None

    @property
    def port(self) -> int:
        """The number of the port, 0 before it is opened."""
        return self._port.number

    @property
    def url(self) -> str:
        """The value for DATABRICKS_HOST."""
        return f"http{'s' if self._tls else ''}://{LOOPBACK}:{self.port}"

    @property
    def mints(self) -> list[Mint]:
        """The database credentials that were issued, in order."""
        return self.api.mints

    def fail(self, call: Call, fault: Reply | Hang, times: int | None = None) -> None:
        """Answer `call` with `fault`, for `times` times or until `clear_faults`."""
        self._faults.add(call, fault, times)

    def clear_faults(self) -> None:
        """Remove all faults; requests that hang continue and get their ordinary reply."""
        self._faults.clear()
        self._release()

    async def called(self, call: Call, times: int = 1) -> None:
        """Wait until `call` was made `times` times, including calls that hang or fail.

        The wait is not bounded: the caller uses `asyncio.timeout`.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.calls[call] >= times)

    async def refuse_connections(self) -> None:
        """Close all connections, and refuse new ones until `accept_connections`."""
        await self._stop_listening()
        self._port.hold()

    async def accept_connections(self) -> None:
        """Accept connections again, on the same port."""
        listener = self._port.take()
        if listener is not None:
            await self._listen(listener)

    def federation_token(self, client_id: str) -> str:
        """Return a token as an external issuer would sign it, for file-oidc and env-oidc."""
        return self.api.issuer.issue(client_id, Purpose.FEDERATION, TTL_SECONDS_MAX)

    async def __aenter__(self) -> Self:
        self._port.hold()
        await self.accept_connections()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop_listening()
        self._port.close()

    async def _answer(self, request: Request) -> Response:
        api_request = await self._parse_request(request)
        if api_request is None:
            return self._response(NOT_FOUND)
        async with self._changed:
            self.calls[api_request.call] += 1
            self._changed.notify_all()
        fault = self._faults.take(api_request.call)
        if isinstance(fault, Reply):
            return self._response(fault)
        if fault is HANG:
            await self._released.wait()
        elif fault is not None:
            return StreamingResponse(self._endless(fault), media_type="application/json")
        return self._response(self.api.answer(api_request))

    async def _endless(self, fault: Hang) -> AsyncIterator[bytes]:
        """Return a body without an end; it ends when the faults are cleared."""
        released = self._released
        part, seconds = (b" " * (1 << 16), 0.0) if fault is ENDLESS else (b" ", _DRIP_SECONDS)
        while not released.is_set():
            yield part
            await asyncio.sleep(seconds)

    def _response(self, reply: Reply) -> Response:
        date = formatdate(self._clock(), usegmt=True)
        headers = {"Date": date, **reply.headers}
        return Response(reply.body, reply.status, headers, reply.content_type)

    async def _parse_request(self, request: Request) -> ApiRequest | None:
        line = f"{request.method} {request.url.path}"
        for call in Call:
            match = call.value.fullmatch(line)
            if match is not None:
                name = "".join(filter(None, match.groups()))
                query, headers = request.query_params, request.headers
                body = await request.body()
                return ApiRequest(call, name, dict(query), dict(headers), body, self.url)
        return None

    def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    async def _listen(self, listener: socket.socket) -> None:
        routes = [Route("/{path:path}", self._answer, methods=["GET", "POST"])]
        config = uvicorn.Config(
            Starlette(routes=routes),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            date_header=False,  # `_response` sets it from `clock`
        )
        config.load()
        config.ssl = self._tls
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        # `startup` alone: `serve` would install signal handlers.
        await self._server.startup(sockets=[listener])

    async def _stop_listening(self) -> None:
        """Abort all connections. uvicorn's own shutdown would wait for requests that hang."""
        server, self._server = self._server, None
        if server is None:
            return
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        # Requests that hang continue, and find their connection closed.
        self._release()
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=_STOP_SECONDS_MAX)
