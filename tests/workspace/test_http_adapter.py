"""Replies without an end, and connections that a network device has forgotten: real sockets."""

import asyncio
import importlib
import resource
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from pydantic import SecretStr

from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.emulator import faults
from proxy.emulator import workspace as emulator
from proxy.emulator.api import Call
from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.faults import Hang, Reply
from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.errors import ErrorKind, ProxyError
from proxy.workspace import resources
from proxy.workspace.client import Workspace
from proxy.workspace.http_adapter import IDLE_SECONDS_MAX, REPLY_BYTES_MAX
from tests.support.emulated_workspace import ENDPOINT
from tests.support.running import eventually

PRIMARY = resources.Endpoint(ENDPOINT)
MEMORY_BYTES_MAX = 5 << 20


@pytest.fixture(scope="module", autouse=True)
def sdk_is_imported() -> None:
    """Import it once, so that its second is no part of a deadline."""
    for name in ("core", "service.postgres"):
        importlib.import_module(f"databricks.sdk.{name}")


def workspace(url: str, timeout: float) -> Workspace:
    secret = SecretStr(CLIENT_SECRET)
    settings = WorkspaceSettings(host=url, client_id=CLIENT_ID, client_secret=secret)
    credentials = CredentialsSettings(mint_timeout_seconds=timeout)
    return Workspace(settings, credentials, version="0")


async def refusal(made: Workspace) -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        await made.mint(PRIMARY)
    return refused.value


def open_connections(api: emulator.Workspace) -> int:
    assert api._server is not None
    return len(api._server.server_state.connections)


# -- replies without an end ----------------------------------------------------------------------

LONG = Reply(200, b'{"token": "' + b"x" * REPLY_BYTES_MAX + b'"}')


@pytest.mark.parametrize("call", [Call.DISCOVERY, Call.OIDC, Call.TOKEN, Call.CREDENTIAL])
@pytest.mark.parametrize(
    "fault", [faults.ENDLESS, faults.DRIPPING, LONG], ids=["endless", "dripping", "long"]
)
async def test_a_reply_without_an_end_costs_neither_memory_nor_its_connection(
    api: emulator.Workspace, fault: Hang | Reply, call: Call
) -> None:
    # It was read on after its client had been refused: up to 5.2 GB in ten seconds. One that came
    # byte by byte kept its thread, because each byte began the socket's timeout anew.
    await workspace(api.url, 10).mint(PRIMARY)  # what is imported is no part of it
    before = set(threading.enumerate())
    bytes_before = peak_bytes()
    api.fail(call, fault)
    error = await refusal(workspace(api.url, 1))
    assert error.kind is ErrorKind.API_UNREACHABLE
    assert peak_bytes() - bytes_before < MEMORY_BYTES_MAX

    def ended() -> bool:
        names = {thread.name for thread in set(threading.enumerate()) - before}
        return "databricks-sdk" not in names

    await eventually(ended, "the call's thread has ended")
    api.clear_faults()


LONG_HEADERS = b"".join(b"X-%d: " % i + b"y" * 65000 + b"\r\n" for i in range(95))
LARGE_REPLIES = {
    "head": b"HTTP/1.1 200 OK\r\n" + LONG_HEADERS + b"Content-Length: 2\r\n\r\n{}",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: /other\r\nConnection: close\r\n"
    b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000,
}


def answer_all(server: socket.socket, reply: bytes) -> None:
    """Answer each connection once, until the server is shut down."""
    with suppress(OSError):
        while True:  # ends with the server
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):
                connection.recv(1 << 16)
                connection.sendall(reply)


@pytest.mark.parametrize("reply", LARGE_REPLIES.values(), ids=LARGE_REPLIES.keys())
async def test_a_head_and_redirects_have_a_bound_too(api: emulator.Workspace, reply: bytes) -> None:
    # The bound was of the body: a head cost 50 MB, and thirty redirects with a body each 80 MB.
    await workspace(api.url, 10).mint(PRIMARY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=answer_all, args=(server, reply))
        answering.start()
        bytes_before = peak_bytes()
        error = await refusal(workspace(f"http://127.0.0.1:{server.getsockname()[1]}", 5))
        bytes_more = peak_bytes() - bytes_before
        server.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(answering.join)
    assert error.kind is ErrorKind.API_UNREACHABLE
    assert bytes_more < MEMORY_BYTES_MAX


