"""Sockets: the options of connected ones, and listening on a unix one.

Small writes go at once, and dead peers are noticed (W36).
"""

import asyncio
import errno
import os
import select
import socket
import stat
from pathlib import Path
from typing import Final

# Network address translation and load balancers forget a connection after 350 s or less.
KEEPALIVE_IDLE_SECONDS: Final = 60
KEEPALIVE_INTERVAL_SECONDS: Final = 10
KEEPALIVE_PROBES: Final = 3
# Keepalive does not run while sent bytes are unacknowledged; this ends such a connection. But the
# kernel counts the time that a peer's window is closed, too: a client that stopped reading for so
# long would be cut in the middle of its result, so clients have none; and a COPY that waits for a
# lock looks the same upstream, so this is four times what suffices to notice a failover.
UNACKNOWLEDGED_SECONDS_MAX: Final = 120

# Linux tells of the peer's FIN apart from the bytes before it; elsewhere only a reset is seen.
_HUNG_UP: Final = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


def set_tcp_options(transport: asyncio.BaseTransport) -> None:
    """Set the options on a TCP transport's socket; a unix socket needs none."""
    found = _tcp_socket(transport)
    if found is None:
        return
    # The loop's stand-in for a socket makes a new one for each option: here one does for all.
    sock = socket.socket(found.family, found.type, found.proto, fileno=found.fileno())
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE_OPTIONS:
            _set_if_available(sock, name, value)
    finally:
        sock.detach()  # the descriptor is the transport's


def set_user_timeout(transport: asyncio.BaseTransport) -> None:
    """End an upstream's connection when what was sent is not taken for too long."""
    sock = _tcp_socket(transport)
    if sock is not None:
        _set_if_available(sock, "TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS_MAX * 1000)


def _tcp_socket(transport: asyncio.BaseTransport) -> socket.socket | None:
    sock: socket.socket | None = transport.get_extra_info("socket")
    return None if sock is None or sock.family == socket.AF_UNIX else sock


def _set_if_available(sock: socket.socket, name: str, value: int) -> None:
    option = getattr(socket, name, None)  # not every platform has every one
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


_KEEPALIVE_OPTIONS: Final = (
    ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
    ("TCP_KEEPCNT", KEEPALIVE_PROBES),
)


def is_unix(transport: asyncio.BaseTransport) -> bool:
    """Whether the connection came over a unix socket."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    return sock is not None and sock.family == socket.AF_UNIX


def has_hung_up(transport: asyncio.BaseTransport) -> bool:
    """Whether the peer has ended its stream, whatever it sent before and nobody has read yet."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), _HUNG_UP)
    return any(event & _HUNG_UP for _, event in poll.poll(0))


def listen_tcp(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Return a listening socket for each address that a host has. Raises OSError."""
    listening: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, _kind, _protocol, _name, address in dict.fromkeys(found):
            # It lets a restarted process have the port again, and keeps IPv6 apart from IPv4.
            sock = socket.create_server(address, family=family, backlog=backlog)
            sock.setblocking(False)
            listening.append(sock)
    except BaseException:
        for sock in listening:
            sock.close()
        raise
    return listening


def listen_unix(path: Path, mode: int, backlog: int) -> socket.socket:
    """Return a socket that listens at `path` with these permissions from its first moment.

    A socket that a dead process left there is replaced. Raises OSError, EADDRINUSE when a live
    process listens, and for anything at `path` that is no socket.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)  # the umask can only take away
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EADDRINUSE, f"{path} is there and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # where a backlog is full, connecting waits as long as it is
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # nobody listens: its process is dead
            return
        except BlockingIOError:
            pass  # somebody listens, and is busy
    raise OSError(errno.EADDRINUSE, f"another process listens on {path}")
