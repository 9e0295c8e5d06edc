"""A map in a catalogue under constant change: no session lives where its key is not served.

Fifty clients open sessions for 200 keys through two sidecar processes, of which one has no feed,
while the verbs add and delete mappings and take them offline and online, the catalogue's server
crashes, and feeds lose their connections. Everything is random by a seed that is printed.

What is right is known here: the clients' own sessions and the shards' tables are compared by the
time for which they differ. For: `make soak`, and less of the same in the suite.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Final

import asyncpg
import uvloop

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.emulator.cluster import Cluster, running
from proxy.verbs.shards import read
from proxy.verbs.shards.administration import administering
from proxy.verbs.shards.output import Output
from proxy.verbs.shards.verb import Call
from tests.support.catalogue import MAP, MAP_VERSION, SHARD_NAMES, Stores, new_stores
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.shards_cli import Shards

SECONDS: Final = 180.0
CLIENTS: Final = 50
KEYS: Final = 200
WRITERS: Final = 4
LIVES_SECONDS_MAX: Final = 5.0  # on a mapping that is offline
REFUSED_SECONDS_MAX: Final = 2.0  # after the mapping is online again
CONNECT_SECONDS_MAX: Final = 60.0
VERB_SECONDS_MAX: Final = 60.0
END_SECONDS_MAX: Final = 60.0
_OBSERVE_SECONDS: Final = 0.2
_RETRY_SECONDS: Final = 0.2
_WIDTH: Final = 10  # keys of one mapping
_WRONG_SHOWN_MAX: Final = 20
_OWN_NAME: Final = (
    "create table own_name as select '{0}' as name; grant select on own_name to public"
)

# All that this soak does to a mapping ends its sessions, so an older epoch is wrong as well.
_REGISTERED: Final = """
select s.pid, s.backend_start::text as start from shardmap_local.live_session s
left join shardmap_local.mapping m using (mapping_id)
where m.status is distinct from 'online' or m.epoch > s.epoch
"""
_LOCAL: Final = "select lo, status from shardmap_local.mapping"
_END_FEEDS: Final = (
    "select count(pg_catalog.pg_terminate_backend(pid)) from pg_stat_activity where usename = $1"
)
_CRASHED: Final = "select pid from pg_stat_activity where backend_type = 'checkpointer'"
_DURABLE: Final = 'alter database "{0}" set synchronous_commit = on'
# What is added by an operation that was not ended may go again.
_IS_ADDED: Final = "select count(*) > 0 from shardmap.mapping where lo = $1 and op_id is null"
_ROWS: Final = "select lo, hi, mapping_id, status, epoch from {} order by lo"

_DONE_BEFORE: Final = {
    "add": Reason.OVERLAP.value.word,
    "delete": Reason.UNKNOWN_MAPPING.value.word,
}

Errors: Final = (
    *(asyncpg.PostgresError, asyncpg.InterfaceError, OSError),
    asyncpg.InternalClientError,  # of the driver, when a session ends between two of its messages
)


@dataclass
class Outcome:
    """What happened; `wrong` has a sentence for each thing that must not."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    longest_seconds: Counter[str] = field(default_factory=Counter)  # by what was measured
    wrong: list[str] = field(default_factory=list)

    def longest(self, what: str, seconds: float) -> None:
        """Keep the longest time."""
        self.longest_seconds[what] = max(self.longest_seconds[what], seconds)  # type: ignore[assignment]

    def __str__(self) -> str:
        counts = [f"  {count:>7,} {what}" for what, count in sorted(self.counts.items())]
        times = [f"  {s:>7.2f} s {what}" for what, s in sorted(self.longest_seconds.items())]
        wrong = [f"  WRONG: {sentence}" for sentence in self.wrong[:_WRONG_SHOWN_MAX]]
        return "\n".join((f"seed {self.seed}, {len(self.wrong)} wrong", *counts, *times, *wrong))


@dataclass
class Keys:
    """The keys of one mapping: where they are, and since when they are served; None: not now."""

    low: int
    shard: str
    since: float | None

    @property
    def words(self) -> tuple[str, str]:
        """The bounds."""
        return str(self.low), str(self.low + _WIDTH)


