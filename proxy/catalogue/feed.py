"""How a proxy hears of changes of its map: notifications, comparing versions, or not at all.

For: the first load, and keeping the map current on one connection (`listen`), from time to time
(`poll`), or not (`off`). Not for: single look-ups (`lookups`).

The invariants: LISTEN comes before what is read, so that no change falls between. A version that
was missed is followed by a reload. A new connection goes on from a version that was read in the
catalogue, not from one of a notification: any login can send one. Whatever a notification says, it
is never an exception, and never more than a reason to read. Reading leaves the event loop free: no
part takes 50 ms.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum, unique
from math import inf
from typing import Final, Literal
from uuid import UUID

from proxy.catalogue.catalogue_reader import IDS_MAX, CatalogueReader, OpenReader
from proxy.catalogue.map_state import Change, MapState
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.notifications import PENDING_IDS_MAX, Notification, Pending, parse
from proxy.catalogue.packed_rows import uuid_of
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger

# Notifications that come together are read together: the pause after a read is short, and doubles
# for as long as one comes in each pause. The few of a move are each read as they come.
COALESCE_SECONDS: Final = (0.002, 0.05)
RECONNECT_SECONDS: Final = (0.1, 30.0)
POLL_JITTER: Final = 0.1
# After a version was read, this much for its notification to come.
NOTIFIED_SECONDS: Final = 1.0
# Single changes that are applied in one go.
_SLICE_MAX: Final = 200
# A whole map that is read again and again is of no use; something sends wrong notifications.
RELOAD_PAUSE_SECONDS: Final = 1.0

# Notifications of other maps make us compare versions no more often than this.
COMPARE_PAUSE_SECONDS: Final = 1.0

_log = get_logger(__name__)

# Waiting does not help: the proxy does not start with these.
FATAL_KINDS: Final = frozenset(
    {
        ErrorKind.CATALOGUE_MAP_MISSING,
        ErrorKind.CATALOGUE_REFUSED,
        ErrorKind.MAP_MISMATCH,
        ErrorKind.STORE_VERSION,
    }
)


@unique
class FeedState(StrEnum):
    """How the feed is, as `/status` shows it."""

    LISTENING = "listening"
    POLLING = "polling"
    OFF = "off"
    DOWN = "down"


_STATES: Final = {
    "listen": FeedState.LISTENING,
    "poll": FeedState.POLLING,
    "off": FeedState.OFF,
}
_IN_FORCE: Final = frozenset((FeedState.LISTENING, FeedState.POLLING))


@dataclass(frozen=True, slots=True)
class FeedSettings:
    """What of `[catalogue]` is the feed's."""

    feed: Literal["listen", "poll", "off"]
    eager: bool
    poll_seconds: float


@dataclass(slots=True)
class FeedCounts:
    """What the metrics show of the feed."""

    gaps: int = 0
    bad_payloads: int = 0
    foreign: int = 0
    """Notifications of other maps of the catalogue."""
    reloads: int = 0


