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
from pathlib import Path
from typing import Final

from proxy.config import ListenSettings
from proxy.observe.logs import connection_log, get_logger
from proxy.observe.metrics import Metrics
from proxy.session.drain import OpenSessions
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
# Who connected just before the listener closed gets so long to say what it wants, and to be told.
SILENT_SECONDS: Final = 1.0
# Who was told that the session ends gets so long to be sent it: nothing else keeps it from a cut.
FLUSH_SECONDS: Final = 0.1
TOO_MANY_STARTING: Final = "too_many_starting"  # the word for it in the metrics

_log = get_logger(__name__)


def socket_name(port: int) -> str:
    """Return the name that drivers look for in a directory, for a server on this port."""
    return f".s.PGSQL.{port}"


class _AcceptedStream(StartupStream):
    """A client's link, which tells when it is connected."""

    __slots__ = ("_connected",)

    def __init__(self, connected: Callable[[StartupStream], None]) -> None:
        super().__init__()
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connected = self._connected
        del self._connected  # it is asked once, and the link lives as long as the session
        connected(self)


class Listener:
    """Accepts connections and serves each in a task of its own, until drained."""

    def __init__(
        self,
        settings: ListenSettings,
        slots: SlotSource,
        metrics: Metrics,
        serve: Callable[[StartupStream], Coroutine[None, None, None]],
        open_sessions: OpenSessions | None = None,
        *,
        memory_trim: MemoryTrim | None = None,
        starting_max: int = STARTING_MAX,
    ) -> None:
        """`serve` registers its session in `open_sessions`; others are waited for, then cut."""
        self._settings = settings
        self._slots = slots
        self._metrics = metrics
        self._serve = serve
        self._open_sessions = open_sessions or OpenSessions()
        self._hastened = asyncio.Event()  # somebody has called drain again
        self._ids = itertools.count(1)
        self._sessions: set[asyncio.Task[None]] = set()
        self._ended = self._session_ended  # bound once, not for each session
        self._memory_trim = memory_trim or MemoryTrim()
        self._starting_max = starting_max
        self._flood_logged_at: float | None = None
        self._cut_sessions: set[asyncio.Task[None]] = set()
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
        """Serve a connection that another process has accepted, and call `ended` behind it.

        `number` is what its lines in the log are known by.
        """
        if self._is_flooded():
            sock.close()
            ended()
        else:
            self._begin(self._run_adopted(sock, number)).add_done_callback(lambda _: ended())

    async def _end(self) -> None:
        await self.drain(0)
        while self._sessions:  # ends: no session begins any more, and all are cancelled
            await asyncio.wait(self._sessions)
        self._memory_trim.close()

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
        """Begin to serve a connection; one that comes out of the backlog after the close is cut."""
        if not self._servers:
            self._metrics.startup_failed(TOO_MANY_STARTING)
        elif not self._is_flooded():
            self._begin(self._run(stream, next(self._ids)))
            return
        stream.transport.abort()

    def _is_flooded(self) -> bool:
        """Tell whether one more would be too many that are starting; then it is counted."""
        starting = len(self._sessions) - self._slots.taken
        if starting < self._starting_max:
            return False
        self._metrics.startup_failed(TOO_MANY_STARTING)
        self._warn_of_flood(starting)
        return True

    def _begin(self, life: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(life, name="session")
        self._sessions.add(task)
        task.add_done_callback(self._ended)
        return task

    def _session_ended(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._memory_trim.session_ended()

    def _warn_of_flood(self, starting: int) -> None:
        """Say once in a while that connections are cut; the metrics count them."""
        now = asyncio.get_running_loop().time()
        logged_at = self._flood_logged_at
        if logged_at is None or now - logged_at >= STARTING_WARNING_SECONDS:
            self._flood_logged_at = now
            _log.warning("connections are cut: too many are starting", starting=starting)

    async def drain(self, seconds: float, *, accept_seconds: float = 0) -> int:
        """Go on accepting for `accept_seconds`, then end all sessions; return how many were cut.

        From then on the sessions have `seconds`: an idle one is ended with 57P01, after half of the
        time also in the midst of a client's hurry; a busy one when it becomes idle; what is left
        is cut. Called again meanwhile, it does with the shorter times what is left to do; both
        calls return how many were cut in all.
        """
        if accept_seconds and not self._hastened.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(accept_seconds):
                    await self._hastened.wait()
        self._hastened.set()
        self._close()
        self._open_sessions.end()
        if not self._sessions:
            return len(self._cut_sessions)
        if not seconds:
            self._open_sessions.skip_grace()
        else:
            _log.info("sessions are ending", **self._left(), idle=self._open_sessions.idle_count())
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(min(SILENT_SECONDS, seconds), self._open_sessions.close_silent),
            loop.call_later(seconds / 2, self._open_sessions.skip_grace),
        ]
        _, left = await asyncio.wait(self._sessions, timeout=seconds)
        for timer in timers:
            timer.cancel()
        await self._cut(left, told=seconds > 0)
        return len(self._cut_sessions)

    def _close(self) -> None:
        while self._servers:
            self._servers.pop().close()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None

    async def _cut(self, tasks: set[asyncio.Task[None]], *, told: bool) -> None:
        """Cancel the tasks, and note those that had a client that this takes something from."""
        cut = {task for task in tasks if self._open_sessions.is_unfinished(task)}
        if cut and told:
            _log.warning("sessions are cut: the time to drain is over", **self._left())
        self._cut_sessions |= cut
        for task in cut:
            task.cancel()
        if ending := tasks - cut:
            _, ending = await asyncio.wait(ending, timeout=FLUSH_SECONDS)
            for task in ending:
                task.cancel()

    def _left(self) -> dict[str, float]:
        """Return what a log line says of the sessions that are left."""
        left = self._open_sessions.unfinished()
        now = asyncio.get_running_loop().time()
        oldest_seconds = round(now - left[0].started_at, 1) if left else 0
        return {"sessions": len(left), "oldest_seconds": oldest_seconds}

    async def _run_adopted(self, sock: socket.socket, number: int) -> None:
        stream = StartupStream()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: stream, sock)
        except OSError:  # its client has gone
            sock.close()
        else:
            await self._run(stream, number)

    async def _run(self, stream: StartupStream, number: int) -> None:
        """The whole life of a connection's task: nothing that goes wrong in it leaves it."""
        with connection_log(number), self._metrics.connection():
            try:
                await self._serve(stream)
            except Exception:
                # A bug of ours must cost one session, not all of them.
                self._metrics.session_ended(EndReason.INTERNAL_ERROR)
                _log.exception("session failed")
            finally:
                stream.transport.abort()  # it is closed already, unless the session was cut
