"""The supervisor: the process that accepts, and has workers serve what it accepts.

For: which worker gets a connection, which are asked, and when one is replaced. Not for: what
happens inside a worker (`worker`), forking one (`fork_server`), or signals and exit codes
(`process`), which are those of a proxy with one process.

Invariants: a connection goes to the worker with the fewest. A worker that dies is replaced unless
the proxy is ending.
"""

import asyncio
import itertools
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from proxy.config import Settings
from proxy.observe.aggregation import Reading, total
from proxy.observe.logs import get_logger
from proxy.observe.session_page import SessionPage, merge_pages
from proxy.server.app import App
from proxy.server.serving import log_serving, running
from proxy.session.listen_sockets import Address
from proxy.workers.acceptor import Acceptor
from proxy.workers.credential_service import CredentialService
from proxy.workers.fork_server import ForkServer
from proxy.workers.map_answers import MapAnswers
from proxy.workers.map_messages import Message
from proxy.workers.shared_counters import SharedCounters
from proxy.workers.worker import run_worker
from proxy.workers.worker_handle import END_SECONDS_MAX, WorkerHandle

# A worker that dies is replaced after this long. The delay doubles with each death in a row, which
# one that lived this long interrupts.
REPLACE_SECONDS_MIN: Final = 0.1
REPLACE_SECONDS_MAX: Final = 10.0
LIVED_SECONDS: Final = 60.0
_DOUBLINGS_MAX: Final = 10  # past the last; 2.0 ** n overflows above 1023

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prefork:
    """What has to be made before there is an event loop."""

    counters: SharedCounters
    fork_server: ForkServer


def prefork(workers: int, *, starting_max: int) -> Prefork:
    """Start the fork server for this many workers; `starting_max` clients may be starting in each.

    Call it while this process has one thread and no event loop. Raises OSError.
    """
    counters = SharedCounters(workers)
    return Prefork(counters, ForkServer(partial(run_worker, counters, starting_max)))


@asynccontextmanager
async def supervising(settings: Settings, preforked: Prefork) -> AsyncIterator[App]:
    """Serve with several processes while the block runs. All others have ended when it returns.

    Raises OSError when an address cannot be listened on or a worker does not start, and
    ConfigurationError for a file that a setting names and that cannot be used.
    """
    try:
        app = App(settings, serves_clients=False)
        supervisor = Supervisor(app, preforked.counters, preforked.fork_server)
        app.connection_source = app.workers = supervisor
        async with running(app):
            log_serving(app)
            yield app
    finally:
        preforked.fork_server.close()


