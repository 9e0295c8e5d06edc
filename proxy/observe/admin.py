"""The admin address: health for orchestrators, metrics for scrapers, a page for people, over HTTP.

For: `/startup`, `/readiness`, `/liveness`, `/metrics`, `/status`, `/history`, the page at `/`,
`/sessions`, `/lookup`, `/reconnect`, `/reload`, `/quitquitquit`. Not for: finding anything out. The
proxy's state (`AdminState`) answers from memory, so that a probe can neither resume a suspended
database nor restart a pod because a database is full.

Invariants: it never opens an upstream connection, handles no signal and changes no logger's level.
Sessions do not depend on it: if its server fails, the address is opened again. After the block of
`serve_admin` the port is free and every connection is closed.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from proxy.addresses import is_loopback
from proxy.blocking import BlockingCalls
from proxy.errors import ProxyError
from proxy.observe.admin_access import (
    BoundedProtocol,
    HostCheck,
    is_from_this_machine,
)
from proxy.observe.admin_state import AdminState, ReloadResult
from proxy.observe.health import health_of
from proxy.observe.logs import get_logger
from proxy.observe.metrics import EXPOSITION_CONTENT_TYPE
from proxy.observe.session_page import SESSIONS_PAGE_MAX
from proxy.observe.status_page import FILES, PAGE_HEADERS

_BACKLOG: Final = 64
# For the request line and the headers, which are some hundreds of bytes. No body is ever read.
REQUEST_BYTES_MAX: Final = 16 * 1024
# Scrapes are rare and a new connection is cheap, so an idle one is closed soon.
_KEEP_ALIVE_SECONDS: Final = 5
# A response takes milliseconds. A client that has not read it by then is cut, so that a drain ends.
_SHUTDOWN_SECONDS: Final = 2
# Shorter than the period of a probe, so that a failure restarts no pod; long enough for a port that
# stays in use.
_REOPEN_SECONDS: Final = 1.0

_LOOK_UP_SECONDS_MAX: Final = 15.0  # for the host, which may be a name

_SESSIONS_PAGE: Final = 100  # without `limit`
_ID_DIGITS_MAX: Final = 18

# Responses show the present, to the client that requested them.
_EVERY_RESPONSE: Final = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]

_log = get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class AdminAddress:
    """The address that is served, with the actual port if 0 was configured."""

    host: str
    port: int


class _EmbeddedServer(uvicorn.Server):
    """uvicorn without its signal handlers: SIGTERM and SIGINT belong to the proxy, which drains."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _verdict(good: bool) -> Response:
    return PlainTextResponse("yes\n") if good else PlainTextResponse("no\n", 503)


def admin_app(state: AdminState, *, quit_allowed: bool) -> Starlette:
    """Return the HTTP application: GET and HEAD, and some POSTs; 404 for every other path."""
    turn = asyncio.Lock()

    async def startup(_request: Request) -> Response:
        return _verdict(state.started)

    async def readiness(_request: Request) -> Response:
        return _verdict(state.ready)

    async def liveness(_request: Request) -> Response:
        # The event loop has run this line, which is all that liveness means.
        return _verdict(True)

    async def metrics(_request: Request) -> Response:
        return Response(state.exposition(), headers={"Content-Type": EXPOSITION_CONTENT_TYPE})

    async def status(_request: Request) -> Response:
        shown = state.status()
        return JSONResponse({"health": health_of(shown).as_dict(), **shown.as_dict()})

    async def history(_request: Request) -> Response:
        return JSONResponse(state.history.as_dict())

    def route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        return Route(path, _guarded(endpoint, state.metrics.admin_failed), methods=[method])

    routes = [
        *(route(path, _page(*file)) for path, file in FILES.items()),
        route("/startup", startup),
        route("/readiness", readiness),
        route("/liveness", liveness),
        route("/metrics", _report(metrics, state, turn)),
        route("/status", _report(status, state, turn)),
        route("/history", history),
        route("/lookup", _from_here(partial(_look_up, state))),
        route("/sessions", _from_here(_in_turn(partial(_sessions, state), turn))),
        route("/reconnect", _from_here(partial(_reconnect, state)), "POST"),
        route("/reload", _from_here(partial(_reload, state)), "POST"),
    ]
    if quit_allowed:
        routes += [
            route("/quitquitquit", _from_here(partial(_quit, state)), "POST"),
            route("/sessions/{ID}", _from_here(partial(_end_session, state)), "DELETE"),
        ]
    return Starlette(routes=routes)


def _report(endpoint: Endpoint, state: AdminState, turn: asyncio.Lock) -> Endpoint:
    """Return the endpoint such that it shows what the proxy's other processes have counted."""

    async def report(request: Request) -> Response:
        await state.refresh()
        return await _in_turn(endpoint, turn)(request)

    return report


def _in_turn(endpoint: Endpoint, turn: asyncio.Lock) -> Endpoint:
    """Return the endpoint such that one of them runs in a turn of the event loop.

    It takes milliseconds. Clients that ask for it thousands of times must not delay a probe, which
    takes some turns.
    """

    async def in_turn(request: Request) -> Response:
        async with turn:
            if await request.is_disconnected():
                return Response()
            response = await endpoint(request)
            await asyncio.sleep(0)
            return response

    return in_turn


def _page(content: bytes, media_type: str) -> Endpoint:
    async def page(_request: Request) -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=media_type)

    return page


