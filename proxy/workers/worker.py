"""A worker: an App whose connections, tokens and settings come from the supervisor.

For: one forked process, from its first settings to its end. Not for: what a session does, which is
the same as with one process.

Invariant: it ends, and its sessions with it, when its connection to the supervisor is lost. Without
the supervisor no process would accept, drain it, or report how it is.
"""

import asyncio
import gc
import math
import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import uvloop

from proxy.blocking import BlockingCalls
from proxy.config import AdminSettings, ConfigurationError, Settings, UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.log_writer import FLUSH_SECONDS_MAX
from proxy.observe.logs import configure_logging, flush_log, get_logger, worker_log
from proxy.observe.metrics import Metrics
from proxy.observe.session_page import SessionPage
from proxy.server.app import App
from proxy.server.catalogue_service import ServiceKey, key_of
from proxy.server.file_limit import full_error, slots_max
from proxy.server.router_factory import clear_map_cache, reread_in_thread
from proxy.server.serving import running
from proxy.wire.secret import Secret
from proxy.wire.startup import CancelRequest
from proxy.workers.connection_socket import ReceivedConnections
from proxy.workers.map_messages import change_from_dict
from proxy.workers.remote_credentials import RemoteWorkspaceRegistry
from proxy.workers.remote_map import RemoteMap
from proxy.workers.rpc import Methods, RpcConnection, RpcConnectionLost
from proxy.workers.shared_counters import BEAT_SECONDS, SharedCounters, SharedSlots

# Bounds of a target that count for all workers together (P3).
_SHARED_OUT: Final = ("connects_max", "pool_idle_max", "pool_size_max")

_log = get_logger(__name__)


def run_worker(
    counters: SharedCounters,
    starting_max: int,
    worker_number: int,
    sockets: Sequence[socket.socket],
) -> int:
    """Serve until the supervisor ends it or has gone. Return the exit code."""
    control, connections = sockets
    with worker_log(worker_number):
        worker = Worker(counters, starting_max, worker_number, connections)
        uvloop.run(worker.run(control))
    return 0


def worker_settings(settings: Settings) -> Settings:
    """Return the settings of one worker.

    It has no admin address, and its part, rounded up, of each bound in `_SHARED_OUT`.
    """
    workers = settings.listen.workers

    def part_of(target: UpstreamSettings) -> UpstreamSettings:
        parts = {name: math.ceil(getattr(target, name) / workers) for name in _SHARED_OUT}
        return target.model_copy(update=parts)

    admin = AdminSettings(enabled=False)
    return settings.with_targets(part_of).model_copy(update={"admin": admin})


