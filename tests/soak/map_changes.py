"""Writers that change a map at random, each in a region of its own, with verbs that may be killed.

A writer knows what it asked for; what has become of it, it reads in the catalogue. Whatever went
wrong, the region's keys are online again in the end. Not for: restarts of servers (`disturbances`).
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.emulator.cluster import Cluster
from proxy.verbs.shards import read
from proxy.verbs.shards.administration import administering
from proxy.verbs.shards.output import Output
from proxy.verbs.shards.verb import Call
from tests.soak.outcome import Outcome
from tests.soak.served import Served, keys_of
from tests.soak.stamped_rows import COPY, Errors, Known
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.killed_verb import VERB_SECONDS_MAX, KilledVerbs

_RETRY_SECONDS: Final = 0.2
# For so long a writer waits for others that change the same shard.
_OTHERS_SECONDS_MAX: Final = 30.0
_OTHER: Final = Reason.OPERATION_PENDING.value.word
_KILLED_SHARE: Final = 0.15
_POINTS_MAX: Final = 36  # of the longest operation: a number beyond its last is not reached
_PENDING: Final = (
    "select distinct op_id, kind from shardmap.op_log join shardmap.mapping m using (op_id)"
    " where m.lo >= $1 and m.lo < $2"
)
_PIECES: Final = (
    "select m.lo, m.hi, s.name, m.status, m.op_id from shardmap.mapping m"
    " join shardmap.shard s using (shard_id) where m.lo >= $1 and m.lo < $2 order by m.lo"
)


def canonical(key: int) -> bytes:
    """Return a key's bytes."""
    return (key + 2**31).to_bytes(4)


@dataclass(frozen=True)
class Piece:
    """A mapping as the catalogue has it."""

    low: int
    high: int
    shard: str
    status: str
    is_pending: bool

    @property
    def words(self) -> tuple[str, str]:
        """The bounds."""
        return str(self.low), str(self.high)

    @property
    def keys(self) -> range:
        """The keys."""
        return range(self.low, self.high)