def peak_bytes() -> int:
    """Return the most memory that this process and the emulator in it have used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def test_a_call_that_is_given_up_closes_its_connection(api: emulator.Workspace) -> None:
    made = workspace(api.url, 10)
    await made.mint(PRIMARY)
    kept = open_connections(api)
    api.fail(Call.CREDENTIAL, faults.HANG, times=3)
    hasty = [workspace(api.url, 0.3) for _ in range(3)]
    for one in hasty:
        await refusal(one)
    await eventually(lambda: open_connections(api) <= kept, "connections are closed")
    api.clear_faults()


# -- handshakes without an end -------------------------------------------------------------------

DRIP_SECONDS = 0.05
# The head of a ServerHello of 16 kB, and an answer to CONNECT whose headers do not end.
SLOW_STARTS = {
    "tls": b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc",
    "connect": b"HTTP/1.1 200 OK\r\nX-Slow: ",
}


class SlowPeer:
    """Begins an answer, and goes on byte by byte until the client closes."""

    def __init__(self, start: bytes) -> None:
        self._start = start
        self.accepted = 0
        self.closed = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        with suppress(ConnectionError):
            await reader.read(1)
            writer.write(self._start)
            closing = asyncio.ensure_future(_read_to_end(reader))
            while not closing.done():
                writer.write(b"x")
                await asyncio.wait([closing], timeout=DRIP_SECONDS)
        self.closed += 1
        writer.transport.abort()


async def _read_to_end(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


@pytest.mark.parametrize("where", SLOW_STARTS)
async def test_a_handshake_that_comes_byte_by_byte_ends_with_its_call(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    # Each byte began the socket's timeout anew: the thread and the connection were kept for hours.
    peer, before = SlowPeer(SLOW_STARTS[where]), set(threading.enumerate())
    async with await asyncio.start_server(peer.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        host = f"https://127.0.0.1:{port}"
        if where == "connect":
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
            host = "https://dbc.example.com"
        made = workspace(host, 1)
        error = await refusal(made)
        assert error.kind is ErrorKind.API_UNREACHABLE
        await eventually(lambda: peer.closed == peer.accepted > 0, "the connection is closed")

        def ended() -> bool:
            names = {thread.name for thread in set(threading.enumerate()) - before}
            return "databricks-sdk" not in names

        await eventually(ended, "the call's thread has ended")


# -- idle connections ----------------------------------------------------------------------------


class ForgetfulNetwork:
    """Forwards connections; `forget` drops or resets what the earlier ones send from then on."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._states: list[list[str]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self.accepted = 0

    def forget(self, how: str) -> None:
        for state in self._states:
            state[0] = how

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        state = ["forward"]
        self._states.append(state)
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, there]
        async with asyncio.TaskGroup() as both:
            both.create_task(_forward(reader, there, state))
            both.create_task(_forward(there_reader, writer, state))

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: list[str]
) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            if state[0] == "reset":
                raw = reader._transport.get_extra_info("socket")  # type: ignore[attr-defined]
                linger = struct.pack("ii", 1, 0)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                reader._transport.abort()  # type: ignore[attr-defined]
            elif state[0] == "forward":
                writer.write(data)
    writer.close()


@asynccontextmanager
async def forgetful_network(api: emulator.Workspace) -> AsyncIterator[tuple[ForgetfulNetwork, str]]:
    network = ForgetfulNetwork(api.port)
    async with await asyncio.start_server(network.serve, "127.0.0.1", 0) as server:
        yield network, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        network.close()


class MovedClock:
    """The adapter's clock, which a test moves: an idle half minute would take that long."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_seconds


@pytest.fixture
def moved_clock(monkeypatch: pytest.MonkeyPatch) -> MovedClock:
    clock = MovedClock()
    monkeypatch.setattr("proxy.workspace.http_adapter.time", clock)
    return clock


@pytest.mark.parametrize("how", ["drop", "reset"])
async def test_a_connection_that_was_idle_for_half_a_minute_is_not_used_again(
    api: emulator.Workspace, moved_clock: MovedClock, how: str
) -> None:
    # The first client after a quiet hour waited 5 s with a valid token, 16.6 s without one: the
    # request went to a connection that the NAT had forgotten.
    async with forgetful_network(api) as (network, url):
        made = workspace(url, 10)
        await made.mint(PRIMARY)
        network.forget(how)
        moved_clock.ahead_seconds = IDLE_SECONDS_MAX + 1
        begun = time.monotonic()
        await made.mint(PRIMARY)
        assert time.monotonic() - begun < 0.5


async def test_a_reset_of_an_idle_connection_is_followed_by_the_second_try_at_once(
    api: emulator.Workspace,
) -> None:
    # The SDK slept for 1 to 2 s before it.
    async with forgetful_network(api) as (network, url):
        made = workspace(url, 10)
        await asyncio.gather(*(made.mint(PRIMARY) for _ in range(4)))
        network.forget("reset")
        begun = time.monotonic()
        await made.mint(PRIMARY)
        assert time.monotonic() - begun < 0.5


async def test_a_connection_is_used_again_while_it_is_not_idle_for_long(
    api: emulator.Workspace,
) -> None:
    async with forgetful_network(api) as (network, url):
        made = workspace(url, 10)
        await made.mint(PRIMARY)
        before = network.accepted
        for _ in range(3):
            await made.mint(PRIMARY)
        assert network.accepted == before
