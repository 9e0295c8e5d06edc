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
from functools import partial
from typing import Any, Final

from proxy.errors import ProxyError
from proxy.observe.aggregation import Reading, total
from proxy.observe.logs import get_logger
from proxy.server.app import App
from proxy.server.router_factory import RELOAD_SECONDS_MAX
from proxy.upstream.connector import CANCEL_SECONDS_MAX
from proxy.upstream.upstreams import Upstreams
from proxy.workers.acceptor import Entrance
from proxy.workers.credential_service import CredentialService
from proxy.workers.fork_server import ForkServer
from proxy.workers.rpc import Answers, Channel, ChannelLost
from proxy.workers.rpc_frames import NUMBER_BYTES, MessageTooLong
from proxy.workers.shared_counters import SharedCounters

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
        self, slot: int, connection_socket: socket.socket, counters: SharedCounters
    ) -> None:
        self.slot = slot
        self.serving = False
        self.reading = Reading()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.channel: Channel
        self.sessions_lost = 0
        self._connection_socket = connection_socket
        self._counters = counters
        self._given = 0
        self._last_number = 0

    @property
    def load(self) -> tuple[int, int]:
        """How many connections it has; of two alike, who has waited longer goes first."""
        return self._given - self._counters.ended(self.slot), self._last_number

    def give(self, sock: socket.socket, number: int) -> bool:
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
        self.sessions_lost = self._counters.places_of(self.slot)
        self._counters.clear(self.slot)
        self._connection_socket.close()
        if not self.ended.done():
            self.ended.set_result(code)


