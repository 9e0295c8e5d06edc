"""The workers as the supervisor sees them: who gets a connection, who is asked, who is replaced.

For: what an App that accepts has in place of sessions of its own: its `entrance` and its `others`.
Not for: what happens inside a worker (`worker`), or how one is forked (`fork_server`).

Invariants: a connection goes to the worker with the fewest; a worker that dies is replaced unless
the proxy is ending; no wait for a worker is without a bound, and one that lets it pass is killed.
"""

import asyncio
import itertools
import signal
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from proxy.config import Settings
from proxy.errors import ProxyError
from proxy.observe.aggregation import Reading, total
from proxy.observe.logs import get_logger
from proxy.server.app import App, running
from proxy.server.router_factory import RELOAD_SECONDS_MAX
from proxy.upstream.connector import CANCEL_SECONDS_MAX
from proxy.upstream.upstreams import Upstreams
from proxy.workers.acceptor import Acceptor
from proxy.workers.credential_service import CredentialService
from proxy.workers.fork_server import ForkServer
from proxy.workers.rpc import Methods, RpcConnection, RpcConnectionLost
from proxy.workers.rpc_frames import NUMBER_BYTES, MessageTooLong
from proxy.workers.shared_counters import SharedCounters
from proxy.workers.worker import run_worker

# From fork to serving takes some tens of milliseconds; reading a large shard map takes longer.
CONFIGURE_SECONDS_MAX: Final = RELOAD_SECONDS_MAX + 5
# A worker answers between two turns of its loop. A scrape waits no longer, and shows what was
# known before.
READ_SECONDS_MAX: Final = 1.0
# So often each is asked anyway: what it had counted by then outlives it.
WATCH_SECONDS: Final = 10.0
# One that does not answer for so long serves nobody, and never will: /liveness would have ended a
# proxy of one process by then.
STUCK_SECONDS_MAX: Final = 30.0
# What a worker gets beyond the time of its sessions.
END_SECONDS_MAX: Final = 5.0
# A worker that dies is replaced after this long; the while doubles, unless one has lived.
REPLACE_SECONDS_MIN: Final = 0.1
REPLACE_SECONDS_MAX: Final = 10.0
LIVED_SECONDS: Final = 60.0

_log = get_logger(__name__)


class WorkerHandle:
    """One worker, from fork to burial."""

    def __init__(
        self, worker_number: int, connection_socket: socket.socket, counters: SharedCounters
    ) -> None:
        self.worker_number = worker_number
        self.serving = False
        self.reading = Reading()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.rpc: RpcConnection
        self.sessions_lost = 0
        self._connection_socket = connection_socket
        self._counters = counters
        self._given = 0
        self._last_number = 0

    @property
    def load(self) -> tuple[int, int]:
        """How many connections it has; of two alike, who has waited longer goes first."""
        return self._given - self._counters.ended(self.worker_number), self._last_number

    def send_connection(self, sock: socket.socket, number: int) -> bool:
        """Give it a connection; tell whether it takes any."""
        try:
            socket.send_fds(
                self._connection_socket, [number.to_bytes(NUMBER_BYTES)], [sock.fileno()]
            )
        except OSError:  # it is stuck, or dead
            return False
        self._given += 1
        self._last_number = number
        return True

    def mark_ended(self, code: int) -> None:
        """Note that its process has ended."""
        self.serving = False
        self.sessions_lost = self._counters.slots_of(self.worker_number)
        self._counters.clear(self.worker_number)
        self._connection_socket.close()
        if not self.ended.done():
            self.ended.set_result(code)


