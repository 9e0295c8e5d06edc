"""A million mappings in a catalogue, as one proxy follows them: `python -m bench.catalogue_map`.

Measures the first load, the restore from a snapshot file, memory, the longest pause of the event
loop, a look-up, and the time from a commit to the new route while changes come: the medians of some
rounds. PostgreSQL is the emulator's own; connections to it are direct. The proxy's part runs in
processes of its own, two a round.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

import asyncpg

from proxy.catalogue import store
from proxy.catalogue.catalogue_reader import open_reader
from proxy.catalogue.followed_map import FollowedMap
from proxy.catalogue.map_state import Change, Times
from proxy.catalogue.schema import migrate_catalogue
from proxy.config import Settings
from proxy.emulator.cluster import Cluster
from proxy.upstream.upstreams import SessionOpener

MAPPINGS: Final = 1_000_000
_SHARDS: Final = 100
_CHANGES_EACH_SECOND: Final = 50
_LOOKED_UP: Final = 200_000
_LOOK_SECONDS: Final = 0.001
_SEED: Final = 20261122
_PAGE_BYTES: Final = resource.getpagesize()
_ROUNDS: Final = 5
Values = dict[str, float]

_FILL: Final = """
insert into shardmap.shard (map_id, name, host, dbname)
select map_id, 's' || n, 's' || n || '.example.com', 'app'
from shardmap.shard_map, generate_series(1, $1) n
"""
_MAP: Final = "insert into shardmap.shard_map (name, kind, key_type) values ('m', 'range', 'int8')"
_ROWS: Final = """
insert into shardmap.mapping (map_id, shard_id, lo, hi)
select s.map_id, s.shard_id, int8send(n * 10 # sign), int8send((n + 1) * 10 # sign)
from generate_series(0::int8, $1::int8 - 1) n cross join (select 1::int8 << 63 as sign) i
join (select *, row_number() over () - 1 as at from shardmap.shard) s on s.at = n % $2
"""
_CHANGE: Final = """
update shardmap.mapping set shard_id = (select shard_id from shardmap.shard
    where shard_id <> mapping.shard_id order by random() limit 1), epoch = epoch + 1
where lo = $1 returning epoch
"""


def key_of(number: int) -> bytes:
    """Return a key of the mapping with this number."""
    return (number * 10 + 3 + 2**63).to_bytes(8)


def resident_megabytes() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * _PAGE_BYTES / 1e6


class Pauses:
    """The longest time for which the event loop ran nothing else."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        """Look again and again."""
        while True:
            at = time.perf_counter()
            await asyncio.sleep(_LOOK_SECONDS)
            self.longest = max(self.longest, time.perf_counter() - at - _LOOK_SECONDS)


@contextmanager
def filled(mappings: int) -> Iterator[Cluster]:
    """Yield a server with the map."""
    with Cluster("map", version=18) as cluster:
        asyncio.run(_fill(str(cluster.directory), mappings))
        yield cluster


async def _connect(directory: str) -> Any:
    return await asyncpg.connect(
        host=directory, user="postgres", database="postgres", password="", ssl=False
    )


async def _fill(directory: str, mappings: int) -> None:
    connection = await _connect(directory)
    began = time.monotonic()
    await migrate_catalogue(connection)
    await connection.execute(_MAP)
    await connection.execute(_FILL, _SHARDS)
    await connection.execute(_ROWS, mappings, _SHARDS)
    await connection.execute("vacuum analyze shardmap.mapping")
    _print("inserted by SQL, s", time.monotonic() - began)
    await connection.close()


def followed(directory: str, snapshot: str) -> FollowedMap:
    """Return the proxy's part."""
    settings = Settings.model_validate(
        {
            "catalogue": {"target": "upstream", "snapshot_file": snapshot},
            "routing": {"shard_map": "m"},
            "shard_maps": {"m": {"catalogue": True}},
        }
    )

    @asynccontextmanager
    async def connect(_opener: SessionOpener) -> AsyncIterator[Any]:
        connection = await _connect(directory)
        try:
            yield connection
        finally:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close()

    opened = open_reader(connect, cast(SessionOpener, None), lambda _purpose: None)
    times = Times(time.monotonic, random.random, asyncio.sleep)
    return FollowedMap(settings, opened, times, lambda _result: None)


async def measure(directory: str, mappings: int, seconds: float, snapshot: str) -> Values:
    """Follow the map and return what was measured."""
    before, began = resident_megabytes(), time.monotonic()
    pauses = Pauses()
    one = followed(directory, snapshot)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(one.run())
        watching = tasks.create_task(pauses.watch())
        await one.wait_until_loaded()
        took = time.monotonic() - began
        if one.status().source == "snapshot":
            found = {"restored from the snapshot file, s": took}
        else:
            found = {
                "first load to ready, s": took,
                "longest pause of the event loop meanwhile, ms": pauses.longest * 1e3,
                "resident memory before, MB": before,
                "resident memory, MB": resident_megabytes(),
                "look-up of a known key, us of CPU": _find_microseconds(one, mappings),
                "uncovered key in the catalogue, ms": await _uncovered(directory, mappings),
            }
            await asyncio.sleep(2 * _LOOK_SECONDS)  # the look-ups were a pause
            pauses.longest = 0.0
            delays = sorted(await _change(one, directory, mappings, seconds))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
            found |= {
                "changes a second": len(delays) / seconds,
                "commit to new route, median, ms": statistics.median(delays) * 1e3,
                "commit to new route, p99, ms": delays[int(len(delays) * 0.99)] * 1e3,
                "longest pause while changes come, ms": pauses.longest * 1e3,
                "most resident memory, MB": peak,
            }
        watching.cancel()
        running.cancel()
    return found


def _find_microseconds(one: FollowedMap, mappings: int) -> float:
    generator = random.Random(_SEED)  # noqa: S311 - the same keys in every run
    keys = [key_of(generator.randrange(mappings)) for _ in range(_LOOKED_UP)]
    assert one.state.cache is not None
    find, best = one.state.cache.find, float("inf")
    for first in range(0, len(keys), 10_000):
        batch = keys[first : first + 10_000]
        began = time.process_time()
        for key in batch:
            find(key)
        best = min(best, (time.process_time() - began) / len(batch))
    return best * 1e6


async def _uncovered(directory: str, mappings: int) -> float:
    """Return the median time of the look-up of a key that no mapping covers, in milliseconds."""
    connection = await _connect(directory)
    map_id = (await store.read_map(connection, "m")).map_id
    times = []
    for number in range(100):
        began = time.perf_counter()
        assert await store.locate(connection, map_id, key_of(mappings + number)) is None
        times.append(time.perf_counter() - began)
    await connection.close()
    return statistics.median(times) * 1e3


async def _change(one: FollowedMap, directory: str, mappings: int, seconds: float) -> list[float]:
    """Change mappings, and return the time from each commit to the new route."""
    connection = await _connect(directory)
    delays: list[float] = []
    waiting: dict[bytes, tuple[int, float]] = {}

    def look(_change: Change) -> None:
        now = time.monotonic()
        for key in list(waiting):
            located = one.source.peek(key)
            if located is not None and located.mapping.epoch >= waiting[key][0]:
                delays.append(now - waiting.pop(key)[1])

    one.subscribe(look)
    generator = random.Random(_SEED)  # noqa: S311 - no secret
    began = time.monotonic()
    for number in range(int(seconds * _CHANGES_EACH_SECOND)):
        await asyncio.sleep(max(0.0, began + number / _CHANGES_EACH_SECOND - time.monotonic()))
        key = key_of(generator.randrange(mappings))
        lo = (int.from_bytes(key) - 3).to_bytes(8)
        epoch = await connection.fetchval(_CHANGE, lo)
        waiting[key] = (epoch, time.monotonic())
        look(Change())
    await asyncio.sleep(1)
    await connection.close()
    assert not waiting, "every change is known"
    return delays


def _print(what: str, value: float) -> None:
    sys.stdout.write(f"{what:<48}{value:>10.2f}\n")
    sys.stdout.flush()


def main() -> None:
    """Fill a catalogue, and measure in processes of their own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mappings", type=int, default=MAPPINGS)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--follow", nargs=2, metavar=("DIRECTORY", "SNAPSHOT"))
    wanted = parser.parse_args()
    if wanted.follow:
        directory, snapshot = wanted.follow
        found = asyncio.run(measure(directory, wanted.mappings, wanted.seconds, snapshot))
        sys.stdout.write(json.dumps(found))
        return
    rounds: dict[str, list[float]] = {}
    with filled(wanted.mappings) as cluster, tempfile.TemporaryDirectory() as folder:
        for number in range(wanted.rounds):
            snapshot = str(Path(folder) / f"{number}.snapshot")
            for _ in range(2):  # the second one restores
                command = [sys.executable, "-m", "bench.catalogue_map", "--follow"]
                command += [str(cluster.directory), snapshot]
                command += ["--mappings", str(wanted.mappings), "--seconds", str(wanted.seconds)]
                output = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603 - this program
                for what, value in json.loads(output).items():
                    rounds.setdefault(what, []).append(value)
    sys.stdout.write(f"medians of {wanted.rounds} rounds (load {os.getloadavg()[0]:.1f})\n")
    for what, values in rounds.items():
        _print(what, statistics.median(values))


if __name__ == "__main__":
    main()
