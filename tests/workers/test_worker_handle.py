"""One worker as the supervisor sees it: started, called, stuck, ended.

The worker is scripted: a forked process that answers the supervisor's calls. Which worker gets a
connection, and what follows when one dies, is in `test_supervisor.py`.
"""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvloop

from proxy.config import Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.aggregation import Reading, Sample
from proxy.workers import worker_handle
from proxy.workers.fork_server import ForkServer
from proxy.workers.rpc import RpcConnection
from proxy.workers.shared_counters import SharedCounters
from proxy.workers.worker_handle import WorkerHandle
from tests.support.proxy_process import alive
from tests.support.running import captured_log, eventually, nothing_left

# Other tests leave daemon threads behind. What is forked here takes no lock that one could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

NUMBER = 1
READ = Reading([Sample("made_up", "counter", "made_up_total", (), 7.0)], [], [], [])
CANCEL_KEY = (1, "00ff")
SESSIONS_CUT = 3
REFUSED = "refused"  # the database whose configuration it does not take
SECONDS_MAX = 10.0
# What a test waits for that a worker which is stopped will never do.
SHORT_SECONDS = 0.1


class ScriptedWorker:
    """Answers calls, and takes a slot for each connection that it receives."""

    def __init__(self, counters: SharedCounters, connections: socket.socket) -> None:
        self._counters = counters
        self._connections = connections
        self._clients: list[socket.socket] = []

    async def run(self, control: socket.socket) -> None:
        methods = {name: getattr(self, f"_{name}") for name in ("configure", "cancel", "drain")}
        rpc = await RpcConnection.open(control, methods | {"read": self._read})
        asyncio.get_running_loop().add_reader(self._connections, self._receive)
        await rpc.call("started", pid=os.getpid())
        await rpc.lost.wait()

    async def _configure(self, generation: int, settings: dict[str, Any]) -> None:
        if Settings.model_validate(settings).upstream.database == REFUSED:
            raise ProxyError(ErrorKind.INTERNAL, f"generation {generation}")

    async def _read(self) -> dict[str, Any]:
        return READ.as_dict()

    async def _cancel(self, pid: int, key: str) -> bool:
        return (pid, key) == CANCEL_KEY

    async def _drain(self, seconds: float) -> int:
        return SESSIONS_CUT

    def _receive(self) -> None:
        packet, descriptors, _, _ = socket.recv_fds(self._connections, 8, 1)
        if not packet:
            asyncio.get_running_loop().remove_reader(self._connections)
            return
        self._clients.append(socket.socket(fileno=descriptors[0]))
        self._counters.add_slots(NUMBER, 1)


def run_scripted(counters: SharedCounters, _number: int, sockets: Sequence[socket.socket]) -> int:
    control, connections = sockets
    uvloop.run(ScriptedWorker(counters, connections).run(control))
    return 0


class Supervised:
    """A handle, what its worker runs on, and the worker's pid."""

    def __init__(self, counters: SharedCounters, fork_server: ForkServer) -> None:
        self.counters = counters
        self.handle = WorkerHandle(NUMBER, counters, fork_server)
        self.pid = 0

    async def start(self) -> None:
        """Start the worker; return once it has called."""
        await self.handle.start({"started": self._started})
        await eventually(lambda: self.pid, "it has called")

    async def _started(self, pid: int) -> None:
        self.pid = pid

    def pass_connection(self) -> bool:
        """Pass the worker one end of a new connection."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            return self.handle.send_connection(theirs, 1)


@pytest.fixture
def counters() -> SharedCounters:
    return SharedCounters(2)


@pytest.fixture
def fork_server(counters: SharedCounters) -> Iterator[ForkServer]:
    """Return what has to be forked before the test's event loop runs."""
    forking = ForkServer(partial(run_scripted, counters))
    yield forking
    forking.close()
    gc.unfreeze()


@asynccontextmanager
async def supervised(counters: SharedCounters, forking: ForkServer) -> AsyncIterator[Supervised]:
    """Start a worker that serves, record its exit, and stop it after the block."""
    loop = asyncio.get_running_loop()
    worker = Supervised(counters, forking)

    def record_exits() -> None:
        for number, code in forking.exits():
            assert number == NUMBER
            worker.handle.record_exit(code)

    loop.add_reader(forking, record_exits)
    try:
        await worker.start()
        worker.handle.serving = True
        yield worker
    finally:
        await worker.handle.stop()
        await exit_code(worker)
        loop.remove_reader(forking)


async def exit_code(worker: Supervised) -> int:
    async with asyncio.timeout(SECONDS_MAX):
        return await asyncio.shield(worker.handle.exit_code)


def settings(database: str) -> Settings:
    return Settings.model_validate({"upstream": {"host": "h", "database": database}})


