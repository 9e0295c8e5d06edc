"""Sockets: options of connected sockets, and listening on TCP and unix sockets.

The options send small writes without delay and detect dead peers (W36).
"""

import asyncio
import errno
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

# Load balancers and NAT devices drop an idle connection after 350 s or less.
KEEPALIVE_IDLE_SECONDS: Final = 60
KEEPALIVE_INTERVAL_SECONDS: Final = 10
KEEPALIVE_PROBES: Final = 3
# Keepalive does not run while sent bytes are unacknowledged; this timeout ends such a connection.
# The kernel also counts the time during which the peer's window is closed. A client that stops
# reading for that long would be cut in the middle of its result, so it is not set for clients. An
# upstream where a COPY waits for a lock looks the same, so the value is four times what suffices to
# detect a failover.
UNACKNOWLEDGED_SECONDS_MAX: Final = 120

# With port 0 another program may have the first address's free port on the second one.
FREE_PORT_TRIES: Final = 10
# Not what the hosts file says: it may name ::1 where there is none, as in a container, or omit it.
_FIXED_ADDRESSES: Final = {
    "localhost": ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")),
    "*": ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")),  # noqa: S104
    "::": ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")),  # noqa: S104
}
# Each of these covers every address of its family.
_ALL_ADDRESSES: Final = ("0.0.0.0", "::")  # noqa: S104
# An address that this machine does not have, or a family that its kernel does not have.
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)

# struct ucred: pid, uid, gid.
_CREDENTIALS: Final = struct.Struct("iII")
# struct tcp_info up to tcpi_last_data_recv: of it tcpi_last_data_sent and the last, in ms.
_LAST_DATA: Final = struct.Struct("=44xI4xI")

# Linux reports the peer's FIN even if bytes before it are unread; elsewhere only a reset is seen.
_HUNG_UP: Final = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


def set_tcp_options(transport: asyncio.BaseTransport) -> None:
    """Set TCP_NODELAY and keepalive on a TCP transport's socket; do nothing for a unix socket."""
    found = _tcp_socket(transport)
    if found is None:
        return
    # The loop's socket wrapper creates a socket object for each option. One here serves for all.
    sock = socket.socket(found.family, found.type, found.proto, fileno=found.fileno())
    try:
        # Some systems refuse options of a connection that the peer has reset.
        with suppress(OSError):
            _set_options(sock)
    finally:
        sock.detach()  # the descriptor belongs to the transport


def inherits_options(listening: socket.socket) -> bool:
    """Set the same on a TCP socket that listens. Return whether those it accepts inherit them.

    Linux copies them. That is one set of system calls in place of one for each connection.
    """
    if listening.family == socket.AF_UNIX or sys.platform != "linux":
        return False
    _set_options(listening)
    return True


def detect_dead_peer(transport: asyncio.BaseTransport) -> None:
    """Set keepalive so that an idle TCP connection ends within 30 s of the loss of its peer.

    For a connection that is only listened on, such as that of LISTEN.
    """
    found = _tcp_socket(transport)
    if found is not None:
        with suppress(OSError):
            for name, value in _FAST_KEEPALIVE_OPTIONS:
                _set_if_available(found, name, value)


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE_OPTIONS:
        _set_if_available(sock, name, value)


def end_stream(transport: asyncio.Transport) -> None:
    """Send FIN after the write buffer. Do nothing if the connection is lost or closing.

    The kernel knows of a reset before the transport does: then shutdown(2) fails with ENOTCONN, and
    `connection_lost` follows.
    """
    if not transport.is_closing():  # uvloop's transport raises once it is closed
        with suppress(OSError):
            transport.write_eof()


def set_user_timeout(transport: asyncio.BaseTransport) -> None:
    """Set the time after which unacknowledged bytes end an upstream connection."""
    sock = _tcp_socket(transport)
    if sock is not None:
        with suppress(OSError):
            _set_if_available(sock, "TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS_MAX * 1000)


def _tcp_socket(transport: asyncio.BaseTransport) -> socket.socket | None:
    sock = _open_socket(transport)
    return None if sock is None or sock.family == socket.AF_UNIX else sock


def _open_socket(transport: asyncio.BaseTransport) -> socket.socket | None:
    """Return the transport's socket; None after its close: uvloop has none, asyncio no number."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    return None if sock is None or sock.fileno() < 0 else sock


def _set_if_available(sock: socket.socket, name: str, value: int) -> None:
    option = getattr(socket, name, None)  # not every platform has every option
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


_KEEPALIVE_OPTIONS: Final = (
    ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
    ("TCP_KEEPCNT", KEEPALIVE_PROBES),
)
_FAST_KEEPALIVE_OPTIONS: Final = (
    ("TCP_KEEPIDLE", 15),
    ("TCP_KEEPINTVL", 5),
    ("TCP_KEEPCNT", 3),
)


def is_unix(transport: asyncio.BaseTransport) -> bool:
    """Return whether the connection uses a unix socket."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    return sock is not None and sock.family == socket.AF_UNIX


def peer_name(transport: asyncio.BaseTransport) -> tuple[str, int] | None:
    """Return the peer's address and port; None for a unix socket and a connection that is lost."""
    found = transport.get_extra_info("peername")
    return (found[0], found[1]) if isinstance(found, tuple) else None


def peer_pid(transport: asyncio.BaseTransport) -> int | None:
    """Return the process that connected to a unix socket, where the kernel knows it."""
    sock, option = _open_socket(transport), getattr(socket, "SO_PEERCRED", None)
    if sock is None or option is None or sock.family != socket.AF_UNIX:
        return None
    with suppress(OSError):
        pid: int = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
        )[0]
        return pid or None  # 0: it is in another namespace of processes
    return None