class Worker:
    """One worker. `run` lasts as long as it does."""

    def __init__(
        self,
        counters: SharedCounters,
        starting_max: int,
        worker_number: int,
        connections: socket.socket,
    ) -> None:
        self._counters = counters
        self._starting_max = starting_max
        self._number = worker_number
        self._connections = connections
        self._threads = BlockingCalls("reload")
        self._map: RemoteMap | None = None
        self._map_key: ServiceKey
        self._first_settings: asyncio.Future[Settings]
        self._serving = asyncio.Event()
        self._rpc: RpcConnection
        self._workspaces: RemoteWorkspaceRegistry
        self._app: App

    async def run(self, control: socket.socket) -> None:
        """Serve from the first settings on, until the connection to the supervisor is lost."""
        self._first_settings = asyncio.get_running_loop().create_future()
        methods: Methods = {
            "configure": self._configure,
            "read": self._read,
            "cancel": self._cancel,
            "reconnect": self._reconnect,
            "sessions": self._sessions,
            "end_session": self._end_session,
            "drain": self._drain,
            "map_changed": self._map_changed,
        }
        self._rpc = await RpcConnection.open(control, methods)
        self._workspaces = RemoteWorkspaceRegistry(self._rpc)
        settings = await self._first_settings
        configure_logging(**settings.log.model_dump())
        self._app = self._build_app(settings)
        async with running(self._app):
            self._beat()
            gc.freeze()  # excludes imports and maps from garbage collection
            self._serving.set()
            _log.info("worker serves", pid=os.getpid())
            await self._rpc.lost.wait()

    def _beat(self) -> None:
        """Show that the event loop runs, from now on until it ends."""
        self._counters.beat(self._number)
        asyncio.get_running_loop().call_later(BEAT_SECONDS, self._beat)

    def _build_app(self, settings: Settings) -> App:
        app = App(
            settings,
            starting_max=self._starting_max,
            workspaces=self._workspaces,
            slots=SharedSlots(
                self._counters,
                self._number,
                slots_max(settings.listen),
                full_error(settings.listen),
            ),
            cancel_elsewhere=self._cancel_elsewhere,
            map_elsewhere=self._map_of,
            share_parked=partial(self._counters.share_parked, self._number),
        )
        ended = partial(self._counters.record_end, self._number)
        app.connection_source = ReceivedConnections(self._connections, app.listener, ended)
        return app

    # -- what the supervisor calls ---------------------------------------------------------------

    async def _configure(self, generation: int, settings: dict[str, Any]) -> None:
        """Serve new sessions by these settings, from now on. Raises ProxyError."""
        validated = worker_settings(Settings.model_validate(settings))
        self._workspaces.register(generation, validated)
        if self._serving.is_set():
            await self._reload(validated)
        else:
            self._first_settings.set_result(validated)
            await self._serving.wait()

    async def _reload(self, settings: Settings) -> None:
        try:
            self._app.reload(*await reread_in_thread(self._threads, lambda: settings))
        except ConfigurationError as error:
            # The supervisor could use them: a file has changed since.
            raise ProxyError(ErrorKind.INTERNAL, "; ".join(map(str, error.problems))) from error
        except TimeoutError:
            raise ProxyError(ErrorKind.INTERNAL, "a map takes too long to read") from None
        finally:
            clear_map_cache()  # a worker builds each map once, and a large one is 100 MB

    async def _read(self) -> dict[str, Any]:
        return self._app.reading().as_dict()

    async def _cancel(self, pid: int, key: str) -> bool:
        request = CancelRequest(pid, Secret(bytes.fromhex(key)))
        return await self._app.cancels.request_here(request)

    async def _reconnect(self) -> bool:
        return await self._app.reconnect()

    async def _sessions(self, after: int, limit: int) -> SessionPage:
        return await self._app.sessions(after, limit, processes=False)

    async def _end_session(self, number: int) -> bool:
        return await self._app.end_session(number)

    async def _drain(self, seconds: float) -> int:
        sessions_cut = await self._app.drain(seconds)
        # The supervisor kills this process next; unsent traces and unwritten lines would be lost.
        await self._app.close_traces()
        await self._threads.run(flush_log, 2 * FLUSH_SECONDS_MAX)
        return sessions_cut

    async def _map_changed(self, **change: Any) -> None:
        if self._map is None:  # no session can have a mapping yet
            return
        in_force = self._app.catalogue.service  # not one that a reload could not use
        if isinstance(in_force, RemoteMap):
            in_force.changed(change_from_dict(change))

    # -- what it calls ---------------------------------------------------------------------------

    def _map_of(self, settings: Settings, metrics: Metrics) -> RemoteMap:
        """Return the map that the supervisor has for these settings."""
        key = key_of(settings)
        if self._map is None or self._map_key != key:
            self._map, self._map_key = RemoteMap(settings.catalogue_map, self._rpc, metrics), key
        return self._map

    async def _cancel_elsewhere(self, request: CancelRequest) -> bool:
        key = request.key.reveal().hex()
        try:
            return bool(await self._rpc.call("cancel", pid=request.pid, key=key))
        except RpcConnectionLost:
            return False
