"""The open sessions, and every way in which the proxy ends one.

For: the register of all connections, from accept to the end of their tasks; the drain, which ends
each according to its stage; the end of one for an operator. Not for: the wait until a session is
idle (`idle_end`), an end by the client or the upstream (`relay`), or accepting (`listener`).

In a drain connections are still accepted for `shutdown.accept_seconds` (`AcceptPeriod`). Then:

- A client that waits for its upstream session is refused.
- An idle session ends with 57P01 after the idle grace, a busy one when it becomes idle.
- A connection that sends no StartupMessage is closed after `SILENT_SECONDS`.
- After half of `shutdown.drain_seconds` there is no idle grace; at their end what is left is cut.

The invariant: once a drain has begun no upstream session is opened, and each session that is
relayed ends as soon as it is idle.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Coroutine
from contextlib import suppress
from enum import Enum, auto
from typing import Final, Protocol

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.routing.router import Route
from proxy.session.end_reason import EndReason
from proxy.session.idle_end import IdleEnd
from proxy.session.relay import Relay
from proxy.transport.sockets import write_now
from proxy.transport.stream import StartupStream
from proxy.upstream.phases import DialPhases
from proxy.wire.messages import ErrorResponse

# The idle grace: the wait before 57P01, for which a session has to be idle. The error must not come
# between a pool's check of a connection and the next statement, which follows in milliseconds.
IDLE_GRACE_SECONDS: Final = 0.1
# A client that connected just before the drain gets this time to send its StartupMessage.
SILENT_SECONDS: Final = 1.0
# A client sends its first packet within milliseconds. In a flood a connection that has sent nothing
# for MUTE_SECONDS makes room for a new one, and one without a StartupMessage after SLOW_SECONDS.
MUTE_SECONDS: Final = 0.2
SLOW_SECONDS: Final = 2.0
# An error that was written gets this time to be sent before its connection is cut.
FLUSH_SECONDS: Final = 0.1

_ENDED_BY_OPERATOR: Final = ProxyError(ErrorKind.ENDED_BY_OPERATOR).response().encode()

_log = get_logger(__name__)


class AcceptPeriod:
    """The time in which a draining proxy still accepts."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Return after `seconds`, or earlier if a second call returns, which hastens the drain."""
        if seconds and not self._over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._over.wait()
        self._over.set()


class Stage(Enum):
    """The stage of a connection."""

    STARTING = auto()  # it has sent no StartupMessage yet
    OPENING = auto()  # its client waits for an upstream session
    RELAYING = auto()
    CLOSING = auto()  # its client has been sent everything


class Registration(Protocol):
    """A second register that a connection is in."""

    @property
    def target(self) -> str:
        """The shard that has admitted it."""

    def close(self) -> None:
        """Unregister it there."""


