"""`python -m bench.delay PORT MILLISECONDS`: a way to a local port that takes its time.

For: PostgreSQL at a distance, as Lakebase always is. Every byte arrives so much later in each
direction, in order, and the first of a connection a round trip later still, since the kernel on
this machine says at once that a connection is there. Not for: a narrow or a lossy line, nor for
many connections (`select`, whose waits are exact, takes 1,024 descriptors).
"""

import asyncio
import selectors
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.children import LOOPBACK, child
from bench.postgres import Place

ONE_WAY_MILLISECONDS: Final = 1.0


@contextmanager
def delayed(place: Place, directory: Path) -> Iterator[Place]:
    """Give the same place, `ONE_WAY_MILLISECONDS` away, while the block runs."""
    command = [sys.executable, "-m", "bench.delay", str(place.port), str(ONE_WAY_MILLISECONDS)]
    with child(command, directory / "delay.log") as started:
        started.wait_until(lambda: started.tail().endswith("\n"))
        yield Place(int(started.tail()), place.ca_file)


class _Direction(asyncio.Protocol):
    """Takes what one side sends; hands it to the other when its time has come."""

    def __init__(self, one_way_seconds: float) -> None:
        self._one_way_seconds = one_way_seconds
        self._loop = asyncio.get_running_loop()
        self._not_before = self._loop.time() + 2 * one_way_seconds
        self._waiting: deque[bytes | None] = deque()  # None is the end
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

    def _delay(self, what: bytes | None) -> None:
        self._waiting.append(what)
        due = max(self._loop.time(), self._not_before) + self._one_way_seconds
        # Timers of one moment may ring in any order: each hands over whatever is first in line.
        self._loop.call_at(due, self._hand_over)

    def _hand_over(self) -> None:
        what = self._waiting.popleft()
        if self.sink is None or self.sink.is_closing():
            return
        if what is None:
            self.sink.close()
        else:
            self.sink.write(what)


class _Arrival(_Direction):
    """The client's side: what it sends waits for the connection to PostgreSQL."""

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
        back = _Direction(self._one_way_seconds)
        back.sink = self.source
        try:
            await self._loop.create_connection(lambda: back, LOOPBACK, self._port)
        except OSError:
            self.source.abort()
            return
        self.sink = back.source
        self.source.resume_reading()


async def _serve(port: int, one_way_seconds: float) -> None:
    """Print the port and serve until the process is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Arrival(port, one_way_seconds), LOOPBACK, 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def _main() -> None:
    # The waits of epoll and of uvloop are whole milliseconds: a delay of one would take two.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1e3))


if __name__ == "__main__":
    _main()
