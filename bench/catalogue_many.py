"""Many sessions of a map in a catalogue: `python -m bench.catalogue_many`.

Measures an idle session's memory with a static map and with one in a catalogue, in turns; and how
long it takes a proxy to end ten thousand sessions of a mapping that goes offline, while sessions of
another mapping ask. Each mapping's shard is an `idle_upstream`, which holds more sessions than
PostgreSQL can and ends none itself. Prints the machine's load with each result.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import uvloop

from bench.catalogue_server import (
    ADMIN,
    CATALOGUE,
    READER,
    SESSION,
    Sections,
    prepare,
    serving,
    settings,
    write,
)
from bench.child_processes import LOOPBACK, run
from bench.idle_upstream import idle_upstream
from bench.postgres import HOST, Postgres, ServerAddress, postgres
from bench.process_usage import cpu_time, descendants, resident_bytes
from proxy.wire.messages import Frame
from proxy.wire.startup import V3_0, StartupMessage

IDLE_SESSIONS: Final = 2_000
MANY_SESSIONS: Final = 10_000
_ROUNDS: Final = 5
_AT_ONCE: Final = 50
_FIRST: Final = 200
_OTHERS: Final = 50
_WORKERS: Final = 2  # a process may have 20,000 open files, and a session takes two
_SETTLE_SECONDS: Final = 3.0
_OPEN_SECONDS_MAX: Final = 120.0
_END_SECONDS_MAX: Final = 60.0
_KEY: Final = 5
_OTHER_KEY: Final = 1005
_PROGRAM: Final = (sys.executable, "-m", "proxy")
_QUERY: Final = Frame(b"Q", b"select 1\0").encode()
_PAUSE_SECONDS: Final = 0.1

_MAP: Final = """
insert into shardmap.shard_map (name, kind, key_type) values ('tenants', 'range', 'int8');
insert into shardmap.shard (map_id, name, host, port, dbname)
  select map_id, 's' || port, '{host}', port, 'app'
  from shardmap.shard_map, unnest(array[{port}, {other}]) port;
