"""The sockets that clients connect to, as `[listen]` describes them.

For: opening all of them, and what they are called. Not for: accepting (`listener`, and with several
processes `workers.acceptor`).

Invariant: all TCP sockets have one port, and either all sockets are open or none.
"""

import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proxy.config import ListenSettings
from proxy.transport.sockets import listen_tcp, listen_unix

ACCEPT_BACKLOG: Final = 1024

Address = tuple[str, int]
"""Host and port, as drivers take them: of a unix socket the host is its directory."""


@dataclass(frozen=True, slots=True)
class ListenSockets:
    """The open sockets, and the addresses of clients for them, TCP first."""

    tcp: Sequence[socket.socket]
    unix: socket.socket | None
    unix_path: Path | None
    addresses: Sequence[Address]


def socket_name(port: int) -> str:
    """Return the file name of a unix socket for this port, as libpq expects it."""
    return f".s.PGSQL.{port}"


def shown(address: Address) -> str:
    """Return an address as one text."""
    host, port = address
    if host.startswith("/"):
        return f"{host}/{socket_name(port)}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_sockets(settings: ListenSettings) -> ListenSockets:
    """Listen on every address. Raises OSError with the setting in its text."""
    port = settings.port
    with ExitStack() as opened:
        tcp: list[socket.socket] = []
        if hosts := settings.hosts:
            try:
                tcp = listen_tcp(hosts, port, ACCEPT_BACKLOG)
            except OSError as error:
                key = "listen.port" if error.errno == errno.EADDRINUSE else "listen.host"
                raise _named(error, key) from error
            for sock in tcp:
                opened.enter_context(sock)
            port = tcp[0].getsockname()[1]
        addresses: list[Address] = [sock.getsockname()[:2] for sock in tcp]
        unix, path = None, None
        if directory := settings.unix_socket_directory:
            path = Path(directory) / socket_name(port)
            try:
                unix = listen_unix(path, int(settings.unix_socket_mode, 8), ACCEPT_BACKLOG)
            except OSError as error:
                raise _named(error, "listen.unix_socket_directory") from error
            addresses.append((directory, port))
        opened.pop_all()
        return ListenSockets(tcp, unix, path, addresses)


def _named(error: OSError, key: str) -> OSError:
    """Return the error with the setting that it is about."""
    return OSError(error.errno, f"{key}: {error.strerror or error}")
