"""Sessions of a map in a catalogue: `python -m bench.catalogue_sessions`.

Measures what an admission adds to opening a session, in turns with a proxy that does not validate;
how long `offline` takes with a thousand live sessions; and what a thousand sessions of one key ask
the catalogue. All of it is the emulator's: its TLS gateway is part of every time, and shares the
machine. Prints the machine's load with each result.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.catalogue_proxy import open_session, serving_proxy
from proxy.emulator.cluster import Cluster, running
from tests.support.catalogue import MAP, MAP_VERSION, SHARD_NAMES, Stores, new_stores
from tests.support.proxy_process import ProxyProcess
from tests.support.running import eventually
from tests.support.shards_cli import Shards

SESSIONS: Final = 1_000
_OTHERS: Final = 50
_AT_ONCE: Final = 50
_ROUNDS: Final = 5
_OPENED_EACH_ROUND: Final = 100
_WARM_UP: Final = 20
_LOOK_SECONDS: Final = 0.02
_SETTINGS: Final = {"max_connections": "1300"}
_SEED: Final = 20261122
_CHANGES_EACH_SECOND: Final = 50
_LOOKED_FOR: Final = 10
_FIRST_OF_MANY: Final = 3
_FILL_SECONDS_MAX: Final = 600.0
_OWN_NAME: Final = (
    "create table own_name as select '{0}' as name; grant select on own_name to public"
)
_ROWS: Final = """
insert into shardmap.mapping (map_id, shard_id, lo, hi)
select s.map_id, s.shard_id, int8send(n * 10 # sign), int8send((n + 1) * 10 # sign)
from generate_series($1::int8, $2::int8) n cross join (select 1::int8 << 63 as sign) i
join (select *, row_number() over () - 1 as at from shardmap.shard) s on s.at = n % 2
"""
_CHANGE: Final = """
update shardmap.mapping m set shard_id = s.shard_id, epoch = m.epoch + 1
from shardmap.shard s where m.lo = $1 and s.shard_id <> m.shard_id returning s.name
"""
_MANY: Final[Mapping[str, Mapping[str, object]]] = {
    "listen": {"max_connections": 2 * SESSIONS},
    "upstream": {"connect_timeout_seconds": 60},
}


def _print(what: str, value: float, digits: int = 0) -> None:
    load = os.getloadavg()[0]
    sys.stderr.write(f"{what:<64}{value:>10.{digits}f}   (load {load:.1f})\n")


async def _open_many(proxy: ProxyProcess, key: int, count: int) -> list[Any]:
    places = asyncio.Semaphore(_AT_ONCE)

    async def one() -> Any:
        async with places:
            return await open_session(proxy, key)

    return await asyncio.gather(*(one() for _ in range(count)))


async def _queries(proxy: ProxyProcess, *purposes: str) -> int:
    """Return how many questions of these purposes the catalogue was asked; by default of all."""
    url = f"http://127.0.0.1:{proxy.events('serving')[0]['admin_port']}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    total = 0.0
    for line in text.splitlines():
        if line.startswith("lakebase_proxy_catalogue_queries_total{"):
            words = not purposes or any(f'purpose="{one}"' in line for one in purposes)
            total += float(line.split()[-1]) if words else 0
    return int(total)


class Most:
    """The most connections that a role had at the catalogue."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self.found = 0

    async def watch(self) -> None:
        """Look again and again."""
        sql = "select count(*) from pg_stat_activity where usename = $1"
        async with self._stores.connect(MAP, "postgres") as connection:
            while True:
                now = await connection.fetchval(sql, self._stores.roles.reader)
                self.found = max(self.found, now)
                await asyncio.sleep(_LOOK_SECONDS)


async def _measure_opening(stores: Stores) -> None:
    off = {"validate": False, "allow_unvalidated": True}
    async with (
        serving_proxy(stores) as validated,
        serving_proxy(stores, catalogue=off) as unvalidated,
    ):
        proxies = (validated, unvalidated)
        for number in range(2 * _WARM_UP):
            (await open_session(proxies[number % 2], 5)).terminate()
        before = await _queries(validated, "lookup", "refresh")
        medians: list[list[float]] = [[], []]
        fast: list[list[float]] = [[], []]
        for _ in range(_ROUNDS):
            took: list[list[float]] = [[], []]
            for number in range(2 * _OPENED_EACH_ROUND):
                began = time.perf_counter()
                connection = await open_session(proxies[number % 2], 5)
                took[number % 2].append(time.perf_counter() - began)
                connection.terminate()
                await asyncio.sleep(0.005)
            for number, one in enumerate(took):
                medians[number].append(statistics.median(one) * 1e3)
                fast[number].append(statistics.quantiles(one, n=10)[0] * 1e3)
        ratios = [a / b for a, b in zip(*medians, strict=True)]
        # What other programs delay least.
        _print("opening, validated, the fastest tenth, ms", statistics.mean(fast[0]), 2)
        _print("opening, not validated, the fastest tenth, ms", statistics.mean(fast[1]), 2)
        _print("opening, validated, p50, ms", statistics.median(medians[0]), 2)
        _print("opening, not validated, p50, ms", statistics.median(medians[1]), 2)
        _print("  ratio, median of the rounds", statistics.median(ratios), 2)
        _print(
            "  questions to the catalogue", await _queries(validated, "lookup", "refresh") - before
        )


async def _measure_offline(stores: Stores, shards: Shards) -> None:
    async with serving_proxy(stores, **_MANY) as proxy:
        sessions = await _open_many(proxy, 5, SESSIONS)
        others = await _open_many(proxy, 15, _OTHERS)
        began = time.monotonic()
        answered = await shards.done("offline", "0", "10")
        took = time.monotonic() - began
        _print("offline, sessions ended", answered["sessions_ended"])
        _print("  until it is proven, s (the verb as a whole)", took, 2)
        await eventually(lambda: all(one.is_closed() for one in sessions), "every session is over")
        _print("  until every client knows, s", time.monotonic() - began, 2)
        alive = [await one.fetchval("select 1") for one in others]
        _print(f"  sessions of another mapping that live, of {_OTHERS}", sum(alive))
        for one in others:
            one.terminate()
    await shards.done("online", "0", "10")


async def _measure_misses(stores: Stores) -> None:
    most = Most(stores)
    async with serving_proxy(stores, **_MANY, catalogue={"load": "lazy"}) as proxy:
        watching = asyncio.create_task(most.watch())
        before = await _queries(proxy, "lookup", "refresh")
        places = [asyncio.ensure_future(open_session(proxy, 25)) for _ in range(SESSIONS)]
        for opened in await asyncio.gather(*places):
            opened.terminate()
        asked = await _queries(proxy, "lookup", "refresh") - before
        _print(f"{SESSIONS:,} opens of one uncached key, questions", asked)
        _print("  most connections to the catalogue", most.found)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _measure_routes(stores: Stores, mappings: int, workers: int, seconds: float) -> None:
    """Measure from a commit to the first session that is opened by the new route.

    One change of ten is looked for, by opening sessions until one is where it should be.
    """
    generator = random.Random(_SEED)  # noqa: S311 - no secret
    sections: Mapping[str, Mapping[str, object]] = {
        "catalogue": {"validate": False, "allow_unvalidated": True},
        "listen": {"workers": workers},
    }
    delays: list[float] = []
    async with (
        serving_proxy(stores, **sections) as proxy,
        stores.connect(MAP) as connection,
        asyncio.TaskGroup() as tasks,
    ):

        async def look(key: int, name: str, committed: float) -> None:
            while True:
                began = time.monotonic()
                opened = await open_session(proxy, key)
                found = await opened.fetchval("select name from own_name")
                opened.terminate()
                if found == name:
                    delays.append(began - committed)
                    return

        began = time.monotonic()
        for number in range(int(seconds * _CHANGES_EACH_SECOND)):
            delay = began + number / _CHANGES_EACH_SECOND - time.monotonic()
            await asyncio.sleep(max(0.0, delay))
            key = generator.randrange(_FIRST_OF_MANY, mappings) * 10 + 3
            name = await connection.fetchval(_CHANGE, (key - 3 + 2**63).to_bytes(8))
            if number % _LOOKED_FOR == 0:
                tasks.create_task(look(key, name, time.monotonic()))
        rate = seconds * _CHANGES_EACH_SECOND / (time.monotonic() - began)
    _print(f"{mappings:,} mappings, {workers} workers: changes a second", rate)
    _print("  commit to new route, median, ms", statistics.median(delays) * 1e3, 1)
    _print("  commit to new route, p99, ms", sorted(delays)[int(len(delays) * 0.99)] * 1e3, 1)


async def _fill(stores: Stores, mappings: int) -> None:
    for name in SHARD_NAMES:
        stores.execute(name, _OWN_NAME.format(name))
    async with stores.connect(MAP) as connection:
        await connection.execute(_ROWS, _FIRST_OF_MANY, mappings - 1, timeout=_FILL_SECONDS_MAX)
        await connection.execute("vacuum analyze shardmap.mapping")


async def measure_routes(mappings: int, workers: list[int], seconds: float) -> None:
    """Measure the routes of a large map, with each of these numbers of workers."""
    async with _filled_map("int8") as (stores, _):
        await _fill(stores, mappings)
        for number in workers:
            await _measure_routes(stores, mappings, number, seconds)


@asynccontextmanager
async def _filled_map(key_type: str) -> AsyncIterator[tuple[Stores, Shards]]:
    """Yield servers of our own with three mappings on the first shard, and the verbs."""
    clusters = {MAP: Cluster(MAP, version=MAP_VERSION)}
    clusters |= {name: Cluster(name, settings=_SETTINGS) for name in SHARD_NAMES}
    with tempfile.TemporaryDirectory() as folder:
        async with running(list(clusters.values())), new_stores(clusters) as stores:
            shards = Shards(stores, Path(folder))
            await shards.set_up(key_type=key_type)
            await shards.done("grant", "reader", stores.roles.reader)
            await shards.done("grant", "session", stores.roles.session)
            for number in range(_FIRST_OF_MANY):
                await shards.add(str(number * 10), str(number * 10 + 10), "one")
            yield stores, shards


async def measure() -> None:
    """Measure sessions."""
    async with _filled_map("int4") as (stores, shards):
        await _measure_opening(stores)
        await _measure_offline(stores, shards)
        await _measure_misses(stores)


def main() -> None:
    """Run as `python -m bench.catalogue_sessions`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routes", type=int, nargs="+", metavar="WORKERS", help="only routes")
    parser.add_argument("--mappings", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    wanted = parser.parse_args()
    with redirect_stdout(StringIO()):  # of the verbs
        if wanted.routes:
            uvloop.run(measure_routes(wanted.mappings, wanted.routes, wanted.seconds))
        else:
            uvloop.run(measure())


if __name__ == "__main__":
    main()
