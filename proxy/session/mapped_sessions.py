"""The live sessions of each mapping of a catalogue's map, and their end when it moves.

For: ending the sessions of a mapping that the catalogue shows in another shard, offline or not at
all. The shard's operator ends them too, and is faster: PostgreSQL's own 57P01 comes through the
relay, and only what is open `KILL_SECONDS` later is ended here. Not for: finding a key's mapping
(`catalogue`), or a drain of the proxy (`drain`).

- An idle session gets 57P01 with reason mapping_moved. A busy one is closed without a message,
  which could fall inside an answer, and what it runs upstream is cancelled.
- A mapping that drains ends its idle sessions at once, the rest `KILL_SECONDS` after its time.
- A higher epoch of the same shard, as after a split, ends nothing.

The invariants: a session is registered under one mapping, that which has its key now; log and
metrics give the mapping as the cause, whether the shard or the proxy ended the session.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from itertools import islice
from typing import Final, Protocol
from uuid import UUID

from proxy.catalogue.model import Located, SessionsMode, Status
from proxy.errors import ErrorKind, ProxyError
from proxy.session.drain import OpenSession
from proxy.session.end_reason import UPSTREAM_ENDS, EndReason, RelayEnd
from proxy.upstream.upstream_session import AdmittedBy

# The shard's own end of a session arrives within this time, as a rule.
KILL_SECONDS: Final = 2.0
# A shard may end a session before the catalogue has changed here. The catalogue is asked then,
# and the end is reported with its answer; after this time without one.
CAUSE_SECONDS_MAX: Final = 5.0
# Where the catalogue cannot be asked, sessions are looked at again after this time.
RETRY_SECONDS: Final = 2.0
# Sessions that are looked up before the event loop runs something else.
SLICE: Final = 200
# Sessions that are ended together, and the pause after them: their tasks close two connections
# each, and other sessions must not notice.
END_SLICE: Final = 50
END_PAUSE_SECONDS: Final = 0.002
# A change may come between an admission and the session's registration, which are apart by less
# than a dial takes. Beyond so many mappings every new session is looked up.
RECENT_SECONDS: Final = 60.0
RECENT_MAX: Final = 10_000

# Of `locate`: the same may succeed later.
_RETRIED: Final = frozenset(
    {ErrorKind.CATALOGUE_UNREACHABLE, ErrorKind.CATALOGUE_REFUSED, ErrorKind.CATALOGUE_STALE}
)
_MOVED: Final = ProxyError(ErrorKind.MAPPING_MOVED).response()
_MOVED_BYTES: Final = _MOVED.encode()

Report = Callable[[RelayEnd], None]


class Locate(Protocol):
    """Returns where routing keys of a map are now, None for one that no mapping covers."""

    def __call__(
        self, map_id: UUID, routing_keys: Sequence[bytes], /
    ) -> Awaitable[Sequence[Located | None]]:
        """Raises ProxyError if it cannot be known now."""


class Refresh(Protocol):
    """Asks the catalogue for the mapping of a routing key, so that `Locate` has its answer."""

    def __call__(self, map_id: UUID, routing_key: bytes, /) -> Awaitable[None]:
        """Raises ProxyError if it cannot be known now."""


class MappedSession:
    """A live session and the mapping that it is registered under."""

    __slots__ = ("_entry", "_report", "_sessions", "admitted_by", "ends", "mapping_id", "moved")

    def __init__(
        self, sessions: "MappedSessions", entry: OpenSession, admitted_by: AdmittedBy
    ) -> None:
        self._sessions = sessions
        self._entry = entry
        self.admitted_by = admitted_by
        self.mapping_id = admitted_by.mapping_id
        self.moved = False
        self.ends = False
        """Whether `end` follows in a moment."""
        self._report: tuple[RelayEnd, Report, asyncio.TimerHandle] | None = None

    @property
    def awaits_cause(self) -> bool:
        """Whether it has ended, and its cause is still waited for."""
        return self._report is not None

    @property
    def target(self) -> str:
        """The shard that has admitted it."""
        return self.admitted_by.target

    def close(self) -> None:
        """Unregister it, unless the cause of its end is still waited for."""
        if self._report is None:
            self._sessions.unregister(self)

    def report(self, end: RelayEnd, report: Report) -> None:
        """Report the end of the session, with the mapping's move as its cause if that is it."""
        if end.reason in UPSTREAM_ENDS and not self.moved:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(CAUSE_SECONDS_MAX, self.report_now)
            context = copy_context()  # its line is to have its id
            self._report = end, lambda known: context.run(report, known), timer
            self._sessions.find_cause(self)
        else:
            report(self._with_cause(end))

    def report_now(self) -> None:
        """Report the end, if it is waited with, and unregister the session."""
        if self._report is not None:
            end, report, timer = self._report
            self._report = None
            timer.cancel()
            self._sessions.unregister(self)
            report(self._with_cause(end))

    def has_moved(self, *, drains: bool = False) -> None:
        """Record that its mapping has moved. If it drains, end the session when it is idle."""
        self.moved = True
        self.report_now()
        self.ends = not drains
        if drains:
            self._entry.end_when_idle(EndReason.MAPPING_MOVED, _MOVED)

    def end(self) -> None:
        """End the session, if it is open still."""
        relay = self._entry.relay
        if relay is None or relay.over:
            return
        if relay.may_end:
            relay.end(EndReason.MAPPING_MOVED, _MOVED_BYTES)
        if not relay.over:
            relay.drop(EndReason.MAPPING_MOVED)

    def _with_cause(self, end: RelayEnd) -> RelayEnd:
        if self.moved and end.reason in UPSTREAM_ENDS:
            return replace(end, reason=EndReason.MAPPING_MOVED)
        return end


