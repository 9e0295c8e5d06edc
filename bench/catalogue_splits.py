"""Splits and merges of a map in a catalogue: `python -m bench.catalogue_splits`.

Splits one mapping 1,000 times, at random, and merges all of it again: in one process, whose
connections are those of the command line; the map must be as it was but for its epochs. Then some
splits by the command line, a process each. All of it is the emulator's: its TLS gateway is part of
every time, and shares the machine. Prints the machine's load with each result.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, Final

import uvloop

from proxy.catalogue import store
from proxy.catalogue.merge import Merge, find_runs
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.operation import Tools
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.operations import Operator
from proxy.catalogue.split import Split
from proxy.emulator.cluster import Cluster, running
from proxy.routing.keys import parse_key
from proxy.verbs.shards.administration import Administration, administering
from tests.support.catalogue import MAP, SHARD_NAMES, Stores, new_stores
from tests.support.shards_cli import Shards

SPLITS: Final = 1_000
_BY_COMMAND_LINE: Final = 20
_KEYS: Final = 1_000_000
_SEED: Final = 20261129
_ROWS: Final = (
    "select mapping_id, lo, hi, shard_id, status, sessions, drain_until, lock_owner, op_id"
    " from shardmap.mapping order by lo"
)
_LOCAL_ROWS: Final = "select mapping_id, lo, hi, status from shardmap_local.mapping order by lo"


def _print(what: str, value: float, digits: int = 1) -> None:
    load = os.getloadavg()[0]
    sys.stderr.write(f"{what:<64}{value:>10.{digits}f}   (load {load:.1f})\n")


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began, used = time.monotonic(), time.process_time()
    yield
    _print(f"{what}, s", time.monotonic() - began)
    used = time.process_time() - used
    _print("  of which CPU of this process, the emulator's gateway included", used)


async def _rows(stores: Stores) -> list[list[Any]]:
    """Return all rows of the map without their epochs: of the catalogue, and of the shards."""
    found = []
    for name, query in ((MAP, _ROWS), *((name, _LOCAL_ROWS) for name in SHARD_NAMES)):
        async with stores.connect(name) as connection:
            found.append([tuple(row) for row in await connection.fetch(query)])
    return found


async def measure(stores: Stores, splits: int, by_command_line: int) -> None:
    """Split and merge in one process, then by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(stores, Path(folder))
        await shards.set_up()
        await shards.add("0", str(_KEYS), "one")
        before = await _rows(stores)
        async with administering(stores.settings()) as administration:
            await _in_one_process(stores, administration, splits)
        if await _rows(stores) != before:
            raise SystemExit("the map is not as it was")
        with _timed(f"{by_command_line} splits by the command line, a process each"):
            for key in range(1, by_command_line + 1):
                answered = await shards.process("split", key)
                if answered.code:
                    raise SystemExit(answered.err)
        with _timed("merge --auto by the command line"):
            await shards.process("merge", "--auto")
        if await _rows(stores) != before:
            raise SystemExit("the map is not as it was")


async def _in_one_process(stores: Stores, administration: Administration, splits: int) -> None:
    tools = Tools(
        administration,
        asyncio.sleep,
        lambda: datetime.now(UTC),
        time.monotonic,
        lambda text: None,
    )
    generator = random.Random(_SEED)  # noqa: S311 - no secret
    keys = generator.sample(range(1, _KEYS), splits)
    async with stores.connect(MAP) as connection:
        owner = await store.read_map(connection, "tenants")
    began = time.monotonic()
    async with Operator(tools, KINDS, store.map_by_id, owner="the benchmark") as operator:
        with _timed(f"{splits} splits in one process"):
            for key in keys:
                await operator.run(Split(owner, parse_key(str(key), owner.spec.key_type)))
        with _timed("merge --auto back to one"):
            await _merge_all(operator, administration, owner)
    _print("both, s", time.monotonic() - began)


async def _merge_all(
    operator: Operator, administration: Administration, owner: CatalogueMap
) -> None:
    async with administration.catalogue() as connection:
        runs = await find_runs(connection, owner)
    for run in runs:
        await operator.run(Merge(owner, run.lo, run.hi))


async def _run(splits: int, by_command_line: int) -> None:
    clusters = {name: Cluster(name) for name in SHARD_NAMES}
    clusters[MAP] = Cluster(MAP)
    async with running(list(clusters.values())), new_stores(clusters) as stores:
        await measure(stores, splits, by_command_line)


def main() -> None:
    """Run as `python -m bench.catalogue_splits`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--by-command-line", type=int, default=_BY_COMMAND_LINE)
    wanted = parser.parse_args()
    with redirect_stdout(StringIO()):  # of the verbs
        uvloop.run(_run(wanted.splits, wanted.by_command_line))


if __name__ == "__main__":
    main()
