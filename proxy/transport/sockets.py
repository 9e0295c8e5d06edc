"""Options of a connected socket: small writes at once, dead peers noticed (W36)."""

import asyncio
import socket
from typing import Final

# Network address translation and load balancers forget a connection after 350 s or less.
KEEPALIVE_IDLE_SECONDS: Final = 60
KEEPALIVE_INTERVAL_SECONDS: Final = 10
KEEPALIVE_PROBES: Final = 3
# Keepalive does not run while sent bytes are unacknowledged; this ends such a connection. For
# upstreams only: the kernel counts the time that a peer's window is closed too, so a client that
# stopped reading for so long would be cut in the middle of its result.
UNACKNOWLEDGED_SECONDS_MAX: Final = 30


def tune(transport: asyncio.BaseTransport) -> None:
    """Set the options on a TCP transport's socket; a unix socket needs none."""
    sock = _tcp_socket(transport)
    if sock is None:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBING:
        _set_where_known(sock, name, value)


def bound_unacknowledged(transport: asyncio.BaseTransport) -> None:
    """End an upstream's connection when what was sent is not taken for too long."""
    sock = _tcp_socket(transport)
    if sock is not None:
        _set_where_known(sock, "TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS_MAX * 1000)


def _tcp_socket(transport: asyncio.BaseTransport) -> socket.socket | None:
    sock: socket.socket | None = transport.get_extra_info("socket")
    return None if sock is None or sock.family == socket.AF_UNIX else sock


def _set_where_known(sock: socket.socket, name: str, value: int) -> None:
    option = getattr(socket, name, None)  # not every platform has every one
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


_PROBING: Final = (
    ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
    ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
    ("TCP_KEEPCNT", KEEPALIVE_PROBES),
)
