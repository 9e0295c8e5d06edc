"""A worker: an App whose connections, tokens and settings come from the supervisor.

For: one forked process, from its first settings to its end. Not for: anything that a session does;
that is an App's as it is with one process.

Invariant: it ends when its channel does, and its sessions with it: without the supervisor nobody
could accept, drain or tell how it is.
"""

import asyncio
import gc
import math
import os
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import uvloop

from proxy.blocking import BlockingCalls
from proxy.config import ConfigurationError, Settings, UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import configure_logging, get_logger, worker_log
from proxy.observe.loop_lag import sampling_lag
from proxy.routing.router import Router
from proxy.server.app import App
from proxy.server.router_factory import RELOAD_SECONDS_MAX, forget_built_maps, reread_with_router
from proxy.session.fast_path import watched_lanes
from proxy.wire.secret import Secret
from proxy.wire.startup import CancelRequest
from proxy.workers.remote_credentials import RemoteWorkspaceRegistry
from proxy.workers.rpc import RpcConnection, RpcConnectionLost
from proxy.workers.rpc_frames import NUMBER_BYTES
from proxy.workers.shared_counters import SharedCounters, SharedSlots

_log = get_logger(__name__)


def run_worker(
    counters: SharedCounters,
    starting_max: int,
    worker_number: int,
    sockets: Sequence[socket.socket],
) -> int:
    """Serve until the supervisor has done with it; return the exit code."""
    control, connection_socket = sockets
    with worker_log(worker_number):
        uvloop.run(Worker(counters, starting_max, worker_number, connection_socket).run(control))
    return 0


def worker_settings(settings: Settings) -> Settings:
    """Return settings with a worker's part of the bounds that it keeps on its own, rounded up."""

    def part_of(section: UpstreamSettings) -> UpstreamSettings:
        connects_max = math.ceil(section.connects_max / settings.listen.workers)
        return section.model_copy(update={"connects_max": connects_max})

    targets = {
        name: part_of(target) if "connects_max" in target.given() else target
        for name, target in settings.targets.items()
    }
    return settings.model_copy(update={"upstream": part_of(settings.upstream), "targets": targets})


class Worker:
    """One worker; `run` is its life."""

    def __init__(
        self,
        counters: SharedCounters,
        starting_max: int,
        worker_number: int,
        connection_socket: socket.socket,
    ) -> None:
        self._counters = counters
        self._starting_max = starting_max
        self._worker_number = worker_number
        self._connection_socket = connection_socket
        self._threads = BlockingCalls("reload")
        self._first: asyncio.Future[Settings]
        self._serving = asyncio.Event()
        self._rpc: RpcConnection
        self._accounts: RemoteWorkspaceRegistry
        self._app: App

    async def run(self, control: socket.socket) -> None:
        """Serve from the first settings on, until the channel ends."""
        self._first = asyncio.get_running_loop().create_future()
        self._rpc = await RpcConnection.open(
            control,
            {
                "configure": self._configure,
                "read": self._read,
                "cancel": self._cancel,
                "drain": self._drain,
            },
        )
        self._accounts = RemoteWorkspaceRegistry(self._rpc)
        settings = await self._first
        configure_logging(format=settings.log.format, level=settings.log.level)
        self._app = App(
            settings,
            starting_max=self._starting_max,
            workspaces=self._accounts,
            slots=SharedSlots(self._counters, self._worker_number, settings.listen.max_connections),
            cancel_elsewhere=self._cancel_elsewhere,
        )
        async with AsyncExitStack() as stack:
            self._app.lanes = stack.enter_context(watched_lanes())
            stack.push_async_callback(self._accounts.close)
            stack.enter_context(sampling_lag(self._app.metrics.loop_lagged))
            await stack.enter_async_context(self._app.listener.adopting())
            self._connection_socket.setblocking(False)
            asyncio.get_running_loop().add_reader(
                self._connection_socket, self._receive_connections
            )
            stack.callback(self._close_connection_socket)
            self._app.lifecycle.serve()
            gc.freeze()  # what is there now stays, and need not be looked at again
            self._serving.set()
            _log.info("worker serves", pid=os.getpid())
            await self._rpc.lost.wait()

    # -- what the supervisor calls ---------------------------------------------------------------

    async def _configure(self, number: int, settings: dict[str, Any]) -> None:
        """Serve, or from now on serve, by these settings. Raises ProxyError."""
        validated = worker_settings(Settings.model_validate(settings))
        self._accounts.register(number, validated)
        if self._serving.is_set():
            await self._reload(validated)
        else:
            self._first.set_result(validated)
            await self._serving.wait()

    async def _reload(self, settings: Settings) -> None:
        try:
            self._app.reload(settings, await self._router_of(settings))
        except ConfigurationError as error:
            # The supervisor could use it: a file has changed since.
            raise ProxyError(ErrorKind.INTERNAL, "; ".join(map(str, error.problems))) from error

    async def _router_of(self, settings: Settings) -> Router:
        """Build it beside the sessions: that of a large map takes seconds."""
        build = partial(reread_with_router, lambda: settings)
        try:
            _, router = await self._threads.run(build, RELOAD_SECONDS_MAX)
        except TimeoutError:
            gc.enable()  # which the thread left behind will not do
            raise ProxyError(ErrorKind.INTERNAL, "a map takes too long to read") from None
        forget_built_maps()  # a worker builds each once; a large one is 100 MB
        return router

    async def _read(self) -> dict[str, Any]:
        return self._app.reading().as_dict()

    async def _cancel(self, pid: int, key: str) -> bool:
        request = CancelRequest(pid, Secret(bytes.fromhex(key)))
        return await self._app.cancels.request_here(request)

    async def _drain(self, seconds: float) -> int:
        self._receive_connections()  # what was sent before the acceptor closed
        self._close_connection_socket()
        return await self._app.drain(seconds)

    # -- inside ----------------------------------------------------------------------------------

    async def _cancel_elsewhere(self, request: CancelRequest) -> bool:
        try:
            found = await self._rpc.call("cancel", pid=request.pid, key=request.key.reveal().hex())
        except RpcConnectionLost:
            return False
        return bool(found)

    def _receive_connections(self) -> None:
        """Serve the connections that wait at the door; each packet is one."""
        while self._connection_socket.fileno() >= 0:  # ends with what waits
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._connection_socket, NUMBER_BYTES, 1
                )
            except BlockingIOError:
                return
            except OSError as error:
                _log.error("cannot take a connection", error=error.strerror)
                return
            if not packet:
                self._close_connection_socket()
                return
            if not descriptors:  # this process has no more of them
                _log.error("a connection was lost: no file descriptor is left")
                self._ended()
                continue
            sock = socket.socket(fileno=descriptors[0])
            sock.setblocking(False)
            self._app.listener.adopt(sock, int.from_bytes(packet), self._ended)

    def _ended(self) -> None:
        self._counters.end(self._worker_number)

    def _close_connection_socket(self) -> None:
        if self._connection_socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._connection_socket)
            self._connection_socket.close()