def quiet_seconds(transport: asyncio.BaseTransport) -> tuple[float, float] | None:
    """Return the time since data was last sent, and since it was last received.

    The kernel has both for a TCP connection, so that nothing has to be recorded. None elsewhere.
    """
    sock = _tcp_socket(transport)
    if sock is None or sys.platform != "linux":
        return None
    with suppress(OSError, struct.error):
        answer = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA.size)
        sent_ms, received_ms = _LAST_DATA.unpack(answer)
        return sent_ms / 1000, received_ms / 1000
    return None


def has_hung_up(transport: asyncio.BaseTransport) -> bool:
    """Return whether the peer has ended its stream, even if bytes before the end are unread."""
    sock = _open_socket(transport)
    if sock is None:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), _HUNG_UP)
    return any(event & _HUNG_UP for _, event in poll.poll(0))


def is_reset(transport: asyncio.BaseTransport) -> bool:
    """Return whether the connection is lost: a peer that has only ended its stream may read on."""
    sock = _open_socket(transport)
    if sock is None:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLERR)
    return bool(poll.poll(0))


def write_now(transport: asyncio.BaseTransport, data: bytes) -> None:
    """Write a few bytes past the transport, whose `abort` would discard them.

    The transport must have written nothing.
    """
    if (sock := _open_socket(transport)) is not None:
        with suppress(OSError):  # the peer has disconnected
            os.write(sock.fileno(), data)


def reset_on_close(transport: asyncio.BaseTransport) -> None:
    """Make the close of a TCP connection a reset, which discards what was not sent."""
    if (sock := _open_socket(transport)) is not None:
        with suppress(OSError):  # some systems refuse it after the peer's reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def listen_tcp(hosts: Sequence[str], port: int, backlog: int) -> list[socket.socket]:
    """Return a listening socket for each address of these hosts, all on one port.

    Of a name, "localhost", "::" and "*" those addresses are taken that this machine has. Raises
    OSError for one that cannot be listened on, with the address in its text.
    """
    for tries_left in reversed(range(FREE_PORT_TRIES)):
        with ExitStack() as opened:
            try:
                listening = _listen_on_all(hosts, port, backlog, opened)
            except OSError as error:
                # The free port of one address may be taken on another.
                if port or error.errno != errno.EADDRINUSE or not tries_left:
                    raise
            else:
                opened.pop_all()
                return listening
    raise AssertionError("unreachable")


def _listen_on_all(
    hosts: Sequence[str], port: int, backlog: int, opened: ExitStack
) -> list[socket.socket]:
    listening: list[socket.socket] = []
    taken: set[str] = set()
    found = [_addresses_of(host) for host in hosts]
    covered = {family for one in found for family, address in one if address in _ALL_ADDRESSES}
    for addresses in found:
        absent: OSError | None = None
        exists = False
        for family, address in addresses:
            # Another host has it, too.
            if address in taken or (family in covered and address not in _ALL_ADDRESSES):
                exists = True
                continue
            try:
                sock = opened.enter_context(_listen_on(family, address, port, backlog))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
                continue
            exists = True
            taken.add(address)
            listening.append(sock)
            port = sock.getsockname()[1]
        if absent is not None and not exists:
            raise absent
    return listening


def _addresses_of(host: str) -> list[tuple[int, str]]:
    """Return family and address of each address of a host. Raises OSError."""
    if fixed := _FIXED_ADDRESSES.get(host.lower()):
        return list(fixed)
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(error.errno, f"{host}: {error.strerror}") from error
    return list(dict.fromkeys((entry[0], str(entry[4][0])) for entry in found))


def _listen_on(family: int, address: str, port: int, backlog: int) -> socket.socket:
    try:
        # create_server sets SO_REUSEADDR, for a restarted process, and IPV6_V6ONLY.
        sock = socket.create_server((address, port), family=family, backlog=backlog)
    except OSError as error:
        number = error.errno or 0
        raise OSError(number, f"{address} port {port}: {os.strerror(number)}") from error
    sock.setblocking(False)
    return sock


def listen_unix(path: Path, mode: int, backlog: int) -> socket.socket:
    """Return a socket that listens at `path`, created with these permissions.

    A socket file left by a dead process is replaced. Raises OSError, with EADDRINUSE if another
    process listens or if `path` is not a socket.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)  # the umask can only remove permissions
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EADDRINUSE, f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # connecting blocks while the backlog is full
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # no process listens: its owner is dead
            return
        except BlockingIOError:
            pass  # a process listens, and its backlog is full
    raise OSError(errno.EADDRINUSE, f"another process listens on {path}")
