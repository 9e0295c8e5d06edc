"""The open sessions, and every way in which the proxy ends one.

For: the register of all connections, from accept to the end of their tasks; the drain, which ends
each according to its stage; the idle timeout. Not for: an end by the client or the upstream
(`relay`), or accepting (`listener`).

In a drain connections are still accepted for `shutdown.accept_seconds` (`AcceptPeriod`). Then:

- A client that waits for its upstream session is refused.
- An idle session ends with 57P01 after the idle grace, a busy one when it becomes idle.
- A connection that sends no StartupMessage is closed after `SILENT_SECONDS`.
- After half of `shutdown.drain_seconds` there is no idle grace; at their end what is left is cut.

The invariant: once a drain has begun no upstream session is opened, and each session that is
relayed ends as soon as it is idle.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from enum import Enum, auto
from typing import Final, Protocol

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.session.end_reason import EndReason
from proxy.session.relay import Relay
from proxy.transport.stream import StartupStream
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
# Polls within one idle timeout: a session ends at most one poll too late.
IDLE_POLLS: Final = 8
# The shortest time between two polls.
IDLE_POLL_SECONDS_MIN: Final = 0.05

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


# -- the end of one relayed session --------------------------------------------------------------


class IdleEnd:
    """Ends a relayed session with an error when it is idle, so that no answer is lost (W47)."""

    __slots__ = ("_error", "_grace_seconds", "_grace_timer", "_poll_timer", "_reason", "_relay")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._reason = EndReason.SHUTDOWN
        self._error = b""
        self._grace_seconds = 0.0
        self._grace_timer: asyncio.TimerHandle | None = None
        self._poll_timer: asyncio.TimerHandle | None = None

    def when_idle(
        self, reason: EndReason, error: ErrorResponse, *, grace_seconds: float = 0
    ) -> None:
        """End the session when it has been idle for the grace period. The last call counts.

        A session that never becomes idle does not end.
        """
        self._reason, self._error = reason, error.encode()
        self._grace_seconds = grace_seconds
        self._relay.follow_reads(self._on_activity)
        self._on_activity()

    def after_idle(self, seconds: float, error: ErrorResponse) -> None:
        """End the session when it has been idle, and received no byte, for this time.

        It may end one poll later. The byte counts are compared at each poll, so that a byte costs
        nothing.
        """
        interval = max(seconds / IDLE_POLLS, IDLE_POLL_SECONDS_MIN)
        call_later = asyncio.get_running_loop().call_later
        relay, quiet_polls = self._relay, 0
        carried = relay.carried()

        def poll() -> None:
            nonlocal carried, quiet_polls
            if relay.over:
                return
            before, carried = carried, relay.carried()
            quiet_polls = quiet_polls + 1 if carried == before else 0
            if quiet_polls >= IDLE_POLLS and relay.idle:
                self.when_idle(EndReason.IDLE_TIMEOUT, error)
            else:
                self._poll_timer = call_later(interval, poll)

        self._poll_timer = call_later(interval, poll)

    def close(self) -> None:
        """Stop the timers."""
        for timer in (self._grace_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()

    def _on_activity(self) -> None:
        """Start the grace period; start it again after each read."""
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        if self._relay.over or not self._relay.may_end:
            return
        if self._grace_seconds:
            loop = asyncio.get_running_loop()
            self._grace_timer = loop.call_later(self._grace_seconds, self._end_now)
        else:
            self._end_now()

    def _end_now(self) -> None:
        self._relay.end(self._reason, self._error)


# -- the register --------------------------------------------------------------------------------


class Stage(Enum):
    """The stage of a connection."""

    STARTING = auto()  # it has sent no StartupMessage yet
    OPENING = auto()  # its client waits for an upstream session
    RELAYING = auto()
    CLOSING = auto()  # its client has been sent everything


class Registration(Protocol):
    """A second register that a connection is in."""

    def close(self) -> None:
        """Unregister it there."""


class OpenSession:
    """The entry of one connection in the register."""

    __slots__ = ("_idle_end", "_sessions", "mapped", "relay", "stage", "started_at", "stream")

    def __init__(self, sessions: "OpenSessions") -> None:
        self._sessions = sessions
        self._idle_end: IdleEnd | None = None
        self.started_at = asyncio.get_running_loop().time()
        self.stage = Stage.STARTING
        self.relay: Relay | None = None
        self.stream: StartupStream | None = None
        """The connection while it is starting."""
        self.mapped: Registration | None = None
        """Among the sessions of its mapping, if a shard has admitted it."""

    def opening(self) -> None:
        """Set the stage in which the client waits. A drain that begins in it cancels the task."""
        self.stage = Stage.OPENING
        self.stream = None

    def refuse_if_draining(self) -> None:
        """Raise ProxyError if a drain has begun: no upstream session is opened any more."""
        if self._sessions.draining:
            raise ProxyError(ErrorKind.SHUTTING_DOWN)

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

    def start(self, serve: Serve) -> asyncio.Task[None]:
        """Serve a connection in a task of its own; keep it registered until that ends."""
        entry = OpenSession(self)
        task = asyncio.get_running_loop().create_task(serve(entry), name="session")
        self._by_task[task] = entry
        task.add_done_callback(self._unregister)
        return task

    def close_slow(self) -> bool:
        """Close a connection that is slow to start, to make room. Return whether there is one.

        It is the oldest that has sent nothing, else the oldest that has sent too little.
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
        if entry.stream is not None:
            entry.stream.transport.abort()
        entry.closing()
        task.cancel()
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
