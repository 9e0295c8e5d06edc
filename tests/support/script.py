"""An upstream that does what a script says, byte for byte: for what no honest server would do.

Every connection runs the same steps. A step that does not find what it expects ends that
connection and is kept in `failures`, which the test's end looks at. When the steps are over the
server waits for its client to end.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from proxy.emulator.streams import EndedBy, Stream, StreamEnded
from proxy.wire.framing import MessageReader
from proxy.wire.messages import AuthenticationCleartextPassword, Frame
from proxy.wire.startup import SSLRequest

WAIT_SECONDS_MAX: Final = 5.0


@dataclass(frozen=True, slots=True)
class Expect:
    """Read exactly these bytes."""

    content: bytes


@dataclass(frozen=True, slots=True)
class ExpectPacket:
    """Read a packet that begins with its length: a StartupMessage or a CancelRequest."""


@dataclass(frozen=True, slots=True)
class ExpectMessage:
    """Read a message of this type."""

    type: bytes


@dataclass(frozen=True, slots=True)
class Send:
    """Send bytes in one write."""

    content: bytes


@dataclass(frozen=True, slots=True)
class SendSplit:
    """Send bytes one at a time."""

    content: bytes


@dataclass(frozen=True, slots=True)
class StartTLS:
    """Shake hands as the server."""

    context: ssl.SSLContext


@dataclass(frozen=True, slots=True)
class Close:
    """End orderly: close_notify where there is TLS, and FIN."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End with RST."""


Step = Expect | ExpectPacket | ExpectMessage | Send | SendSplit | StartTLS | Close | Reset


class ScriptedServer:
    """Listens on a port of its own. `packets` are what ExpectPacket and ExpectMessage read."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.port = 0
        self.accepted = 0
        self.open = 0
        self.scripted = 0  # connections whose script has not come to its end
        self.scripted_most = 0
        self.packets: list[bytes] = []
        self.ends: list[EndedBy | None] = []
        self.failures: list[str] = []
        self._steps = steps
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Run the script on one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        stream = Stream(reader, writer)
        await self._count(accepted=1, opened=1)
        try:
            await self._run_all(stream)
            await stream.linger(WAIT_SECONDS_MAX)
        except StreamEnded:
            pass  # the client left in the middle, which a test may want; `ends` says how
        except AssertionError as error:
            self.failures.append(str(error))
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            stream.reset()
            self._tasks.discard(task)
            self.ends.append(stream.ended_by)
            await self._count(accepted=0, opened=-1)

    async def _run_all(self, stream: Stream) -> None:
        self.scripted += 1
        self.scripted_most = max(self.scripted, self.scripted_most)
        try:
            for step in self._steps:
                await self._run(step, stream)
        finally:
            self.scripted -= 1

    async def until_open(self, count: int) -> None:
        """Wait until so many connections are open."""
        async with asyncio.timeout(WAIT_SECONDS_MAX), self._changed:
            await self._changed.wait_for(lambda: self.open == count)

    async def until_read(self, count: int) -> None:
        """Wait until so many packets were read."""
        async with asyncio.timeout(WAIT_SECONDS_MAX), self._changed:
            await self._changed.wait_for(lambda: len(self.packets) >= count)

    async def stop(self) -> None:
        """Cut what is still open."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _count(self, *, accepted: int, opened: int) -> None:
        self.accepted += accepted
        self.open += opened
        async with self._changed:
            self._changed.notify_all()

    async def _keep(self, packet: bytes) -> None:
        self.packets.append(packet)
        async with self._changed:
            self._changed.notify_all()

    async def _run(self, step: Step, stream: Stream) -> None:
        match step:
            case Expect(content):
                found = await stream.read_exactly(len(content))
                assert found == content, f"expected {content!r}, got {found!r}"
            case ExpectPacket():
                header = await stream.read_exactly(4)
                rest = await stream.read_exactly(int.from_bytes(header, "big") - 4)
                await self._keep(header + rest)
            case ExpectMessage(kind):
                header = await stream.read_exactly(5)
                assert header[:1] == kind, f"expected {kind!r}, got {header[:1]!r}"
                size = int.from_bytes(header[1:], "big") - 4
                await self._keep(header + await stream.read_exactly(size))
            case Send(content):
                await stream.write(content)
            case SendSplit(content):
                for index in range(len(content)):
                    await stream.write(content[index : index + 1])
                    await asyncio.sleep(0)
            case StartTLS(context):
                await stream.start_tls(context)
            case Close():
                await stream.finish(WAIT_SECONDS_MAX)
                raise StreamEnded
            case Reset():
                raise StreamEnded


@asynccontextmanager
async def scripted(*steps: Step) -> AsyncIterator[ScriptedServer]:
    """Serve the script while the block runs; then no step may have failed."""
    script = ScriptedServer(steps)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    try:
        yield script
    finally:
        server.close()
        await script.stop()
    assert script.failures == []


def tls_opening(context: ssl.SSLContext) -> tuple[Step, ...]:
    """Return the steps of an honest server up to and with the StartupMessage."""
    return (Expect(SSLRequest().encode()), Send(b"S"), StartTLS(context), ExpectPacket())


def password_opening(context: ssl.SSLContext) -> tuple[Step, ...]:
    """Return the steps of an honest server up to and with the token."""
    asked = Send(AuthenticationCleartextPassword().encode())
    return (*tls_opening(context), asked, ExpectMessage(b"p"))


def password_in(packet: bytes) -> bytes:
    """Return what a PasswordMessage holds."""
    reader = MessageReader(len(packet))
    reader.feed(packet)
    frame = reader.next()
    assert isinstance(frame, Frame)
    return frame.payload.rstrip(b"\0")
