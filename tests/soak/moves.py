"""A map under constant change: no key is on two shards or on none, and no row is lost.

Fifty clients write and read rows of 200 keys through two sidecars, one with two workers, one
without a feed, while writers move, split, merge, delete and take offline the mappings, some of them
in processes that are killed; catalogue and shards restart, a shard changes its host, feeds are cut.
Everything is random by a seed that is printed. For: `make soak`, and less of the same in the suite.
"""

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Final

import uvloop

from proxy.emulator.cluster import Cluster, running
from proxy.emulator.endpoints import AUTOSCALING_DOMAIN, PROVISIONED_DOMAIN
from tests.soak.clients import Client, Clients
from tests.soak.disturbances import CUT, RELOCATED, Disturbances, restarts_of
from tests.soak.map_changes import Verbs, Writer, copy_command
from tests.soak.outcome import Outcome
from tests.soak.served import ALL_KEYS, REGIONS, Served
from tests.soak.stamped_rows import Known, check_rows, install
from tests.support.catalogue import MAP, MAP_VERSION, SHARD_NAMES, Stores, new_stores
from tests.support.killed_verb import killed_verbs
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.shards_cli import Shards

SECONDS: Final = 600.0
CLIENTS: Final = 50
END_SECONDS_MAX: Final = 60.0
# It goes on until each kind has happened, at most for so long: verbs take minutes where the machine
# does much else.
LONGER_SECONDS_MAX: Final = 300.0
_WIDTH: Final = 10  # keys of one mapping at first
# What must have happened.
KINDS: Final = (
    *(f"verbs: {word}" for word in ("move", "split", "merge", "offline", "online")),
    *(f"verbs: {word}" for word in ("delete", "add", "relocate")),
    *(restarts_of(server) for server in (MAP, *SHARD_NAMES)),
    *(CUT, "verbs killed", "sessions ended", "rows written", "rows read"),
)
_HOSTS: Final = {"shard_hosts": f"*.{AUTOSCALING_DOMAIN},*.{PROVISIONED_DOMAIN}"}


class Soak:
    """The state of one run."""

    def __init__(self, stores: Stores, folder: Path, seed: int) -> None:
        self.outcome = Outcome(seed)
        self._stores = stores
        self._folder = folder
        self._shards = Shards(stores, folder, catalogue=_HOSTS)
        self._served = Served()
        self._known = Known()
        self._over = False

    async def set_up(self) -> None:
        """Fill the map, give the rights, and make the tables of rows."""
        shards, roles = self._shards, self._stores.roles
        self._stores.lakebase[RELOCATED].instance.disabled = True
        # The emulator's servers lose the last commits when they crash; Lakebase does not.
        durable = f'alter database "{self._stores.database}" set synchronous_commit = on'
        self._stores.execute(MAP, durable)
        await shards.set_up()
        await shards.done("grant", "reader", roles.reader)
        await shards.done("grant", "session", roles.session)
        install(self._stores)
        lines = ["low,high,shard"]
        for number, low in enumerate(key for key in ALL_KEYS if key % _WIDTH == 0):
            owner = SHARD_NAMES[number % 2]
            lines.append(f"{low},{low + _WIDTH},{owner}")
            self._served.owners.update(dict.fromkeys(range(low, low + _WIDTH), owner))
        file = self._folder / "map.csv"
        file.write_text("\n".join([*lines, ""]))
        await shards.done("add", "--file", str(file))

    async def run(self, seconds: float, proxies: list[ProxyProcess]) -> None:
        """Run for a while; afterwards everything must be online, and nothing lost."""
        clients = Clients(proxies, self._served, self._known, self.outcome)
        copy = copy_command(self._folder, self._stores.clusters["one"])
        async with killed_verbs() as killed, asyncio.TaskGroup() as tasks:
            verbs = Verbs(self._stores, self._shards.config, killed, self.outcome)
            for number in range(CLIENTS):
                client = Client(number, self._derived("client", number))
                tasks.create_task(clients.work(client, self._is_over))
            for number in range(REGIONS):
                writer = Writer(number, verbs, self._served, self._known, copy)
                tasks.create_task(writer.work(self._derived("writer", number), self._is_over))
            others = Disturbances(self._stores, verbs, self._served, self.outcome)
            tasks.create_task(others.work(self._derived("others", 0), self._is_over))
            tasks.create_task(self._time(seconds))
        await self._judge_end(clients, len(proxies))

    def _derived(self, what: str, number: int) -> random.Random:
        return random.Random(f"{self.outcome.seed} {what} {number}")

    def _is_over(self) -> bool:
        return self._over

    async def _time(self, seconds: float) -> None:
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds + LONGER_SECONDS_MAX:
            if elapsed >= seconds and not self.outcome.missing(KINDS):
                break
            await asyncio.sleep(0.2)
        self._over = True
        self.outcome.longest("all of it", time.monotonic() - began)

    async def _judge_end(self, clients: Clients, proxies: int) -> None:
        wrong = self.outcome.wrong
        wrong += [f"did not happen: {kind}" for kind in self.outcome.missing(KINDS)]
        merged = await self._shards.done("merge", "--auto")
        self.outcome.counts["mappings merged at the end"] += merged["merged"]
        verified = await self._shards.done("verify")
        wrong += [f"verify: {one}" for one in verified["differences"]]
        if pending := (await self._shards.done("ops"))["operations"]:
            wrong.append(f"pending: {pending}")
        for key in ALL_KEYS:
            if not await clients.can_open(key, key % proxies):
                wrong.append(f"{key} is not served at the end")
        owners = self._served.owners
        await check_rows(self._stores, self._known, owners, ALL_KEYS, self.outcome)


