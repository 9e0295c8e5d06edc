"""The listener: accepts clients, and serves each connection in a task of its own.

Sessions are bounded by `max_connections` (`slots`). Connections that are starting, and cancel
requests, have a bound of their own: they must neither use up slots nor be refused for lack of one
(W42). Over it a new connection takes the place of one that is slow to start; if there is none, the
new one is refused. One that is refused, or is closed and has sent nothing, gets 53300, as from
PostgreSQL when it cannot start a backend; or 53000, where the limit of open files is the bound.
"""

import asyncio
import itertools
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, cast

from proxy.config import ConfigurationError, ListenSettings, Problem
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import connection_log, get_logger
from proxy.observe.metrics import Metrics
from proxy.observe.session_page import SessionPage
from proxy.session.drain import OpenSession, OpenSessions
from proxy.session.end_reason import EndReason
from proxy.session.listen_sockets import ACCEPT_BACKLOG, Address, open_sockets
from proxy.session.memory_trim import MemoryTrim
from proxy.session.session_rows import page_of
from proxy.session.slots import SlotSource
from proxy.transport.self_signed import self_signed_context
from proxy.transport.sockets import inherits_options
from proxy.transport.stream import StartupStream
from proxy.transport.tls import server_context

# Connections that may be starting at a time. Clients that reconnect together are some hundreds.
STARTING_MAX: Final = 2000
# From this number on each takes the place of one that is slow to start. None is slow in its first
# moments: until then there is room for as many again.
FLOOD_FROM: Final = 1000
# A flood is logged once in this time.
STARTING_WARNING_SECONDS: Final = 60.0

_log = get_logger(__name__)


Serve = Callable[[StartupStream, OpenSession], Coroutine[None, None, None]]
"""Serves a connection from accept to close, and sets its stage in the register."""


class _AcceptedStream(StartupStream):
    """A client's stream, which calls `connected` with itself."""

    __slots__ = ("_connected", "_has_options")

    def __init__(self, connected: Callable[[StartupStream], None], *, has_options: bool) -> None:
        """`has_options`: its socket has those of a TCP connection already."""
        super().__init__()
        self._connected = connected
        self._has_options = has_options

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._has_options:
            self.transport = cast(asyncio.Transport, transport)
        else:
            super().connection_made(transport)
        self._connected(self)


