"""What happens to the servers meanwhile: restarts, cut connections, a shard that changes its host.

A server restarts as after a crash of one of its processes: it ends all sessions and starts anew by
itself. A shard has two hosts, of which one is disabled: it changes to the other, and `relocate`
tells the map.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from proxy.catalogue.errors import CatalogueError
from tests.soak.map_changes import Verbs
from tests.soak.outcome import Outcome
from tests.soak.served import Served
from tests.soak.stamped_rows import Errors
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.killed_verb import VERB_SECONDS_MAX

RELOCATED: Final = "two"
RESTART_SECONDS_MAX: Final = 60.0
CUT: Final = "LISTEN connections and look-ups cut"
_RETRY_SECONDS: Final = 0.2
_END_FEEDS: Final = (
    "select count(pg_catalog.pg_terminate_backend(pid)) from pg_stat_activity where usename = $1"
)
_CRASHED: Final = "select pid from pg_stat_activity where backend_type = 'checkpointer'"


def restarts_of(server: str) -> str:
    """Return under which name the restarts of a server are counted."""
    return f"restarts of {'the catalogue' if server == MAP else f'shard {server}'}"


class Disturbances:
    """Does one of these every few seconds."""

    def __init__(self, stores: Stores, verbs: Verbs, served: Served, outcome: Outcome) -> None:
        self._stores = stores
        self._verbs = verbs
        self._served = served
        self._outcome = outcome
        self._is_at_instance = False

    async def work(self, generator: random.Random, is_over: Callable[[], bool]) -> None:
        """Disturb until it is over; each kind comes once before one comes again."""
        kinds = ("cut", MAP, *SHARD_NAMES, "relocate")
        deck: list[str] = []
        while not is_over():
            await asyncio.sleep(generator.uniform(1, 5))
            deck = deck or generator.sample(kinds, len(kinds))
            kind = deck.pop()
            if kind == "cut":
                await self._cut()
            elif kind == "relocate":
                # It would wait for verbs that still try the old host.
                async with self._verbs.alone():
                    await self._relocate()
            else:
                await self._restart(kind)

    async def _cut(self) -> None:
        """End the connections on which sidecars listen."""
        with suppress(*Errors):
            async with self._stores.connect(MAP, "postgres") as connection:
                ended = await connection.fetchval(_END_FEEDS, self._stores.roles.reader)
                self._outcome.counts[CUT] += ended

    async def _restart(self, server: str) -> None:
        """Kill a process of a server, and wait until it is there again."""
        async with self._stores.connect(server, "postgres") as connection:
            pid = await connection.fetchval(_CRASHED)
        self._served.falls(server)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + RESTART_SECONDS_MAX
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            assert time.monotonic() < deadline, f"{server} starts anew"
            with suppress(*Errors):
                async with self._stores.connect(server, "postgres") as connection:
                    if await connection.fetchval(_CRASHED) not in (None, pid):
                        break
        self._served.rises(server)
        self._outcome.counts[restarts_of(server)] += 1

    async def _relocate(self) -> None:
        """Change the shard's host, and ask for `relocate` until it has succeeded."""
        shard = self._stores.lakebase[RELOCATED]
        hosts = shard.endpoint, shard.instance
        old, new = reversed(hosts) if self._is_at_instance else hosts
        self._is_at_instance = not self._is_at_instance
        self._served.falls(RELOCATED)
        new.disabled, old.disabled = False, True
        old.end_sessions()
        flag = "--instance" if self._is_at_instance else "--endpoint"
        port = str(self._stores.lakebase.port)
        deadline = time.monotonic() + VERB_SECONDS_MAX
        while True:
            try:
                await self._verbs.run("relocate", RELOCATED, flag, new.name, "--port", port)
                break
            except CatalogueError as error:
                self._outcome.counts[f"refused: relocate: {error.reason}"] += 1
                if time.monotonic() > deadline:
                    self._outcome.wrong.append(f"relocate: {error.reason}: {error}")
                    break
            await asyncio.sleep(_RETRY_SECONDS)
        self._served.rises(RELOCATED, elsewhere=True)
