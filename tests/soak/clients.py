"""Clients that open sessions for keys, write and read rows, and know when that must work.

A refusal, the end of a session, a wait or a row that is missing is judged by what the soak knows of
the key (`served`). Not for: what the rows say of the shards (`stamped_rows`).
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final, NamedTuple

import asyncpg

from tests.soak.outcome import Outcome
from tests.soak.served import ALL_KEYS, Served
from tests.soak.stamped_rows import READ, WRITE, Errors, Known, Stamp
from tests.support.running import Listening

FEEDLESS: Final = 1
"""The number of the sidecar without a feed."""
CONNECT_SECONDS_MAX: Final = 60.0
# A client waits for a key while it is offline, and for a shard while it starts. Once it is served,
# a dial to a host that is gone may still be under way, and be tried again.
WAIT_SECONDS_MAX: Final = 20.0
# A refusal may be on its way when the key is served again.
REFUSED_SECONDS_MAX: Final = 3.0
# Not a wait for the map's sake.
_LIVES_SECONDS: Final = (0.0, 0.5, 2.0, 10.0)


class Client(NamedTuple):
    """One client: its number, and its random choices."""

    number: int
    generator: random.Random


class Clients:
    """What all clients share."""

    def __init__(
        self, proxies: Sequence[Listening], served: Served, known: Known, outcome: Outcome
    ) -> None:
        self._proxies = proxies
        self._served = served
        self._known = known
        self._outcome = outcome
        self._numbers = count()

    async def work(self, client: Client, is_over: Callable[[], bool]) -> None:
        """Open one session after the other."""
        generator = client.generator
        while not is_over():
            changing = [key for key in ALL_KEYS if self._served.is_changing(key)]
            preferred = changing if changing and generator.random() < 0.5 else ALL_KEYS
            key = generator.choice(preferred)
            connection = await self.open(key, generator.randrange(len(self._proxies)))
            if connection is None:
                await asyncio.sleep(0.1)
                continue
            until = time.monotonic() + generator.choice(_LIVES_SECONDS)
            await self._use(connection, key, client, until)

    async def open(self, key: int, number: int) -> Any:
        """Return a session, or None after a refusal, which is judged."""
        began = time.monotonic()
        proxy = self._proxies[number]
        try:
            connection = await asyncpg.connect(
                host=proxy.listen_host,
                port=proxy.listen_port,
                user="anyone",
                database=f"app@{key}",
                ssl=False,
                timeout=CONNECT_SECONDS_MAX,
                statement_cache_size=0,
            )
        except Errors as error:
            self._judge_refusal(key, number, error)
            return None
        self._outcome.counts[f"sessions opened by sidecar {number}"] += 1
        waited = time.monotonic() - began
        self._outcome.longest("the longest wait for a session", waited)
        if (served := self._seconds(key, number)) is not None:
            late, what = min(served, waited), "the longest wait for a key that is served"
            self._outcome.bounded(what, late, WAIT_SECONDS_MAX, key)
        return connection

    async def can_open(self, key: int, number: int) -> bool:
        """Return whether a session can be opened, when the sidecar must have heard of its host."""
        while True:  # bounded by the time that a sidecar has for that
            is_due = self._seconds(key, number) is not None
            connection = await self.open(key, number)
            if connection is not None:
                await connection.close()
            if is_due or connection is not None:
                return connection is not None
            await asyncio.sleep(0.5)

    def _seconds(self, key: int, number: int) -> float | None:
        return self._served.seconds(key, has_feed=number != FEEDLESS)

    def _judge_refusal(self, key: int, number: int, error: BaseException) -> None:
        sqlstate = getattr(error, "sqlstate", None) or type(error).__name__
        detail = getattr(error, "detail", None) or ""
        reason = detail.partition(" ")[0].removesuffix(";")
        self._outcome.counts[f"refused by sidecar {number}: {sqlstate} {reason}"] += 1
        served = self._seconds(key, number)
        if served is not None:
            self._outcome.longest("the latest refusal of what is served", served)
        if sqlstate == "55000" or (served is not None and served > REFUSED_SECONDS_MAX):
            self._outcome.wrong.append(
                f"sidecar {number} refused {key} on {self._served.owners[key]}, served for"
                f" {served} s: {sqlstate} {error} {detail}"
            )

    async def _use(self, connection: Any, key: int, client: Client, until: float) -> None:
        """Write and read until then. Only what concerns the key or its shard may end it."""
        ends, is_served = self._served.ends(key), self._served.seconds(key) is not None
        try:
            await self._write(connection, key, client.number)
            await self._read(connection, key)
            while time.monotonic() < until:
                await asyncio.sleep(client.generator.uniform(0, 0.5))
                await self._write(connection, key, client.number)
                await self._read(connection, key)
        except Errors as error:
            self._outcome.counts["sessions ended"] += 1
            if is_served and self._served.ends(key) == ends:
                self._outcome.wrong.append(f"a session of {key}, which did not change: {error!r}")
        finally:
            connection.terminate()

    async def _write(self, connection: Any, key: int, number: int) -> None:
        row = number, next(self._numbers)
        self._known.attempted[key].add(row)
        await connection.execute(WRITE, key, *row)
        self._known.acknowledged[key].add(row)
        self._outcome.counts["rows written"] += 1

    async def _read(self, connection: Any, key: int) -> None:
        at_least = len(self._known.acknowledged[key])
        items, epoch, shard, at, _ = await connection.fetchrow(READ, key)
        self._known.reads.append(Stamp(key, epoch, shard, at.timestamp()))
        self._outcome.counts["rows read"] += items
        at_most = len(self._known.attempted[key])
        if not at_least <= items <= at_most:
            self._outcome.wrong.append(
                f"key {key} on {shard}, epoch {epoch}: {items} rows, not {at_least} to {at_most}"
            )
