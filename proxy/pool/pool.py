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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from proxy.config import UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.pool.kept_sessions import KeptSessions, Register
from proxy.pool.pool_counts import RetireReason, TakeSource
from proxy.pool.pool_mode import take_pool_mode
from proxy.pool.pooled_session import CLOSE_SECONDS_MAX, PooledSession, State
from proxy.pool.spares import Spares
from proxy.pool.waiting import DialWaiter, Waiter
from proxy.upstream.dialer import Dialer
from proxy.upstream.phases import DialPhases, StartStep
from proxy.upstream.upstream_session import Admit, Prepared, UpstreamSession
from proxy.upstream.upstreams import RouteReplaced
from proxy.wire.client_startup import wants_replication
from proxy.wire.startup import StartupMessage
from proxy.workspace.registry import UseCount

# How long a client waits for a session in its reset before it dials: half of the last dial's time,
# within these bounds (P19).
RESET_WAIT_SECONDS: Final = (0.02, 1.0)
# For a shard's verdict on a session that was kept. It waits 5 s for a change of the mapping itself.
ADMIT_SECONDS_MAX: Final = 20.0
# For an idle session to end that makes room: a second, and what a busy process takes to notice.
EVICTION_SECONDS_MAX: Final = CLOSE_SECONDS_MAX + 4.0


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
        """`register` shows the pool to operators."""
        self._settings = settings
        self._dialer = dialer
        self._clock = clock
        self._kept = KeptSessions(
            name,
            settings,
            register,
            known_target=lambda: dialer.known_target,
            clock=clock,
            jitter=jitter,
        )
        self._spares = Spares(self._kept, dialer, clock)
        self._dial_seconds = 0.0
        self.held = UseCount(partial(self._close, RetireReason.RECONFIGURED))

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
        """Return a kept session for this client, or dial one. Raises what `Dialer.dial` does.

        And RouteReplaced for a client that waited while a reload has closed the pool.
        """
        with phases.step(StartStep.TAKE):
            return await self._take(client, phases, fallback, admit, timeout_seconds)

    async def _take(
        self,
        client: StartupMessage,
        phases: DialPhases,
        fallback: StartupMessage | None,
        admit: Admit | None,
        timeout_seconds: float | None,
    ) -> UpstreamSession:
        client, fallback, pools = self._asked(client, fallback)
        key = self._dialer.prepare(client, fallback) if pools else None
        session = None
        if key is not None and self._kept.keeps(key):
            session = self._kept.take(key)
            if session is not None and admit is None and not self._kept.needs_check(session):
                return self._lend(session, TakeSource.REUSED, client, fallback)
        if timeout_seconds is None:
            timeout_seconds = self._settings.connect_timeout_seconds
        deadline = self._clock() + timeout_seconds
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
        replication = client.get(b"replication")
        replicates = replication is not None and wants_replication(replication)
        return client, fallback, mode != "off" and not replicates and not self._kept.is_closed

    async def _open(self, request: _Request, session: PooledSession | None) -> UpstreamSession:
        """Return a session after all that may have to be waited for. Raises ProxyError."""
        opened = None
        while opened is None:  # each turn ends an idle session, or a wait; a dial ends it
            if session is None:
                session = await self._find(request)
            if session is None:
                opened, session = await self._dial(request)
            elif session.state is State.IDLE:
                opened, session = await self._approved(session, request), None
            else:  # it has ended since it was given to this client
                session = None
        return opened

    async def _find(self, request: _Request) -> PooledSession | None:
        """Return a kept session; None where the client is to dial, and has room to."""
        key, session = request.key, None
        if key is not None and not request.dials and self._kept.keeps(key):
            session = self._kept.take(key) or await self._after_reset(key)
        return session or await self._room(request)

    async def _after_reset(self, key: Prepared) -> PooledSession | None:
        """Wait a moment for a session of this key that is in its reset (P19)."""
        waiting = self._kept.waiting
        if waiting or self._kept.in_reset(key) <= waiting.reset_waiters(key):
            return None
        least, most = RESET_WAIT_SECONDS
        waiter = Waiter(key)
        with waiting.for_reset(waiter, key):
            await self._given(waiter, min(max(self._dial_seconds / 2, least), most))
        return waiter.session

    async def _room(self, request: _Request) -> PooledSession | None:
        """Return a session that another client returned, or None with room to dial (P38)."""
        if self._kept.reserve():
            return None
        waiter = Waiter(request.key if request.pools else None)
        began = self._clock()
        request.source = TakeSource.WAITED
        request.phases.wait_for_slot()
        try:
            if self._kept.evict_for(waiter):
                await self._given(waiter, EVICTION_SECONDS_MAX)
            else:
                await self._in_queue(waiter, request)
        finally:
            self._kept.counts.waited(self._clock() - began)
        if waiter.session is None and not waiter.may_dial:
            raise self._full(self._clock() - began)
        return waiter.session

    async def _in_queue(self, waiter: Waiter, request: _Request) -> None:
        """Wait until there is room, for pool_wait_seconds (P40)."""
        seconds = min(self._settings.pool_wait_seconds, request.deadline - self._clock())
        with self._kept.waiting.for_room(waiter):
            if seconds > 0:
                await self._given(waiter, seconds)

    def _full(self, seconds: float) -> ProxyError:
        detail = (
            f"all {self._settings.pool_size_max} sessions (upstream.pool_size_max) were in use "
            f"for {seconds:.1f} seconds"
        )
        return ProxyError(ErrorKind.POOL_FULL, detail)

    async def _given(self, waiter: Waiter, seconds: float) -> None:
        """Wait for what a client is given. If cancelled, take it back.

        Raises RouteReplaced if a reload has closed the pool meanwhile (P44).
        """
        was_replaced = self._kept.is_replaced
        try:
            await waiter.wait(seconds)
            if self._kept.is_replaced and not was_replaced:
                raise RouteReplaced
        except BaseException:
            if waiter.session is not None:
                self._kept.offer(waiter.session)
            elif waiter.may_dial:
                self._kept.dial_ended()
            raise

    # -- a session for it ------------------------------------------------------------------------

    def _lend(
        self,
        session: PooledSession,
        source: TakeSource,
        client: StartupMessage,
        fallback: StartupMessage | None,
    ) -> UpstreamSession:
        self._kept.counts.taken(source)
        opened = session.lend()
        self._spares.begin(session.prepared, client, fallback)
        return opened

    async def _approved(self, session: PooledSession, request: _Request) -> UpstreamSession | None:
        """Return the session if it is alive and admits the client; else close it."""
        if self._kept.needs_check(session) and not await self._is_alive(session):
            request.dials = True
            return None
        if request.admit is None:
            return self._lend(session, request.source, request.client, request.fallback)
        opened = session.lend()
        seconds = min(ADMIT_SECONDS_MAX, request.deadline - self._clock())
        try:
            async with asyncio.timeout(seconds):
                session.ticket = await request.admit(opened.stream, session.ticket)
        except (ProxyError, TimeoutError):
            # There is no verdict: what a dial finds is the client's.
            self._kept.retire(session, RetireReason.CHECK_FAILED)
            request.dials = True
            return None
        except BaseException:
            self._kept.retire(session, RetireReason.CHECK_FAILED)
            raise
        self._taken(session, request)
        return opened

    def _taken(self, session: PooledSession, request: _Request) -> None:
        """Count a client that has a session, and dial the next one ahead."""
        self._kept.counts.taken(request.source)
        if session.returns:
            self._spares.begin(session.prepared, request.client, request.fallback)

    async def _is_alive(self, session: PooledSession) -> bool:
        """Ask a session for a sign of life. Without one the older ones are closed, too (P23)."""
        try:
            is_alive = await session.check()
        except BaseException:
            self._kept.retire(session, RetireReason.CHECK_FAILED)
            raise
        if not is_alive:
            self._kept.check_failed(session)
        return is_alive

    async def _dial(self, request: _Request) -> tuple[UpstreamSession | None, PooledSession | None]:
        """Dial in the room that is reserved. Return the session, or one that was returned (P42)."""
        generation, began = self._kept.generation, self._clock()
        waiter = DialWaiter(request.key, request.phases)
        try:
            opened = await self._dialled(waiter, request)
        except BaseException:
            if waiter.session is not None:
                self._kept.offer(waiter.session)
            self._kept.dial_ended()
            raise
        if opened is None:
            self._kept.dial_ended()
            return None, waiter.session
        if waiter.session is not None:
            self._kept.offer(waiter.session)
        self._dial_seconds = self._clock() - began
        session = self._kept.dialled(opened, generation, returns=request.pools)
        if request.source is TakeSource.REUSED:
            request.source = TakeSource.DIALLED
        self._taken(session, request)
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
        if request.key is None or not self._kept.keeps(request.key):
            return await dial
        with self._kept.waiting.dialling(waiter, request.key):
            return await waiter.unless_given(dial)

    # -- its life --------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """Close what is idle now, and after its client each session that has one (P46)."""
        self._spares.clear()
        self._kept.reconnect()

    def drain(self) -> None:
        """Keep nothing from now on: close what is idle or in its reset (P47)."""
        self._close(RetireReason.DRAIN)

    async def wait_closed(self) -> None:
        """Return when none of its connections is open, after `drain` and the last client."""
        await self._kept.wait_closed()

    def _close(self, reason: RetireReason) -> None:
        self._kept.close(reason)
        self._spares.close()
