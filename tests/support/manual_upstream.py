"""An upstream of which a test writes every byte, and which keeps every byte that it is sent.

For: what no honest server says, and what exactly the proxy says to one. It does the honest part of
a login by itself (SSLRequest, TLS, StartupMessage, the question for a token) and tells sessions
from cancels, which `script` does not. Every wait is bounded.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from proxy.emulator.certificates import Certificate
from proxy.emulator.lakebase import Lakebase
from proxy.emulator.streams import EndedBy, Stream, StreamEnded
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    BackendKeyData,
    ReadyForQuery,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import SSLRequest

WAIT_SECONDS_MAX: Final = 10.0
KEY: Final = BackendKeyData(4711, Secret(b"key1"))
READY: Final = ReadyForQuery(b"I").encode()
WELCOME: Final = AuthenticationOk().encode() + KEY.encode() + READY
_CANCEL_CODE: Final = bytes.fromhex("04d2162e")


class WrittenSession:
    """One login. `received` is what came behind the token; a test may write to `stream`."""

    def __init__(self, stream: Stream, startup: bytes, token: bytes) -> None:
        self.stream = stream
        self.startup = startup
        self.token = token
        self.received = bytearray()
        self.ended = False

    def end(self, *, notify: bool) -> None:
        """End our stream with FIN, behind a close_notify or bare, and go on reading."""
        stream = self.stream
        if notify and stream._tls is not None:
            with suppress(ssl.SSLError):  # ours is sent, the proxy's has not come
                stream._tls.unwrap()
            stream._flush()
        stream._send_fin()

    @property
    def ended_by(self) -> EndedBy | None:
        """How the proxy ended it."""
        return self.stream.ended_by


class WrittenUpstream:
    """Made by `written_upstream`."""

    def __init__(self, context: ssl.SSLContext, welcome: bytes, question: bytes) -> None:
        self.port = 0
        self.sessions: list[WrittenSession] = []
        self.cancels: list[bytes] = []
        self.first_bytes: list[bytes] = []  # what each connection began with, before its answer
        self._context = context
        self._welcome = welcome
        self._question = question
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something is true of what came."""
        async with asyncio.timeout(WAIT_SECONDS_MAX), self._changed:
            await self._changed.wait_for(happened)

    async def session(self, number: int = 0) -> WrittenSession:
        """Return a session once its login is over."""
        await self.until(lambda: len(self.sessions) > number)
        return self.sessions[number]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """See one connection through."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        stream = Stream(reader, writer)
        try:
            await self._serve(stream)
        except StreamEnded:
            pass
        except asyncio.CancelledError:
            stream.reset()  # the test is over
        finally:
            await stream.release()
            self._tasks.discard(task)

    async def _serve(self, stream: Stream) -> None:
        self.first_bytes.append(await stream.read())
        assert self.first_bytes[-1] == SSLRequest().encode()
        await stream.write(b"S")
        await stream.start_tls(self._context)
        header = await stream.read_exactly(4)
        packet = header + await stream.read_exactly(int.from_bytes(header, "big") - 4)
        if packet[4:8] == _CANCEL_CODE:
            self.cancels.append(packet)
            await self._tell()
            await stream.finish(WAIT_SECONDS_MAX)
            return
        await stream.write(self._question)
        header = await stream.read_exactly(5)
        token = await stream.read_exactly(int.from_bytes(header[1:], "big") - 4)
        await stream.write(self._welcome)
        session = WrittenSession(stream, packet, token.rstrip(b"\0"))
        self.sessions.append(session)
        await self._tell()
        while received := await stream.read():
            session.received += received
            await self._tell()
        session.ended = True
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def stop(self) -> None:
        """Cut what is still open."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def written_upstream(
    lakebase: Lakebase,
    welcome: bytes = WELCOME,
    question: bytes = AuthenticationCleartextPassword().encode(),
) -> AsyncIterator[WrittenUpstream]:
    """Serve on a port of its own, with the stand-in's certificate, while the block runs."""
    context = lakebase.gateway.certificates.context(Certificate.GOOD)
    upstream = WrittenUpstream(context, welcome, question)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        await upstream.stop()
