"""The supervisor with real processes: which worker gets a connection, is asked, is replaced.

The workers are scripted: forked processes at the other end of the supervisor's sockets, which do
what their clients ask for. The real worker is in `e2e/test_workers.py`.
"""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvloop

from proxy.config import Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.server.app import App
from proxy.server.connection_source import Workers
from proxy.workers import worker_handle
from proxy.workers.fork_server import ForkServer
from proxy.workers.rpc import Methods, RpcConnection
from proxy.workers.shared_counters import SharedCounters
from proxy.workers.supervisor import Prefork, supervising
from tests.support.running import captured_log, eventually

# Other tests leave daemon threads behind. What is forked here takes no lock that one could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

REFUSED = "refused"  # the database whose configuration no worker takes
SESSIONS_CUT = 3  # what each worker answers to drain
SECONDS_MAX = 10.0


class ScriptedWorker:
    """Greets each client with its number, pid and database, then does what the client asks for.

    t: take a slot. c and a digit: have the supervisor cancel by the key that the worker of this
    number knows; the answer is y or n.
    """

    def __init__(self, counters: SharedCounters, number: int, connections: socket.socket) -> None:
        self._counters = counters
        self._number = number
        self._connections = connections
        self._clients: set[asyncio.Task[None]] = set()
        self._rpc: RpcConnection
        self._app: App

    async def run(self, control: socket.socket) -> None:
        methods: Methods = {
            "configure": self._configure,
            "read": self._read,
            "cancel": self._cancel,
            "drain": self._drain,
        }
        self._rpc = await RpcConnection.open(control, methods)
        await self._rpc.lost.wait()

    async def _configure(self, generation: int, settings: dict[str, Any]) -> None:
        validated = Settings.model_validate(settings)
        if validated.upstream.database == REFUSED:
            raise ProxyError(ErrorKind.INTERNAL, f"generation {generation}")
        if not hasattr(self, "_app"):
            asyncio.get_running_loop().add_reader(self._connections, self._receive)
            self._app = App(validated)
        self._app.reload(validated)

    async def _read(self) -> dict[str, Any]:
        return self._app.reading().as_dict()

    async def _cancel(self, pid: int, key: str) -> bool:
        return (pid, key) == (1, f"{self._number:02}")

    async def _drain(self, seconds: float) -> int:
        return SESSIONS_CUT

    def _receive(self) -> None:
        _, descriptors, _, _ = socket.recv_fds(self._connections, 8, 1)
        client = self._serve(socket.socket(fileno=descriptors[0]))
        self._clients.add(asyncio.get_running_loop().create_task(client))

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        with self._app.metrics.connection():
            database = self._app.settings.upstream.database
            writer.write(f"{self._number} {os.getpid()} {database}\n".encode())
            while command := await reader.read(1):
                if command == b"t":
                    self._counters.add_slots(self._number, 1)
                else:
                    key = f"{int(await reader.read(1)):02}"
                    found = await self._rpc.call("cancel", pid=1, key=key)
                    writer.write(b"y" if found else b"n")
        writer.close()
        self._counters.record_end(self._number)


def run_scripted(counters: SharedCounters, number: int, sockets: Sequence[socket.socket]) -> int:
    control, connections = sockets
    uvloop.run(ScriptedWorker(counters, number, connections).run(control))
    return 0


@pytest.fixture
def preforked() -> Iterator[Prefork]:
    """Return what has to be made before the test's event loop runs."""
    counters = SharedCounters(2)
    fork_server = ForkServer(partial(run_scripted, counters))
    yield Prefork(counters, fork_server)
    fork_server.close()
    gc.unfreeze()


def settings(database: str = "first", **listen: object) -> Settings:
    """Return settings of two workers, which neither workspace nor upstream exists for."""
    endpoint = "projects/p/branches/b/endpoints/e"
    return Settings.model_validate(
        {
            "listen": {"port": 0, "workers": 2, **listen},
            "admin": {"enabled": False},
            "upstream": {"endpoint": endpoint, "database": database},
        }
    )


