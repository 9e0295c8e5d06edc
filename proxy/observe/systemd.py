"""Telling systemd how the proxy is: ready, reloading, stopping (sd_notify).

For: a unit of `Type=notify` whose `ExecReload` sends SIGHUP, as ours is; `Type=notify-reload` would
send it by itself, and needs systemd 253. Not for: any other supervisor; without NOTIFY_SOCKET
nothing is sent.

Invariant: a supervisor that does not listen changes nothing here. Messages are datagrams; one that
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
    """Return the message that a reload begins now; `READY` ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send a state to the supervisor that NOTIFY_SOCKET names, if there is one."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    # "@" stands for the NUL byte of Linux's abstract addresses.
    address = "\0" + path[1:] if path[0] == "@" else path
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.setblocking(False)
        sock.sendto(state.encode(), address)
