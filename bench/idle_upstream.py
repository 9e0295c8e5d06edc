"""`python -m bench.idle_upstream CERTIFICATE KEY`: a scripted upstream for thousands of sessions.

For: the memory of a proxy at session counts that PostgreSQL cannot hold on a small machine. It
speaks TLS, accepts every login, admits every session of a shard map, and answers every other query
with one row of one column. Not for: measuring time or CPU.
"""

import asyncio
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct
from typing import Final

from bench.child_processes import LOOPBACK, child
from bench.postgres import Postgres, ServerAddress
from proxy.wire.messages import (
    IDLE,
    AuthenticationOk,
    BackendKeyData,
    Frame,
    ParameterStatus,
    ReadyForQuery,
)
from proxy.wire.secret import Secret

_MESSAGE_BYTES_MAX: Final = 64 * 1024  # our own clients send less
_BACKLOG: Final = 1024
_INT32: Final = Struct("!i")

_STARTUP_ANSWER: Final = b"".join(
    [
        AuthenticationOk().encode(),
        *(
            ParameterStatus(name, value).encode()
            for name, value in (
                (b"server_version", b"15.0"),
                (b"server_encoding", b"UTF8"),
                (b"client_encoding", b"UTF8"),
                (b"DateStyle", b"ISO, MDY"),
                (b"TimeZone", b"UTC"),
                (b"standard_conforming_strings", b"on"),
                (b"integer_datetimes", b"on"),
            )
        ),
        BackendKeyData(1, Secret(b"none")).encode(),
        ReadyForQuery(IDLE).encode(),
    ]
)
# One column "one": no table, no attribute, int4 of 4 bytes, no modifier, text. Then "1".
_COLUMN: Final = b"\0\1one\0" + Struct("!ihihih").pack(0, 0, 23, 4, -1, 0)
_ANSWER: Final = b"".join(
    [
        Frame(b"T", _COLUMN).encode(),
        Frame(b"D", b"\0\1" + _INT32.pack(1) + b"1").encode(),
        Frame(b"C", b"SELECT 1\0").encode(),
        ReadyForQuery(IDLE).encode(),
    ]
)

_ADMISSION: Final = b"shardmap_local.admit("
_ADMITTED: Final = b"".join(
    [
        Frame(b"D", b"\0\3\0\0\0\2ok\0\0\0\0011\0\0\0\0011").encode(),
        Frame(b"C", b"SELECT 1\0").encode(),
        ReadyForQuery(IDLE).encode(),
    ]
)


@contextmanager
def idle_upstream(upstream: Postgres, directory: Path) -> Iterator[ServerAddress]:
    """Run a scripted upstream while the block runs, with the real server's certificate."""
    files = [str(upstream.certificate), str(upstream.private_key)]
    command = [sys.executable, "-m", "bench.idle_upstream", *files]
    with child(command, directory / "idle_upstream.log") as started:
        started.wait_until(lambda: started.tail().endswith("\n"))
        yield ServerAddress(int(started.tail()), upstream.address.ca_file)


class _Upstream:
    """Serves connections until the process exits."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    async def serve(self) -> None:
        """Print the port and serve."""
        server = await asyncio.start_server(self._session, LOOPBACK, 0, backlog=_BACKLOG)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await server.serve_forever()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client may disconnect at any point, as PQping does.
        with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            await reader.readexactly(8)  # SSLRequest
            writer.write(b"S")
            await writer.start_tls(self._context)
            await _read_body(reader)  # StartupMessage
            writer.write(_STARTUP_ANSWER)
            while await reader.readexactly(1) == b"Q":
                sql = await _read_body(reader)
                writer.write(_ADMITTED if _ADMISSION in sql else _ANSWER)
        writer.close()


async def _read_body(reader: asyncio.StreamReader) -> bytes:
    (length,) = _INT32.unpack(await reader.readexactly(4))
    return await reader.readexactly(min(length - 4, _MESSAGE_BYTES_MAX))


def _main() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    asyncio.run(_Upstream(context).serve())


if __name__ == "__main__":
    _main()