class Client:
    """A connected client, and the worker that serves it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.worker = self.pid = 0
        self.database = ""

    async def greeted(self) -> None:
        """Read which worker serves it, by which configuration."""
        line = await asyncio.wait_for(self._reader.readline(), SECONDS_MAX)
        number, pid, self.database = line.decode().split()
        self.worker, self.pid = int(number), int(pid)

    def send(self, command: str) -> None:
        """Send its worker a command."""
        self._writer.write(command.encode())

    async def ask(self, command: str) -> str:
        """Return what its worker answers; nothing when that has died."""
        self.send(command)
        return (await asyncio.wait_for(self._reader.read(1), SECONDS_MAX)).decode()

    async def close(self) -> None:
        """Disconnect."""
        self._writer.close()
        with_reset = await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)
        assert all(isinstance(one, OSError | None) for one in with_reset)


class Proxy:
    """A supervisor's App, and what a test does with it."""

    def __init__(self, app: App, stack: AsyncExitStack) -> None:
        assert app.workers is not None
        self.app = app
        self.workers: Workers = app.workers
        self._stack = stack

    async def client(self) -> Client:
        """Connect; the client is closed at the end of the test."""
        client = Client(*await asyncio.open_connection(self.app.listen_host, self.app.listen_port))
        self._stack.push_async_callback(client.close)
        await client.greeted()
        return client

    async def clients(self, count: int) -> list[Client]:
        """Connect so many clients, one after another."""
        return [await self.client() for _ in range(count)]

    async def client_of(self, worker: int) -> Client:
        """Connect until this worker serves, which has the fewest connections as soon as it does."""
        async with asyncio.timeout(SECONDS_MAX):
            while (client := await self.client()).worker != worker:
                await client.close()
        return client

    async def kill(self, client: Client) -> None:
        """Kill a client's worker, and return when the supervisor has noticed."""
        deaths = partial(self.app.metrics.value, "worker_deaths_total")
        before = deaths()
        os.kill(client.pid, signal.SIGKILL)
        await eventually(lambda: deaths() == before + 1, "it is noticed")

    async def counted(self, name: str) -> float:
        """Return what all workers together have counted."""
        await self.workers.refresh()
        samples = self.workers.reading().samples
        return sum(one.value for one in samples if one.name == f"lakebase_proxy_{name}")


@asynccontextmanager
async def supervised(preforked: Prefork, configured: Settings) -> AsyncIterator[Proxy]:
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(supervising(configured, preforked))
        yield Proxy(app, await stack.enter_async_context(AsyncExitStack()))


def workers_of(clients: Sequence[Client]) -> list[int]:
    return sorted(client.worker for client in clients)


async def test_a_connection_goes_to_the_worker_with_the_fewest(preforked: Prefork) -> None:
    async with supervised(preforked, settings()) as proxy:
        clients = await proxy.clients(6)
        assert [client.worker for client in clients] == [clients[0].worker, clients[1].worker] * 3
        assert workers_of(clients) == [1, 1, 1, 2, 2, 2]
        of_two = [client for client in clients if client.worker == 2]
        for client in of_two:
            await client.close()
        await eventually(lambda: preforked.counters.connections_ended(2) == 3, "they have ended")
        assert workers_of(await proxy.clients(3)) == [2, 2, 2]


async def test_counts_are_those_of_all_workers(preforked: Prefork) -> None:
    async with supervised(preforked, settings()) as proxy:
        assert proxy.workers.ready
        for client in await proxy.clients(4):
            client.send("t")
        await eventually(lambda: proxy.workers.slots_used == 4, "each has its slot")
        assert await proxy.counted("connections_accepted_total") == 4
        assert await proxy.counted("connections") == 4


async def test_a_worker_that_dies_is_replaced_and_what_it_had_counted_stays(
    preforked: Prefork,
) -> None:
    with captured_log() as log:
        async with supervised(preforked, settings()) as proxy:
            one, other = await proxy.clients(2)
            one.send("t")
            await eventually(lambda: proxy.workers.slots_used == 1, "it has a slot")
            assert await proxy.counted("connections_accepted_total") == 2
            await proxy.kill(one)
            assert proxy.workers.slots_used == 0
            assert await proxy.counted("connections_accepted_total") == 2
            assert await proxy.counted("connections") == 1
            assert (await proxy.client_of(one.worker)).pid != one.pid
            assert await other.ask(f"c{other.worker}") == "n", "it lives"
    (died,) = log.events("worker died")
    assert (died["worker"], died["exit_code"], died["signal"]) == (one.worker, -9, "SIGKILL")
    assert died["sessions_lost"] == 1


