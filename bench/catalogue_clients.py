"""Clients of a mapping that moves, as a process of their own: `python -m bench.catalogue_clients`.

They share no event loop with the emulator's gateway, which the operator's statements go through
too. For each line on standard input all of them have a session again, and one line of JSON says how
long they took.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple, Self

import asyncpg
import uvloop

from bench.catalogue_proxy import open_session
from tests.support.running import Listening, eventually

ENDED: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
_AT_ONCE: Final = 50
_PROBE_SECONDS: Final = 0.01
LIVE_SECONDS_MAX: Final = 120.0
_ANSWER_BYTES_MAX: Final = 1 << 24
_AGAIN: Final = "again"


class Waits(NamedTuple):
    """What clients waited since the last question, in seconds, and how many were refused."""

    probes: list[float]
    """Of one client that opens a session for another key of the mapping again and again."""
    refused: int


class Clients:
    """Clients of one key that keep a session each, and open another one when it is ended."""

    def __init__(self, proxy: Listening, key: int) -> None:
        self._proxy = proxy
        self._key = key
        self._places = asyncio.Semaphore(_AT_ONCE)
        self.live = 0
        self.refused = 0
        self.waits: list[float] = []

    async def keep(self) -> None:
        """Keep a session, until cancelled."""
        while True:
            try:
                async with self._places:
                    connection = await open_session(self._proxy, self._key)
            except ENDED:
                self.refused += 1
                continue
            over = asyncio.Event()
            connection.add_termination_listener(lambda _, over=over: over.set())
            if connection.is_closed():
                continue
            self.live += 1
            try:
                await over.wait()
            finally:
                self.live -= 1
                connection.terminate()

    async def probe(self) -> None:
        """Open sessions one after the other, until cancelled, and note how long each took."""
        while True:
            began = time.monotonic()
            try:
                connection = await open_session(self._proxy, self._key)
            except ENDED:
                self.refused += 1
                continue
            self.waits.append(time.monotonic() - began)
            connection.terminate()
            await asyncio.sleep(_PROBE_SECONDS)


class ClientsProcess:
    """The other side: clients that were started by `started_clients`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to, self._from = process.stdin, process.stdout

    async def live(self) -> Waits:
        """Return, when all have a session, what they waited since the last question."""
        return await self._ask("live")

    async def reopen(self) -> Waits:
        """Close all sessions, and open as many at once. Return what the probe waited meanwhile."""
        return await self._ask(_AGAIN)

    async def _ask(self, word: str) -> Waits:
        self._to.write(f"{word}\n".encode())
        await self._to.drain()
        probes, refused = json.loads(await self._from.readline())
        return Waits(probes, refused)


@asynccontextmanager
async def started_clients(proxy: Listening, count: int) -> AsyncIterator[ClientsProcess]:
    """Run so many clients of the key 5, and a probe of the key 6, while the block runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.catalogue_clients"),
        *(proxy.listen_host, str(proxy.listen_port), str(count)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_ANSWER_BYTES_MAX,
    )
    try:
        yield ClientsProcess(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class _Address(NamedTuple):
    listen_host: str
    listen_port: int


class _Serving:
    """The clients, and the answers to the questions of standard input."""

    def __init__(self, proxy: Listening, count: int) -> None:
        self._clients, self._probes = Clients(proxy, 5), Clients(proxy, 6)
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._probe = asyncio.create_task(self._probes.probe())
        self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._probe.cancel()
        await self._stop()

    def _start(self) -> None:
        keep = self._clients.keep
        self._tasks = [asyncio.create_task(keep()) for _ in range(self._count)]

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def answer(self, word: str) -> Waits:
        """Return what the clients waited, when all have a session."""
        if word == _AGAIN:
            await self._stop()
            self._probes.waits.clear()
            self._start()
        await eventually(
            lambda: self._clients.live == self._count, "all sessions live", LIVE_SECONDS_MAX
        )
        waits = Waits(list(self._probes.waits), self._clients.refused + self._probes.refused)
        self._probes.waits.clear()
        self._clients.refused = self._probes.refused = 0
        return waits


async def _serve(proxy: Listening, count: int) -> None:
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(questions), sys.stdin
    )
    async with _Serving(proxy, count) as serving:
        while word := (await questions.readline()).decode().strip():
            sys.stdout.write(json.dumps(await serving.answer(word)) + "\n")
            sys.stdout.flush()


def main() -> None:
    """Run as `python -m bench.catalogue_clients HOST PORT COUNT`."""
    host, port, count = sys.argv[1:]
    uvloop.run(_serve(_Address(host, int(port)), int(count)))


if __name__ == "__main__":
    main()