class Soak:
    """The state of one run."""

    def __init__(
        self, stores: Stores, folder: Path, seed: int, proxies: list[ProxyProcess]
    ) -> None:
        self.outcome = Outcome(seed)
        self._stores = stores
        self._shards = Shards(stores, folder)
        self._proxies = proxies
        self._catalogue_since: float | None = time.monotonic()
        self._keys = [
            Keys(n * _WIDTH, SHARD_NAMES[n % 2], self._catalogue_since) for n in range(KEYS)
        ]
        self._changing: dict[int, Keys] = {}  # by writer: clients prefer these
        self._sessions: dict[tuple[str, int], int] = {}  # the key, by shard and pid
        self._misplaced: dict[tuple[object, ...], float] = {}
        self._over = False

    async def set_up(self, folder: Path) -> None:
        """Fill the map, and give the rights."""
        shards, roles = self._shards, self._stores.roles
        # The emulator's servers lose the last commits when they crash; Lakebase does not.
        self._stores.execute(MAP, _DURABLE.format(self._stores.database))
        for name in SHARD_NAMES:
            self._stores.execute(name, _OWN_NAME.format(name))
        await shards.set_up()
        await shards.done("grant", "reader", roles.reader)
        await shards.done("grant", "session", roles.session)
        lines = [f"{keys.words[0]},{keys.words[1]},{keys.shard}" for keys in self._keys]
        (folder / "map.csv").write_text("\n".join(["low,high,shard", *lines, ""]))
        await shards.done("add", "--file", str(folder / "map.csv"))

    async def run(self, seconds: float) -> None:
        """Run for a while; afterwards everything must be online, and both sides agree."""
        async with asyncio.TaskGroup() as others:
            background = [others.create_task(self._observe(name)) for name in SHARD_NAMES]
            async with asyncio.TaskGroup() as tasks:
                for number in range(CLIENTS):
                    tasks.create_task(self._client(self._derived("client", number)))
                for number in range(WRITERS):
                    tasks.create_task(self._writer(number, self._derived("writer", number)))
                tasks.create_task(self._disturb(self._derived("disturb", 0)))
                await asyncio.sleep(seconds)
                self._over = True
            for task in background:
                task.cancel()
        await self._judge_end()

    def _derived(self, what: str, number: int) -> random.Random:
        return random.Random(f"{self.outcome.seed} {what} {number}")

    # -- writers ---------------------------------------------------------------------------------

    async def _writer(self, number: int, generator: random.Random) -> None:
        while not self._over:
            keys = generator.choice(self._keys[number::WRITERS])
            self._changing[number] = keys
            keys.since = None
            mode = generator.choice((("kill",), ("kill",), ("drain", "--drain-seconds", "1")))
            await self._do("offline", *keys.words, "--sessions", *mode)
            await asyncio.sleep(generator.choice((0, 0, 0.5, 1, 2, 6)))
            if generator.random() < 0.4:
                await self._do("delete", *keys.words)
                await asyncio.sleep(generator.choice((0, 0, 1, 3)))
                keys.shard = generator.choice(SHARD_NAMES)
                offline = generator.choice(((), ("--offline",)))
                await self._do("add", *keys.words, "--shard", keys.shard, *offline)
            await self._do("online", *keys.words)
            keys.since = time.monotonic()
            await asyncio.sleep(generator.uniform(0, 1))

    async def _do(self, word: str, *arguments: str) -> None:
        """Do what a verb says; again while the catalogue, or a previous operation, prevents it."""
        began = time.monotonic()
        deadline, is_again = began + VERB_SECONDS_MAX, False
        while True:
            try:
                await self._call(word, *arguments)
                break
            except CatalogueError as error:
                if is_again and await self._is_done_before(word, arguments[0], error):
                    break
                is_again = True
                self.outcome.counts[f"verbs again: {error.reason}"] += 1
                if time.monotonic() > deadline:
                    self.outcome.wrong.append(f"{word} {arguments}: {error.reason}: {error}")
                    break
            await asyncio.sleep(_RETRY_SECONDS)
        self.outcome.counts[f"verbs: {word}"] += 1
        self.outcome.longest(f"the longest {word}", time.monotonic() - began)

    async def _is_done_before(self, word: str, low: str, error: CatalogueError) -> bool:
        """Return whether an earlier attempt, whose answer was lost, did what the verb says."""
        if error.reason != _DONE_BEFORE.get(word):
            return False
        with suppress(*Errors):
            async with self._stores.connect(MAP) as connection:
                is_added = await connection.fetchval(_IS_ADDED, _canonical(int(low)))
                return bool(is_added) == (word == "add")
        return False

    async def _call(self, word: str, *arguments: str) -> None:
        verb, parsed, settings = read([word, "--config", self._shards.config, *arguments])
        output = Output(as_json=True)
        try:
            async with administering(settings) as administration:
                await verb.run(Call(parsed, administration, output))
        finally:
            output.progress.stop()

    # -- clients ---------------------------------------------------------------------------------

    async def _client(self, generator: random.Random) -> None:
        while not self._over:
            changing = list(self._changing.values())
            popular = changing if changing and generator.random() < 0.5 else self._keys
            keys = generator.choice(popular)
            key = keys.low + generator.randrange(_WIDTH)
            number = generator.randrange(len(self._proxies))
            connection = await self._open(keys, key, number)
            if connection is None:
                await asyncio.sleep(0.1)
                continue
            await self._use(connection, keys, key, generator)

    async def _open(self, keys: Keys, key: int, number: int) -> Any:
        """Return a session, or None after a refusal, which is judged."""
        began = time.monotonic()
        try:
            connection = await asyncpg.connect(
                host=self._proxies[number].listen_host,
                port=self._proxies[number].listen_port,
                user="anyone",
                database=f"app@{key}",
                ssl=False,
                timeout=CONNECT_SECONDS_MAX,
            )
        except Errors as error:
            self._judge_refusal(keys, number, error)
            return None
        self.outcome.counts[f"sessions opened by sidecar {number}"] += 1
        if (served := self._served_seconds(keys)) is not None:
            late = min(served, time.monotonic() - began)
            self.outcome.longest("the longest opening of what is served", late)
        return connection

    def _served_seconds(self, keys: Keys) -> float | None:
        """Return for how long a key can have been served; None: it may not be."""
        if keys.since is None or self._catalogue_since is None:
            return None
        return time.monotonic() - max(keys.since, self._catalogue_since)

    def _judge_refusal(self, keys: Keys, number: int, error: BaseException) -> None:
        sqlstate = getattr(error, "sqlstate", None) or type(error).__name__
        detail = getattr(error, "detail", None) or ""
        reason = detail.partition(" ")[0].removesuffix(";") if detail else ""
        self.outcome.counts[f"refused by sidecar {number}: {sqlstate} {reason}"] += 1
        served = self._served_seconds(keys)
        if served is not None:
            self.outcome.longest("the latest refusal of what is served", served)
        if sqlstate == "55000" or (served is not None and served > REFUSED_SECONDS_MAX):
            self.outcome.wrong.append(
                f"sidecar {number} refused {keys.low} on {keys.shard}, served for {served} s:"
                f" {sqlstate} {error} {detail}"
            )

    async def _use(self, connection: Any, keys: Keys, key: int, generator: random.Random) -> None:
        """Hold a session for a while. It may be ended only by a change of its own mapping."""
        since, where = keys.since, None
        try:
            row = await connection.fetchrow(
                "select name, pg_catalog.pg_backend_pid() from own_name"
            )
            where = (str(row[0]), int(row[1]))
            self._sessions[where] = key
            connection.add_termination_listener(lambda _: self._sessions.pop(where, None))
            left = generator.choice((0.0, 0.5, 1.0, 2.0, 15.0))
            until = time.monotonic() + left
            while time.monotonic() < until and not self._over:
                await connection.execute("select pg_catalog.pg_sleep(0.1)")
                await asyncio.sleep(generator.uniform(0, 0.5))
        except Errors as error:
            self.outcome.counts["sessions ended"] += 1
            if since is not None and keys.since == since:
                self.outcome.wrong.append(f"a session of {keys.low}, which did not change: {error}")
        finally:
            if where is not None:
                self._sessions.pop(where, None)
            connection.terminate()

    # -- disturbances ----------------------------------------------------------------------------

    async def _disturb(self, generator: random.Random) -> None:
        reader = self._stores.roles.reader
        while not self._over:
            await asyncio.sleep(generator.uniform(2, 6))
            if generator.random() < 0.5:
                await self._crash_catalogue()
            else:
                with suppress(*Errors):
                    async with self._stores.connect(MAP, "postgres") as connection:
                        ended = await connection.fetchval(_END_FEEDS, reader)
                        self.outcome.counts["feeds and look-ups ended"] += ended

    async def _crash_catalogue(self) -> None:
        """Kill a process of the server: it ends all connections, and starts anew by itself."""
        async with self._stores.connect(MAP, "postgres") as connection:
            pid = await connection.fetchval(_CRASHED)
        self._catalogue_since = None
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS_MAX
        while True:
            await asyncio.sleep(_RETRY_SECONDS)
            assert time.monotonic() < deadline, "the catalogue's server starts anew"
            with suppress(*Errors):
                async with self._stores.connect(MAP, "postgres") as connection:
                    if await connection.fetchval(_CRASHED) not in (None, pid):
                        break
        self._catalogue_since = time.monotonic()
        self.outcome.counts["restarts of the catalogue"] += 1

    # -- judgement -------------------------------------------------------------------------------

    async def _observe(self, name: str) -> None:
        """Look again and again for sessions of keys that the shard's own table does not serve."""
        async with self._stores.connect(name, "postgres") as connection:
            while True:
                rows = await connection.fetch(_LOCAL)
                served = {row["lo"]: row["status"] == "online" for row in rows}
                found: list[tuple[object, ...]] = [
                    ("registered", name, row["pid"], row["start"])
                    for row in await connection.fetch(_REGISTERED)
                ]
                for (shard, pid), key in self._sessions.items():
                    if shard == name and not served.get(_canonical(key // _WIDTH * _WIDTH)):
                        found.append(("a client's", name, pid))
                self._judge_lives(name, found)
                await asyncio.sleep(_OBSERVE_SECONDS)

    def _judge_lives(self, name: str, found: list[tuple[object, ...]]) -> None:
        now = time.monotonic()
        for known in [one for one in self._misplaced if one[1] == name and one not in found]:
            del self._misplaced[known]
        for one in found:
            # An operation whose catalogue is down goes on when it is there again.
            since = max(self._misplaced.setdefault(one, now), self._catalogue_since or now)
            seconds = now - since
            self.outcome.longest("the longest life of a session that is not served", seconds)
            if seconds > LIVES_SECONDS_MAX:
                self.outcome.wrong.append(f"lives for {seconds:.1f} s where it must not: {one}")

    async def _judge_end(self) -> None:
        """Open a session for each key by each sidecar, and compare catalogue and shards."""
        async with self._stores.connect(MAP) as connection:
            if pending := await connection.fetch("select * from shardmap.op_log"):
                self.outcome.wrong.append(f"pending operations: {pending}")
            rows = await connection.fetch(_ROWS.format("shardmap.mapping"))
        local: list[Any] = []
        for name in SHARD_NAMES:
            async with self._stores.connect(name) as connection:
                local += await connection.fetch(_ROWS.format("shardmap_local.mapping"))
        if [tuple(row) for row in rows] != sorted(tuple(row) for row in local):
            self.outcome.wrong.append("catalogue and shards differ at the end")
        for keys in self._keys:
            for number in range(len(self._proxies)):
                connection = await self._open(keys, keys.low, number)
                if connection is None:
                    self.outcome.wrong.append(f"{keys.low} is not served at the end")
                    continue
                name = await connection.fetchval("select name from own_name")
                if name != keys.shard:
                    self.outcome.wrong.append(f"{keys.low} is on {name}, not {keys.shard}")
                connection.terminate()


def _canonical(key: int) -> bytes:
    return (key + 2**31).to_bytes(4)


@asynccontextmanager
async def _sidecar(
    stores: Stores, folder: Path, feed: str, workers: int
) -> AsyncIterator[ProxyProcess]:
    """Yield a sidecar with this feed, which says little."""
    sections: dict[str, dict[str, object]] = {
        "catalogue": {"feed": feed},
        "listen": {"workers": workers},
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
    proxies: list[ProxyProcess] = []
    soak = Soak(stores, folder, seed, proxies)
    await soak.set_up(folder)
    folders = [Path(tempfile.mkdtemp(dir=folder)) for _ in range(2)]
    async with (
        _sidecar(stores, folders[0], "listen", 2) as one,
        _sidecar(stores, folders[1], "off", 1) as two,
    ):
        proxies += one, two
        await soak.run(seconds)
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
    """Run as `python -m tests.soak.catalogue`; return the exit code."""
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
