"""The listener: one task a connection, a flood's bound, drain, and its failures."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from proxy.config import ListenSettings
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.server.file_limit import raise_file_limit
from proxy.server.metric_labels import build_metrics
from proxy.session.drain import MUTE_SECONDS, OpenSession
from proxy.session.listener import FLOOD_FROM, STARTING_MAX, Listener, Serve
from proxy.session.memory_trim import SESSIONS_MIN, MemoryTrim
from proxy.session.slots import Slots
from proxy.transport.stream import StartupStream
from tests.support.client import Client, plain_client
from tests.support.running import LogLines, captured_log, eventually


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit of open files for a test, as the proxy does when it starts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_file_limit()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def echo(stream: StartupStream, _entry: OpenSession) -> None:
    while received := await stream.receive():
        stream.write(received)
    await stream.close()


class Listening:
    """A listener that accepts, and its address."""

    def __init__(self, listener: Listener, metrics: Metrics, address: tuple[str, int]) -> None:
        self.listener = listener
        self.metrics = metrics
        self.address = address
        self.listen_host, self.listen_port = address

    @property
    def open(self) -> float:
        return self.metrics.value("connections")


@asynccontextmanager
async def listening(
    serve: Serve = echo,
    max_connections: int = 10,
    starting_max: int = STARTING_MAX,
    memory_trim: MemoryTrim | None = None,
) -> AsyncIterator[Listening]:
    metrics = build_metrics()
    settings = ListenSettings(port=0, max_connections=max_connections)
    slots = Slots(settings.max_connections)
    listener = Listener(
        settings, slots, metrics, serve, memory_trim=memory_trim, starting_max=starting_max
    )
    async with listener.accepting() as (address, *_):
        yield Listening(listener, metrics, address)


@pytest.fixture
def log() -> Iterator[LogLines]:
    with captured_log() as lines:
        yield lines


async def exchange(client: Client, content: bytes) -> None:
    await client.send(content)
    assert await client.receive() == content


async def assert_cut(client: Client) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert await client.receive() == b""


async def test_each_connection_is_served_in_a_task_of_its_own_and_counted() -> None:
    async with listening() as there:
        async with plain_client(there) as one, plain_client(there) as two:
            await exchange(one, b"1")
            await exchange(two, b"2")
            await exchange(one, b"3")
            assert there.open == 2
        await eventually(lambda: there.open == 0, "all are gone")
        assert there.metrics.value("connections_accepted_total") == 2


async def test_memory_is_released_after_many_connections() -> None:
    released = asyncio.Event()
    async with listening(memory_trim=MemoryTrim(released.set)) as there:
        for _ in range(SESSIONS_MIN):
            async with plain_client(there) as client:
                await exchange(client, b"x")
        async with asyncio.timeout(10):
            await released.wait()


async def test_every_line_of_a_connection_carries_its_number(log: LogLines) -> None:
    async def serve(stream: StartupStream, _entry: OpenSession) -> None:
        get_logger("proxy.session").info("served")
        stream.transport.close()

    async with listening(serve) as there:
        for _ in range(2):
            async with plain_client(there) as client:
                assert await client.receive() == b""
    assert [line["connection"] for line in log.events("served")] == [1, 2]


async def test_a_bug_costs_one_session_and_is_logged_and_counted(log: LogLines) -> None:
    async def serve(stream: StartupStream, entry: OpenSession) -> None:
        if (first := await stream.receive()) == b"bad":
            raise ZeroDivisionError("a bug")
        stream.write(first)
        await echo(stream, entry)

    async with listening(serve) as there:
        async with plain_client(there) as good, plain_client(there) as bad:
            await exchange(good, b"before")
            await bad.send(b"bad")
            await assert_cut(bad)
            await exchange(good, b"after")
        assert there.metrics.value("sessions_ended_total", reason="internal_error") == 1
    (line,) = log.above_info()
    assert line["event"] == "session failed"
    assert "ZeroDivisionError: a bug" in line["exception"]


async def test_a_silent_connection_makes_room_for_a_new_one() -> None:
    # 1,200 local connections that sent nothing locked every client out for 15 seconds.
    async with listening(starting_max=5) as there, AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(plain_client(there)) for _ in range(5)]
        await eventually(lambda: there.open == 5, "all are connected")
        await exchange(silent[0], b"it is the oldest, and not silent")
        loop = asyncio.get_running_loop()
        late = loop.time() + MUTE_SECONDS
        await eventually(lambda: loop.time() >= late, "they have been silent for long enough")
        for number in range(1, 4):
            await exchange(await stack.enter_async_context(plain_client(there)), b"x")
            error = await silent[number].error()  # it was closed without an answer
            assert error.sqlstate == "53000"
            await assert_cut(silent[number])
        await exchange(silent[0], b"x")
        assert there.metrics.value("startup_failures_total", reason="out_of_resources") == 3


async def test_a_flood_is_bounded_told_and_one_warning(log: LogLines) -> None:
    # They were closed without a word.
    async with listening(starting_max=2) as there, AsyncExitStack() as stack:
        for _ in range(2):
            await exchange(await stack.enter_async_context(plain_client(there)), b"x")
        for _ in range(5):
            client = await stack.enter_async_context(plain_client(there))
            error = await client.error()
            # Such a bound is that of few files.
            assert error.sqlstate == "53000"
            allowed = "the proxy's limit of open files allows 2 to start at a time"
            assert error.text(b"D") == f"reason=out_of_resources {allowed}"
            await assert_cut(client)
        assert there.metrics.value("startup_failures_total", reason="out_of_resources") == 5
    (line,) = log.above_info()
    assert line["event"] == "connections are cut: too many are starting"
    assert line["reason"] == "out_of_resources"
    assert line["starting"] == 2


async def test_where_files_are_no_bound_too_many_that_start_are_told_so(many_files: None) -> None:
    async with listening() as there, AsyncExitStack() as stack:
        first = await stack.enter_async_context(plain_client(there))
        for _ in range(FLOOD_FROM - 1):
            await stack.enter_async_context(plain_client(there))
        await eventually(lambda: there.open == FLOOD_FROM, "all are connected")
        loop = asyncio.get_running_loop()
        late = loop.time() + MUTE_SECONDS
        await eventually(lambda: loop.time() >= late, "they have been silent for long enough")
        await exchange(await stack.enter_async_context(plain_client(there)), b"x")
        error = await first.error()
        assert (error.sqlstate, error.message) == ("53300", "too many clients already")
        detail = f"at least {FLOOD_FROM} others are starting"
        assert error.text(b"D") == f"reason=too_many_starting {detail}"
        assert there.metrics.value("startup_failures_total", reason="too_many_starting") == 1


async def test_an_address_in_use_is_an_os_error_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        settings = ListenSettings(port=busy.getsockname()[1])
        with pytest.raises(OSError, match=r"listen\.port: .*in use"):
            async with Listener(settings, Slots(1), build_metrics(), echo).accepting():
                pass


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    # A TaskGroup would wrap it into an ExceptionGroup; the command line's sentences once got lost.
    with pytest.raises(LookupError, match="mine"):
        async with listening() as there, plain_client(there):
            raise LookupError("mine")


async def test_leaving_the_block_ends_every_connection_and_frees_the_port() -> None:
    async with AsyncExitStack() as stack:
        async with listening() as there:
            client = await stack.enter_async_context(plain_client(there))
            await exchange(client, b"x")
        assert there.open == 0
        await assert_cut(client)
    with pytest.raises(ConnectionRefusedError):
        await stack.enter_async_context(plain_client(there))


async def test_a_drain_without_connections_ends_at_once() -> None:
    async with listening() as there:
        assert await there.listener.drain(60) == 0
        with pytest.raises(ConnectionRefusedError):
            async with plain_client(there):
                pass


async def test_a_connection_that_waits_in_the_backlog_at_the_end_is_cut() -> None:
    # It is accepted by the kernel, perhaps by the loop, and has no task yet.
    for turns in range(10):
        async with listening() as there:
            clients = [socket.create_connection(there.address) for _ in range(5)]
            for _ in range(turns):
                await asyncio.sleep(0)
        await eventually(lambda: there.open == 0, "none is served")
        for sock in clients:
            with sock:
                sock.setblocking(False)
                await assert_cut(Client(sock))


async def test_connections_that_only_start_do_not_use_up_the_slots_of_sessions() -> None:
    # Once both were counted together: 1005 idle sockets shut out every client, with all slots free.
    slots = Slots(1)
    metrics = build_metrics()
    listener = Listener(ListenSettings(port=0, max_connections=1), slots, metrics, echo)
    async with listener.accepting() as (address, *_):
        with slots.take():
            async with AsyncExitStack() as stack:
                for _ in range(5):
                    reader, writer = await asyncio.open_connection(*address)
                    stack.callback(writer.close)
                    writer.write(b"hello")
                    async with asyncio.timeout(5):
                        assert await reader.readexactly(5) == b"hello"


OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_SNDBUF),
    (socket.SOL_SOCKET, socket.SO_RCVBUF),
)


@asynccontextmanager
async def accepted_elsewhere() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection, the client's and the one that was accepted."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, listening.getsockname())
        accepted, _ = listening.accept()
        accepted.setblocking(False)
        yield client, accepted


async def test_a_connection_that_was_accepted_elsewhere_is_served_like_one_of_its_own() -> None:
    options: list[list[int]] = []

    async def noted(stream: StartupStream, entry: OpenSession) -> None:
        sock = stream.transport.get_extra_info("socket")
        options.append([sock.getsockopt(*option) for option in OPTIONS])
        await echo(stream, entry)

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with listening(noted) as there, accepted_elsewhere() as (client, accepted):
        async with plain_client(there) as own:
            await exchange(own, b"x")
        there.listener.adopt(accepted, 7, ended.set)
        await loop.sock_sendall(client, b"adopted")
        assert await loop.sock_recv(client, 100) == b"adopted"
        assert options[0] == options[1], "no delay, keepalive"
        client.close()
        async with asyncio.timeout(5):
            await ended.wait()
        await eventually(lambda: there.open == 0, "it is not counted any more")
        assert there.metrics.value("connections_accepted_total") == 2


async def test_over_the_bound_of_those_that_start_an_adopted_connection_is_told_and_counted(
    log: LogLines,
) -> None:
    ended: list[int] = []
    loop = asyncio.get_running_loop()
    async with (
        listening(starting_max=1) as there,
        accepted_elsewhere() as (first, its),
        accepted_elsewhere() as (second, other),
    ):
        there.listener.adopt(its, 1, lambda: ended.append(1))
        there.listener.adopt(other, 2, lambda: ended.append(2))
        assert ended == [2]
        async with asyncio.timeout(5):
            assert b"C53000" in await loop.sock_recv(second, 1000)
            assert await loop.sock_recv(second, 1) == b""
        assert there.metrics.value("startup_failures_total", reason="out_of_resources") == 1
        await loop.sock_sendall(first, b"served")
        assert await loop.sock_recv(first, 100) == b"served"