class MappedSessions:
    """The register. `run` compares it with the catalogue after each change."""

    def __init__(
        self,
        locate: Locate,
        refresh: Refresh,
        *,
        clock: Callable[[], float] = time.time,
        kill_seconds: float = KILL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        recent_max: int = RECENT_MAX,
    ) -> None:
        """`clock` is the wall clock, in seconds."""
        self._locate = locate
        self._refresh = refresh
        self._clock = clock
        self._kill_seconds = kill_seconds
        self._retry_seconds = retry_seconds
        self._recent_max = recent_max
        self._by_mapping: dict[UUID, set[MappedSession]] = {}
        self._changed: set[UUID] = set()
        self._all_changed = False
        self._wake = asyncio.Event()
        self._causes = asyncio.Queue[UUID]()
        self._causes_queued = set[UUID]()
        self._recent: dict[UUID, float] = {}
        self._all_recent_until = 0.0
        self._ending = deque[MappedSession]()
        self._ends_slices = False

    def __len__(self) -> int:
        return sum(map(len, self._by_mapping.values()))

    def register(self, entry: OpenSession, admitted_by: AdmittedBy | None) -> MappedSession | None:
        """Register a session that its shard has admitted. Its entry unregisters it."""
        if admitted_by is None:
            return None
        session = MappedSession(self, entry, admitted_by)
        entry.mapped = session
        self._by_mapping.setdefault(session.mapping_id, set()).add(session)
        if self._changed_lately(session.mapping_id):
            self._changed.add(session.mapping_id)
            self._wake.set()
        return session

    def unregister(self, session: MappedSession) -> None:
        """Unregister a session."""
        sessions = self._by_mapping.get(session.mapping_id)
        if sessions is not None:
            sessions.discard(session)
            if not sessions:
                del self._by_mapping[session.mapping_id]

    def changed(self, mapping_ids: Iterable[UUID] | None) -> None:
        """Look at the sessions of these mappings again; None: at all."""
        now = asyncio.get_running_loop().time()
        if mapping_ids is None:
            self._all_changed = True
            self._all_recent_until = now + RECENT_SECONDS
        else:
            for mapping_id in mapping_ids:
                self._recent.pop(mapping_id, None)  # so that the oldest come first
                self._recent[mapping_id] = now
                self._changed.add(mapping_id)
            self._forget_old(now)
        self._wake.set()

    def find_cause(self, session: MappedSession) -> None:
        """Ask the catalogue why a session was ended, once for all of its mapping."""
        if session.mapping_id not in self._causes_queued:
            self._causes_queued.add(session.mapping_id)
            self._causes.put_nowait(session.mapping_id)

    async def run(self) -> None:
        """Compare the sessions with the catalogue after each change, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._find_causes())

    async def _follow(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            changed, self._changed = self._changed, set()
            if self._all_changed:
                self._all_changed, changed = False, set(self._by_mapping)
            failed = {one for one in changed if not await self._compare_all(one)}
            if failed:
                self._changed |= failed
                asyncio.get_running_loop().call_later(self._retry_seconds, self._wake.set)

    def close(self) -> None:
        """Report the ends whose cause is still waited for."""
        for sessions in tuple(self._by_mapping.values()):
            for session in tuple(sessions):
                session.report_now()

    # -- inside ----------------------------------------------------------------------------------

    def _changed_lately(self, mapping_id: UUID) -> bool:
        now = asyncio.get_running_loop().time()
        since = self._recent.get(mapping_id)
        return now < self._all_recent_until or (since is not None and now - since < RECENT_SECONDS)

    def _forget_old(self, now: float) -> None:
        while self._recent:
            oldest = next(iter(self._recent))
            if len(self._recent) > self._recent_max:
                self._all_recent_until = self._recent[oldest] + RECENT_SECONDS
            elif now - self._recent[oldest] < RECENT_SECONDS:
                break
            del self._recent[oldest]

    async def _find_causes(self) -> None:
        """Ask for one mapping after the other: others ask the catalogue for keys meanwhile."""
        while True:
            mapping_id = await self._causes.get()
            self._causes_queued.discard(mapping_id)
            ended = [one for one in self._by_mapping.get(mapping_id, ()) if one.awaits_cause]
            if not ended:
                continue
            with suppress(ProxyError, TimeoutError):
                async with asyncio.timeout(CAUSE_SECONDS_MAX):
                    asked = ended[0].admitted_by
                    await self._refresh(asked.map_id, asked.routing_key)
                    await self._compare_all(mapping_id)
            for session in ended:
                session.report_now()

    async def _compare_all(self, mapping_id: UUID) -> bool:
        """Compare the sessions of a mapping. Return False if they are to be compared again."""
        sessions = iter(tuple(self._by_mapping.get(mapping_id, ())))
        while part := tuple(islice(sessions, SLICE)):
            try:
                await self._compare(part)
            except ProxyError as error:
                if error.kind in _RETRIED:
                    return False
            await asyncio.sleep(0)
        return True

    async def _compare(self, sessions: Sequence[MappedSession]) -> None:
        """Compare sessions with where their keys are now. Raises ProxyError."""
        keys = [session.admitted_by.routing_key for session in sessions]
        moved: list[MappedSession] = []
        drain_ends: dict[UUID, float] = {}
        found = await self._locate(sessions[0].admitted_by.map_id, keys)
        for session, located in zip(sessions, found, strict=True):
            if located is not None and located.mapping.mapping_id != session.mapping_id:
                self._register_under(session, located.mapping.mapping_id)
            seconds = self._seconds_left(session.admitted_by, located)
            if seconds is None or session.ends:
                continue
            if seconds > 0:
                session.has_moved(drains=True)
                drain_ends[session.mapping_id] = seconds
            else:
                session.has_moved()
                moved.append(session)
        loop = asyncio.get_running_loop()
        if moved:
            loop.call_later(self._kill_seconds, self._end, moved)
        for mapping_id, seconds in drain_ends.items():
            loop.call_later(seconds, self.changed, (mapping_id,))

    def _seconds_left(self, admitted_by: AdmittedBy, located: Located | None) -> float | None:
        """Return how long a session may go on; None: without a bound."""
        if located is None or located.shard.shard_id != admitted_by.shard_id:
            return 0.0
        mapping = located.mapping
        if mapping.status is Status.ONLINE or mapping.sessions is SessionsMode.KEEP:
            return None
        if mapping.sessions is SessionsMode.KILL or mapping.drain_until is None:
            return 0.0
        return max(0.0, mapping.drain_until.timestamp() - self._clock())

    def _end(self, sessions: Iterable[MappedSession]) -> None:
        """End sessions, after those that are being ended already."""
        self._ending.extend(sessions)
        if not self._ends_slices:
            self._end_slice()

    def _end_slice(self) -> None:
        """End a slice of sessions, and the next one after a pause."""
        self._ends_slices = bool(self._ending)
        if self._ends_slices:  # first: one end that fails must not stop all others
            asyncio.get_running_loop().call_later(END_PAUSE_SECONDS, self._end_slice)
        for _ in range(min(END_SLICE, len(self._ending))):
            self._ending.popleft().end()

    def _register_under(self, session: MappedSession, mapping_id: UUID) -> None:
        """Register a session under the mapping that has its key now: a split or merge."""
        sessions = self._by_mapping.get(session.mapping_id)
        if sessions is None or session not in sessions:
            return  # it has ended meanwhile
        self.unregister(session)
        session.mapping_id = mapping_id
        self._by_mapping.setdefault(mapping_id, set()).add(session)