class Feed:
    """Keeps a map current while `run` runs."""

    def __init__(
        self,
        state: MapState,
        open_reader: OpenReader,
        settings: FeedSettings,
        check: Callable[[CatalogueMap], None],
    ) -> None:
        """`check` raises ProxyError for a map that is not as it is configured."""
        self._state = state
        self._contact, self._times = state.contact, state.times
        self._open_reader = open_reader
        self._settings = settings
        self._check = check
        self._wake = asyncio.Event()
        self._is_closed = False
        self._is_loading = False
        self._seeks_version = False
        self._pending = Pending(0)
        # What comes while the map is read: it is compared with the version that was read.
        self._early: deque[Notification] | None = None
        # A version that was read, and until when the notifications of it may come.
        self._expected = (0, 0.0)
        self._compared_at = self._reloaded_at = -inf
        self._build_wanted = asyncio.Event()
        self.counts = FeedCounts()
        self.state = FeedState.OFF if settings.feed == "off" else FeedState.DOWN
        self.failure: ProxyError | None = None
        """Why the catalogue could not be read the last time; None if it could."""
        self.has_succeeded = False
        """Whether the catalogue was ever read."""
        self.tried = asyncio.Event()
        """Set after the first try, whatever its outcome."""

    async def run(self) -> None:
        """Load the map and keep it current, until the task is cancelled."""
        unsubscribe = self._state.subscribe(self._want_build)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._build_tables())
                await self._follow()
        finally:
            unsubscribe()

    # -- connections -----------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Follow the map over one connection after the other; with `off` over one alone."""
        first, last = RECONNECT_SECONDS
        ceiling = first
        while True:  # until the task is cancelled
            try:
                await self._follow_once()
            except ProxyError as error:
                if self.state in _IN_FORCE:  # it was followed for a while
                    ceiling = first
                self._lost(error)
                await self._times.sleep(ceiling * self._times.jitter())
                ceiling = min(last, 2 * ceiling)
                continue
            if self._settings.feed == "off":
                return
            ceiling = first
            await self._times.sleep(self._poll_seconds())

    async def _follow_once(self) -> None:
        """Bring the map up to date; with `listen` keep it so until the connection is lost."""
        async with self._open_reader() as reader:
            listens = self._settings.feed == "listen"
            self._early, self._is_closed = deque(maxlen=PENDING_IDS_MAX), False
            self._wake.clear()
            if listens:
                await reader.listen(self._notified, self._closed)
            await self._bring_up_to_date(reader)
            self._contact.answered(self._times.clock())
            self._contact.feed_is_current = listens
            self.state = _STATES[self._settings.feed]
            self.has_succeeded = True
            if self.failure is not None:
                _log.info("the catalogue is followed again", shard_map=self._state.name)
            self.failure = None
            self.tried.set()
            if listens:
                await self._listen(reader)

    def _lost(self, error: ProxyError) -> None:
        before = self.failure
        if before is None or before.kind is not error.kind:
            _log.warning(
                "the catalogue cannot be followed",
                shard_map=self._state.name,
                reason=error.reason,
                error=error.detail,
            )
        if self._contact.feed_is_current:  # until now
            self._contact.answered_at = self._times.clock()
        self._contact.feed_is_current = False
        self._contact.failed = True
        self.failure = error
        self.state = FeedState.OFF if self._settings.feed == "off" else FeedState.DOWN
        self.tried.set()

    def _poll_seconds(self) -> float:
        return self._settings.poll_seconds * (1 + POLL_JITTER * (2 * self._times.jitter() - 1))

    # -- notifications ---------------------------------------------------------------------------

    def _notified(self, payload: str) -> None:
        found, known = parse(payload), self._state.map
        if found is None:
            self.counts.bad_payloads += 1
            self._pending.reload = True
        elif known is not None and found.map_id != known.map_id:
            # Of another map of the catalogue, most likely; nothing of ours can be missing.
            self.counts.foreign += 1
            if self._times.clock() < self._compared_at + COMPARE_PAUSE_SECONDS:
                return
            self._seeks_version = True
        elif self._early is not None:
            self._early.append(found)  # if the first ones are dropped, that is a gap
        else:
            self._pending.add(found)
        self._wake.set()

    def _closed(self) -> None:
        self._is_closed = True
        self._wake.set()

    async def _listen(self, reader: CatalogueReader) -> None:
        """Apply what is notified, and compare versions now and then. Raises ProxyError."""
        poll_at = self._times.clock() + self._poll_seconds()
        first, last = COALESCE_SECONDS
        pause = first
        while True:  # until the connection is lost
            until = min(poll_at, self._expected[1] or poll_at)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until - self._times.clock())):
                    await self._wake.wait()
            self._wake.clear()
            if self._is_closed:
                detail = "the connection on which changes are notified was closed"
                raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE, detail)
            now = self._times.clock()
            is_due = 0 < self._expected[1] <= now
            if is_due and self._expected[0] > self._pending.version:
                self._pending.gaps += 1
                self._pending.reload = True
            if self._pending:
                await self._apply(reader, self._pending.taken())
            if is_due and self._expected[1]:  # else the map was read anew
                # All of this version has come: a forged notification and the real one are a gap.
                self._state.read_version, self._expected = self._expected[0], (0, 0.0)
            if now >= poll_at:
                self._seeks_version = True
                poll_at = now + self._poll_seconds()
            if self._seeks_version:
                await self._compare(reader)
            self._contact.answered(self._times.clock())
            # What comes meanwhile is read together.
            await self._times.sleep(pause)
            pause = min(last, 2 * pause) if self._wake.is_set() else first

    async def _apply(self, reader: CatalogueReader, pending: Pending) -> None:
        """Read what has changed. Raises ProxyError, and then the next connection reads it."""
        self.counts.gaps += pending.gaps
        if pending.reload:
            await self._times.sleep(
                max(0.0, self._reloaded_at + RELOAD_PAUSE_SECONDS - self._times.clock())
            )
            await self._reload(reader)
            return
        assert self._state.map is not None, "it was loaded"
        if pending.shards_changed:
            self._state.set_shards(await reader.shards(self._state.map.map_id))
        await self._read_mappings(reader, pending.mapping_ids)
        self._state.version = pending.version

    async def _compare(self, reader: CatalogueReader) -> None:
        """Compare the map's version with that of the notifications. Raises ProxyError.

        Only this sees that the map was dropped, or created anew.
        """
        self._seeks_version = False
        self._compared_at = self._times.clock()
        assert self._state.map is not None, "it was loaded"
        version = await reader.version(self._state.map.map_id)
        if version is None or version < self._state.version:  # dropped, or restored
            self.counts.gaps += 1
            await self._reload(reader)
        elif not self._expected[1]:
            # A notification comes a moment after its change can be read.
            self._expected = (version, self._times.clock() + NOTIFIED_SECONDS)

    # -- reading ---------------------------------------------------------------------------------

    async def _bring_up_to_date(self, reader: CatalogueReader) -> None:
        """Read what is not known of the map, or has changed. Raises ProxyError."""
        found, known = await self._read_map(reader), self._state.map
        if (
            known is not None
            and self._state.loaded.is_set()
            and (known.map_id, known.spec) == (found.map_id, found.spec)
            and self._state.read_version == found.version
        ):
            self._caught_up(found.version)
        else:
            await self._reload(reader)

    async def _read_map(self, reader: CatalogueReader) -> CatalogueMap:
        """Return the map as it is now. Raises ProxyError if it is not as it is configured."""
        found = self._state.checked(await reader.read_map(self._state.name))
        self._check(found)
        return found

    async def _reload(self, reader: CatalogueReader) -> None:
        """Read the map anew. Raises ProxyError."""
        self._early = self._early or deque(maxlen=PENDING_IDS_MAX)
        self._is_loading = True
        try:
            is_read = False
            while not is_read:  # again if so much was looked up meanwhile that it is void
                self.counts.reloads += 1
                is_read = await self._read_all(reader)
        finally:
            self._is_loading = False
            self._reloaded_at = self._times.clock()
        self._state.loaded.set()
        self._caught_up(self._state.version)

    def _caught_up(self, version: int) -> None:
        """Go on from this version with what was notified meanwhile."""
        early, self._early = self._early or (), None
        self._expected = (0, 0.0)
        self._pending = Pending(version)
        known = self._state.map
        for notification in early:  # which map is ours may not have been known then
            if known is not None and notification.map_id == known.map_id:
                self._pending.add(notification)
        if self._pending:
            self._wake.set()

    async def _read_all(self, reader: CatalogueReader) -> bool:
        """Read the map at one moment. Return False if it has to be read again."""
        async with reader.snapshot():
            found = await self._read_map(reader)
            cache = self._state.start(found)
            build = cache.start_build() if self._settings.eager else None
            shards = await reader.shards(found.map_id)
            if build is None:
                self._state.set_shards(shards)
                for chunk in cache.chunks():
                    await self._read_mappings(reader, map(uuid_of, chunk.split_ids()))
                self._state.reloaded(found.version)
                return True
            async for chunk in reader.chunks(found.map_id):
                build.append(chunk)
                await asyncio.sleep(0)
        for _ in build.steps():
            await asyncio.sleep(0)
        return self._state.exchange(build, shards, found.version)

    async def _read_mappings(self, reader: CatalogueReader, ids: Iterable[UUID]) -> None:
        """Read these mappings; with `lazy` those of them that are in use."""
        state = self._state
        asked = list(ids)
        for at in range(0, len(asked), IDS_MAX):
            batch = asked[at : at + IDS_MAX]
            wanted = [one for one in batch if self._settings.eager or state.by_id(one) is not None]
            rows = await reader.mappings(wanted) if wanted else []
            found = {row.mapping_id: row for row in rows}
            for first in range(0, len(batch), _SLICE_MAX):
                part = batch[first : first + _SLICE_MAX]
                state.set_mappings(part, [found[one] for one in part if one in found])
                await asyncio.sleep(0)

    # -- tables ----------------------------------------------------------------------------------

    def _want_build(self, _change: Change) -> None:
        if self._state.cache is not None and self._state.cache.wants_build():
            self._build_wanted.set()

    async def _build_tables(self) -> None:
        """Build a table when so much has changed that look-ups and memory suffer from it."""
        while True:  # until the task is cancelled
            await self._build_wanted.wait()
            self._build_wanted.clear()
            cache = self._state.cache
            if cache is None or self._is_loading or not cache.wants_build():
                continue
            build = cache.start_build()
            for chunk in cache.chunks():
                build.append(chunk)
                await asyncio.sleep(0)
            for _ in build.steps():
                await asyncio.sleep(0)
            cache.exchange(build)
