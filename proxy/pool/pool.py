"""The pool of one target: upstream sessions that go to the next client.

For: what is done for a client that wants a session, and for a session whose client has left. Not
for: the decisions that need no waiting (`policy`), or what a session does meanwhile
(`pooled_session`).

The invariants: a client gets a session whose login sent the very bytes that its own would have sent
(P6), and which has been reset or never used; what is in doubt is closed. A take of an idle session
that needs neither a check nor an admission waits for nothing. A pool that is closed keeps nothing:
its sessions end with their clients.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from proxy.config import UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.observe.pool_stats import PoolPresent, PoolRow
from proxy.pool.policy import Bounds, IdleSessions, UnpoolableKeys
from proxy.pool.pool_counts import PoolCounts, RetireReason, TakeSource
from proxy.pool.pool_mode import take_pool_mode
from proxy.pool.pooled_session import CLOSE_SECONDS_MAX, PooledSession, State
from proxy.pool.spares import Spares
from proxy.pool.waiting import DialWaiter, Waiter, WaitingClients
from proxy.upstream.dialer import Dialer
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstream_session import Admit, Prepared, UpstreamSession
from proxy.wire.kept_welcome import KeptWelcome
from proxy.wire.startup import StartupMessage
from proxy.workspace.registry import UseCount

# How long a client waits for a session in its reset before it dials: half of the last dial's time,
# within these bounds (P19).
RESET_WAIT_SECONDS: Final = (0.02, 1.0)
# For a shard's verdict on a session that was kept. It waits 5 s for a change of the mapping itself.
ADMIT_SECONDS_MAX: Final = 20.0
# Welcomes that sessions share. Those of one target differ by the client's own settings.
WELCOMES_MAX: Final = 64

_log = get_logger(__name__)

Register = Callable[[str, Callable[[], PoolRow]], Callable[[], None]]
"""`PoolStats.register`."""


@dataclass(slots=True)
class _Request:
    """A client that wants a session."""

    client: StartupMessage
    fallback: StartupMessage | None
    phases: DialPhases
    admit: Admit | None
    deadline: float
    """The end of its connect_timeout_seconds, by the pool's clock."""
    pools: bool
    """Whether a kept session may serve it, and its own may be kept."""
    key: Prepared | None
    """What its session sends; None while that is not known."""
    source: TakeSource = TakeSource.REUSED
    dials: bool = False
    """An idle session has given no sign of life: this client gets none (P23)."""