insert into shardmap.mapping (map_id, shard_id, lo, hi)
  select map_id, shard_id, int8send(n * 1000 # sign), int8send((n + 1) * 1000 # sign)
  from shardmap.shard, lateral (select (port = {other})::int4::int8 as n) m,
    (select 1::int8 << 63 as sign) i;
grant usage on schema shardmap to {reader};
grant select on all tables in schema shardmap to {reader}
"""
_OFFLINE: Final = """
update shardmap.mapping set status = 'offline', sessions = 'kill', epoch = epoch + 1
where lo < int8send(1000 # (1::int8 << 63))
"""


class Client(asyncio.Protocol):
    """A client's session, which keeps only whether it is ready and what it got last."""

    __slots__ = ("answered", "last", "over", "transport")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Look for a ReadyForQuery at the end."""
        self.last = data
        if data[-6:-1] == b"Z\0\0\0\5" and not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Register the end."""
        if not self.over.done():
            self.over.set_result(None)

    async def ask(self, message: bytes) -> float:
        """Send a message and return how long the answer took."""
        self.answered = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self.transport.write(message)
        await asyncio.wait((self.answered, self.over), return_when=asyncio.FIRST_COMPLETED)
        assert self.answered.done(), self.last
        return time.perf_counter() - began


async def _open(port: int, key: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, LOOPBACK, port)
    names = ((b"user", b"anyone"), (b"database", f"app@{key}".encode()))
    await client.ask(StartupMessage(V3_0, names).encode())
    await client.ask(_QUERY)  # what is done after the welcome waits for a first query
    return client


async def _open_many(port: int, key: int, count: int) -> list[Client]:
    places = asyncio.Semaphore(_AT_ONCE)

    async def one() -> Client:
        async with places, asyncio.timeout(_OPEN_SECONDS_MAX):
            return await _open(port, key)

    return list(await asyncio.gather(*(one() for _ in range(count))))


def _print(what: str, value: float, digits: int = 0) -> None:
    load = os.getloadavg()[0]
    sys.stdout.write(f"{what:<64}{value:>10.{digits}f}   (load {load:.1f})\n")
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Maps:
    """A server with the catalogue, the shard, and the files of proxies."""

    server: Postgres
    shard: ServerAddress
    folder: Path

    def catalogue(self, name: str, workers: int = 1) -> Path:
        """Write the settings of a proxy whose map is in the catalogue."""
        sections = settings(self.server, self.folder, SESSION)
        sections["listen"] |= {"workers": workers, "max_connections": MANY_SESSIONS + 2 * _OTHERS}
        return write(self.folder, name, sections)

    def static(self, name: str) -> Path:
        """Write the settings of a proxy with the same map in its file."""
        sections: Sections = settings(self.server, self.folder, SESSION)
        del sections["catalogue"]
        sections["listen"]["max_connections"] = MANY_SESSIONS
        sections["targets.main"] = {
            "host": HOST,
            "hostaddr": LOOPBACK,
            "port": self.shard.port,
            "user": SESSION,
        }
        mappings = [
            {"low": str(low), "high": str(low + 1000), "target": "main"} for low in (0, 1000)
        ]
        sections["shard_maps.tenants"] = {
            "kind": "range",
            "key_type": "int8",
            "mappings": mappings,
        }
        return write(self.folder, name, sections)


@contextmanager
def _maps() -> Iterator[Maps]:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        folder.chmod(0o711)
        (folder / "other").mkdir()
        with (
            postgres(folder) as server,
            idle_upstream(server, folder) as shard,
            idle_upstream(server, folder / "other") as other,
        ):
            prepare(server, folder)
            file = write(folder, "admin", settings(server, folder, ADMIN))
            command: list[str | Path] = [*_PROGRAM, "shards", "init", "--config", file]
            run(command, folder / "init.log", seconds_max=_OPEN_SECONDS_MAX)
            sql = _MAP.format(host=HOST, port=shard.port, other=other.port, reader=READER)
            server.sql(sql, database=CATALOGUE)
            yield Maps(server, shard, folder)


async def _idle_bytes(pid: int, port: int, count: int) -> float:
    """Return the resident memory of each of so many sessions.

    What the first ones load, and the SDK's import once the proxy serves, is not theirs.
    """
    first = await _open_many(port, _KEY, _FIRST)
    before = await _settled_bytes(pid)
    clients = await _open_many(port, _KEY, count)
    found = (await _settled_bytes(pid) - before) / count
    for client in (*first, *clients):
        client.transport.abort()
    return found


async def _settled_bytes(pid: int) -> int:
    """Return the resident memory, once it has not changed for a while."""
    found = -1
    while (now := resident_bytes(pid)) != found:
        found = now
        await asyncio.sleep(_SETTLE_SECONDS)
    return found


def measure_idle(maps: Maps, rounds: int, count: int) -> None:
    """Measure an idle session's memory each way, in turns, each time in a new proxy."""
    found: dict[str, list[float]] = {"static": [], "catalogue": []}
    for number in range(rounds):
        for name, values in found.items():
            title = f"{name}{number}"
            file = maps.static(title) if name == "static" else maps.catalogue(title)
            with serving(_PROGRAM, file, "idle") as (pid, port):
                values.append(uvloop.run(_idle_bytes(pid, port, count)))
    for name, values in found.items():
        _print(f"an idle session of {count:,}, {name} map, bytes", statistics.median(values))
    more = [a - b for a, b in zip(found["catalogue"], found["static"], strict=True)]
    _print("  more with a catalogue, median of the rounds", statistics.median(more))


@dataclass(slots=True)
class Others:
    """Sessions of another mapping, in a thread of their own: they ask again and again."""

    took: list[float] = field(default_factory=list)
    alive: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def run(self, port: int) -> None:
        """Open the sessions, ask until it is done, and count those that live."""
        asyncio.run(self._run(port))

    async def _run(self, port: int) -> None:
        async def query(client: Client) -> None:
            while not self.done.is_set():
                self.took.append(await client.ask(_QUERY))
                await asyncio.sleep(_PAUSE_SECONDS)

        clients = await _open_many(port, _OTHER_KEY, _OTHERS)
        await asyncio.gather(*map(query, clients))
        self.alive = sum(not client.over.done() for client in clients)

    def print(self, when: str) -> None:
        """Print how long queries took since the last time."""
        took, self.took = self.took, []
        _print(f"a query of another mapping {when}, p99, ms", _p99(took) * 1e3, 1)
        _print("  the longest, ms", max(took) * 1e3, 1)


async def _end_many(maps: Maps, pids: Sequence[int], port: int, count: int) -> None:
    sessions = await _open_many(port, _KEY, count)
    others = Others()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(others.run, port))
        await asyncio.sleep(2 * _SETTLE_SECONDS)
        others.print("before")
        before = sum(cpu_time(pid).total for pid in pids)
        await asyncio.to_thread(maps.server.sql, _OFFLINE, database=CATALOGUE)
        began = time.monotonic()
        await asyncio.wait([one.over for one in sessions], timeout=_END_SECONDS_MAX)
        _print("until all are over, s", time.monotonic() - began, 2)
        others.print("meanwhile")
        others.done.set()
    _print("CPU time of the proxy, s", sum(cpu_time(pid).total for pid in pids) - before, 2)
    ended = [one for one in sessions if one.over.done()]
    _print(f"sessions of {count:,} that are over", len(ended))
    _print("  with 57P01", sum(b"57P01" in one.last for one in ended))
    _print(f"sessions of another mapping that live, of {_OTHERS}", others.alive)


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def measure_end(maps: Maps, count: int) -> None:
    """Measure the end of many sessions of one mapping."""
    file = maps.catalogue("many", _WORKERS)
    with serving(_PROGRAM, file, "end") as (pid, port):
        uvloop.run(_end_many(maps, (pid, *descendants(pid)), port, count))


def main() -> None:
    """Run as `python -m bench.catalogue_many`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--idle", type=int, default=IDLE_SESSIONS, metavar="SESSIONS")
    parser.add_argument("--many", type=int, default=MANY_SESSIONS, metavar="SESSIONS")
    wanted = parser.parse_args()
    with _maps() as maps:
        if wanted.idle:
            measure_idle(maps, wanted.rounds, wanted.idle)
        if wanted.many:
            measure_end(maps, wanted.many)


if __name__ == "__main__":
    main()