@asynccontextmanager
async def _sidecar(
    stores: Stores, folder: Path, feed: str, workers: int
) -> AsyncIterator[ProxyProcess]:
    """Yield a sidecar, which says little."""
    sections: dict[str, dict[str, object]] = {
        "catalogue": {"feed": feed, **_HOSTS},
        "listen": {"port": 0, "workers": workers},
    }
    file = stores.file(folder, stores.roles.session, **sections)
    async with started_process("run", "--config", str(file)) as proxy:
        await proxy.serving()
        # Two lines a session would fill this process' memory.
        stores.file(folder, stores.roles.session, **sections, log={"level": "warning"})
        proxy.send(signal.SIGHUP)
        yield proxy


async def run(stores: Stores, folder: Path, seconds: float, seed: int) -> Outcome:
    """Run on stores that are empty."""
    soak = Soak(stores, folder, seed)
    await soak.set_up()
    proxies = []
    async with AsyncExitStack() as stack:
        for feed, workers in (("listen", 2), ("off", 1)):
            own = Path(tempfile.mkdtemp(dir=folder))
            sidecar = _sidecar(stores, own, feed, workers)
            proxies.append(await stack.enter_async_context(sidecar))
        await soak.run(seconds, proxies)
        for number, proxy in enumerate(proxies):
            proxy.send(signal.SIGTERM)
            code = await proxy.ended(END_SECONDS_MAX)
            errors = [line for line in proxy.lines if line["level"] in ("error", "critical")]
            if code or errors:
                shown = [(line["event"], line.get("exception", "")[-200:]) for line in errors[:3]]
                soak.outcome.wrong.append(f"sidecar {number}: {code}, {shown}")
    return soak.outcome


async def soak(seconds: float, seed: int) -> Outcome:
    """Run with servers of our own, and remove them afterwards."""
    clusters = {MAP: Cluster(MAP, version=MAP_VERSION), **{n: Cluster(n) for n in SHARD_NAMES}}
    with tempfile.TemporaryDirectory() as folder:
        async with running(list(clusters.values())), new_stores(clusters) as stores:
            return await run(stores, Path(folder), seconds, seed)


def main() -> int:
    """Run as `python -m tests.soak.moves`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    sys.stderr.write(f"seed {options.seed}, {options.seconds:g} s\n")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # of the verbs
        outcome = uvloop.run(soak(options.seconds, options.seed))
    sys.stdout.write(f"{outcome}\n")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