class Pool:
    """The sessions of one `Dialer`."""

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        dialer: Dialer,
        register: Register,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`register` shows the pool to operators, from its first session on."""
        self._name = name
        self._settings = settings
        self._dialer = dialer
        self._register = register
        self._unregister: Callable[[], None] | None = None
        self._clock = clock
        bounds = Bounds(
            settings.pool_idle_max,
            settings.pool_size_max,
            settings.pool_spare_min,
            settings.pool_lifetime_seconds,
            settings.pool_idle_seconds,
            settings.pool_check_seconds,
        )
        self._counts = PoolCounts()
        self._idle = IdleSessions[Prepared, PooledSession](bounds, jitter)
        self._unpoolable = UnpoolableKeys[Prepared]()
        self._waiting = WaitingClients()
        self._sessions: set[PooledSession] = set()
        """All whose connection is open, whatever their state."""
        self._promised: dict[PooledSession, Waiter] = {}
        """Clients that get a session, or the room of one that is closed."""
        self._resetting: dict[Prepared, dict[PooledSession, float]] = {}
        """Those in their reset, and since when."""
        self._dialling = 0
        self._dial_seconds = 0.0
        self._generation = 0
        self._target = dialer.known_target
        self._closed_for: RetireReason | None = None
        self._over: asyncio.Future[None] | None = None
        """Done when it is closed and none of its connections is open."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._welcomes: dict[KeptWelcome, KeptWelcome] = {}
        self._spares = Spares(self, dialer, self._counts, clock)
        self.held = UseCount(self._close)

    # -- a client that wants a session -----------------------------------------------------------

    async def open(
        self,
        client: StartupMessage,
        phases: DialPhases,
        fallback: StartupMessage | None = None,
        *,
        admit: Admit | None = None,
        timeout_seconds: float | None = None,
    ) -> UpstreamSession:
        """Return a kept session for this client, or dial one. Raises what `Dialer.dial` does."""
        now = self._clock()
        client, fallback, pools = self._asked(client, fallback)
        key = self._dialer.prepare(client, fallback) if pools else None
        session = None
        if key is not None and not self._unpoolable.contains(key, now):
            session = self._idle.take(key, now)
            if session is not None and admit is None and not self._idle.needs_check(session, now):
                return self._lend(session, TakeSource.REUSED, client, fallback)
        seconds = self._settings.connect_timeout_seconds
        deadline = now + (seconds if timeout_seconds is None else timeout_seconds)
        request = _Request(client, fallback, phases, admit, deadline, pools, key)
        return await self._open(request, session)

    def _asked(
        self, client: StartupMessage, fallback: StartupMessage | None
    ) -> tuple[StartupMessage, StartupMessage | None, bool]:
        """Return a client's messages without its wish for less, and whether it is pooled (P2, P10).

        Raises ProxyError for a wish for more.
        """
        mode, client = take_pool_mode(client, self._settings.pool)
        if fallback is not None:
            _, fallback = take_pool_mode(fallback, self._settings.pool)
        replicates = client.get(b"replication") is not None
        return client, fallback, mode != "off" and not replicates and self._closed_for is None

    async def _open(self, request: _Request, session: PooledSession | None) -> UpstreamSession:
        """Return a session after all that may have to be waited for. Raises ProxyError."""
        while True:  # each turn ends an idle session, or a wait; a dial ends it
            if session is None or session.state is not State.IDLE:  # it may have ended meanwhile
                session = await self._find(request)
            if session is not None:
                opened, session = await self._approved(session, request), None
            else:
                opened, session = await self._dial(request)
            if opened is not None:
                return opened

    async def _find(self, request: _Request) -> PooledSession | None:
        """Return a kept session; None where the client is to dial, and has room to."""
        key, session = request.key, None
        if key is not None and not request.dials and self._keeps(key):
            session = self._idle.take(key, self._clock()) or await self._after_reset(key)
        return session or await self._room(request)

    def _keeps(self, key: Prepared) -> bool:
        return self._closed_for is None and not self._unpoolable.contains(key, self._clock())

    async def _after_reset(self, key: Prepared) -> PooledSession | None:
        """Wait a moment for a session of this key that is in its reset (P19)."""
        free = len(self._resetting.get(key, ())) - self._waiting.reset_waiters(key)
        if free <= 0 or self._waiting:
            return None
        least, most = RESET_WAIT_SECONDS
        waiter = Waiter(key)
        with self._waiting.for_reset(waiter, key):
            await self._given(waiter, min(max(self._dial_seconds / 2, least), most))
        return waiter.session

    async def _room(self, request: _Request) -> PooledSession | None:
        """Return a session that another client returned, or None with room to dial (P38)."""
        if not self._is_full():
            self._dialling += 1
            return None
        waiter = Waiter(request.key if request.pools else None)
        began = self._clock()
        request.source = TakeSource.WAITED
        oldest = self._idle.least_recent()
        try:
            if oldest is not None and not self._waiting:
                self._idle.remove(oldest)
                self._promised[oldest] = waiter
                self._retire(oldest, RetireReason.SURPLUS)
                await self._given(waiter, CLOSE_SECONDS_MAX)
            else:
                await self._in_queue(waiter, request)
        finally:
            self._counts.waited(self._clock() - began)
        return waiter.session

    async def _in_queue(self, waiter: Waiter, request: _Request) -> None:
        """Wait until there is room. Raises ProxyError where that takes too long (P40)."""
        most = min(self._settings.pool_wait_seconds, request.deadline - self._clock())
        request.phases.wait_for_slot()
        with self._waiting.for_room(waiter):
            if most > 0:
                await self._given(waiter, most)
        if waiter.session is None and not waiter.may_dial:
            detail = (
                f"all {self._settings.pool_size_max} sessions (upstream.pool_size_max) were in use "
                f"for {max(most, 0):g} seconds"
            )
            raise ProxyError(ErrorKind.POOL_FULL, detail)

    async def _given(self, waiter: Waiter, seconds: float) -> None:
        """Wait for what a client is given. If cancelled, take it back."""
        try:
            await waiter.wait(seconds)
        except BaseException:
            if waiter.session is not None:
                self._offer(waiter.session)
            elif waiter.may_dial:
                self._dial_ended()
            raise

    # -- a session for it ------------------------------------------------------------------------

    def _lend(
        self,
        session: PooledSession,
        source: TakeSource,
        client: StartupMessage,
        fallback: StartupMessage | None,
    ) -> UpstreamSession:
        self._counts.taken(source)
        opened = session.lend()
        self._spares.begin(session.prepared, client, fallback)
        return opened

    async def _approved(self, session: PooledSession, request: _Request) -> UpstreamSession | None:
        """Return the session if it is alive and admits the client; else close it."""
        if self._idle.needs_check(session, self._clock()) and not await self._is_alive(session):
            request.dials = True
            return None
        opened = self._lend(session, request.source, request.client, request.fallback)
        if request.admit is None:
            return opened
        seconds = min(ADMIT_SECONDS_MAX, request.deadline - self._clock())
        try:
            async with asyncio.timeout(seconds):
                session.ticket = await request.admit(opened.stream, session.ticket)
        except (ProxyError, TimeoutError):
            # There is no verdict: what a dial finds is the client's.
            self._retire(session, RetireReason.CHECK_FAILED)
            request.dials = True
            return None
        except BaseException:
            self._retire(session, RetireReason.CHECK_FAILED)
            raise
        return opened

    async def _is_alive(self, session: PooledSession) -> bool:
        """Ask a session for a sign of life. Without one the older ones are closed, too (P23)."""
        try:
            is_alive = await session.check()
        except BaseException:
            self._retire(session, RetireReason.CHECK_FAILED)
            raise
        if not is_alive:
            for one in (session, *self._idle.remove_not_younger(session)):
                self._retire(one, RetireReason.CHECK_FAILED)
        return is_alive

    async def _dial(self, request: _Request) -> tuple[UpstreamSession | None, PooledSession | None]:
        """Dial in the room that is reserved. Return the session, or one that was returned (P42)."""
        generation, began = self._generation, self._clock()
        waiter = DialWaiter(request.key, request.phases)
        try:
            opened = await self._dialled(waiter, request)
        except BaseException:
            if waiter.session is not None:
                self._offer(waiter.session)
            self._dial_ended()
            raise
        if opened is None:
            self._dial_ended()
            return None, waiter.session
        self._dialling -= 1
        self._dial_seconds = self._clock() - began
        session = self._keep(opened, generation, returns=request.pools)
        waited = request.source is TakeSource.WAITED
        self._counts.taken(TakeSource.WAITED if waited else TakeSource.DIALLED)
        if session.returns:
            self._spares.begin(session.prepared, request.client, request.fallback)
        return replace(opened, lease=session), None

    async def _dialled(self, waiter: DialWaiter, request: _Request) -> UpstreamSession | None:
        """Return a dialled session; None if the waiter was given one before it had a slot."""
        seconds = max(request.deadline - self._clock(), 0.0)
        dial = self._dialer.dial(
            request.client,
            request.phases,
            request.fallback,
            admit=request.admit,
            timeout_seconds=seconds,
        )
        if request.key is None or not self._keeps(request.key):
            return await dial
        with self._waiting.dialling(waiter, request.key):
            return await waiter.unless_given(dial)

    def _keep(self, opened: UpstreamSession, generation: int, *, returns: bool) -> PooledSession:
        """Register a session that was dialled."""
        assert opened.prepared is not None
        if self._unregister is None:
            self._unregister = self._register(self._name, self.row)
        if opened.prepared.target != self._target:
            self._target = opened.prepared.target
            self._retire_idle(RetireReason.RECONFIGURED, all_targets=False)  # P45
        returns = returns and self._keeps(opened.prepared)
        session = PooledSession(
            opened, self, now=self._clock(), generation=generation, returns=returns
        )
        self._sessions.add(session)
        return session

    # -- a session that its client has left ------------------------------------------------------

    def released(self, session: PooledSession, retired_for: str) -> None:
        """Reset the session for the next client, or close it."""
        if not session.returns:
            session.close()
            return
        reason = RetireReason(retired_for) if retired_for else self._reason_to_retire(session)
        if reason is None and self._may_keep(session):
            self._resetting.setdefault(session.prepared, {})[session] = self._clock()
            session.reset()
        else:
            self._retire(session, reason or RetireReason.SURPLUS)

    def put_back(self, session: PooledSession) -> None:
        """Keep a session that its client has not used."""
        self._offer(session)

    def reset_ended(self, session: PooledSession, failure: RetireReason | None) -> None:
        """Give the session to the next client, keep it, or close it."""
        key, now = session.prepared, self._clock()
        began = self._stop_reset(session)
        if failure is None:
            self._counts.reset_took(now - began)
            self._unpoolable.reset_succeeded(key)
            self._offer(session)
            return
        if failure is not RetireReason.LOGIN_TRIGGER:
            self._unpoolable.reset_failed(key, now)
        elif self._unpoolable.add(key):
            _log.warning(
                "the database has login event triggers: its sessions serve one client each",
                target=self._name,
            )
        self._retire(session, failure)
        if (waiter := self._waiting.next_for_reset(key)) is not None:
            waiter.give(None)  # there is one less to wait for

    def idle_ended(self, session: PooledSession, *, in_error: bool) -> None:
        """Close an idle session that has sent something, or has ended."""
        self._idle.remove(session)  # else it was given to a client that has not woken up yet
        if in_error:  # what ended it may have ended the others, without a word (P34)
            self._idle.suspect_all(self._clock())
        self._retire(session, RetireReason.UPSTREAM_ENDED)

    def session_closed(self, session: PooledSession) -> None:
        """Give the room of a session to a client that waits for it."""
        self._sessions.discard(session)
        self._room_freed(self._promised.pop(session, None))
        self._unregister_last()

    def shared_welcome(self, welcome: KeptWelcome) -> KeptWelcome:
        """Return an equal welcome that other sessions have, too."""
        found = self._welcomes.get(welcome)
        if found is None:
            if len(self._welcomes) >= WELCOMES_MAX:
                del self._welcomes[next(iter(self._welcomes))]
            self._welcomes[welcome] = found = welcome
        return found

    # -- what becomes of a session ---------------------------------------------------------------

    def _reason_to_retire(self, session: PooledSession) -> RetireReason | None:
        """Return why a session may serve no other client; None if it may."""
        if self._closed_for is not None:
            return self._closed_for
        if session.generation != self._generation:
            return RetireReason.RECONNECT
        if session.prepared.target != self._target:
            return RetireReason.RECONFIGURED
        if self._unpoolable.contains(session.prepared, self._clock()):
            return RetireReason.RESET_FAILED
        if self._idle.is_too_old(session, self._clock()):
            return RetireReason.LIFETIME
        return None

    def _may_keep(self, session: PooledSession) -> bool:
        """Return whether there is a client or room for a session; a client gets it or its room."""
        waiter = self._waiting.next_for_room()
        if waiter is not None:
            self._promised[session] = waiter
            return waiter.key == session.prepared
        has_client = self._waiting.next_dial(session.prepared) is not None
        return has_client or self._settings.pool_idle_max > 0

    def _offer(self, session: PooledSession) -> None:
        """Give a session that is as after its login to a client, keep it idle, or close it."""
        session.be_idle(self._clock())
        reason = self._reason_to_retire(session)
        waiter = None if reason else self._next_client(session)
        if waiter is not None:
            waiter.give(session)
        elif reason is not None or session in self._promised or not self._settings.pool_idle_max:
            self._retire(session, reason or RetireReason.SURPLUS)
        else:
            for surplus in self._idle.add(session, session.prepared):
                self._retire(surplus, RetireReason.SURPLUS)
            self._schedule_expiry(self._idle.next_expiry())

    def _next_client(self, session: PooledSession) -> Waiter | None:
        """Return the client that gets a session; one with another key is promised its room."""
        key = session.prepared
        waiter = self._promised.pop(session, None)
        if waiter is None or not waiter.waits:
            waiter = self._waiting.next_for_reset(key) or self._waiting.next_for_room()
        if waiter is not None and waiter.key != key:
            self._promised[session] = waiter
            return None
        return waiter or self._waiting.next_dial(key)

    def _retire(self, session: PooledSession, reason: RetireReason) -> None:
        """Close a session that is not in use."""
        unused = reason in (RetireReason.IDLE, RetireReason.LIFETIME) and not session.used
        self._counts.retired(RetireReason.UNUSED_SPARE if unused else reason)
        session.close()

    def _stop_reset(self, session: PooledSession) -> float:
        """Unregister a session in its reset. Return when that began."""
        of_key = self._resetting[session.prepared]
        began = of_key.pop(session)
        if not of_key:
            del self._resetting[session.prepared]
        return began

    def _retire_idle(self, reason: RetireReason, *, all_targets: bool = True) -> None:
        for session in self._idle:
            if all_targets or session.prepared.target != self._target:
                self._idle.remove(session)
                self._retire(session, reason)

    # -- bounds ----------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        size_max = self._settings.pool_size_max
        return 0 < size_max <= len(self._sessions) + self._dialling

    def _dial_ended(self) -> None:
        """Release the room of a dial that has opened nothing."""
        self._dialling -= 1
        self._room_freed()
        self._unregister_last()

    def _room_freed(self, promised: Waiter | None = None) -> None:
        """Let clients dial that wait for room, a promised one first."""
        if promised is not None and promised.waits:
            self._dialling += 1
            promised.give(None)
        while not self._is_full():
            waiter = self._waiting.next_for_room()
            if waiter is None:
                return
            self._dialling += 1
            waiter.give(None)

    def _schedule_expiry(self, at: float | None) -> None:
        """Look at the idle sessions at this time, unless that is done earlier anyway."""
        if at is None or at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        seconds = max(at - self._clock(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        for session, reason in self._idle.expire(self._clock()):
            self._retire(session, reason)
        self._schedule_expiry(self._idle.next_expiry())

    # -- spares ----------------------------------------------------------------------------------

    def wants_spare(self, key: Prepared) -> bool:
        """Return whether there are too few idle sessions of this key, and room for one."""
        found = self._idle.count(key) + len(self._resetting.get(key, ()))
        if found >= self._settings.pool_spare_min or not self._keeps(key) or self._is_full():
            return False
        return len(self._idle) < self._settings.pool_idle_max and not self._waiting

    def spare_begins(self) -> int:
        """Reserve room for a spare. Return the number of reconnects so far."""
        self._dialling += 1
        return self._generation

    def spare_ended(self, opened: UpstreamSession | None, generation: int) -> None:
        """Keep a spare, or release the room of one that failed."""
        if opened is None:
            self._dial_ended()
            return
        self._dialling -= 1
        session = self._keep(opened, generation, returns=True)
        session.used = False
        opened = replace(opened, lease=session)
        opened.put_back()

    # -- its life --------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """Close what is idle now, and after its client each session that has one (P46)."""
        self._generation += 1
        self._unpoolable.clear()
        self._spares.clear()
        self._retire_idle(RetireReason.RECONNECT)

    def drain(self) -> None:
        """Keep nothing from now on: close what is idle or in its reset (P47)."""
        self._close(RetireReason.DRAIN)

    async def wait_closed(self) -> None:
        """Return when none of its connections is open: CLOSE_SECONDS_MAX after the last client."""
        while self._sessions or self._dialling:  # bounded by the timers of sessions and dials
            self._over = self._over or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._over)

    def _close(self, reason: RetireReason = RetireReason.RECONFIGURED) -> None:
        if self._closed_for is not None:
            return
        self._closed_for = reason
        self._spares.close()
        self._retire_idle(reason)
        for session in [one for of_key in self._resetting.values() for one in of_key]:
            self._stop_reset(session)
            self._retire(session, reason)
        self._waiting.stop_resets()
        if self._timer is not None:
            self._timer.cancel()
        self._unregister_last()

    def _unregister_last(self) -> None:
        """Show a pool that is closed no more once its last session has gone."""
        if self._closed_for is None or self._sessions or self._dialling:
            return
        if self._unregister is not None:
            self._unregister()
            self._unregister = None
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def row(self) -> PoolRow:
        """Return everything that operators see of it."""
        states = Counter(session.state for session in self._sessions)
        oldest = min((session.born_at for session in self._sessions), default=self._clock())
        present = PoolPresent(
            mode=self._settings.pool,
            keys=len({session.prepared for session in self._sessions}),
            in_use=states[State.IN_USE] + states[State.CHECKING],
            idle=states[State.IDLE],
            resetting=states[State.RESETTING],
            dialling=self._dialling,
            waiting=len(self._waiting),
            size_max=self._settings.pool_size_max,
            oldest_seconds=self._clock() - oldest,
        )
        return self._counts.row(self._name, present)
