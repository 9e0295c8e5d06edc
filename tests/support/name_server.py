"""A DNS server that may be silent, and a process that asks no other.

The process runs in a mount namespace of its own, where this server is the only one of
/etc/resolv.conf. The port of a resolver is always 53, so that each server has an address of its own
in 127.0.0.0/8. It needs Linux and root: ask `available`.
"""

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, cast

_PORT: Final = 53
_HEADER_BYTES: Final = 12
_TYPE_A: Final = 1
_FLAGS_ANSWER: Final = 0x8180
_NAME_ERROR: Final = 3
_SERVER_FAILURE: Final = 2
_IN_NAMESPACE: Final = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


def available() -> bool:
    """Return whether there can be a mount namespace here, and a server on port 53."""
    return sys.platform == "linux" and os.geteuid() == 0


class NameServer(asyncio.DatagramProtocol):
    """Answers A queries for the names of `known`, and "no such name" for all others.

    Nothing is answered for names in `silent`, SERVFAIL for those in `failing`.
    """

    def __init__(self) -> None:
        self.address = ""
        self.known: dict[str, str] = {}
        self.silent: set[str] = set()
        self.failing: set[str] = set()
        self.asked: list[str] = []
        """The name of each A query."""
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by type

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer a query, or do not."""
        name, end = _name_in(data)
        kind = int.from_bytes(data[end : end + 2])
        if kind == _TYPE_A:
            self.asked.append(name)
        if name in self.silent:
            return
        found = self.known.get(name) if kind == _TYPE_A else None
        code = 0 if name in self.known else _NAME_ERROR
        code = _SERVER_FAILURE if name in self.failing else code
        flags = (_FLAGS_ANSWER | code).to_bytes(2)
        counts = b"\0\1" + (b"\0\1" if found else b"\0\0") + bytes(4)
        record = (
            b"\xc0\x0c" + b"\0\1\0\1" + bytes(4) + b"\0\4" + socket.inet_aton(found or "127.0.0.1")
        )
        answer = data[:2] + flags + counts + data[_HEADER_BYTES : end + 4]
        self._transport.sendto(answer + (record if found else b""), addr)

    def python(self, directory: Path) -> Sequence[str]:
        """Return the start of a command that runs Python with this server as its only one."""
        resolv = directory / "resolv.conf"
        resolv.write_text(f"nameserver {self.address}\n")
        return ("unshare", "-m", "sh", "-c", _IN_NAMESPACE, "sh", str(resolv), sys.executable)


def _name_in(query: bytes) -> tuple[str, int]:
    """Return the name that is asked for, and where its type begins."""
    labels, at = [], _HEADER_BYTES
    while length := query[at]:  # each turn advances
        labels.append(query[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels).lower(), at + 1


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """Run a server while the block runs."""
    first = 64 + secrets.randbelow(128)
    address = f"127.{first}.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, local_addr=(address, _PORT))
    server.address = address
    try:
        yield server
    finally:
        transport.close()
