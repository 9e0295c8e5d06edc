"""`python -m bench.delayed_upstream PORT MILLISECONDS`: a TCP forwarder that adds network delay.

For: PostgreSQL at a distance, where Lakebase always is. Every byte arrives that much later in each
direction, in order. The first byte of a connection arrives one round trip later still, because on
this machine TCP connects at once. Not for: low bandwidth or packet loss, nor for many connections
(`select`, whose timeouts are exact, takes 1,024 descriptors).
"""

import asyncio
import selectors
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.child_processes import LOOPBACK, child
from bench.postgres import ServerAddress

ONE_WAY_MILLISECONDS: Final = 1.0


@contextmanager
def delayed_upstream(address: ServerAddress, directory: Path) -> Iterator[ServerAddress]:
    """Run a forwarder to this address, `ONE_WAY_MILLISECONDS` away, while the block runs."""
    arguments = [str(address.port), str(ONE_WAY_MILLISECONDS)]
    command = [sys.executable, "-m", "bench.delayed_upstream", *arguments]
    with child(command, directory / "delayed_upstream.log") as started:
        started.wait_until(lambda: started.tail().endswith("\n"))
        yield ServerAddress(int(started.tail()), address.ca_file)


class _Direction(asyncio.Protocol):
    """Receives from one side and writes to the other after the delay."""

    def __init__(self, one_way_seconds: float) -> None:
        self._one_way_seconds = one_way_seconds
        self._loop = asyncio.get_running_loop()
        self._not_before = self._loop.time() + 2 * one_way_seconds
        self._queue: deque[bytes | None] = deque()  # None is EOF
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.source = transport

    def data_received(self, data: bytes) -> None:
        self._delay(data)

    def eof_received(self) -> bool:
        self._delay(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._delay(None)

    def _delay(self, data: bytes | None) -> None:
        self._queue.append(data)
        due = max(self._loop.time(), self._not_before) + self._one_way_seconds
        # Timers of the same moment may fire in any order: each delivers the head of the queue.
        self._loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        if self.sink is None and self.source is not None and not self.source.is_closing():
            # Not connected yet: Python 3.11.2 reads in spite of a pause in `connection_made`.
            self._loop.call_later(self._one_way_seconds, self._deliver)
            return
        data = self._queue.popleft()
        if self.sink is None or self.sink.is_closing():
            return
        if data is None:
            self.sink.close()
        else:
            self.sink.write(data)


class _FromClient(_Direction):
    """The client's side: it is not read until the connection to PostgreSQL is open."""

    def __init__(self, port: int, one_way_seconds: float) -> None:
        super().__init__(one_way_seconds)
        self._port = port
        self._dialing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.source is not None
        self.source.pause_reading()
        self._dialing = self._loop.create_task(self._dial())

    async def _dial(self) -> None:
        assert self.source is not None
        reverse = _Direction(self._one_way_seconds)
        reverse.sink = self.source
        try:
            await self._loop.create_connection(lambda: reverse, LOOPBACK, self._port)
        except OSError:
            self.source.abort()
            return
        self.sink = reverse.source
        self.source.resume_reading()


async def _serve(port: int, one_way_seconds: float) -> None:
    """Print the port and serve until the process exits."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _FromClient(port, one_way_seconds), LOOPBACK, 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def _main() -> None:
    # epoll and uvloop round timeouts up to whole milliseconds: a delay of 1 ms would take 2.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1e3))


if __name__ == "__main__":
    _main()
