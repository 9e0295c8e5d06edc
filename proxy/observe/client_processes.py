"""The processes that have connected, as far as the kernel tells: pid and command.

For: `/sessions`, when it is asked to. The kernel names the process of a unix socket. Of a
connection on loopback it names the socket, and the process is the one that has it among its open
files. Not for: clients on other machines, in other containers, or of users whose files may not be
listed.

Invariants: it runs in a thread and within `SCAN_SECONDS_MAX`, after which what was found counts. A
command is its name without arguments, which may be secrets.
"""

import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from proxy.addresses import address_of, is_loopback
from proxy.blocking import BlockingCalls, NoThreadStarted
from proxy.observe.session_page import SessionRow

SCAN_SECONDS_MAX: Final = 1.0
# One more request waits; of a third the rows have no process.
_THREADS_MAX: Final = 1
# Beyond the time of the scan, which ends by itself.
_GRACE_SECONDS: Final = 1.0

_PROC: Final = Path("/proc")
_TABLES: Final = ("net/tcp", "net/tcp6")
_SOCKET: Final = "socket:["
_IN_IPV6: Final = b"\0" * 10 + b"\xff" * 2  # before an IPv4 address

Peer = str
"""A client's address and port, as a row has them."""


class ClientProcesses:
    """Looks for the processes of clients, one request at a time."""

    def __init__(self) -> None:
        self._threads = BlockingCalls("client processes", threads_max=_THREADS_MAX)

    async def add_to(self, rows: Iterable[SessionRow], ports: Collection[int]) -> None:
        """Set `pid` and `command` in the rows whose process is found.

        `ports` are the proxy's: a client's port may also be that of another connection of another
        process, to somewhere else.
        """
        peers = [row["client"] for row in rows if row["client"]]
        pids = [row["pid"] for row in rows if row["pid"] is not None]
        found: Mapping[Peer, int] = {}
        commands: Mapping[int, str] = {}
        with suppress(TimeoutError, NoThreadStarted):
            found, commands = await self._threads.run(
                lambda: _find(peers, ports, pids), SCAN_SECONDS_MAX + _GRACE_SECONDS
            )
        for row in rows:
            row["pid"] = pid = found.get(row["client"], row["pid"])
            row["command"] = None if pid is None else commands.get(pid)


def _find(
    peers: Iterable[Peer], ports: Collection[int], pids: Iterable[int]
) -> tuple[dict[Peer, int], dict[int, str]]:
    """Return the processes of these peers, and the commands of these and of the pids."""
    ends_at = time.monotonic() + SCAN_SECONDS_MAX
    found = dict(_owners(_sockets_of(peers, ports), ends_at))
    commands = {}
    for pid in {*pids, *found.values()}:
        with suppress(OSError):  # it has ended
            commands[pid] = (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    return found, commands


def _sockets_of(peers: Iterable[Peer], ports: Collection[int]) -> dict[str, Peer]:
    """Return the peers on loopback by what the kernel calls a link to their socket."""
    ours = tuple(f":{port:04X}" for port in ports)
    wanted = {name: peer for peer in peers for name in _names_in_table(peer)}
    found: dict[str, Peer] = {}
    for table in _TABLES if wanted else ():
        with suppress(OSError), (_PROC / table).open() as lines:
            for line in lines:
                _, local, remote, _ = line.split(None, 3)
                if local in wanted and remote.endswith(ours):
                    found[f"{_SOCKET}{line.split()[9]}]"] = wanted[local]
    return found


def _owners(sockets: Mapping[str, Peer], ends_at: float) -> Iterator[tuple[Peer, int]]:
    """Yield the peers and the process that has their socket open, until this time."""
    left = dict(sockets)
    for pid in _processes():
        files = f"{_PROC}/{pid}/fd"
        with suppress(OSError):  # it has ended, or is another user's
            for name in os.listdir(files):  # noqa: PTH208 - names, not paths: there are many
                if not left or time.monotonic() > ends_at:
                    return
                peer = None
                with suppress(OSError):
                    peer = left.pop(os.readlink(f"{files}/{name}"), None)  # noqa: PTH115
                if peer is not None:
                    yield peer, pid


def _processes() -> list[int]:
    """Return the processes, the newest first; this one, which has the most files, comes last."""
    with suppress(OSError):
        pids = [int(path.name) for path in _PROC.iterdir() if path.name.isdecimal()]
        return sorted(pids, key=lambda pid: (pid == os.getpid(), -pid))
    return []


def _names_in_table(peer: Peer) -> Iterator[str]:
    """Yield how the kernel's tables write a peer on loopback."""
    host, _, port = peer.rpartition(":")
    address = address_of(host.strip("[]"))
    if address is None or not is_loopback(str(address)):
        return
    packed = address.packed
    yield f"{_words(packed)}:{int(port):04X}"
    if address.version == 4:
        yield f"{_words(_IN_IPV6 + packed)}:{int(port):04X}"  # of a socket of both families


def _words(packed: bytes) -> str:
    """Return an address as the kernel writes it: words in the machine's order, in hexadecimal."""
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