async def test_a_worker_that_is_stuck_is_killed_and_replaced(
    preforked: Prefork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(worker_handle, "STUCK_SECONDS_MAX", 2)  # the other one is to answer
    with captured_log() as log:
        async with supervised(preforked, settings()) as proxy:
            client = await proxy.client()
            os.kill(client.pid, signal.SIGSTOP)
            await eventually(lambda: log.events("worker died"), "it is noticed")
    (stuck,) = log.events("worker is stuck and is killed")
    (died,) = log.events("worker died")
    assert stuck["worker"] == died["worker"] == client.worker
    assert died["signal"] == "SIGKILL"


async def test_a_reload_reaches_all_workers_and_those_that_come_later(preforked: Prefork) -> None:
    async with supervised(preforked, settings()) as proxy:
        before = await proxy.clients(2)
        proxy.app.reload(settings("second"))
        assert await proxy.workers.reload()
        after = await proxy.clients(2)
        assert {client.database for client in before} == {"first"}
        assert {client.database for client in after} == {"second"}
        await proxy.kill(before[0])
        assert (await proxy.client_of(before[0].worker)).database == "second"


async def test_a_reload_that_a_worker_refuses_says_so_and_it_serves_on(preforked: Prefork) -> None:
    with captured_log() as log:
        async with supervised(preforked, settings()) as proxy:
            proxy.app.reload(settings(REFUSED))
            assert not await proxy.workers.reload()
            assert {client.database for client in await proxy.clients(2)} == {"first"}
    errors = {line["worker"]: line["error"] for line in log.events("worker not configured")}
    assert errors.keys() == {1, 2}
    assert all("generation 2" in text for text in errors.values())


async def test_a_cancel_is_asked_of_every_other_worker_and_not_of_the_one_that_asks(
    preforked: Prefork,
) -> None:
    async with supervised(preforked, settings()) as proxy:
        one, other = await proxy.clients(2)
        for asking, elsewhere in ((one, other), (other, one)):
            assert await asking.ask(f"c{elsewhere.worker}") == "y"
            assert await asking.ask(f"c{asking.worker}") == "n"
            assert await asking.ask("c9") == "n"


async def test_a_drain_adds_up_what_workers_cut_and_kills_one_that_is_stuck(
    preforked: Prefork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "END_SECONDS_MAX", 2)  # the other one is to answer
    async with supervised(preforked, settings()) as proxy:
        one, _ = await proxy.clients(2)
        one.send("t")
        await eventually(lambda: proxy.workers.slots_used == 1, "it has a slot")
        os.kill(one.pid, signal.SIGSTOP)
        async with asyncio.timeout(SECONDS_MAX):
            assert await proxy.app.drain(0.1) == SESSIONS_CUT + 1
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await proxy.client()


async def test_a_drain_that_is_asked_for_again_accepts_no_longer(preforked: Prefork) -> None:
    async with supervised(preforked, settings()) as proxy:
        slow = asyncio.ensure_future(proxy.app.drain(60, accept_seconds=60))
        assert (await proxy.client()).worker in (1, 2)
        async with asyncio.timeout(SECONDS_MAX):
            assert await proxy.app.drain(0) == 2 * SESSIONS_CUT
            assert await slow == 2 * SESSIONS_CUT


async def test_without_the_fork_server_the_proxy_is_asked_to_end(preforked: Prefork) -> None:
    with captured_log() as log:
        async with supervised(preforked, settings()) as proxy:
            client = await proxy.client()
            os.kill(preforked.fork_server.pid, signal.SIGKILL)
            async with asyncio.timeout(SECONDS_MAX):
                await proxy.app.lifecycle.quit_asked.wait()
            assert proxy.app.lifecycle.failed
            assert await client.ask("c9") == "n", "its sessions go on"
            assert (await proxy.client()).worker in (1, 2), "and new ones come"
    assert log.events("the fork server died; the proxy ends")


async def test_when_a_worker_does_not_start_the_proxy_does_not(preforked: Prefork) -> None:
    with pytest.raises(OSError, match="a worker did not start"):
        async with supervised(preforked, settings(REFUSED)):
            pytest.fail("it serves")


async def test_a_port_that_is_taken_is_a_plain_os_error(preforked: Prefork) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = {"host": "127.0.0.1", "port": taken.getsockname()[1]}
        with pytest.raises(OSError, match="in use"):
            async with supervised(preforked, settings(**listen)):
                pytest.fail("it serves")
