"""The upstream sessions of one pool: which are open, and what becomes of each.

For: a session whose client has left: reset, given to a client that waits, kept idle, or closed; and
the bounds of all of them. Not for: what is done for a client that wants one (`pool`), the decisions
that need no waiting (`policy`), or what a session itself does (`pooled_session`).

The invariants: what is in doubt is closed. There are never more sessions and dials than
`pool_size_max`; where clients wait for room, none is idle. After `close` nothing is kept.
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from proxy.config import UpstreamSettings
from proxy.observe.logs import get_logger
from proxy.observe.pool_stats import PoolPresent, PoolRow
from proxy.pool.policy import Bounds, IdleSessions, Unpoolable
from proxy.pool.pool_counts import PoolCounts, RetireReason
from proxy.pool.pooled_session import PooledSession, State
from proxy.pool.shared_parts import SharedParts
from proxy.pool.waiting import Waiter, WaitingClients
from proxy.upstream.address_lookup import Target
from proxy.upstream.upstream_session import Prepared, UpstreamSession

_log = get_logger(__name__)

Register = Callable[[str, Callable[[], PoolRow]], Callable[[], None]]
"""`PoolStats.register`."""


class KeptSessions:
    """All sessions of one target's pool, in use or not."""

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        register: Register,
        *,
        known_target: Callable[[], Target | None],
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        """`register` shows the pool to operators. `known_target` returns what is dialled now."""
        self._name = name
        self._settings = settings
        self._known_target = known_target
        self._clock = clock
        bounds = Bounds(
            settings.pool_idle_max,
            settings.pool_size_max,
            settings.pool_spare_min,
            settings.pool_lifetime_seconds,
            settings.pool_idle_seconds,
            settings.pool_check_seconds,
        )
        self.counts = PoolCounts()
        self.waiting = WaitingClients()
        self.generation = 0
        """The number of reconnects so far."""
        self._idle = IdleSessions[Prepared, PooledSession](bounds, jitter)
        self._unpoolable = Unpoolable[Prepared]()
        self._sessions: set[PooledSession] = set()  # whose connection is open, in any state
        # Clients that get a session after its reset, or its room when it is closed.
        self._promised: dict[PooledSession, Waiter] = {}
        self._resetting: dict[Prepared, dict[PooledSession, float]] = {}  # since when
        self._dialling = 0
        self._target: Target | None = None
        self._closed_for: RetireReason | None = None
        self._over: asyncio.Future[None] | None = None  # closed, and no connection is open
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._shared = SharedParts()
        # At once: rate() and increase() miss the first events of a series that appears with them.
        self._unregister = register(name, self.row)

    # -- for a client ----------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether nothing is kept any more."""
        return self._closed_for is not None

    @property
    def is_replaced(self) -> bool:
        """Whether a reload has closed it: a client that still waits is routed anew."""
        return self._closed_for is RetireReason.RECONFIGURED

    def keeps(self, key: Prepared) -> bool:
        """Return whether sessions of this key are kept now."""
        return self._closed_for is None and self._why_unpoolable(key) is None

    def take(self, key: Prepared) -> PooledSession | None:
        """Remove and return an idle session of this key."""
        while (session := self._idle.take(key, self._clock())) is not None:
            if not session.transport.is_closing():
                return session
            self.retire(session, RetireReason.UPSTREAM_ENDED)
        return None

    def needs_check(self, session: PooledSession) -> bool:
        """Return whether a session is asked for a sign of life before a client gets it (P23)."""
        return self._idle.needs_check(session, self._clock())

    def check_failed(self, session: PooledSession) -> None:
        """Close a session that gave no sign of life, and the idle ones that are not younger."""
        for one in (session, *self._idle.remove_not_younger(session)):
            self.retire(one, RetireReason.CHECK_FAILED)

    def in_reset(self, key: Prepared) -> int:
        """Return how many sessions of this key are in their reset."""
        return len(self._resetting.get(key, ()))

    # -- room ------------------------------------------------------------------------------------

    def reserve(self) -> bool:
        """Reserve room for a dial. Return whether there is any."""
        if self._is_full():
            return False
        self._dialling += 1
        return True

    def evict_for(self, waiter: Waiter) -> bool:
        """Close the least recently used idle session for a client, which gets its room."""
        session = None if self.waiting else self._idle.least_recent()
        if session is None:
            return False
        self._idle.remove(session)
        self._promised[session] = waiter
        self.retire(session, RetireReason.SURPLUS)
        return True

    def dial_ended(self) -> None:
        """Release the room of a dial that has opened nothing."""
        self._dialling -= 1
        self._room_freed()
        self._unregister_last()

    def dialled(self, opened: UpstreamSession, generation: int, *, returns: bool) -> PooledSession:
        """Register a session that was dialled in reserved room; `generation` is of before."""
        self._dialling -= 1
        opened = self._shared.of(opened)
        key = opened.prepared
        assert key is not None
        self._follow_target()
        returns = returns and self.keeps(key)
        born_at = self._clock()
        session = PooledSession(
            opened,
            self._shared.welcome(opened),
            self,
            born_at=born_at,
            ends_at=self._idle.lifetime_ends_at(born_at),
            generation=generation,
            returns=returns,
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
            self.retire(session, reason or RetireReason.SURPLUS)

    def reset_ended(
        self, session: PooledSession, failure: RetireReason | None, *, ended: bool = False
    ) -> None:
        """Pass the session on to the next client, keep it, or close it."""
        key, now = session.prepared, self._clock()
        began = self._stop_reset(session)
        if failure is None:
            self.counts.reset_took(now - began)
            self._unpoolable.reset_succeeded(key)
            self.offer(session)
            return
        if ended:  # as an idle one that ends: it says nothing of resets (P24, P34)
            self._idle.suspect_all(now)
        else:
            self._reset_failed(session, failure)
        self.retire(session, failure)
        if (waiter := self.waiting.next_for_reset(key)) is not None:
            waiter.wake()  # there is one less to wait for

    def idle_ended(self, session: PooledSession) -> None:
        """Close an idle session that has sent something, or has ended."""
        self._idle.remove(session)  # else it was given to a client that has not woken up yet
        self.retire(session, RetireReason.UPSTREAM_ENDED)

    def session_closed(self, session: PooledSession) -> None:
        """Unregister a session; its room goes to a client that waits for it."""
        self._sessions.discard(session)
        self._room_freed(self._promised.pop(session, None))
        self._unregister_last()

    # -- what becomes of a session ---------------------------------------------------------------

    def _reason_to_retire(self, session: PooledSession) -> RetireReason | None:
        """Return why a session may serve no other client; None if it may."""
        if self._closed_for is not None:
            return self._closed_for
        if session.generation != self.generation:
            return RetireReason.RECONNECT
        if session.prepared.target != self._known_target():
            return RetireReason.RECONFIGURED  # its dial may have begun before the look-up (P45)
        if self._clock() >= session.ends_at:
            return RetireReason.LIFETIME
        return self._why_unpoolable(session.prepared)

    def _why_unpoolable(self, key: Prepared) -> RetireReason | None:
        return self._unpoolable.reason(key, key.names.database, self._clock())

    def _reset_failed(self, session: PooledSession, failure: RetireReason) -> None:
        """Record why a reset failed; such sessions may not be kept for a while, or at all."""
        key, text = session.prepared, ""
        if failure is RetireReason.LOGIN_TRIGGER:
            if key.names.database not in self._unpoolable.databases:
                self._unpoolable.databases.add(key.names.database)
                text = "the database has login event triggers: its sessions serve one client each"
        elif self._unpoolable.reset_failed(key, session.born_at, self._clock()):
            text = "resets of upstream sessions fail: for a minute they serve one client each"
        if text:
            _log.warning(text, target=self._name, reason=failure)

    def _may_keep(self, session: PooledSession) -> bool:
        """Return whether there is a client or room for a session; a client gets it or its room."""
        waiter = self.waiting.next_for_room()
        if waiter is not None:
            self._promised[session] = waiter
            return waiter.key == session.prepared
        has_client = self.waiting.next_dial(session.prepared) is not None
        return has_client or self._settings.pool_idle_max > 0

    def offer(self, session: PooledSession) -> None:
        """Pass a session that is as after its login to a client, keep it idle, or close it.

        It may have ended since it was given to a client that does not take it.
        """
        if session.is_over:
            return
        session.be_idle(self._clock())
        reason = self._reason_to_retire(session)
        waiter = None if reason else self._next_client(session)
        if waiter is not None:
            waiter.give(session)
        elif reason is not None or session in self._promised or not self._settings.pool_idle_max:
            self.retire(session, reason or RetireReason.SURPLUS)
        else:
            for surplus in self._idle.add(session, session.prepared):
                self.retire(surplus, RetireReason.SURPLUS)
            self._schedule_expiry(self._idle.expires_at(session))

    def _next_client(self, session: PooledSession) -> Waiter | None:
        """Return the client that gets a session; one with another key is promised its room."""
        key = session.prepared
        waiter = self._promised.pop(session, None)
        if waiter is None or not waiter.waits:
            waiter = self.waiting.next_for_reset(key) or self.waiting.next_for_room()
        if waiter is not None and waiter.key != key:
            self._promised[session] = waiter
            return None
        return waiter or self.waiting.next_dial(key)

    def retire(self, session: PooledSession, reason: RetireReason) -> None:
        """Close a session that is not in use, unless it has ended already."""
        if session.is_over:
            return
        if reason is RetireReason.UPSTREAM_ENDED:  # as others may have, without a word (P34)
            self._idle.suspect_all(self._clock())
        unused = reason in (RetireReason.IDLE, RetireReason.LIFETIME) and not session.used
        self.counts.retired(RetireReason.UNUSED_SPARE if unused else reason)
        session.close()

    def _stop_reset(self, session: PooledSession) -> float:
        """Unregister a session in its reset. Return when that began."""
        of_key = self._resetting[session.prepared]
        began = of_key.pop(session)
        if not of_key:
            del self._resetting[session.prepared]
        return began

    def _follow_target(self) -> None:
        """Close the idle sessions of another host than is dialled now (P45)."""
        target = self._known_target()
        if target != self._target:
            self._target = target
            self._retire_idle(RetireReason.RECONFIGURED, but_of=target)

    def _retire_idle(self, reason: RetireReason, but_of: Target | None = None) -> None:
        for session in self._idle:
            if session.prepared.target != but_of:
                self._idle.remove(session)
                self.retire(session, reason)

    # -- bounds ----------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        size_max = self._settings.pool_size_max
        return 0 < size_max <= len(self._sessions) + self._dialling

    def _room_freed(self, promised: Waiter | None = None) -> None:
        """Pass free room to clients that wait for it, a promised one first."""
        if promised is not None and promised.waits:
            self._dialling += 1
            promised.give(None)
        while not self._is_full():
            waiter = self.waiting.next_for_room()
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
            self.retire(session, reason)
        self._schedule_expiry(self._idle.next_expiry())

    def wants_spare(self, key: Prepared) -> bool:
        """Return whether there are too few idle sessions of this key, and room for one."""
        found = self._idle.count(key) + len(self._resetting.get(key, ()))
        if found >= self._settings.pool_spare_min or not self.keeps(key) or self._is_full():
            return False
        return len(self._idle) < self._settings.pool_idle_max and not self.waiting

    # -- its life --------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """Close what is idle now, and after its client each session that has one (P46)."""
        self.generation += 1
        self._unpoolable.clear()
        self._retire_idle(RetireReason.RECONNECT)

    async def wait_closed(self) -> None:
        """Return when none of its connections is open: CLOSE_SECONDS_MAX after the last client."""
        while self._sessions or self._dialling:  # bounded by the timers of sessions and dials
            self._over = asyncio.get_running_loop().create_future()
            await self._over

    def close(self, reason: RetireReason) -> None:
        """Keep nothing from now on: close what is idle or in its reset."""
        if self._closed_for is not None:
            return
        self._closed_for = reason
        self._unpoolable.clear()
        self._retire_idle(reason)
        for session in [one for of_key in self._resetting.values() for one in of_key]:
            self._stop_reset(session)
            self.retire(session, reason)
        self.waiting.stop(all_waits=self.is_replaced)
        if self._timer is not None:
            self._timer.cancel()
        self._unregister_last()

    def _unregister_last(self) -> None:
        """Show a pool that is closed no more once its last session has gone."""
        if self._closed_for is None or self._sessions or self._dialling:
            return
        self._unregister()
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def row(self) -> PoolRow:
        """Return everything that operators see of it."""
        states = Counter(session.state for session in self._sessions)
        now = self._clock()
        oldest = min((session.born_at for session in self._sessions), default=now)
        present = PoolPresent(
            mode=self._settings.pool,
            keys=len({session.prepared for session in self._sessions}),
            in_use=states[State.IN_USE] + states[State.CHECKING],
            idle=states[State.IDLE],
            resetting=states[State.RESETTING],
            dialling=self._dialling,
            waiting=len(self.waiting),
            size_max=self._settings.pool_size_max,
            oldest_seconds=now - oldest,
            login_triggers=len(self._unpoolable.databases),
        )
        return self.counts.row(self._name, present)
