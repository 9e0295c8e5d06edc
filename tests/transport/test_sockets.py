"""W36: the options that a connection's socket really has."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.transport import sockets
from proxy.transport.stream import StartupStream
from tests.support.loops import LOOPS, NewLoop, run
from tests.support.peer import Peer
from tests.transport.peers import Notes, linked


def option(sock: socket.socket, level: int, name: int) -> int:
    return sock.getsockopt(level, name)


async def test_w36_small_writes_go_at_once_and_dead_peers_are_noticed() -> None:
    async with linked() as (stream, _):
        sock = stream.transport.get_extra_info("socket")
        tcp = socket.IPPROTO_TCP
        assert option(sock, tcp, socket.TCP_NODELAY) == 1
        assert option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert option(sock, tcp, socket.TCP_KEEPIDLE) == 60
        assert option(sock, tcp, socket.TCP_KEEPINTVL) == 10
        assert option(sock, tcp, socket.TCP_KEEPCNT) == 3


async def test_w33_a_client_that_stops_reading_for_long_is_not_cut_by_the_kernel() -> None:
    # TCP_USER_TIMEOUT also runs while the peer's window is closed, however alive the peer is: a
    # client that paused for 30 s in the middle of a result lost its connection.
    async with linked() as (stream, _):
        sock = stream.transport.get_extra_info("socket")
        assert option(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


async def test_w36_unacknowledged_bytes_to_an_upstream_have_a_bound() -> None:
    async with linked() as (stream, _):
        sockets.set_user_timeout(stream.transport)
        sock = stream.transport.get_extra_info("socket")
        assert option(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


async def test_a_unix_socket_needs_no_options(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    path = str(tmp_path / "s")
    accepted = Notes(keep_open=False)
    server = await loop.create_unix_server(lambda: accepted, path)
    transport, _ = await loop.create_unix_connection(asyncio.Protocol, path)
    sockets.set_tcp_options(transport)
    sockets.set_user_timeout(transport)
    transport.abort()
    await accepted.until_told("lost")
    server.close()


def test_what_has_no_socket_needs_no_options() -> None:
    sockets.set_tcp_options(asyncio.Transport())
    sockets.set_user_timeout(asyncio.Transport())


async def test_an_option_that_this_platform_does_not_have_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")  # macOS calls it TCP_KEEPALIVE
    async with linked() as (stream, _):
        sock = stream.transport.get_extra_info("socket")
        assert option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_a_peers_end_is_seen_before_its_bytes_are_read() -> None:
    # Reading may be paused for the other side's sake: then nothing else tells that it has gone.
    loop = asyncio.get_running_loop()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as peer,
    ):
        accepted, _ = listener.accept()
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
        transport.pause_reading()
        peer.sendall(b"unread" * 1000)
        assert not sockets.has_hung_up(transport)
        peer.shutdown(socket.SHUT_WR)  # on loopback it has arrived when this returns
        assert sockets.has_hung_up(transport)
        transport.abort()


async def _reset_unseen(stream: StartupStream, peer: Peer) -> None:
    peer.reset()


async def _reset_after_the_end(stream: StartupStream, peer: Peer) -> None:
    peer.close()
    await stream.gone
    stream.write(b"x")  # which the peer answers with RST


async def _lost(stream: StartupStream, peer: Peer) -> None:
    peer.reset()
    await stream.gone
    await asyncio.sleep(0)  # the transport closes after connection_lost


async def _aborted(stream: StartupStream, peer: Peer) -> None:
    stream.transport.abort()


def _write_now(transport: asyncio.Transport) -> None:
    sockets.write_now(transport, b"x")


GOES_AWAY = (_reset_unseen, _reset_after_the_end, _lost, _aborted)

CALLS = (
    sockets.end_stream,
    sockets.set_tcp_options,
    sockets.set_user_timeout,
    sockets.is_unix,
    sockets.has_hung_up,
    sockets.is_reset,
    _write_now,
    sockets.reset_on_close,
)


@LOOPS
@pytest.mark.parametrize("goes_away", GOES_AWAY)
@pytest.mark.parametrize("call", CALLS)
def test_no_call_on_the_socket_of_a_peer_that_has_gone_fails(
    new_loop: NewLoop,
    goes_away: Callable[[StartupStream, Peer], Awaitable[None]],
    call: Callable[[asyncio.Transport], object],
) -> None:
    # ENOTCONN, EBADF and uvloop's RuntimeError were taken for bugs of the proxy.
    async def story() -> None:
        async with linked() as (stream, peer):
            await goes_away(stream, peer)
            call(stream.transport)
            await asyncio.sleep(0)

    run(new_loop, story)


def test_listening_again_on_a_port_that_is_taken_fails_and_leaves_nothing_open() -> None:
    (sock,) = sockets.listen_tcp(["127.0.0.1"], 0, 8)
    with sock:
        assert sock.getsockname()[1] > 0
        assert not sock.getblocking()
        with pytest.raises(OSError, match="in use"):
            sockets.listen_tcp(["127.0.0.1"], sock.getsockname()[1], 8)
    with pytest.raises(OSError, match=r"."):  # not an address of this machine (RFC 5737)
        sockets.listen_tcp(["192.0.2.1"], 0, 8)


def addresses_of(*hosts: str) -> tuple[list[str], set[int]]:
    """Listen on these hosts; return the addresses and the ports."""
    listening = sockets.listen_tcp(hosts, 0, 8)
    names = [sock.getsockname() for sock in listening]
    for sock in listening:
        sock.close()
    return [name[0] for name in names], {name[1] for name in names}


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["localhost"], ["127.0.0.1", "::1"]),
        (["LOCALHOST", "127.0.0.1"], ["127.0.0.1", "::1"]),
        (["::1", "127.0.0.1"], ["::1", "127.0.0.1"]),
        (["*"], ["0.0.0.0", "::"]),
        (["::"], ["::", "0.0.0.0"]),
        # An address that another one covers was reported as taken by another Postgres.
        (["localhost", "*"], ["0.0.0.0", "::"]),
        (["0.0.0.0", "localhost"], ["0.0.0.0", "::1"]),
        (["::1", "127.0.0.1", "::"], ["::", "0.0.0.0"]),
    ],
)
def test_each_address_has_a_socket_and_all_have_one_port(
    hosts: list[str], expected: list[str]
) -> None:
    # Only the first of them had the port that was logged, and "::" did not take IPv4.
    needs_ipv6()
    addresses, ports = addresses_of(*hosts)
    assert addresses == expected
    assert len(ports) == 1


def test_a_free_port_that_is_taken_on_the_second_address_is_not_used() -> None:
    needs_ipv6()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"^.*::1 port {port}: Address already in use"):
            sockets.listen_tcp(["localhost"], port, 8)
        assert addresses_of("localhost")[1] != {port}


NAMES = "127.0.0.1 localhost both.example\n::1 localhost both.example only6.example\n"
# Runs without IPv6, as many containers do: there ::1 exists in the hosts file only.
WITHOUT_IPV6 = """
import sys
from proxy.transport.sockets import listen_tcp
try:
    print([sock.getsockname()[0] for sock in listen_tcp(sys.argv[1:], 0, 8)])
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize(
    ("hosts", "printed"),
    [
        (["localhost"], "['127.0.0.1']"),
        (["::1"], "::1 port 0: Cannot assign requested address"),
        # The kernel has the family, and lets a socket wait for addresses.
        (["*"], "['0.0.0.0', '::']"),
        (["::"], "['::', '0.0.0.0']"),
        (["both.example"], "['127.0.0.1']"),
        # The second one has no address of its own.
        (["127.0.0.1", "localhost"], "['127.0.0.1']"),
        (["both.example", "localhost", "127.0.0.2"], "['127.0.0.1', '127.0.0.2']"),
        (["only6.example"], "::1 port 0: Cannot assign requested address"),
        (["unknown.example"], "unknown.example: "),
    ],
)
def test_without_ipv6_the_addresses_that_exist_are_taken(
    hosts: list[str], printed: str, tmp_path: Path
) -> None:
    # "localhost" did not start where the hosts file names ::1 and the machine has no such address,
    # and neither did "localhost" after 127.0.0.1.
    names = tmp_path / "hosts"
    names.write_text(NAMES)
    prepare = (
        f"mount --bind {names} /etc/hosts; mount --bind /dev/null /etc/resolv.conf;"
        " ip link set lo up; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
    )
    namespace = ("unshare", "--map-root-user", "--mount", "--net", "sh", "-c")
    if subprocess.run([*namespace, f"({prepare}) 2>&1"], check=False).returncode:
        pytest.skip("needs a network namespace of its own")
    command = [*namespace, f'{prepare}; exec "$@"', "sh", sys.executable, "-c", WITHOUT_IPV6]
    ran = subprocess.run([*command, *hosts], check=True, capture_output=True, text=True)
    if hosts == ["unknown.example"]:  # the rest is the resolver's own text
        assert ran.stdout.startswith(printed)
    else:
        assert ran.stdout.strip() == printed


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
