"""The sessions that live now, so that a drain can end each in the way that its stage allows.

For: ending them, and counting what is left. Not for: cutting; whoever accepted them does that. The
invariant: once `end` was called no session begins to be relayed, and each that is relayed ends as
soon as it is idle.
"""

import asyncio
from enum import Enum, auto
from typing import Final

from proxy.errors import ErrorKind, ProxyError
from proxy.session.end_reason import EndReason
from proxy.session.relay import Relay

# The error must not fall between a pool's check of a connection and the statement that it is
# checked for: the client has to be silent for so long. A pool at work goes on within milliseconds.
IDLE_GRACE_SECONDS: Final = 0.1


class Stage(Enum):
    """How far a session has come."""

    STARTING = auto()  # its first packets have not been read
    OPENING = auto()  # the client waits for a session upstream
    RELAYING = auto()
    CLOSING = auto()  # whatever was to be said has been said


class OpenSession:
    """One entry: the session that its task runs, kept while a `with` block runs."""

    __slots__ = ("_sessions", "relay", "stage", "started_at", "task")

    def __init__(self, sessions: "OpenSessions") -> None:
        self._sessions = sessions
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        self.task = task
        self.started_at = asyncio.get_running_loop().time()
        self.stage = Stage.STARTING
        self.relay: Relay | None = None

    def __enter__(self) -> "OpenSession":
        """Count among the living from here on."""
        self._sessions.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Be forgotten."""
        self._sessions.remove(self)

    def opening(self) -> None:
        """Note that the client has said what it wants. Raises ProxyError when all are to end."""
        if self._sessions.ending:
            raise ProxyError(ErrorKind.SHUTTING_DOWN)
        self.stage = Stage.OPENING

    def relaying(self, relay: Relay) -> None:
        """Note that the client is served."""
        self.stage = Stage.RELAYING
        self.relay = relay

    def closing(self) -> None:
        """Note that nothing is left to be cut."""
        self.stage = Stage.CLOSING

    @property
    def unfinished(self) -> bool:
        """Whether a cut would take something from its client."""
        if self.stage is Stage.RELAYING:
            return self.relay is not None and not self.relay.over
        return self.stage is Stage.OPENING


class OpenSessions:
    """All of a proxy's sessions."""

    def __init__(self) -> None:
        self.ending = False
        self._by_task: dict[asyncio.Task[None], OpenSession] = {}

    def session(self) -> OpenSession:
        """Return an entry for the current task, to be kept while a block runs."""
        return OpenSession(self)

    def add(self, entry: OpenSession) -> None:
        """Take an entry."""
        self._by_task[entry.task] = entry

    def remove(self, entry: OpenSession) -> None:
        """Forget an entry."""
        del self._by_task[entry.task]

    def unfinished(self) -> list[OpenSession]:
        """Return the sessions that a cut would hurt, the oldest first."""
        left = [entry for entry in self._by_task.values() if entry.unfinished]
        return sorted(left, key=lambda entry: entry.started_at)

    def is_unfinished(self, task: asyncio.Task[None]) -> bool:
        """Whether a cut of this task would hurt: one without an entry is believed to be at work."""
        entry = self._by_task.get(task)
        return entry is None or entry.unfinished

    def idle_count(self) -> int:
        """Return how many are relayed and could end now."""
        relays = [entry.relay for entry in self._by_task.values() if entry.relay is not None]
        return sum(relay.idle and not relay.over for relay in relays)

    def end(self) -> None:
        """Refuse who still waits to be served, and end the others when they are idle."""
        self.ending = True
        for entry in list(self._by_task.values()):
            if entry.stage is Stage.OPENING:
                entry.task.cancel()  # which makes it tell its client
        self._end_relays(IDLE_GRACE_SECONDS)

    def skip_grace(self) -> None:
        """End without the idle grace those that are never silent between two transactions."""
        self._end_relays(0)

    def close_silent(self) -> None:
        """Close those that have not said what they want: no answer is due to them (W49)."""
        for entry in list(self._by_task.values()):
            if entry.stage is Stage.STARTING:
                entry.closing()
                entry.task.cancel()

    def _end_relays(self, grace_seconds: float) -> None:
        error = ProxyError(ErrorKind.SHUTTING_DOWN).response()
        for entry in list(self._by_task.values()):
            if entry.relay is not None and not entry.relay.over:
                entry.relay.end_when_idle(EndReason.SHUTDOWN, error, grace_seconds=grace_seconds)
