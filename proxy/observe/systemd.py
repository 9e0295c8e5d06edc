"""Notifying systemd of the proxy's state: ready, reloading, stopping (sd_notify).

For: a unit of `Type=notify` whose `ExecReload` sends SIGHUP, as ours does. (`Type=notify-reload`
sends it itself, but needs systemd 253.) Not for: any other service manager; without NOTIFY_SOCKET
nothing is sent.

Invariant: a service manager that does not listen has no effect. Messages are datagrams; one that
cannot be delivered at once is dropped.

Source: systemd's sd_notify(3).
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"


def reloading() -> str:
    """Return the message that a reload starts now; `READY` ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send a state to the service manager's socket in NOTIFY_SOCKET, if it is set."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    # "@" stands for the NUL byte of a Linux abstract address.
    address = "\0" + path[1:] if path[0] == "@" else path
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.setblocking(False)
        sock.sendto(state.encode(), address)
