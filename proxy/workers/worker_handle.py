"""One worker as the supervisor sees it, from fork to exit.

For: starting it, passing it connections, calling it, and noticing that it is stuck. Not for: which
worker gets a connection, or when one is replaced (`supervisor`).

Invariant: every wait for a worker has a bound; one that exceeds it is killed.
"""

import asyncio
import socket
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Final

from proxy.config import Settings
from proxy.errors import ProxyError
from proxy.observe.aggregation import Reading
from proxy.observe.logs import get_logger
from proxy.observe.session_page import SessionPage
from proxy.server.router_factory import RELOAD_SECONDS_MAX
from proxy.upstream.connector import CANCEL_SECONDS_MAX
from proxy.workers.connection_socket import connection_socket_pair, send_connection
from proxy.workers.fork_server import ForkServer
from proxy.workers.map_messages import Message
from proxy.workers.rpc import MessageTooLong, Methods, RpcConnection, RpcConnectionLost
from proxy.workers.shared_counters import SILENT_SECONDS_MAX, SharedCounters

# From fork to serving takes some tens of milliseconds; reading a large shard map takes longer.
CONFIGURE_SECONDS_MAX: Final = RELOAD_SECONDS_MAX + 5
# A worker answers between two turns of its loop. A scrape waits no longer than this, and shows what
# was read before.
READ_SECONDS_MAX: Final = 1.0
# Each worker is read this often anyway: what it had counted by then outlives it.
WATCH_SECONDS: Final = 10.0
# A worker that does not answer for so long serves no client. With one process /liveness would fail.
STUCK_SECONDS_MAX: Final = 30.0
# What a worker gets beyond the time of its sessions.
END_SECONDS_MAX: Final = 5.0

_log = get_logger(__name__)