async def test_it_ends_by_itself_once_its_sockets_are_closed(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert alive({worker.pid}) == {worker.pid}
    assert await exit_code(worker) == 0
    assert alive({worker.pid}) == set()
    assert not worker.handle.serving
    assert not worker.pass_connection(), "it is dead"


async def test_without_a_fork_server_it_is_not_started_and_keeps_no_socket(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    fork_server.close()

    async def start() -> None:
        with pytest.raises(OSError, match=r"Bad file descriptor|Broken pipe"):
            await WorkerHandle(NUMBER, counters, fork_server).start({})

    await start()  # with its first socket the event loop opens a file of its own
    async with nothing_left():
        await start()


async def test_it_says_whether_it_serves_by_settings(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    with captured_log() as log:
        async with supervised(counters, fork_server) as worker:
            assert await worker.handle.configure(1, settings("shop"))
            assert not await worker.handle.configure(2, settings(REFUSED))
        assert not await worker.handle.configure(3, settings("shop")), "it has ended"
    first, second = log.events("worker not configured")
    assert first["worker"] == NUMBER
    assert "generation 2" in first["error"]
    assert second["error"] == "RpcConnectionLost"


async def test_settings_that_it_does_not_take_in_time_are_given_up(
    counters: SharedCounters, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "CONFIGURE_SECONDS_MAX", SHORT_SECONDS)
    with captured_log() as log:
        async with supervised(counters, fork_server) as worker:
            os.kill(worker.pid, signal.SIGSTOP)
            assert not await worker.handle.configure(1, settings("shop"))
            os.kill(worker.pid, signal.SIGCONT)
    (line,) = log.events("worker not configured")
    assert line["error"] == "TimeoutError"


async def test_its_last_reading_stays_while_it_is_silent_and_when_it_has_ended(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert worker.handle.reading == Reading()
        assert await worker.handle.read(SECONDS_MAX)
        assert worker.handle.reading == READ
        os.kill(worker.pid, signal.SIGSTOP)
        assert not await worker.handle.read(SHORT_SECONDS)
        assert worker.handle.reading == READ
        os.kill(worker.pid, signal.SIGCONT)
        assert await worker.handle.read(SECONDS_MAX)
    assert not await worker.handle.read()
    assert worker.handle.reading == READ


async def test_a_cancel_says_whether_it_knows_the_key(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert await worker.handle.cancel(*CANCEL_KEY)
        assert not await worker.handle.cancel(2, "00ff")
    assert not await worker.handle.cancel(*CANCEL_KEY), "it has ended"


async def test_its_load_is_what_it_was_sent_and_has_not_ended_and_silence_is_the_heaviest(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert worker.handle.load == (True, 0, 0), "its loop has not run yet"
        counters.beat(NUMBER)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for connection_id in (5, 8):
                assert worker.handle.send_connection(theirs, connection_id)
        await eventually(lambda: counters.slots_used == 2, "both are received")
        counters.record_end(NUMBER)
        counters.beat(NUMBER)
        assert worker.handle.load == (False, 1, 8)


async def test_its_exit_frees_its_slots_and_says_how_many_sessions_it_had(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert worker.pass_connection()
        await eventually(lambda: counters.slots_used == 1, "it is received")
        os.kill(worker.pid, signal.SIGKILL)
        assert await exit_code(worker) == -signal.SIGKILL
        assert worker.handle.sessions_lost == 1
        assert counters.slots_used == 0
        assert not worker.handle.serving


async def test_a_drain_says_how_many_sessions_were_cut_and_asks_only_one_that_serves(
    counters: SharedCounters, fork_server: ForkServer
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert await worker.handle.drain(0) == SESSIONS_CUT
        worker.handle.serving = False
        assert await worker.handle.drain(0) == 0


async def test_a_drain_that_it_does_not_answer_kills_it(
    counters: SharedCounters, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with supervised(counters, fork_server) as worker:
        assert worker.pass_connection()
        await eventually(lambda: counters.slots_used == 1, "it is received")
        os.kill(worker.pid, signal.SIGSTOP)
        with monkeypatch.context() as shorter:
            # The bound of the answer alone: its end has the time that it needs.
            shorter.setattr(worker_handle, "END_SECONDS_MAX", SHORT_SECONDS)
            draining = asyncio.ensure_future(worker.handle.drain(0))
            await asyncio.sleep(0)
        assert await draining == 1
        assert await exit_code(worker) == -signal.SIGKILL


async def test_one_that_does_not_stop_is_killed(
    counters: SharedCounters, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "END_SECONDS_MAX", SHORT_SECONDS)
    async with supervised(counters, fork_server) as worker:
        os.kill(worker.pid, signal.SIGSTOP)
    assert await exit_code(worker) == -signal.SIGKILL


async def test_watching_reads_it_now_and_then_and_ends_with_it(
    counters: SharedCounters, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "WATCH_SECONDS", 0.01)
    async with supervised(counters, fork_server) as worker:
        watching = asyncio.ensure_future(worker.handle.watch())
        await eventually(lambda: worker.handle.reading == READ, "it is read")
        first = worker.handle.reading
        await eventually(lambda: worker.handle.reading is not first, "it is read again")
        os.kill(worker.pid, signal.SIGKILL)
        async with asyncio.timeout(SECONDS_MAX):
            await watching


async def test_watching_kills_one_that_is_stuck(
    counters: SharedCounters, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(worker_handle, "STUCK_SECONDS_MAX", SHORT_SECONDS)
    with captured_log() as log:
        async with supervised(counters, fork_server) as worker:
            os.kill(worker.pid, signal.SIGSTOP)
            async with asyncio.timeout(SECONDS_MAX):
                await worker.handle.watch()
            assert await exit_code(worker) == -signal.SIGKILL
    (line,) = log.events("worker is stuck and is killed")
    assert line["worker"] == NUMBER


async def test_its_silence_is_logged_once_and_so_is_its_return(
    counters: SharedCounters, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "SILENT_SECONDS_MAX", 0.02)  # how often it is looked at
    silent, returned = "worker does not answer and gets no connections", "worker answers again"
    with captured_log() as log:
        async with supervised(counters, fork_server) as worker:
            watching = asyncio.ensure_future(worker.handle.watch())
            await eventually(lambda: log.events(silent), "its loop has not run yet")
            counters.beat(NUMBER)
            await eventually(lambda: log.events(returned), "it is noticed")
            assert [len(log.events(text)) for text in (silent, returned)] == [1, 1]
            os.kill(worker.pid, signal.SIGKILL)
            async with asyncio.timeout(SECONDS_MAX):
                await watching
