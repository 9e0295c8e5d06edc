"""The admin address: health for orchestrators, metrics for scrapers, a page for people, over HTTP.

For: `/startup`, `/readiness`, `/liveness`, `/metrics`, `/status`, `/`, `/quitquitquit`. Not for:
finding anything out. State arrives as callables that answer at once, so that asking can neither
wake a database that sleeps nor restart a pod over one that is full.

Invariants: it never dials; it takes no signal and changes no logger's level; sessions do not depend
on it, and when it dies it is opened anew; the port is free and every connection closed when the
block of `serve_admin` has ended.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from proxy.addresses import is_loopback
from proxy.observe.admin_access import (
    CONNECTIONS_MAX,
    BoundedProtocol,
    HostCheck,
    is_from_this_machine,
)
from proxy.observe.logs import get_logger
from proxy.observe.metrics import EXPOSITION_CONTENT_TYPE, Metrics
from proxy.observe.status import LifecycleStatus, Status
from proxy.observe.status_page import PAGE, PAGE_HEADERS

_BACKLOG: Final = 64
# A request's line and headers; a browser's are some hundreds of bytes. No body is ever read.
REQUEST_BYTES_MAX: Final = 16 * 1024
# Between two scrapes a connection is cheap to make anew, and must not outstay its use.
_KEEP_ALIVE_SECONDS: Final = 5
# An answer takes milliseconds; whoever has not read it by then is cut, so that drain can end.
_SHUTDOWN_SECONDS: Final = 2
# Shorter than the period of a probe, so that a death costs no pod; a port that is gone for good is
# not asked for without rest.
_REOPEN_SECONDS: Final = 1.0

# What is served is of now, and is nobody's but the one's who asked.
_EVERY_ANSWER: Final = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]

_log = get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class AdminState(Protocol):
    """What the admin address shows of a proxy, and what it asks of it.

    Every member but `refresh` answers at once, from memory.
    """

    @property
    def lifecycle(self) -> LifecycleStatus:
        """Whether the proxy starts, serves or drains."""

    @property
    def ready(self) -> bool:
        """Whether the proxy serves and does not drain."""

    @property
    def metrics(self) -> Metrics:
        """Counts errors of the admin address itself."""

    async def refresh(self) -> None:
        """Fetch what the proxy's other processes have counted, for `exposition` and `status`."""

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus's text format."""

    def status(self) -> Status:
        """Return what `/status` shows."""

    def quit(self) -> None:
        """Ask the proxy to drain and end."""


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


def admin_app(state: AdminState, *, quit_allowed: bool) -> Starlette:
    """Return the HTTP application: GET and HEAD, and one POST; 404 for every other path."""

    async def startup(_request: Request) -> Response:
        return _verdict(state.lifecycle.started)

    async def readiness(_request: Request) -> Response:
        return _verdict(state.ready)

    async def liveness(_request: Request) -> Response:
        # The event loop has run this line, which is all that liveness means.
        return _verdict(True)

    async def metrics(_request: Request) -> Response:
        await state.refresh()
        return Response(state.exposition(), headers={"Content-Type": EXPOSITION_CONTENT_TYPE})

    async def status(_request: Request) -> Response:
        await state.refresh()
        return JSONResponse(state.status().as_dict())

    async def page(_request: Request) -> Response:
        return Response(PAGE, headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")

    async def quitquitquit(request: Request) -> Response:
        if not is_from_this_machine(request):
            return PlainTextResponse("only from this machine\n", 403)
        _log.info("asked to quit")
        state.quit()
        return PlainTextResponse("draining\n", 202)

    def route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        return Route(path, _guarded(endpoint, state.metrics.admin_failed), methods=[method])

    routes = [
        route("/", page),
        route("/startup", startup),
        route("/readiness", readiness),
        route("/liveness", liveness),
        route("/metrics", metrics),
        route("/status", status),
    ]
    if quit_allowed:
        routes.append(route("/quitquitquit", quitquitquit, "POST"))
    return Starlette(routes=routes)


def _guarded(endpoint: Endpoint, failed: Callable[[], None]) -> Endpoint:
    """Answer 500 for what goes wrong in an endpoint; log and count it."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception:
            # A bug of ours must not end the address that probes look at.
            failed()
            _log.exception("admin request failed", path=request.url.path)
            return PlainTextResponse("internal error; see the log\n", 500)

    return guarded


async def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket here, because uvicorn ends the process when it cannot."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _kind, _protocol, _name, address = found[0]
    return socket.create_server(address, family=family, backlog=_BACKLOG)


def _embedded(app: ASGIApp) -> _EmbeddedServer:
    return _EmbeddedServer(
        uvicorn.Config(
            app,
            interface="asgi3",
            http=BoundedProtocol,
            h11_max_incomplete_event_size=REQUEST_BYTES_MAX,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            headers=_EVERY_ANSWER,
            backlog=_BACKLOG,
            limit_concurrency=CONNECTIONS_MAX + 1,  # uvicorn refuses what reaches its limit
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )


class _AdminServer:
    """The server that serves now. When one dies, the next takes its address."""

    def __init__(self, app: ASGIApp, restarted: Callable[[], None]) -> None:
        self._app = app
        self._restarted = restarted
        self._server = _embedded(app)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()
        self._server.should_exit = True

    async def run(self, listener: socket.socket) -> None:
        """Serve until told to end; what kills a server is logged and counted."""
        host, port = listener.getsockname()[:2]
        current: socket.socket | None = listener
        while current is not None:
            serving = self._server.serve(sockets=[current])
            served = asyncio.create_task(serving, name="admin server")
            await asyncio.wait([served])
            with closing(current):
                if self._stopping.is_set():
                    return
                await self._log_death(served)
            current = await self._reopen(host, port)

    async def _log_death(self, served: asyncio.Task[None]) -> None:
        error = None if served.cancelled() else served.exception()
        _log.error("admin address died; sessions go on", exc_info=error)
        self._restarted()
        if self._server.started:
            await self._server.shutdown()
        self._server = _embedded(self._app)

    async def _reopen(self, host: str, port: int) -> socket.socket | None:
        """Return a socket on the same address as soon as there is one; None once it is to end."""
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _REOPEN_SECONDS)
            try:
                return await _listen(host, port)
            except OSError as error:  # another program took it: until it lets go
                _log.debug("admin address not opened anew", error=error.strerror)
        return None


@asynccontextmanager
async def serve_admin(
    state: AdminState, *, host: str, port: int, quit_allowed: bool = False
) -> AsyncIterator[AdminAddress]:
    """Serve the admin address while the block runs; port 0 takes a free one.

    Raises:
        OSError: before the block begins, when the address cannot be listened on.
    """
    with closing(await _listen(host, port)) as listener:
        bound_host, bound_port = listener.getsockname()[:2]
        app: ASGIApp = admin_app(state, quit_allowed=quit_allowed)
        if is_loopback(bound_host):
            app = HostCheck(app, own_name=host)
        admin = _AdminServer(app, state.metrics.admin_restarted)
        # Not a TaskGroup: that would wrap whatever the block raises into an ExceptionGroup. The
        # task cannot be lost, because leaving the block waits for it.
        running = asyncio.create_task(admin.run(listener), name="admin")
        try:
            yield AdminAddress(bound_host, bound_port)
        finally:
            admin.stop()
            await running
