"""The admin address: health for orchestrators and metrics for scrapers, over HTTP.

For: `/startup`, `/readiness`, `/liveness`, `/metrics`. Not for: finding anything out. State
arrives as callables that answer at once, so that asking can neither wake a database that sleeps
nor restart a pod over one that is full.

Invariants: it never dials; it takes no signal and changes no logger's level; the port is free and
every connection closed when the block of `serve_admin` has ended.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from proxy.observe.metrics import EXPOSITION_CONTENT_TYPE

# Probes and one or two scrapers: more at a time is not use but abuse, and is answered with 503.
_CONNECTIONS_MAX: Final = 64
_BACKLOG: Final = 64
# Between two scrapes a connection is cheap to make anew, and must not outstay its use.
_KEEP_ALIVE_SECONDS: Final = 5
# An answer takes milliseconds; whoever has not read it by then is cut, so that drain can end.
_SHUTDOWN_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class AdminState:
    """What the admin address shows. Each callable answers at once, from memory.

    `started`: the listener has been opened (and stays true while draining). `ready`: it serves and
    is not draining. `metrics`: the exposition.
    """

    started: Callable[[], bool]
    ready: Callable[[], bool]
    metrics: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class AdminAddress:
    """Where the admin address is really served: the port is chosen when 0 was asked for."""

    host: str
    port: int


class _EmbeddedServer(uvicorn.Server):
    """uvicorn as a guest: SIGTERM and SIGINT belong to the proxy, which drains."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _verdict(good: bool) -> Response:
    return PlainTextResponse("yes\n") if good else PlainTextResponse("no\n", 503)


def admin_app(state: AdminState) -> Starlette:
    """Return the HTTP application: GET and HEAD of four paths, 404 for every other one."""

    async def startup(_request: Request) -> Response:
        return _verdict(state.started())

    async def readiness(_request: Request) -> Response:
        return _verdict(state.ready())

    async def liveness(_request: Request) -> Response:
        # The loop has come round to this line: that is all there is to being alive.
        return _verdict(True)

    async def metrics(_request: Request) -> Response:
        return Response(state.metrics(), headers={"Content-Type": EXPOSITION_CONTENT_TYPE})

    return Starlette(
        routes=[
            Route("/startup", startup),
            Route("/readiness", readiness),
            Route("/liveness", liveness),
            Route("/metrics", metrics),
        ]
    )


async def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket here, because uvicorn ends the process when it cannot."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _kind, _protocol, _name, address = found[0]
    return socket.create_server(address, family=family, backlog=_BACKLOG)


def _embedded(app: Starlette) -> _EmbeddedServer:
    return _EmbeddedServer(
        uvicorn.Config(
            app,
            interface="asgi3",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=_CONNECTIONS_MAX,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )


@asynccontextmanager
async def serve_admin(state: AdminState, *, host: str, port: int) -> AsyncIterator[AdminAddress]:
    """Serve the admin address while the block runs; port 0 takes a free one.

    Raises:
        OSError: before the block begins, when the address cannot be listened on.
    """
    with closing(await _listen(host, port)) as listener:
        bound_host, bound_port = listener.getsockname()[:2]
        server = _embedded(admin_app(state))
        # Not a TaskGroup: that would wrap whatever the block raises into an ExceptionGroup. The
        # task cannot be lost, because leaving the block waits for it.
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="admin")
        try:
            yield AdminAddress(bound_host, bound_port)
        finally:
            server.should_exit = True
            await serving