def listener_tls(settings: ListenSettings) -> ssl.SSLContext | None:
    """Return the context for clients that request TLS, if the listener has a certificate.

    Raises ConfigurationError for files that cannot be used.
    """
    if settings.tls == "self-signed":
        return self_signed_context()
    if not settings.tls_certificate:
        return None
    try:
        return server_context(settings.tls_certificate, settings.tls_key)
    except OSError as error:
        text = f"cannot be used with its key: {error.strerror or error}"
        raise ConfigurationError([Problem("listen.tls_certificate", text)]) from error


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
        self.open_sessions = OpenSessions(self._memory_trim.session_ended)
        self._ids = itertools.count(1)
        self._starting_max = starting_max
        # For a client that has sent nothing: a new one, or one that is closed in its place.
        self._too_many = _too_many(starting_max)
        self._refusal = self._too_many.response().encode()
        # A burst that waits in the backlog is accepted at once, before anything of it can end.
        self._backlog = min(ACCEPT_BACKLOG, starting_max)
        self._flood_logged_at: float | None = None
        self._servers: list[asyncio.Server] = []
        self._unix_path: Path | None = None

    @asynccontextmanager
    async def accepting(self) -> AsyncIterator[Sequence[Address]]:
        """Accept while the block runs, and yield the addresses; then end what is left.

        Raises OSError when one cannot be listened on.
        """
        try:
            loop = asyncio.get_running_loop()
            listening = open_sockets(self._settings)
            self._unix_path = listening.unix_path
            for sock in listening.tcp:
                accepted = partial(self._accepted, has_options=inherits_options(sock))
                server = await loop.create_server(accepted, sock=sock, backlog=self._backlog)
                self._servers.append(server)
            if listening.unix is not None:
                server = await loop.create_unix_server(
                    self._accepted, sock=listening.unix, backlog=self._backlog
                )
                self._servers.append(server)
            yield listening.addresses
        finally:
            await self._end()

    @asynccontextmanager
    async def adopting(self) -> AsyncIterator[None]:
        """Serve the connections passed to `adopt` while the block runs; then end what is left."""
        try:
            yield
        finally:
            await self._end()

    def adopt(self, sock: socket.socket, number: int, ended: Callable[[], None]) -> None:
        """Serve a connection that another process has accepted; call `ended` when it is over.

        `number` is its id in the log.
        """
        if self._is_flooded():
            with suppress(OSError):  # the client has disconnected
                sock.send(self._refusal)
            sock.close()
            ended()
            return
        task = self.open_sessions.start(partial(self._run_adopted, sock), number)
        task.add_done_callback(lambda _: ended())

    async def drain(self, seconds: float) -> int:
        """Stop accepting, and end all sessions within `seconds`. Return how many were cut.

        A second call ends what is left within its own time; both return how many were cut in all.
        """
        self._close()
        return await self.open_sessions.drain(seconds)

    async def sessions(self, after: int, limit: int) -> SessionPage:
        """Return open connections whose id is higher than `after`."""
        return await page_of(self.open_sessions, after, limit)

    async def end_session(self, number: int) -> bool:
        """End the connection that has this id. Return whether there is one."""
        return self.open_sessions.end(number)

    async def _end(self) -> None:
        await self.drain(0)
        await self.open_sessions.wait_closed()
        self._memory_trim.close()

    def _close(self) -> None:
        while self._servers:
            self._servers.pop().close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None

    def _accepted(self, *, has_options: bool = False) -> StartupStream:
        return _AcceptedStream(self._connected, has_options=has_options)

    def _connected(self, stream: StartupStream) -> None:
        """Serve a connection; abort one that was in the backlog when the listener closed."""
        if not self._servers:
            self._metrics.startup_failed(ErrorKind.SHUTTING_DOWN.value.reason)
            stream.transport.abort()
        elif self._is_flooded():
            stream.write(self._refusal)
            stream.transport.close()
        else:
            self.open_sessions.start(partial(self._run, stream), next(self._ids))

    def _is_flooded(self) -> bool:
        """Return whether there is no room for one more that starts. Count each that is closed."""
        starting = len(self.open_sessions) - self._slots.used
        if starting < min(FLOOD_FROM, self._starting_max):
            return False
        made_room = self.open_sessions.close_slow(self._refusal)
        if made_room or starting >= self._starting_max:
            self._metrics.session_refused(self._too_many.reason, self._too_many.kind.value.sqlstate)
            self._warn_of_flood(starting)
        return not made_room and starting >= self._starting_max

    def _warn_of_flood(self, starting: int) -> None:
        """Log that connections are cut, once in `STARTING_WARNING_SECONDS`."""
        now = asyncio.get_running_loop().time()
        logged_at = self._flood_logged_at
        if logged_at is None or now - logged_at >= STARTING_WARNING_SECONDS:
            self._flood_logged_at = now
            _log.warning(
                "connections are cut: too many are starting",
                reason=self._too_many.reason,
                starting=starting,
            )

    async def _run_adopted(self, sock: socket.socket, entry: OpenSession) -> None:
        with suppress(OSError):  # the client has disconnected
            await self._run(await _stream_of(sock), entry)

    async def _run(self, stream: StartupStream, entry: OpenSession) -> None:
        """Serve a connection in its task. No failure leaves it."""
        entry.transport = transport = stream.transport
        with connection_log(entry.number), self._metrics.connection():
            try:
                entry.stream = stream
                serving = self._serve(stream, entry)
                del stream  # only the startup needs it, and a session may go on for days
                await serving
            except Exception:
                # A bug of ours must cost one session, not all of them.
                self._metrics.session_ended(EndReason.INTERNAL_ERROR)
                _log.exception("session failed")
            finally:
                transport.abort()  # it is closed already, unless the session was cut


def _too_many(starting_max: int) -> ProxyError:
    """Return the error for a client that has sent nothing, where too many others are starting."""
    if starting_max < FLOOD_FROM:
        detail = f"the proxy's limit of open files allows {starting_max} to start at a time"
        return ProxyError(ErrorKind.TOO_FEW_FILES, detail)
    return ProxyError(ErrorKind.TOO_MANY_STARTING, f"at least {FLOOD_FROM} others are starting")


async def _stream_of(sock: socket.socket) -> StartupStream:
    """Return the stream of an accepted socket. Raises OSError, and closes the socket then."""
    try:
        _, stream = await asyncio.get_running_loop().connect_accepted_socket(StartupStream, sock)
    except OSError:
        sock.close()
        raise
    return stream