class WorkerHandle:
    """One worker. `number` counts from 1 and goes over to its successor."""

    def __init__(self, number: int, counters: SharedCounters, fork_server: ForkServer) -> None:
        self.number = number
        self.serving = False
        self.reading = Reading()
        """What it had counted when it was read last."""
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.sessions_lost = 0
        self._was_silent = False
        self._counters = counters
        self._fork_server = fork_server
        self._connections: socket.socket
        self._rpc: RpcConnection
        self._connections_sent = 0
        self._last_connection_id = 0

    # -- its process -----------------------------------------------------------------------------

    async def start(self, methods: Methods) -> None:
        """Fork it. `methods` are what it may call. Raises OSError."""
        self._connections, its_connections = connection_socket_pair()
        control, its_control = socket.socketpair()
        self._rpc = await RpcConnection.open(control, methods)
        try:
            with its_control, its_connections:
                self._fork_server.fork(self.number, (its_control, its_connections))
        except OSError:
            self.close()
            raise

    async def watch(self) -> None:
        """Read it now and then. Return when it has ended, or was stuck and is killed."""
        lost = self._rpc.lost
        while not lost.is_set():
            await self._watch_silence(WATCH_SECONDS)
            if not await self.read(STUCK_SECONDS_MAX) and not lost.is_set():
                _log.error("worker is stuck and is killed", worker=self.number)
                self._fork_server.kill(self.number)
                return

    async def _watch_silence(self, seconds: float) -> None:
        """Log when it falls silent and when it answers again, for so long or until it is lost."""
        loop, lost = asyncio.get_running_loop(), self._rpc.lost
        ends_at = loop.time() + seconds
        while not lost.is_set() and (left := ends_at - loop.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, SILENT_SECONDS_MAX / 2)):
                    await lost.wait()
            self._log_silence()

    def _log_silence(self) -> None:
        silent = self.serving and self._counters.is_silent(self.number)
        if silent and not self._was_silent:
            _log.warning("worker does not answer and gets no connections", worker=self.number)
        elif self._was_silent and not silent:
            _log.info("worker answers again", worker=self.number)
        self._was_silent = silent

    def close(self) -> None:
        """Close both sockets to it, upon which it ends."""
        self._rpc.close()
        self._connections.close()

    async def stop(self) -> None:
        """Stop it; kill it if it does not."""
        self.close()
        try:
            async with asyncio.timeout(END_SECONDS_MAX):
                await asyncio.shield(self.exit_code)
        except TimeoutError:
            self._fork_server.kill(self.number)

    def record_exit(self, code: int) -> None:
        """Record that its process has ended, and free its slots."""
        self.serving = False
        self.sessions_lost = self._counters.slots_of(self.number)
        self._counters.reset(self.number)
        self.close()
        if not self.exit_code.done():
            self.exit_code.set_result(code)

    # -- its connections -------------------------------------------------------------------------

    @property
    def load(self) -> tuple[bool, int, int]:
        """The sort key for a new connection: silent ones last, then the fewest connections.

        One that is stopped or blocked serves no client: it gets a connection only if all are.
        """
        ended = self._counters.connections_ended(self.number)
        silent = self._counters.is_silent(self.number)
        return silent, self._connections_sent - ended, self._last_connection_id

    def send_connection(self, client: socket.socket, connection_id: int) -> bool:
        """Pass it a client's connection. Return False if it is stuck or dead."""
        if not send_connection(self._connections, client, connection_id):
            return False
        self._connections_sent += 1
        self._last_connection_id = connection_id
        return True

    # -- calls -----------------------------------------------------------------------------------

    async def configure(self, generation: int, settings: Settings) -> bool:
        """Make it serve new sessions by these settings. Return whether it does."""
        # Secrets are masked in it: only the supervisor logs in to the workspace.
        content = settings.model_dump(mode="json", exclude_unset=True)
        try:
            async with asyncio.timeout(CONFIGURE_SECONDS_MAX):
                await self._rpc.call("configure", generation=generation, settings=content)
        except (RpcConnectionLost, MessageTooLong, ProxyError, TimeoutError) as error:
            text = str(error) or type(error).__name__
            _log.error("worker not configured", worker=self.number, error=text)
            return False
        return True

    async def read(self, seconds_max: float = READ_SECONDS_MAX) -> bool:
        """Read what it has counted. Return False, and keep the last reading, if it is silent."""
        content = await self._answer(self._rpc.call("read"), seconds_max)
        if content is not None:
            self.reading = Reading.from_dict(content)
        return content is not None

    async def cancel(self, pid: int, key: str) -> bool:
        """Make it cancel the query of this cancel key. Return whether it knows the key."""
        call = self._rpc.call("cancel", pid=pid, key=key)
        return bool(await self._answer(call, CANCEL_SECONDS_MAX + READ_SECONDS_MAX))

    async def reconnect(self) -> bool:
        """Make it retire its pooled sessions. Return whether it has answered."""
        return bool(await self._answer(self._rpc.call("reconnect"), READ_SECONDS_MAX))

    async def sessions(self, after: int, limit: int) -> SessionPage | None:
        """Return its open connections whose id is higher than `after`; None if it is silent."""
        call = self._rpc.call("sessions", after=after, limit=limit)
        page: SessionPage | None = await self._answer(call, READ_SECONDS_MAX)
        for row in [] if page is None else page["sessions"]:
            row["worker"] = self.number
        return page

    async def end_session(self, number: int) -> bool:
        """Make it end the connection that has this id. Return whether it has it."""
        call = self._rpc.call("end_session", number=number)
        return bool(await self._answer(call, READ_SECONDS_MAX))

    def map_changed(self, change: Message) -> None:
        """Notify it of a change of the shard map."""
        self._rpc.notify("map_changed", **change)

    async def drain(self, seconds: float) -> int:
        """End its sessions; kill it if it does not answer. Return how many sessions were cut."""
        if not self.serving:
            return 0
        call = self._rpc.call("drain", seconds=seconds)
        cut: int | None = await self._answer(call, seconds + END_SECONDS_MAX)
        if cut is not None:
            return cut
        self._fork_server.kill(self.number)
        await asyncio.wait({self.exit_code}, timeout=END_SECONDS_MAX)
        return self.sessions_lost

    async def _answer(self, call: Awaitable[Any], seconds_max: float) -> Any:
        """Return its answer, or None if there is none in time."""
        try:
            async with asyncio.timeout(seconds_max):
                return await call
        except (RpcConnectionLost, ProxyError, TimeoutError) as error:
            _log.debug("no answer from a worker", worker=self.number, error=repr(error))
            return None
