"""Clients of a mapping that moves, as a process of their own: `python -m bench.catalogue_clients`.

They share no event loop with the emulator's gateway, which the operator's statements go through
too. Some keep a session, and open another one when it is ended, at once or a while later. Some
connect all the time: theirs are the waits. Each line on standard input is answered by one line of
JSON with these waits, at once or when all of the first have a session again.
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
_CONNECTING: Final = 10
_PAUSE_SECONDS: Final = 0.1  # of one of them
LIVE_SECONDS_MAX: Final = 120.0
_ANSWER_BYTES_MAX: Final = 1 << 24
_LIVE: Final = "live"
_AGAIN: Final = "again"


class Waits(NamedTuple):
    """What clients waited since the last question, in seconds, and how many were ever refused."""

    connecting: list[float]
    """Of those that open a session for another key of the mapping again and again."""
    refused: int


class Clients:
    """Clients of one key that keep a session each, or open one after the other.

    Those that keep one open another `away_seconds` after its end.
    """

    def __init__(self, proxy: Listening, key: int, away_seconds: float = 0.0) -> None:
        self._proxy = proxy
        self._key = key
        self._away_seconds = away_seconds
        self._places = asyncio.Semaphore(_AT_ONCE)
        self.live = 0
        self.refused = 0
        """Since the start."""
        self.waits: list[float] = []
        self._began: dict[int, float] = {}  # the connects under way

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
            await asyncio.sleep(self._away_seconds)

    async def connect(self, number: int) -> None:
        """Open sessions one after the other, until cancelled, and note how long each took."""
        while True:
            self._began[number] = began = time.monotonic()
            try:
                connection = await open_session(self._proxy, self._key)
            except ENDED:
                self.refused += 1
                continue
            self.waits.append(time.monotonic() - began)
            del self._began[number]
            connection.terminate()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def take_waits(self) -> list[float]:
        """Return how long those waited that have begun to connect by now, since the last call."""
        asked = time.monotonic()
        await eventually(
            lambda: all(began > asked for began in self._began.values()),
            "all who were connecting have a session",
            LIVE_SECONDS_MAX,
        )
        waits, self.waits = self.waits, []
        return waits


class ClientsProcess:
    """The other side: clients that were started by `started_clients`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to, self._from = process.stdin, process.stdout

    async def waits(self) -> Waits:
        """Return what was waited since the last question."""
        return await self._ask("waits")

    async def live(self) -> Waits:
        """Return, when all have a session, what was waited since the last question."""
        return await self._ask(_LIVE)

    async def reopen(self) -> Waits:
        """Close all sessions, and open as many at once. Return what was waited meanwhile."""
        return await self._ask(_AGAIN)

    async def _ask(self, word: str) -> Waits:
        self._to.write(f"{word}\n".encode())
        await self._to.drain()
        connecting, refused = json.loads(await self._from.readline())
        return Waits(connecting, refused)


@asynccontextmanager
async def started_clients(
    proxy: Listening, count: int, away_seconds: float
) -> AsyncIterator[ClientsProcess]:
    """Run so many clients of the key 5, and some of the key 6 that connect all the time."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.catalogue_clients"),
        *(proxy.listen_host, str(proxy.listen_port), str(count), str(away_seconds)),
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

    def __init__(self, proxy: Listening, count: int, away_seconds: float) -> None:
        self._clients, self._connecting = Clients(proxy, 5, away_seconds), Clients(proxy, 6)
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        connect = self._connecting.connect
        self._connects = [asyncio.create_task(connect(number)) for number in range(_CONNECTING)]
        self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await _stop(self._connects)
        await _stop(self._tasks)

    def _start(self) -> None:
        keep = self._clients.keep
        self._tasks = [asyncio.create_task(keep()) for _ in range(self._count)]

    async def answer(self, word: str) -> Waits:
        """Return what was waited, at once or when all have a session."""
        if word == _AGAIN:
            await _stop(self._tasks)
            self._connecting.waits.clear()
            self._start()
        if word in (_AGAIN, _LIVE):
            await eventually(
                lambda: self._clients.live == self._count, "all sessions live", LIVE_SECONDS_MAX
            )
        waits = await self._connecting.take_waits()
        return Waits(waits, self._clients.refused + self._connecting.refused)


async def _stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _serve(proxy: Listening, count: int, away_seconds: float) -> None:
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(questions), sys.stdin
    )
    async with _Serving(proxy, count, away_seconds) as serving:
        while word := (await questions.readline()).decode().strip():
            sys.stdout.write(json.dumps(await serving.answer(word)) + "\n")
            sys.stdout.flush()


def main() -> None:
    """Run as `python -m bench.catalogue_clients HOST PORT COUNT AWAY_SECONDS`."""
    host, port, count, away_seconds = sys.argv[1:]
    uvloop.run(_serve(_Address(host, int(port)), int(count), float(away_seconds)))


if __name__ == "__main__":
    main()