def _from_here(endpoint: Endpoint) -> Endpoint:
    """Return the endpoint such that it answers programs on this machine alone."""

    async def from_here(request: Request) -> Response:
        if not is_from_this_machine(request):
            return PlainTextResponse("only from this machine\n", 403)
        return await endpoint(request)

    return from_here


async def _quit(state: AdminState, _request: Request) -> Response:
    _log.info("asked to quit")
    state.quit()
    return PlainTextResponse("draining\n", 202)


async def _reconnect(state: AdminState, _request: Request) -> Response:
    """Retire the pooled sessions. It dials nothing and ends no client's session."""
    _log.info("asked to reconnect")
    if await state.reconnect():
        return PlainTextResponse("pooled sessions are retired\n")
    return PlainTextResponse("a worker did not answer: its pooled sessions are kept\n", 503)


async def _sessions(state: AdminState, request: Request) -> Response:
    """Answer who is connected: a page of it."""
    asked = request.query_params
    try:
        after, limit = int(asked.get("after", 0)), int(asked.get("limit", _SESSIONS_PAGE))
    except ValueError:
        return PlainTextResponse("after and limit are numbers\n", 400)
    limit = max(1, min(limit, SESSIONS_PAGE_MAX))
    return JSONResponse(await state.sessions(after, limit, processes="processes" in asked))


async def _end_session(state: AdminState, request: Request) -> Response:
    """End a session: with 57P01 if it is idle, else its query is cancelled and it is closed."""
    number = request.path_params["ID"]
    if not (number.isdecimal() and len(number) <= _ID_DIGITS_MAX):
        return PlainTextResponse("a session's id is a number\n", 404)
    _log.info("asked to end a session", session=int(number))
    if await state.end_session(int(number)):
        return PlainTextResponse("ending\n", 202)
    return PlainTextResponse("there is no such session\n", 404)


_RELOAD_STATUS: Final = {
    ReloadResult.RELOADED: 200,
    ReloadResult.PENDING: 202,
    ReloadResult.NOT_SERVING: 409,
    ReloadResult.REFUSED: 422,
    ReloadResult.FAILED: 503,
}


async def _reload(state: AdminState, _request: Request) -> Response:
    """Reload. The answer has keys, and the problems that the log has: never a value of a secret."""
    _log.info("asked to reload")
    outcome = await state.reload_configuration()
    return JSONResponse(asdict(outcome), _RELOAD_STATUS[outcome.result])


async def _look_up(state: AdminState, request: Request) -> Response:
    """Answer where a shard key leads; a web page could find out which keys exist."""
    try:
        facts = state.look_up(request.query_params.get("key", ""))
    except ProxyError as error:
        answer = error.response()
        words = {"sqlstate": answer.sqlstate, "reason": error.reason, "error": answer.message}
        return JSONResponse({"ok": False, **words, "hint": answer.text(b"H")})
    return JSONResponse({"ok": True, **facts})


def _guarded(endpoint: Endpoint, failed: Callable[[], None]) -> Endpoint:
    """Return the endpoint such that an exception is answered with 500, logged and counted."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception:
            # A bug must not end the address that the probes use.
            failed()
            _log.exception("admin request failed", path=request.url.path)
            return PlainTextResponse("internal error; see the log\n", 500)

    return guarded


async def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. uvicorn would end the process if it could not."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await BlockingCalls("dns").run(look_up, _LOOK_UP_SECONDS_MAX)
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
            headers=_EVERY_RESPONSE,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )


class _AdminServer:
    """Runs one uvicorn server at a time. If it fails, another one is started on the address."""

    def __init__(self, app: ASGIApp, restarted: Callable[[], None]) -> None:
        self._app = app
        self._restarted = restarted
        self._server = _embedded(app)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Make `run` return."""
        self._stopping.set()
        self._server.should_exit = True

    async def run(self, listener: socket.socket) -> None:
        """Serve until `stop` is called. Log and count each failure of a server."""
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
        _log.error("admin address died; sessions continue", exc_info=error)
        self._restarted()
        if self._server.started:
            await self._server.shutdown()
        self._server = _embedded(self._app)

    async def _reopen(self, host: str, port: int) -> socket.socket | None:
        """Return a new socket on the same address as soon as it is free; None after `stop`."""
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _REOPEN_SECONDS)
            try:
                return await _listen(host, port)
            except OSError as error:  # another program has the port: retry until it is free
                _log.debug("admin address not reopened", error=error.strerror)
        return None


@asynccontextmanager
async def serve_admin(
    state: AdminState, *, host: str, port: int, quit_allowed: bool = False
) -> AsyncIterator[AdminAddress]:
    """Serve the admin address while the block runs. Port 0 takes a free one.

    Raises:
        OSError: before the block starts, if the address cannot be opened; its text names the key.
    """
    try:
        opened = await _listen(host, port)
    except OSError as error:
        key = "admin.port" if error.errno == errno.EADDRINUSE else "admin.host"
        text = f"{key}: {host} port {port}: {error.strerror or error}"
        raise OSError(error.errno, text) from error
    with closing(opened) as listener:
        bound_host, bound_port = listener.getsockname()[:2]
        app: ASGIApp = admin_app(state, quit_allowed=quit_allowed)
        app = HostCheck(app, own_name=host, refuses=is_loopback(bound_host))
        admin = _AdminServer(app, state.metrics.admin_restarted)
        # Not a TaskGroup, which would wrap the block's exceptions in an ExceptionGroup. The task
        # cannot be lost, because leaving the block waits for it.
        running = asyncio.create_task(admin.run(listener), name="admin")
        try:
            yield AdminAddress(bound_host, bound_port)
        finally:
            admin.stop()
            await running
