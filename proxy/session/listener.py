"""Accepting clients: one task a connection, bounded in number, ended together.

`max_connections` counts sessions, from the StartupMessage on: a client over it is told so (W44).
Connections that are still starting, and cancel requests, have a bound of their own and are closed
without a word over it: they must neither fill the slots nor be refused by them (W42).
"""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from proxy.config import ListenSettings
from proxy.observe.logs import connection_log, get_logger
from proxy.observe.metrics import Metrics
from proxy.session.drain import AcceptPeriod, OpenSession, OpenSessions
from proxy.session.end_reason import EndReason
from proxy.session.memory_trim import MemoryTrim
from proxy.session.slots import SlotSource
from proxy.transport.sockets import listen_unix
from proxy.transport.stream import StartupStream

# A burst of reconnecting clients is some hundreds; more than this is a flood.
STARTING_MAX: Final = 1000
ACCEPT_BACKLOG: Final = 1024
# A flood is one line in so long a time.
STARTING_WARNING_SECONDS: Final = 60.0
TOO_MANY_STARTING: Final = "too_many_starting"  # the word for it in the metrics

_log = get_logger(__name__)


def socket_name(port: int) -> str:
    """Return the name that drivers look for in a directory, for a server on this port."""
    return f".s.PGSQL.{port}"


Serve = Callable[[StartupStream, OpenSession], Coroutine[None, None, None]]
"""Serves a connection from accept to close, and enters its stages in the register."""


class _AcceptedStream(StartupStream):
    """A client's stream, which calls `connected` with itself."""

    __slots__ = ("_connected",)

    def __init__(self, connected: Callable[[StartupStream], None]) -> None:
        super().__init__()
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connected(self)


class Listener:
    """Accepts connections and serves each in a task of its own, until drained."""

    def __init__(
        self,
        settings: ListenSettings,
        slots: SlotSource,
        metrics: Metrics,
        serve: Serve,
        *,
        memory_trim: MemoryTrim | None = None,
        starting_max: int = STARTING_MAX,
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._metrics = metrics
        self._serve = serve
        self._memory_trim = memory_trim or MemoryTrim()
        self._open_sessions = OpenSessions(self._memory_trim.session_ended)
        self._accept_period = AcceptPeriod()
        self._ids = itertools.count(1)
        self._starting_max = starting_max
        self._flood_logged_at: float | None = None
        self._servers: list[asyncio.Server] = []
        self._unix_path: Path | None = None

    @asynccontextmanager
    async def accepting(self) -> AsyncIterator[tuple[str, int]]:
        """Accept while the block runs, and give the address; then end what is left.

        Without TCP the address is the directory of the unix socket, as drivers take it for a host.
        Raises OSError when the address cannot be listened on.
        """
        # Not a TaskGroup: that would wrap whatever the block raises into an ExceptionGroup. No
        # task is lost, because leaving the block waits for them all.
        try:
            host, port = self._settings.host, self._settings.port
            if host:
                host, port = await self._open_tcp()
            if directory := self._settings.unix_socket_directory:
                await self._open_unix(Path(directory) / socket_name(port))
            yield host or directory, port
        finally:
            await self._end()

    @asynccontextmanager
    async def adopting(self) -> AsyncIterator[None]:
        """Serve what `adopt` is given while the block runs; then end what is left."""
        try:
            yield
        finally:
            await self._end()

    def adopt(self, sock: socket.socket, number: int, ended: Callable[[], None]) -> None:
        """Serve a connection that another process has accepted, and call `ended` after it.

        `number` is the id of its lines in the log.
        """
        if self._is_flooded():
            sock.close()
            ended()
            return
        task = self._open_sessions.start(partial(self._run_adopted, sock, number))
        task.add_done_callback(lambda _: ended())

    async def drain(self, seconds: float, *, accept_seconds: float = 0) -> int:
        """Accept for `accept_seconds` more, then end all sessions; return how many were cut.

        From then on the sessions have `seconds`. Called again meanwhile, it hastens what the first
        call does; both return how many were cut in all.
        """
        await self._accept_period.wait(accept_seconds)
        self._close()
        return await self._open_sessions.drain(seconds)

    async def _end(self) -> None:
        await self.drain(0)
        await self._open_sessions.wait_closed()
        self._memory_trim.close()

    def _close(self) -> None:
        while self._servers:
            self._servers.pop().close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None

    async def _open_tcp(self) -> tuple[str, int]:
        settings = self._settings
        server = await asyncio.get_running_loop().create_server(
            self._accepted, settings.host, settings.port, backlog=ACCEPT_BACKLOG
        )
        self._servers.append(server)
        host, port, *_ = server.sockets[0].getsockname()
        return host, port

    async def _open_unix(self, path: Path) -> None:
        sock = listen_unix(path, int(self._settings.unix_socket_mode, 8), ACCEPT_BACKLOG)
        self._unix_path = path
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_unix_server(self._accepted, sock=sock))

    def _accepted(self) -> StartupStream:
        return _AcceptedStream(self._connected)

    def _connected(self, stream: StartupStream) -> None:
        """Serve a connection; one that comes out of the backlog after the close is cut."""
        if not self._servers:
            self._metrics.startup_failed(TOO_MANY_STARTING)
        elif not self._is_flooded():
            self._open_sessions.start(partial(self._run, stream, next(self._ids)))
            return
        stream.transport.abort()

    def _is_flooded(self) -> bool:
        """Return whether one more would be too many that are starting; then it is counted."""
        starting = len(self._open_sessions) - self._slots.taken
        if starting < self._starting_max:
            return False
        self._metrics.startup_failed(TOO_MANY_STARTING)
        self._warn_of_flood(starting)
        return True

    def _warn_of_flood(self, starting: int) -> None:
        """Log from time to time that connections are cut; the metrics count them."""
        now = asyncio.get_running_loop().time()
        logged_at = self._flood_logged_at
        if logged_at is None or now - logged_at >= STARTING_WARNING_SECONDS:
            self._flood_logged_at = now
            _log.warning("connections are cut: too many are starting", starting=starting)

    async def _run_adopted(self, sock: socket.socket, number: int, entry: OpenSession) -> None:
        with suppress(OSError):  # the client has gone
            await self._run(await _stream_of(sock), number, entry)

    async def _run(self, stream: StartupStream, number: int, entry: OpenSession) -> None:
        """Serve a connection in its task: no failure leaves it."""
        transport = stream.transport
        with connection_log(number), self._metrics.connection():
            try:
                serving = self._serve(stream, entry)
                del stream  # only a session that starts needs it, which may go on for days
                await serving
            except Exception:
                # A bug of ours must cost one session, not all of them.
                self._metrics.session_ended(EndReason.INTERNAL_ERROR)
                _log.exception("session failed")
            finally:
                transport.abort()  # it is closed already, unless the session was cut


async def _stream_of(sock: socket.socket) -> StartupStream:
    """Return a connection that was accepted elsewhere. Raises OSError, and closes the socket."""
    try:
        _, stream = await asyncio.get_running_loop().connect_accepted_socket(StartupStream, sock)
    except OSError:
        sock.close()
        raise
    return stream