class OpenSession:
    """The entry of one connection in the register."""

    __slots__ = (
        *("_idle_end", "_sessions", "mapped", "number", "phases", "relay", "route", "stage"),
        *("started_at", "stream", "transport"),
    )

    def __init__(self, sessions: "OpenSessions", number: int = 0) -> None:
        """`number` is the connection's id in the log."""
        self._sessions = sessions
        self.number = number
        self._idle_end: IdleEnd | None = None
        self.started_at = asyncio.get_running_loop().time()
        self.stage = Stage.STARTING
        self.relay: Relay | None = None
        self.stream: StartupStream | None = None
        """The connection while it is starting."""
        self.mapped: Registration | None = None
        """Among the sessions of its mapping, if a shard has admitted it."""
        self.transport: asyncio.Transport | None = None
        """The client's connection, without its TLS."""
        self.phases: DialPhases | None = None
        """What the client waits for, from its StartupMessage on."""
        self.route: Route | None = None

    def opening(self, phases: DialPhases | None = None) -> None:
        """Set the stage in which the client waits. A drain that begins in it cancels the task."""
        self.stage = Stage.OPENING
        self.phases = phases
        self.stream = None

    def refuse_if_draining(self) -> None:
        """Raise ProxyError if a drain has begun: no upstream session is opened any more."""
        if self._sessions.draining:
            raise ProxyError(ErrorKind.SHUTTING_DOWN)

    @property
    def cancelled_for(self) -> ErrorKind:
        """The reason why the task of a client that waits was cancelled."""
        is_drain = self._sessions.draining
        return ErrorKind.SHUTTING_DOWN if is_drain else ErrorKind.ENDED_BY_OPERATOR

    def relaying(self, relay: Relay) -> None:
        """Set the stage in which the client is served by this relay."""
        self.stage = Stage.RELAYING
        self.relay = relay

    def closing(self) -> None:
        """Set the stage in which a cut loses nothing."""
        self.stage = Stage.CLOSING
        self.stream = None
        if self._idle_end is not None:
            self._idle_end.close()
        if self.mapped is not None:
            self.mapped.close()

    def shut_down(self, error: ErrorResponse, grace_seconds: float) -> None:
        """End the session when it has been idle for the grace period, if it is relayed."""
        if self.relay is not None and not self.relay.over:
            idle_end = self._idle_end_of(self.relay)
            idle_end.when_idle(EndReason.SHUTDOWN, error, grace_seconds=grace_seconds)

    def end_when_idle(self, reason: EndReason, error: ErrorResponse) -> None:
        """End a relayed session as soon as it is idle."""
        if self.relay is not None and not self.relay.over:
            self._idle_end_of(self.relay).when_idle(reason, error)

    def end_after_idle(self, seconds: float) -> None:
        """End a relayed session with 57P05 when it has been idle for this time."""
        assert self.relay is not None
        error = ProxyError(ErrorKind.IDLE_TIMEOUT).response()
        self._idle_end_of(self.relay).after_idle(seconds, error)

    def end_now(self) -> None:
        """End a relayed session for an operator: with an error where no answer is under way.

        Elsewhere the error could fall inside an answer: the client is closed without one, and what
        runs upstream is cancelled.
        """
        relay = self.relay
        if relay is None or relay.over:
            return
        if relay.may_end or relay.in_transaction:
            relay.end(EndReason.ENDED_BY_OPERATOR, _ENDED_BY_OPERATOR)
        if not relay.over:
            relay.drop(EndReason.ENDED_BY_OPERATOR)

    @property
    def unfinished(self) -> bool:
        """Whether its client would lose something by a cut."""
        if self.stage is Stage.RELAYING:
            return self.relay is not None and not self.relay.over
        return self.stage is Stage.OPENING

    def _idle_end_of(self, relay: Relay) -> IdleEnd:
        self._idle_end = self._idle_end or IdleEnd(relay)
        return self._idle_end


Serve = Callable[[OpenSession], Coroutine[None, None, None]]
"""Serves one connection, and sets its stage in the entry."""