class Supervisor:
    """All workers of a proxy: an App's `connection_source`, and its `workers`."""

    def __init__(self, app: App, counters: SharedCounters, fork_server: ForkServer) -> None:
        self._app = app
        self._counters = counters
        self._fork_server = fork_server
        self._acceptor = Acceptor(app.settings.listen, self._pass_connection)
        self._credentials = CredentialService()
        self._map_answers = MapAnswers(app, self._tell_of_map)
        self._workers: dict[int, WorkerHandle] = {}  # by their numbers
        self._counts_of_dead = Reading()  # by workers that have died
        self._connection_ids = itertools.count(1)
        self._generation = 0  # of the configuration
        self._ending = asyncio.Event()
        self._start_decided = asyncio.Event()  # all workers serve, or one has died
        self._register_configuration()

    # -- the App's connection source -------------------------------------------------------------

    @asynccontextmanager
    async def accepting(self) -> AsyncIterator[Sequence[Address]]:
        """Start the workers and accept while the block runs. Yield the addresses; then end all.

        Raises OSError when the address cannot be listened on, or a worker does not start.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fork_server, self._read_exits)
        numbers = range(1, self._app.settings.listen.workers + 1)
        tasks: list[asyncio.Task[None]] = []
        try:
            addresses = self._acceptor.open()
            # No TaskGroup, as for sessions (`OpenSessions`): leaving the block waits for them all.
            tasks += [loop.create_task(self._keep_running(number)) for number in numbers]
            await self._start_decided.wait()
            if len(self._serving) < len(numbers):
                raise OSError("a worker did not start; the log says why")
            self._acceptor.start()
            yield addresses
        finally:
            await self.drain(0)
            await self._stop(tasks)
            loop.remove_reader(self._fork_server)
            await self._credentials.close()

    async def drain(self, seconds: float) -> int:
        """Stop accepting, and end all sessions within this time. Return how many were cut.

        Called again meanwhile, it does what is left in the shorter time.
        """
        self._ending.set()
        self._acceptor.close()
        workers = list(self._workers.values())
        return sum(await asyncio.gather(*(worker.drain(seconds) for worker in workers)))

    # -- the App's workers -----------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a worker serves."""
        return bool(self._serving)

    @property
    def serving(self) -> int:
        """The number of workers that serve."""
        return len(self._serving)

    @property
    def slots_used(self) -> int:
        """The slots that the sessions of all workers use."""
        return self._counters.slots_used

    def reading(self) -> Reading:
        """Return what all had counted when they were read last, dead ones included."""
        return total([self._counts_of_dead, *(worker.reading for worker in self._workers.values())])

    async def refresh(self) -> None:
        """Read what the workers have counted. For one that is silent the last reading stays."""
        await asyncio.gather(*(worker.read() for worker in self._serving))

    async def reload(self) -> bool:
        """Make all workers serve new sessions by the App's settings. Return whether all do."""
        self._register_configuration()
        return all(await asyncio.gather(*map(self._configure, self._serving)))

    async def reconnect(self) -> bool:
        """Make all workers retire their pooled sessions. Return whether all have done so."""
        return all(await asyncio.gather(*(worker.reconnect() for worker in self._serving)))

    async def sessions(self, after: int, limit: int) -> SessionPage:
        """Return open connections of all workers whose id is higher than `after`."""
        pages = await asyncio.gather(*(each.sessions(after, limit) for each in self._serving))
        return merge_pages(pages, limit)

    async def end_session(self, number: int) -> bool:
        """End the connection that has this id. Return whether a worker has it."""
        return any(await asyncio.gather(*(each.end_session(number) for each in self._serving)))

    # -- one worker ------------------------------------------------------------------------------

    @property
    def _serving(self) -> list[WorkerHandle]:
        return [worker for worker in self._workers.values() if worker.serving]

    async def _keep_running(self, number: int) -> None:
        """Run a worker, and replace it when it dies, until the proxy ends."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while not self._ending.is_set():
            started_at = loop.time()
            try:
                worker = await self._run_worker(number)
            except OSError as error:  # no descriptor is left, or the fork server has gone
                _log.error("cannot start a worker", worker=number, error=error.strerror)
            else:
                self._log_death(worker, await worker.exit_code)
            self._start_decided.set()
            deaths = 1 if loop.time() - started_at > LIVED_SECONDS else deaths + 1
            with suppress(TimeoutError):
                async with asyncio.timeout(_replacement_delay(deaths)):
                    await self._ending.wait()

    async def _run_worker(self, number: int) -> WorkerHandle:
        """Start a worker, and return it once it has ended or is killed. Raises OSError."""
        worker = WorkerHandle(number, self._counters, self._fork_server)
        methods = {**self._credentials.methods, **self._map_answers.methods}
        await worker.start({**methods, "cancel": partial(self._cancel, worker)})
        self._workers[number] = worker
        if await self._configure(worker):
            worker.serving = True
            if len(self._serving) == self._app.settings.listen.workers:
                self._start_decided.set()
            await worker.watch()
            worker.serving = False
        await worker.stop()
        return worker

    def _log_death(self, worker: WorkerHandle, code: int) -> None:
        if self._ending.is_set():
            return
        self._app.metrics.worker_died()
        _log.error(
            "worker died",
            worker=worker.number,
            exit_code=code,
            signal=signal.Signals(-code).name if code < 0 else "",
            sessions_lost=worker.sessions_lost,
        )

    def _read_exits(self) -> None:
        try:
            for number, code in self._fork_server.exits():
                self._record_exit(number, code)
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._fork_server)
            self._fork_server_died()

    def _record_exit(self, number: int, code: int) -> None:
        worker = self._workers.pop(number)
        self._counts_of_dead = total([self._counts_of_dead, worker.reading.after_exit()])
        worker.record_exit(code)

    def _fork_server_died(self) -> None:
        if not self._ending.is_set():
            _log.error("the fork server died; the proxy ends")
            self._app.lifecycle.fail()
        self._start_decided.set()
        for worker in self._workers.values():
            if not worker.exit_code.done():  # it cannot be known; it ends when it is closed
                worker.exit_code.set_result(-signal.SIGKILL)

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        """End all workers, which have no session any more, and wait for the tasks that run them."""
        for worker in list(self._workers.values()):
            worker.close()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * END_SECONDS_MAX)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what workers get ------------------------------------------------------------------------

    def _pass_connection(self, client: socket.socket) -> bool:
        """Pass a connection to the worker with the fewest. Return whether one took it."""
        connection_id = next(self._connection_ids)
        return any(
            worker.send_connection(client, connection_id)
            for worker in sorted(self._serving, key=lambda each: each.load)
        )

    async def _configure(self, worker: WorkerHandle) -> bool:
        """Make a worker serve by the newest settings. Return whether it does."""
        configured = 0
        while configured != self._generation:  # a reload may come meanwhile
            configured = self._generation
            if not await worker.configure(configured, self._app.settings):
                return False
        return True

    def _register_configuration(self) -> None:
        self._generation += 1
        snapshot = self._app.snapshot
        self._credentials.register(self._generation, snapshot.upstreams, snapshot.shards)

    def _tell_of_map(self, change: Message) -> None:
        """Notify every worker of a change of the map, those that are starting too."""
        for worker in self._workers.values():
            worker.map_changed(change)

    async def _cancel(self, asking: WorkerHandle, pid: int, key: str) -> bool:
        """Make the other worker that knows this key cancel its query (W43)."""
        others = [worker for worker in self._serving if worker is not asking]
        return any(await asyncio.gather(*(worker.cancel(pid, key) for worker in others)))


def _replacement_delay(deaths: int) -> float:
    """Return the delay before a worker is replaced; it doubles with each consecutive death."""
    return min(REPLACE_SECONDS_MAX, REPLACE_SECONDS_MIN * 2.0 ** min(deaths, _DOUBLINGS_MAX))