class Supervisor:
    """All workers of a proxy."""

    def __init__(self, app: App, counters: SharedCounters, fork_server: ForkServer) -> None:
        self._app = app
        self._counters = counters
        self._fork_server = fork_server
        self._acceptor = Acceptor(app.settings.listen, self._pass_connection)
        self._workers: dict[int, WorkerHandle] = {}  # by worker_number
        self._dead = Reading()
        self._credentials = CredentialService()
        self._numbers = itertools.count(1)  # of connections
        self._configuration = 0
        self._accept_ended = asyncio.Event()  # somebody has called drain again
        self._ending = asyncio.Event()
        self._start_decided = asyncio.Event()  # all serve, or one has died
        self._open_configuration(app.snapshot.upstreams)

    # -- what an App wants of its entrance -------------------------------------------------------

    @asynccontextmanager
    async def accepting(self) -> AsyncIterator[tuple[str, int]]:
        """Accept while the block runs, and give the address; then end all workers.

        Raises OSError when the address cannot be listened on, or a worker does not start.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fork_server, self._read_exits)
        numbers = range(self._app.settings.listen.workers)
        tasks: list[asyncio.Task[None]] = []
        try:
            host, port = self._acceptor.open()
            # Not a TaskGroup: that would wrap whatever the block raises into an ExceptionGroup. No
            # task is lost, because leaving the block waits for them all.
            tasks += [
                loop.create_task(self._keep_running(worker_number)) for worker_number in numbers
            ]
            await self._start_decided.wait()
            if len(self._serving) < len(numbers):
                raise OSError("a worker did not start; the log says why")
            self._acceptor.start()
            yield host, port
        finally:
            await self.drain(0)
            await self._stop_workers(tasks)
            loop.remove_reader(self._fork_server)
            await self._credentials.close()

    async def drain(self, seconds: float, *, accept_seconds: float = 0) -> int:
        """Go on accepting for a while, then end all sessions; return how many were cut.

        Called again meanwhile, it does with the shorter times what is left to do.
        """
        if accept_seconds and not self._accept_ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(accept_seconds):
                    await self._accept_ended.wait()
        self._accept_ended.set()
        self._ending.set()
        self._acceptor.close()
        return sum(
            await asyncio.gather(
                *(self._drain(worker, seconds) for worker in self._workers.values())
            )
        )

    # -- what it wants of the others -------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether there is a worker that serves."""
        return bool(self._serving)

    @property
    def slots_taken(self) -> int:
        """How many places all sessions take."""
        return self._counters.slots_taken

    def reading(self) -> Reading:
        """Return what all had counted when they were asked last, the dead among them."""
        return total([self._dead, *(worker.reading for worker in self._workers.values())])

    async def refresh(self) -> None:
        """Ask the workers what they have counted; of one that is silent the last word stands."""
        await asyncio.gather(*map(self._read, self._serving))

    async def reload(self) -> bool:
        """Have all workers serve new sessions by the App's settings; tell whether all do."""
        self._open_configuration(self._app.snapshot.upstreams)
        return all(await asyncio.gather(*map(self._configure, self._serving)))

    # -- a worker's life -------------------------------------------------------------------------

    @property
    def _serving(self) -> list[WorkerHandle]:
        return [worker for worker in self._workers.values() if worker.serving]

    async def _keep_running(self, worker_number: int) -> None:
        """Have a worker in a worker_number, again and again, until the proxy ends."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while not self._ending.is_set():
            began = loop.time()
            try:
                worker = await self._run_worker(worker_number)
            except OSError as error:  # no descriptor is left, or the nursery has gone
                _log.error("cannot fork a worker", worker=worker_number, error=error.strerror)
            else:
                self._log_death(worker, await worker.ended)
            self._start_decided.set()
            deaths = 1 if loop.time() - began > LIVED_SECONDS else deaths + 1
            seconds = min(REPLACE_SECONDS_MAX, REPLACE_SECONDS_MIN * 2.0 ** min(deaths, 10))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ending.wait()

    def _log_death(self, worker: WorkerHandle, code: int) -> None:
        if self._ending.is_set():
            return
        self._app.metrics.worker_died()
        _log.error(
            "worker died",
            worker=worker.worker_number,
            exit_code=code,
            signal=signal.Signals(-code).name if code < 0 else "",
            sessions_lost=worker.sessions_lost,
        )

    async def _run_worker(self, worker_number: int) -> WorkerHandle:
        """Fork a worker and see it through; return it when it is to be buried. Raises OSError."""
        worker = await self._fork(worker_number)
        if await self._configure(worker):
            worker.serving = True
            if len(self._serving) == self._app.settings.listen.workers:
                self._start_decided.set()
            await self._watch(worker)
            worker.serving = False
        worker.rpc.close()
        try:
            async with asyncio.timeout(END_SECONDS_MAX):
                await asyncio.shield(worker.ended)
        except TimeoutError:
            self._fork_server.kill(worker_number)
        return worker

    async def _fork(self, worker_number: int) -> WorkerHandle:
        control, their_control = socket.socketpair()
        connection_socket, their_connection_socket = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        connection_socket.setblocking(False)
        worker = WorkerHandle(worker_number, connection_socket, self._counters)
        methods: Methods = {**self._credentials.methods, "cancel": partial(self._cancel, worker)}
        worker.rpc = await RpcConnection.open(control, methods)
        try:
            with their_control, their_connection_socket:
                self._fork_server.fork(worker_number, (their_control, their_connection_socket))
        except OSError:
            worker.rpc.close()
            connection_socket.close()
            raise
        self._workers[worker_number] = worker
        return worker

    async def _watch(self, worker: WorkerHandle) -> None:
        """Return when a worker has ended; end one that is stuck."""
        while not worker.rpc.lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await worker.rpc.lost.wait()
            answered = await self._read(worker, STUCK_SECONDS_MAX)
            if not answered and not worker.rpc.lost.is_set():
                _log.error("worker is stuck and is ended", worker=worker.worker_number)
                self._fork_server.kill(worker.worker_number)
                return

    async def _configure(self, worker: WorkerHandle) -> bool:
        """Have a worker serve by the newest settings; tell whether it does."""
        done = 0
        try:
            async with asyncio.timeout(CONFIGURE_SECONDS_MAX):
                while done != self._configuration:  # a reload may come meanwhile
                    done = self._configuration
                    # Secrets are masked in it: only the supervisor logs in to the workspace.
                    content = self._app.settings.model_dump(mode="json", exclude_unset=True)
                    await worker.rpc.call("configure", number=done, settings=content)
        except (RpcConnectionLost, MessageTooLong, ProxyError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            _log.error("worker not configured", worker=worker.worker_number, error=what)
            return False
        return True

    def _open_configuration(self, upstreams: Upstreams) -> None:
        self._configuration += 1
        self._credentials.open(self._configuration, upstreams)

    def _read_exits(self) -> None:
        try:
            for worker_number, code in self._fork_server.exits():
                self._reap(worker_number, code)
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._fork_server)
            if not self._ending.is_set():
                _log.error("the process that forks workers died; the proxy ends")
                self._app.lifecycle.fail()
            self._start_decided.set()
            for worker in self._workers.values():
                if not worker.ended.done():  # nobody will tell, and it ends with its channel
                    worker.ended.set_result(-signal.SIGKILL)

    def _reap(self, worker_number: int, code: int) -> None:
        worker = self._workers.pop(worker_number)
        self._dead = total([self._dead, worker.reading.left_behind()])
        worker.mark_ended(code)

    async def _stop_workers(self, tasks: list[asyncio.Task[None]]) -> None:
        """End all workers, which have no session any more, and wait for it."""
        for worker in list(self._workers.values()):
            worker.rpc.close()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * END_SECONDS_MAX)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- asking ----------------------------------------------------------------------------------

    async def _answer_within(
        self, worker: WorkerHandle, call: Awaitable[Any], seconds: float
    ) -> Any:
        """Return a worker's answer, None where it gives none in time."""
        try:
            async with asyncio.timeout(seconds):
                return await call
        except (RpcConnectionLost, ProxyError, TimeoutError) as error:
            _log.debug("no answer of a worker", worker=worker.worker_number, error=repr(error))
            return None

    async def _read(self, worker: WorkerHandle, seconds: float = READ_SECONDS_MAX) -> bool:
        content = await self._answer_within(worker, worker.rpc.call("read"), seconds)
        if content is not None:
            worker.reading = Reading.from_dict(content)
        return content is not None

    async def _cancel(self, asking: WorkerHandle, pid: int, key: str) -> bool:
        """Have whichever other worker knows this key cancel its query (W43)."""
        seconds = CANCEL_SECONDS_MAX + READ_SECONDS_MAX
        others = [worker for worker in self._serving if worker is not asking]
        calls = [worker.rpc.call("cancel", pid=pid, key=key) for worker in others]
        asked = (self._answer_within(*each, seconds) for each in zip(others, calls, strict=True))
        return any(await asyncio.gather(*asked))

    async def _drain(self, worker: WorkerHandle, seconds: float) -> int:
        if not worker.serving:
            return 0
        call = worker.rpc.call("drain", seconds=seconds)
        cut: int | None = await self._answer_within(worker, call, seconds + END_SECONDS_MAX)
        if cut is None:
            self._fork_server.kill(worker.worker_number)
            await asyncio.wait({worker.ended}, timeout=END_SECONDS_MAX)
            return worker.sessions_lost
        return cut

    def _pass_connection(self, sock: socket.socket) -> bool:
        """Give a connection to the worker with the fewest; tell whether one takes it."""
        number = next(self._numbers)
        return any(
            worker.send_connection(sock, number)
            for worker in sorted(self._serving, key=lambda each: each.load)
        )


@dataclass(frozen=True, slots=True)
class Prefork:
    """What has to be made before there is an event loop."""

    counters: SharedCounters
    fork_server: ForkServer


def prefork(workers: int, *, starting_max: int) -> Prefork:
    """Fork what so many workers are forked from; in each `starting_max` clients may be starting.

    Call it while this process has one thread and no event loop. Raises OSError.
    """
    counters = SharedCounters(workers)
    return Prefork(counters, ForkServer(partial(run_worker, counters, starting_max)))


@asynccontextmanager
async def supervising(settings: Settings, preforked: Prefork) -> AsyncIterator[App]:
    """Serve with several processes while the block runs; none is left behind it.

    Raises OSError when an address cannot be listened on or a worker does not start, and
    ConfigurationError for a file that a setting names and that cannot be used.
    """
    try:
        app = App(settings)
        app.connection_source = app.workers = Supervisor(
            app, preforked.counters, preforked.fork_server
        )
        async with running(app):
            yield app
    finally:
        preforked.fork_server.close()