class OpenSessions:
    """The register of a process's connections; `ended` is called after each.

    Their tasks are in no TaskGroup, which would wrap what the block of `accepting` raises in an
    ExceptionGroup. None is lost: leaving that block waits for all of them.
    """

    def __init__(self, ended: Callable[[], object] = lambda: None) -> None:
        self.draining = False
        self._ended = ended
        self._by_task: dict[asyncio.Task[None], OpenSession] = {}
        self._cut: set[asyncio.Task[None]] = set()
        self._unregister = self._unregister_task  # bound once, not for each session

    def __len__(self) -> int:
        return len(self._by_task)

    def start(self, serve: Serve, number: int = 0) -> asyncio.Task[None]:
        """Serve a connection in a task of its own; keep it registered until that ends.

        Each `number`, its id in the log, is higher than those before.
        """
        entry = OpenSession(self, number)
        task = asyncio.get_running_loop().create_task(serve(entry), name="session")
        self._by_task[task] = entry
        task.add_done_callback(self._unregister)
        return task

    def close_slow(self, refusal: bytes) -> bool:
        """Close a connection that is slow to start, to make room. Return whether there is one.

        It is the oldest that has sent nothing, which is sent `refusal`, else the oldest that has
        sent too little.
        """
        now = asyncio.get_running_loop().time()
        slow = [
            (not entry.stream.silent, entry.started_at, entry, task)
            for task, entry in self._by_task.items()
            if entry.stream is not None
            and now - entry.started_at >= (SLOW_SECONDS, MUTE_SECONDS)[entry.stream.silent]
        ]
        if not slow:
            return False
        _, _, entry, task = min(slow, key=lambda found: found[:2])
        _close_starting(entry, task, refusal)
        return True

    def after(self, number: int, count: int) -> list[OpenSession]:
        """Return so many of the connections with higher numbers, in the order of their numbers."""
        entries = list(self._by_task.values())
        start = bisect_right(entries, number, key=lambda entry: entry.number)
        return entries[start : start + count]

    def end(self, number: int) -> bool:
        """End a connection, whatever its stage. Return whether there is one with this number."""
        found = [one for one in self._by_task.items() if one[1].number == number]
        if not found:
            return False
        ((task, entry),) = found
        if entry.stage is Stage.STARTING:
            _close_starting(entry, task)
        elif entry.stage is Stage.OPENING:
            task.cancel()  # the session refuses its client
        else:
            entry.end_now()
        return True

    async def drain(self, seconds: float) -> int:
        """End all sessions within `seconds`. Return how many were cut.

        A second call ends the rest within its own time; both return how many were cut in all.
        """
        self._end_idle()
        if not self._by_task:
            return len(self._cut)
        if seconds:
            _log.info("sessions are ending", **self._left(), idle=self._idle_count())
        else:
            self._skip_grace()
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(min(SILENT_SECONDS, seconds), self._close_silent),
            loop.call_later(seconds / 2, self._skip_grace),
        ]
        _, left = await asyncio.wait(set(self._by_task), timeout=seconds)
        for timer in timers:
            timer.cancel()
        await self._cut_off(left, logged=seconds > 0)
        return len(self._cut)

    async def wait_closed(self) -> None:
        """Return when no connection is left. Call it after a drain, when none is started."""
        while self._by_task:
            await asyncio.wait(set(self._by_task))

    # -- inside ----------------------------------------------------------------------------------

    def _unregister_task(self, task: asyncio.Task[None]) -> None:
        del self._by_task[task]
        self._ended()

    def _end_idle(self) -> None:
        """Refuse the clients that wait for a session; end the others when they are idle."""
        self.draining = True
        for task, entry in list(self._by_task.items()):
            if entry.stage is Stage.OPENING:
                task.cancel()  # the session refuses its client
        self._end_relays(IDLE_GRACE_SECONDS)

    def _skip_grace(self) -> None:
        """End sessions at once when idle: some are never idle for the whole grace period."""
        self._end_relays(0)

    def _close_silent(self) -> None:
        """Close the connections that have sent no StartupMessage, without an answer (W49)."""
        for task, entry in list(self._by_task.items()):
            if entry.stage is Stage.STARTING:
                entry.closing()
                task.cancel()

    def _end_relays(self, grace_seconds: float) -> None:
        error = ProxyError(ErrorKind.SHUTTING_DOWN).response()
        for entry in list(self._by_task.values()):
            entry.shut_down(error, grace_seconds)

    async def _cut_off(self, tasks: set[asyncio.Task[None]], *, logged: bool) -> None:
        """Cancel the tasks. Count the unfinished ones; let the others flush first."""
        cut = {task for task in tasks if self._by_task[task].unfinished}
        if cut and logged:
            _log.warning("sessions are cut: the time to drain is over", **self._left())
        self._cut |= cut
        for task in cut:
            task.cancel()
        if ending := tasks - cut:
            _, ending = await asyncio.wait(ending, timeout=FLUSH_SECONDS)
            for task in ending:
                task.cancel()

    def _left(self) -> dict[str, float]:
        """Return the fields of a log line that show the unfinished sessions."""
        left = [entry.started_at for entry in self._by_task.values() if entry.unfinished]
        oldest_seconds = round(asyncio.get_running_loop().time() - min(left), 1) if left else 0
        return {"sessions": len(left), "oldest_seconds": oldest_seconds}

    def _idle_count(self) -> int:
        """Return the number of relayed sessions that are idle."""
        relays = [entry.relay for entry in self._by_task.values() if entry.relay is not None]
        return sum(relay.may_end and not relay.over for relay in relays)


def _close_starting(entry: OpenSession, task: asyncio.Task[None], refusal: bytes = b"") -> None:
    """Close a connection that has sent no StartupMessage; send `refusal` if it has sent nothing."""
    if entry.stream is not None:
        if refusal and entry.stream.silent:
            write_now(entry.stream.transport, refusal)
        entry.stream.transport.abort()
    entry.closing()
    task.cancel()
