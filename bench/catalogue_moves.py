"""Moves of a map in a catalogue, without a copy: `python -m bench.catalogue_moves`.

Measures how long a mapping with a hundred live sessions is offline for a move, and what clients
wait that connect meanwhile; how long a thousand sessions take to end; when a key's clients are on
the new shard, with a feed and without; and what ten thousand moves leave. Each measured move is
`shards move` in a process of its own; the ten thousand are of one process. The emulator's TLS
gateway is in this process, the hundred clients are in another; all share the machine. Prints the
load with each result.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.catalogue_clients import ENDED, Clients, started_clients
from bench.catalogue_proxy import open_session, serving_proxy
from bench.process_usage import resident_bytes
from proxy.catalogue import store
from proxy.catalogue.move import Move
from proxy.catalogue.operation import Tools
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operations import Operator
from proxy.emulator.cluster import Cluster, running
from proxy.routing.keys import parse_key
from proxy.verbs.shards.administration import administering
from tests.support.catalogue import MAP, SHARD_NAMES, Stores, new_stores
from tests.support.proxy_process import ProxyProcess
from tests.support.running import eventually
from tests.support.shards_cli import Shards

_MOVES: Final = 50
_LIVE: Final = 100
# A pool opens another session when it needs one, so that most come later; or all come at once.
_AWAY_SECONDS: Final = (1.0, 0.0)
_MANY: Final = 1_000
_QUIET_SECONDS: Final = 0.5  # some usual waits
_FLIPS: Final = 20
_LONG: Final = 10_000
_WARM_UP_SHARE: Final = 10
_WARM_UP_MIN: Final = 200  # until then the memory grows by what is used for the first time
_AT_ONCE: Final = 50
_SETTINGS: Final = {"max_connections": "1300"}
_LISTEN: Final = {"listen": {"max_connections": 2 * _MANY}}
_OWN_NAME: Final = (
    "create table own_name as select '{0}' as name; grant select on own_name to public"
)
_ENDED_TOTAL: Final = "lakebase_proxy_sessions_ended_total{"
_MOVED: Final = 'reason="mapping_moved"'


def _print(what: str, value: float, digits: int = 0) -> None:
    load = os.getloadavg()[0]
    sys.stderr.write(f"{what:<68}{value:>10.{digits}f}   (load {load:.1f})\n")


def _print_spread(what: str, seconds: list[float]) -> None:
    hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
    _print(f"{what}, p50, ms", statistics.median(seconds) * 1e3, 1)
    _print(f"{what}, p99, ms", hundredths[98] * 1e3, 1)
    _print(f"{what}, most, ms", max(seconds) * 1e3, 1)


async def _count_moved(proxy: ProxyProcess) -> int:
    """Return how many sessions the sidecar has counted as ended by a move."""
    url = f"http://127.0.0.1:{proxy.events('serving')[0]['admin_port']}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    lines = [line for line in text.splitlines() if line.startswith(_ENDED_TOTAL)]
    return int(sum(float(line.split()[-1]) for line in lines if _MOVED in line))


async def _move(shards: Shards, number: int) -> dict[str, Any]:
    to = SHARD_NAMES[1 - number % 2]
    answered = await shards.process("move", "0", "10", "--to", to, "--json")
    if answered.code:
        raise SystemExit(answered.out + answered.err)
    return answered.facts


async def _measure_offline(stores: Stores, shards: Shards, moves: int, away_seconds: float) -> None:
    """Measure moves of a mapping with live sessions; their clients come again a while after.

    Others connect all the time. Beside each move of clients that come again at once, what those
    wait when as many come without a move.
    """
    offline, added, alone, ended = list[float](), list[float](), list[float](), 0
    async with (
        serving_proxy(stores, **_LISTEN) as proxy,
        started_clients(proxy, _LIVE, away_seconds) as clients,
    ):
        for number in range(moves):
            await clients.live()
            await asyncio.sleep(_QUIET_SECONDS)
            usual = statistics.median((await clients.waits()).connecting)
            facts = await _move(shards, number)
            waits = await (clients.waits() if away_seconds else clients.live())
            offline.append(facts["seconds_offline"])
            added.append(max(waits.connecting) - usual - facts["seconds_offline"])
            ended += facts["sessions_ended"]
            if not away_seconds:
                waits = await clients.reopen()
                alone.append(max(waits.connecting, default=usual) - usual)
        refused = (await clients.live()).refused
        _print(f"{moves} moves with {_LIVE} live sessions: sessions ended", ended)
        _print("  whose clients come again after, s", away_seconds, 1)
        _print("  counted as mapping_moved", await _count_moved(proxy))
        _print_spread("  fence to open", offline)
        _print_spread("  the longest wait of a client, beyond that and a usual one", added)
        if alone:
            _print_spread("  the same when as many come at once without a move", alone)
        _print("  clients refused", refused)


async def _measure_ending(stores: Stores, shards: Shards, sessions: int) -> None:
    async with serving_proxy(stores, **_LISTEN) as proxy:
        places = asyncio.Semaphore(_AT_ONCE)

        async def one() -> Any:
            async with places:
                return await open_session(proxy, 5)

        opened = await asyncio.gather(*(one() for _ in range(sessions)))
        others = [await open_session(proxy, 15) for _ in range(50)]
        facts = await _move(shards, 0)
        await eventually(lambda: all(one.is_closed() for one in opened), "every session is over")
        _print(f"a move with {sessions:,} live sessions: sessions ended", facts["sessions_ended"])
        _print("  fence to open, s", facts["seconds_offline"], 2)
        _print("  counted as mapping_moved", await _count_moved(proxy))
        alive = [await one.fetchval("select 1") for one in others]
        _print("  sessions of another mapping that live, of 50", sum(alive))
        for connection in others:
            connection.terminate()
    await _move(shards, 1)


async def _measure_flips(stores: Stores, shards: Shards, feed: str, flips: int) -> None:
    """Measure from the end of a move to the first query of a client on the new shard."""
    async with serving_proxy(stores, catalogue={"feed": feed}) as proxy, _moving(stores) as mover:
        delays: list[float] = []
        errors = 0
        for number in range(flips):
            to = SHARD_NAMES[1 - number % 2]
            old = await open_session(proxy, 5)
            over = asyncio.Event()
            old.add_termination_listener(lambda _, over=over: over.set())
            moving = asyncio.create_task(mover.move(to))
            await over.wait()
            found = ""
            while found != to:
                with suppress(*ENDED):
                    connection = await open_session(proxy, 5)
                    found = await connection.fetchval("select name from own_name")
                    connection.terminate()
                    continue
                errors += 1
            at = time.monotonic()
            delays.append(at - await moving)
        _print_spread(f"feed {feed}: open to the first answer of the new shard", delays)
        _print("  errors", errors)


class Mover:
    """Moves [0, 10) in this process, with one operator."""

    def __init__(self, operator: Operator, owner: Any) -> None:
        self._operator = operator
        self._owner = owner

    async def move(self, to: str) -> float:
        """Move the mapping. Return when it was online again."""
        key_type = self._owner.spec.key_type
        bounds = parse_key("0", key_type), parse_key("10", key_type)
        await self._operator.run(Move(self._owner, *bounds, to))
        return time.monotonic()


@asynccontextmanager
async def _moving(stores: Stores) -> AsyncIterator[Mover]:
    async with administering(stores.settings()) as administration:
        tools = Tools(
            administration,
            asyncio.sleep,
            lambda: datetime.now(UTC),
            time.monotonic,
            lambda text: None,
        )
        async with stores.connect(MAP) as connection:
            owner = await store.read_map(connection, "tenants")
        async with Operator(tools, KINDS, store.map_by_id, owner="the benchmark") as operator:
            yield Mover(operator, owner)


async def _measure_long(stores: Stores, moves: int) -> None:
    """Measure what many moves leave, in shards, catalogue and sidecar."""
    async with serving_proxy(stores) as proxy, _moving(stores) as mover:
        others = [await open_session(proxy, 15) for _ in range(20)]
        clients = Clients(proxy, 5)
        tasks = [asyncio.create_task(clients.keep()) for _ in range(5)]
        warm = max(moves // _WARM_UP_SHARE, min(_WARM_UP_MIN, moves // 2))
        began, memory = time.monotonic(), 0
        for number in range(moves):
            if number == warm:
                memory = resident_bytes(proxy.pid)
            await mover.move(SHARD_NAMES[1 - number % 2])
        _print(f"{moves:,} moves: each, ms", (time.monotonic() - began) / moves * 1e3, 1)
        await eventually(lambda: clients.live == len(tasks), "all sessions live")
        after = resident_bytes(proxy.pid)
        _print(
            f"  the sidecar's memory at the end, of that after {warm:,}, %", after / memory * 100, 1
        )
        registered = 0
        for name in SHARD_NAMES:
            async with stores.connect(name) as connection:
                query = "select count(*) from shardmap_local.session"
                registered += await connection.fetchval(query)
        _print("  rows of the registries", registered)
        _print("  live sessions", len(others) + clients.live)
        async with stores.connect(MAP) as connection:
            _print(
                "  rows of op_log",
                await connection.fetchval("select count(*) from shardmap.op_log"),
            )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in others:
            connection.terminate()


@asynccontextmanager
async def _filled_map() -> AsyncIterator[tuple[Stores, Shards]]:
    """Yield servers of our own with two mappings on the first shard, and the verbs."""
    clusters = {name: Cluster(name, settings=_SETTINGS) for name in SHARD_NAMES}
    clusters[MAP] = Cluster(MAP)
    with tempfile.TemporaryDirectory() as folder:
        async with running(list(clusters.values())), new_stores(clusters) as stores:
            shards = Shards(stores, Path(folder))
            await shards.set_up()
            await shards.done("grant", "reader", stores.roles.reader)
            await shards.done("grant", "session", stores.roles.session)
            for low in (0, 10):
                await shards.add(str(low), str(low + 10), "one")
            for name in SHARD_NAMES:
                stores.execute(name, _OWN_NAME.format(name))
            yield stores, shards


async def measure(moves: int, sessions: int, long: int) -> None:
    """Measure all."""
    async with _filled_map() as (stores, shards):
        for away_seconds in _AWAY_SECONDS:
            await _measure_offline(stores, shards, moves - moves % 2, away_seconds)
        await _measure_ending(stores, shards, sessions)
        for feed in ("listen", "off"):
            await _measure_flips(stores, shards, feed, _FLIPS)
        await _measure_long(stores, long - long % 2)


def main() -> None:
    """Run as `python -m bench.catalogue_moves`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=_MOVES)
    parser.add_argument("--sessions", type=int, default=_MANY)
    parser.add_argument("--long", type=int, default=_LONG)
    wanted = parser.parse_args()
    with redirect_stdout(StringIO()):  # of the verbs
        uvloop.run(measure(wanted.moves, wanted.sessions, wanted.long))


if __name__ == "__main__":
    main()