class WorkerPool:
    """All workers of a proxy."""

    def __init__(self, app: App, counters: SharedCounters, fork_server: ForkServer) -> None:
        self._app = app
        self._counters = counters
        self._fork_server = fork_server
        self._entrance = Entrance(app.settings.listen, self._give_away)
        self._workers: dict[int, WorkerHandle] = {}  # by slot
        self._dead = Reading()
        self._credentials = CredentialService()
        self._numbers = itertools.count(1)  # of connections
        self._configuration = 0
        self._hastened = asyncio.Event()  # somebody has called drain again
        self._ending = asyncio.Event()
        self._start_over = asyncio.Event()  # all serve, or one has died
        self._open_configuration(app.snapshot.upstreams)

    # -- what an App wants of its entrance -------------------------------------------------------

    @asynccontextmanager
    async def accepting(self) -> AsyncIterator[tuple[str, int]]:
        """Accept while the block runs, and give the address; then end all workers.

        Raises OSError when the address cannot be listened on, or a worker does not start.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fork_server, self._read_exits)
        slots = range(self._app.settings.listen.workers)
        keepers: list[asyncio.Task[None]] = []
        try:
            host, port = self._entrance.open()
            # Not a TaskGroup: that would wrap whatever the block raises into an ExceptionGroup. No
            # task is lost, because leaving the block waits for them all.
            keepers += [loop.create_task(self._keep(slot)) for slot in slots]
            await self._start_over.wait()
            if len(self._serving) < len(slots):
                raise OSError("a worker did not start; the log says why")
            self._entrance.begin()
            yield host, port
        finally:
            await self.drain(0)
            await self._dismiss(keepers)
            loop.remove_reader(self._fork_server)
            await self._credentials.close()

    async def drain(self, seconds: float, *, accept_seconds: float = 0) -> int:
        """Go on accepting for a while, then end all sessions; return how many were cut.

        Called again meanwhile, it does with the shorter times what is left to do.
        """
        if accept_seconds and not self._hastened.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(accept_seconds):
                    await self._hastened.wait()
        self._hastened.set()
        self._ending.set()
        self._entrance.close()
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
    def places_taken(self) -> int:
        """How many places all sessions take."""
        return self._counters.places_taken

    def reading(self) -> Reading:
        """Return what all had counted when they were asked last, the dead among them."""
        return total([self._dead, *(worker.reading for worker in self._workers.values())])

    async def refresh(self) -> None:
        """Ask the workers what they have counted; of one that is silent the last word stands."""
        await asyncio.gather(*map(self._read, self._serving))

    async def take_over(self) -> bool:
        """Have all workers serve new sessions by the App's settings; tell whether all do."""
        self._open_configuration(self._app.snapshot.upstreams)
        return all(await asyncio.gather(*map(self._configure, self._serving)))

    # -- a worker's life -------------------------------------------------------------------------

    @property
    def _serving(self) -> list[WorkerHandle]:
        return [worker for worker in self._workers.values() if worker.serving]

    async def _keep(self, slot: int) -> None:
        """Have a worker in a slot, again and again, until the proxy ends."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while not self._ending.is_set():
            began = loop.time()
            try:
                worker = await self._run_worker(slot)
            except OSError as error:  # no descriptor is left, or the nursery has gone
                _log.error("cannot fork a worker", worker=slot + 1, error=error.strerror)
            else:
                self._log_death(worker, await worker.ended)
            self._start_over.set()
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
            worker=worker.slot + 1,
            exit_code=code,
            signal=signal.Signals(-code).name if code < 0 else "",
            sessions_lost=worker.sessions_lost,
        )

    async def _run_worker(self, slot: int) -> WorkerHandle:
        """Fork a worker and see it through; return it when it is to be buried. Raises OSError."""
        worker = await self._fork(slot)
        if await self._configure(worker):
            worker.serving = True
            if len(self._serving) == self._app.settings.listen.workers:
                self._start_over.set()
            await self._watch(worker)
            worker.serving = False
        worker.channel.close()
        try:
            async with asyncio.timeout(END_SECONDS_MAX):
                await asyncio.shield(worker.ended)
        except TimeoutError:
            self._fork_server.kill(slot)
        return worker

    async def _fork(self, slot: int) -> WorkerHandle:
        control, their_control = socket.socketpair()
        connection_socket, their_connection_socket = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        connection_socket.setblocking(False)
        worker = WorkerHandle(slot, connection_socket, self._counters)
        answers: Answers = {**self._credentials.answers, "cancel": partial(self._cancel, worker)}
        worker.channel = await Channel.open(control, answers)
        try:
            with their_control, their_connection_socket:
                self._fork_server.fork(slot, (their_control, their_connection_socket))
        except OSError:
            worker.channel.close()
            connection_socket.close()
            raise
        self._workers[slot] = worker
        return worker

    async def _watch(self, worker: WorkerHandle) -> None:
        """Return when a worker has ended; end one that is stuck."""
        while not worker.channel.lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await worker.channel.lost.wait()
            answered = await self._read(worker, STUCK_SECONDS_MAX)
            if not answered and not worker.channel.lost.is_set():
                _log.error("worker is stuck and is ended", worker=worker.slot + 1)
                self._fork_server.kill(worker.slot)
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
                    await worker.channel.call("configure", number=done, settings=content)
        except (ChannelLost, MessageTooLong, ProxyError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            _log.error("worker not configured", worker=worker.slot + 1, error=what)
            return False
        return True

    def _open_configuration(self, upstreams: Upstreams) -> None:
        self._configuration += 1
        self._credentials.open(self._configuration, upstreams)

    def _read_exits(self) -> None:
        try:
            for slot, code in self._fork_server.exits():
                self._reap(slot, code)
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._fork_server)
            if not self._ending.is_set():
                _log.error("the process that forks workers died; the proxy ends")
                self._app.lifecycle.fail()
            self._start_over.set()
            for worker in self._workers.values():
                if not worker.ended.done():  # nobody will tell, and it ends with its channel
                    worker.ended.set_result(-signal.SIGKILL)

    def _reap(self, slot: int, code: int) -> None:
        worker = self._workers.pop(slot)
        self._dead = total([self._dead, worker.reading.after_exit()])
        worker.mark_ended(code)

    async def _dismiss(self, keepers: list[asyncio.Task[None]]) -> None:
        """End all workers, which have no session any more, and wait for it."""
        for worker in list(self._workers.values()):
            worker.channel.close()
        if keepers:
            await asyncio.wait(keepers, timeout=2 * END_SECONDS_MAX)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    # -- asking ----------------------------------------------------------------------------------

    async def _asked(self, worker: WorkerHandle, call: Awaitable[Any], seconds: float) -> Any:
        """Return a worker's answer, None where it gives none in time."""
        try:
            async with asyncio.timeout(seconds):
                return await call
        except (ChannelLost, ProxyError, TimeoutError) as error:
            _log.debug("no answer of a worker", worker=worker.slot + 1, error=repr(error))
            return None

    async def _read(self, worker: WorkerHandle, seconds: float = READ_SECONDS_MAX) -> bool:
        content = await self._asked(worker, worker.channel.call("read"), seconds)
        if content is not None:
            worker.reading = Reading.from_dict(content)
        return content is not None

    async def _cancel(self, asking: WorkerHandle, pid: int, key: str) -> bool:
        """Have whichever other worker knows this key cancel its query (W43)."""
        seconds = CANCEL_SECONDS_MAX + READ_SECONDS_MAX
        others = [worker for worker in self._serving if worker is not asking]
        calls = [worker.channel.call("cancel", pid=pid, key=key) for worker in others]
        asked = (self._asked(*each, seconds) for each in zip(others, calls, strict=True))
        return any(await asyncio.gather(*asked))

    async def _drain(self, worker: WorkerHandle, seconds: float) -> int:
        if not worker.serving:
            return 0
        call = worker.channel.call("drain", seconds=seconds)
        cut: int | None = await self._asked(worker, call, seconds + END_SECONDS_MAX)
        if cut is None:
            self._fork_server.kill(worker.slot)
            await asyncio.wait({worker.ended}, timeout=END_SECONDS_MAX)
            return worker.sessions_lost
        return cut

    def _give_away(self, sock: socket.socket) -> bool:
        """Give a connection to the worker with the fewest; tell whether one takes it."""
        number = next(self._numbers)
        return any(
            worker.give(sock, number)
            for worker in sorted(self._serving, key=lambda each: each.load)
        )