class Verbs:
    """Runs verbs: in this process, or in one that is killed somewhere."""

    def __init__(self, stores: Stores, config: str, killed: KilledVerbs, outcome: Outcome) -> None:
        self.stores = stores
        self._config = config
        self._killed = killed
        self.outcome = outcome
        self._turns = asyncio.Condition()
        self._writers = 0
        self._is_alone = False
        self._lock = asyncio.Lock()  # the process that forks takes one call at a time

    async def run(self, *words: str) -> None:
        """Run a verb. Raises CatalogueError."""
        word, *rest = words
        verb, parsed, settings = read([word, "--config", self._config, *rest])
        output = Output(as_json=True)
        began = time.monotonic()
        try:
            async with administering(settings) as administration:
                await verb.run(Call(parsed, administration, output))
        finally:
            output.progress.stop()
        what = " ".join(words[:2]) if word == "ops" else word
        self.outcome.counts[f"verbs: {what}"] += 1
        self.outcome.longest(f"the longest {what}", time.monotonic() - began)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Hold a writer's turn while the block runs; at its end nothing of it is pending."""
        async with self._turns:
            await self._turns.wait_for(lambda: not self._is_alone)
            self._writers += 1
        try:
            yield
        finally:
            async with self._turns:
                self._writers -= 1
                self._turns.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold back all writers while the block runs."""
        async with self._turns:
            self._is_alone = True
            await self._turns.wait_for(lambda: not self._writers)
        try:
            yield
        finally:
            async with self._turns:
                self._is_alone = False
                self._turns.notify_all()

    async def kill(self, generator: random.Random, *words: str) -> None:
        """Run a verb that is killed at one of its points, or after a random time."""
        point = generator.randrange(_POINTS_MAX)
        seconds = generator.choice((0.0, generator.uniform(0.3, 2)))
        async with self._lock:
            ended = await self._killed.run(
                point, *words, "--config", self._config, killed_after=seconds
            )
        how = "killed" if ended == -signal.SIGKILL else f"ended with {ended}"
        self.outcome.counts[f"processes of {words[0]} that were {how}"] += 1
        if ended == -signal.SIGKILL:
            self.outcome.counts["verbs killed"] += 1


class Writer:
    """Changes one region of the map."""

    def __init__(self, region: int, verbs: Verbs, served: Served, known: Known, copy: str) -> None:
        self._region = keys_of(region)
        self._verbs = verbs
        self._served = served
        self._known = known
        self._outcome = verbs.outcome
        self._copy = copy

    async def work(self, generator: random.Random, is_over: Callable[[], bool]) -> None:
        """Change something until it is over; each kind comes once before one comes again."""
        kinds: dict[str, Callable[[random.Random, list[Piece]], Awaitable[None]]] = {
            "move": self._move,
            "move again": self._move,
            "split": self._split,
            "merge": self._merge,
            "offline": self._offline,
            "delete": self._delete,
        }
        deck: list[str] = []
        while not is_over():
            deck = deck or generator.sample(list(kinds), len(kinds))
            async with self._verbs.changing():
                pieces = await self._settled(generator)
                await kinds[deck.pop()](generator, pieces)
                await self._settled(generator)
            await asyncio.sleep(generator.uniform(0, 0.5))

    # -- the changes -----------------------------------------------------------------------------

    async def _move(self, generator: random.Random, pieces: list[Piece]) -> None:
        piece = generator.choice(pieces)
        (other,) = [name for name in SHARD_NAMES if name != piece.shard]
        mode = generator.choice((("kill",), ("drain", "--drain-seconds", "1")))
        words = ("move", *piece.words, "--to", other, "--sessions", *mode, "--copy", self._copy)
        with self._changing(piece):
            await self._do(generator, *words)

    async def _split(self, generator: random.Random, pieces: list[Piece]) -> None:
        wide = [piece for piece in pieces if len(piece.keys) > 1]
        piece = generator.choice(wide)
        with self._changing(piece, ends=False):
            await self._do(generator, "split", str(generator.choice(piece.keys[1:])))

    async def _merge(self, generator: random.Random, pieces: list[Piece]) -> None:
        pairs = [
            (one, two)
            for one, two in pairwise(pieces)
            if one.shard == two.shard and one.high == two.low
        ]
        if not pairs:
            await self._split(generator, pieces)
            return
        one, two = generator.choice(pairs)
        with self._changing(one, two, ends=False):
            await self._do(generator, "merge", str(two.low))

    async def _offline(self, generator: random.Random, pieces: list[Piece]) -> None:
        piece = generator.choice(pieces)
        mode = generator.choice((("kill",), ("keep",), ("drain", "--drain-seconds", "1")))
        with self._changing(piece, keeps=mode == ("keep",)):
            await self._do(generator, "offline", *piece.words, "--sessions", *mode)
            await asyncio.sleep(generator.choice((0, 0.3, 1)))
            await self._do(generator, "online", *piece.words)

    async def _delete(self, generator: random.Random, pieces: list[Piece]) -> None:
        """Delete a mapping, and add it where its rows are."""
        piece = generator.choice(pieces)
        with self._changing(piece):
            await self._do(generator, "offline", *piece.words)
            await self._do(generator, "delete", *piece.words)
            await asyncio.sleep(generator.choice((0, 0.3)))
            await self._do(generator, "add", *piece.words, "--shard", piece.shard)

    @contextmanager
    def _changing(self, *pieces: Piece, ends: bool = True, keeps: bool = False) -> Iterator[None]:
        """Mark the keys as not served. What a verb is refused with, the next round looks at."""
        for piece in pieces:
            self._served.stops(piece.keys, ends=ends)
            self._known.changing(piece.keys, keeps=keeps)
        with suppress(CatalogueError):
            yield

    async def _do(self, generator: random.Random, *words: str) -> None:
        """Run a verb, perhaps in a process that is killed."""
        if generator.random() < _KILLED_SHARE:
            await self._verbs.kill(generator, *words)
            return
        deadline = time.monotonic() + _OTHERS_SECONDS_MAX
        while True:
            try:
                await self._count(*words)
                break
            except CatalogueError as error:
                if error.reason != _OTHER or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(generator.uniform(0, 2 * _RETRY_SECONDS))

    # -- back to all online ----------------------------------------------------------------------

    async def _settled(self, generator: random.Random) -> list[Piece]:
        """Return the mappings of the region, all of them online again."""
        began = time.monotonic()
        while True:
            with suppress(CatalogueError, *Errors):
                pieces = await self._complete_one(generator)
                if pieces:
                    break
            seconds = time.monotonic() - began
            if seconds > VERB_SECONDS_MAX:
                raise AssertionError(f"{self._region} is not settled after {seconds:.0f} s")
            await asyncio.sleep(_RETRY_SECONDS)
        self._outcome.longest("the longest time to settle", time.monotonic() - began)
        for piece in pieces:
            changed = [key for key in piece.keys if self._served.is_changing(key)]
            self._served.serves(changed, piece.shard)
        return pieces

    async def _complete_one(self, generator: random.Random) -> list[Piece]:
        """Do one thing that is missing. Return the mappings if nothing is."""
        for op_id, kind in await self._pending():
            word = generator.choice(("resume", "undo", ""))
            copies = ("--copy", self._copy) if (word, kind) == ("resume", "move") else ()
            if word:
                await self._count("ops", word, str(op_id), *copies)
        pieces = await self._pieces()
        at = self._region.start
        for piece in pieces:
            if at < piece.low:
                await self._fill(at, piece.low)
                return []
            at = piece.high
            if piece.status == "offline" or piece.is_pending:
                await self._count("online", *piece.words)
                return []
        if at < self._region.stop:
            await self._fill(at, self._region.stop)
            return []
        return pieces

    async def _fill(self, low: int, high: int) -> None:
        """Add the mapping that was deleted, where its rows are."""
        await self._count("add", str(low), str(high), "--shard", self._served.owners[low])

    async def _count(self, *words: str) -> None:
        try:
            await self._verbs.run(*words)
        except CatalogueError as error:
            self._outcome.counts[f"refused: {words[0]}: {error.reason}"] += 1
            raise

    async def _pending(self) -> list[Any]:
        return list(await self._fetch(_PENDING))

    async def _pieces(self) -> list[Piece]:
        return [
            Piece(_number(lo), _number(hi), name, status, op_id is not None)
            for lo, hi, name, status, op_id in await self._fetch(_PIECES)
        ]

    async def _fetch(self, query: str) -> Any:
        bounds = canonical(self._region.start), canonical(self._region.stop)
        async with self._verbs.stores.connect(MAP) as connection:
            return await connection.fetch(query, *bounds)


def _number(bound: bytes) -> int:
    return int.from_bytes(bound) - 2**31


def copy_command(folder: Path, cluster: Cluster) -> str:
    """Return the command that copies the rows of a range from one shard to the other."""
    script = folder / "copy.sh"
    script.write_text(COPY.format(psql=cluster.binaries / "psql"))
    return f"sh {script}"
