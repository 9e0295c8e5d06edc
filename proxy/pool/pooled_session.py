"""One upstream session of a pool, and the protocol of its connection while no client has it.

For: the reset after a client, the sign of life before the next one, being idle, and the end. None
of them has a task: what the upstream sends is given to a machine, and one timer bounds it. Not for:
which client gets it, or when it ends (`pool`).

The invariants: what a client gets was reset, or never used; while it is idle nothing is sent, and a
byte from the upstream ends it (P25).
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import Final, Protocol

from proxy.pool.pool_counts import RetireReason
from proxy.transport.sockets import end_stream
from proxy.transport.stream import StartupStream
from proxy.upstream.upstream_session import Prepared, UpstreamSession
from proxy.wire.kept_welcome import KeptWelcome
from proxy.wire.messages import BackendKeyData, Terminate
from proxy.wire.session_reset import ResetDone, ResetEvent, SessionReset, may_have_login_triggers
from proxy.wire.sign_of_life import Alive, CheckEvent, SignOfLife
from proxy.wire.upstream_startup import UpstreamRefused

# For the whole answer to a reset: two statements that PostgreSQL needs microseconds for.
RESET_SECONDS_MAX: Final = 5.0
# For the sign of life: one round trip.
CHECK_SECONDS_MAX: Final = 2.0
# For the upstream to end its stream after a Terminate, so that its slot in the database is free.
CLOSE_SECONDS_MAX: Final = 1.0

_TERMINATE: Final = Terminate().encode()
_IGNORING: Final = asyncio.Protocol()  # the protocol of connections that are over
_ENDED: Final = "57P"  # begins the SQLSTATEs with which PostgreSQL ends a session by itself


class State(Enum):
    """Who the connection belongs to."""

    IN_USE = auto()  # a client, or the admission of one
    RESETTING = auto()
    IDLE = auto()
    CHECKING = auto()  # a client waits for the sign of life
    CLOSING = auto()
    CLOSED = auto()


_OVER: Final = (State.CLOSING, State.CLOSED)


class Owner(Protocol):
    """The pool of a session: what it is told."""

    def released(self, session: "PooledSession", retired_for: str) -> None:
        """The client of a session has left it."""

    def offer(self, session: "PooledSession") -> None:
        """A session that its client has not used can serve another one."""

    def reset_ended(
        self, session: "PooledSession", failure: RetireReason | None, *, ended: bool = False
    ) -> None:
        """A reset is over. A session that failed is to be closed; `ended`: the upstream did."""

    def idle_ended(self, session: "PooledSession") -> None:
        """An idle session has sent something, or has ended."""

    def session_closed(self, session: "PooledSession") -> None:
        """The connection of a session that was closed is gone."""


class PooledSession(asyncio.Protocol):
    """One session, from its login to its end.

    It is the `Lease` of the client that has it, and the `Welcome` of all but the first one.
    """

    __slots__ = (
        "_checked",
        "_machine",
        "_messages",
        "_owner",
        "_reported",
        "_timer",
        "_triggers_counted",
        "born_at",
        "ends_at",
        "generation",
        "idle_since",
        "key",
        "prepared",
        "returns",
        "reused",
        "state",
        "target",
        "ticket",
        "transport",
        "used",
    )

    def __init__(
        self,
        opened: UpstreamSession,
        welcome: KeptWelcome,
        owner: Owner,
        *,
        born_at: float,
        ends_at: float,
        generation: int,
        returns: bool,
    ) -> None:
        """Keep a session that was dialled; it is in use. Without `returns` it serves one client.

        No client gets it after `ends_at`.
        """
        assert opened.prepared is not None
        self._owner = owner
        self._messages = welcome
        self._machine: SessionReset | SignOfLife | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._checked: asyncio.Future[bool] | None = None
        self._triggers_counted = False
        self._reported = b""
        self.key = opened.startup.key
        self.transport = opened.stream.transport
        self.prepared: Prepared = opened.prepared
        self.target = opened.target
        self.ticket = opened.ticket
        self.state = State.IN_USE
        self.born_at = self.idle_since = born_at
        self.ends_at = ends_at
        self.generation = generation
        """The number of reconnects of the pool when its dial began."""
        self.returns = returns
        self.reused = False
        self.used = True
        """Whether a client has had it; false for a spare."""

    @property
    def is_over(self) -> bool:
        """Whether it is closed, or was told to be."""
        return self.state in _OVER

    # -- the lease of a client -------------------------------------------------------------------

    def release(self, retired_for: str = "", reported: bytes = b"") -> None:
        """Return the session to its pool; see `Lease`."""
        self._reported = reported
        self._owner.released(self, retired_for)

    def put_back(self, stream: StartupStream, early: bytes) -> None:
        """Return the session as its client found it; see `Lease`."""
        early += stream.hand_over(self)
        if early or stream.gone.done() or self.transport.is_closing() or not self.returns:
            self._owner.released(self, RetireReason.UPSTREAM_ENDED)
        else:
            self._owner.offer(self)

    def lend(self) -> UpstreamSession:
        """Return an idle session for a client, which has it from now on."""
        assert self.state is State.IDLE
        self.state = State.IN_USE
        self.reused = self.used = True
        stream = StartupStream()
        stream.transport = self.transport
        self.transport.set_protocol(stream)
        return UpstreamSession(
            stream, self, self.target, lease=self, prepared=self.prepared, ticket=self.ticket
        )

    # -- the welcome -----------------------------------------------------------------------------

    def welcome(self, key: BackendKeyData | None) -> bytes:
        """Return the messages after AuthenticationOk, with this key for the upstream's own."""
        return self._messages.with_key(key if self.key is not None else None)

    def trailing_data(self) -> bytes:
        """Return nothing: an idle session that sends a byte is given to no client."""
        return b""

    # -- without a client ------------------------------------------------------------------------

    def reset(self) -> None:
        """Bring a session whose client has left back to its state after login."""
        login = self._messages.parameters
        counts_triggers = not self._triggers_counted and may_have_login_triggers(login)
        self._triggers_counted = True
        self.transport.set_protocol(self)
        if self.transport.is_closing():
            self._owner.reset_ended(self, RetireReason.UPSTREAM_ENDED, ended=True)
            return
        self.state = State.RESETTING
        self._machine = reset = SessionReset(
            login, counts_triggers=counts_triggers, reported=self._reported
        )
        self._reported = b""
        self._start_timer(RESET_SECONDS_MAX, partial(self._machine_failed, reset))
        self.transport.write(reset.begin())

    def be_idle(self, now: float) -> None:
        """Wait for the next client. A byte from the upstream ends the session from now on.

        One that its client has not used has been silent since before (P23).
        """
        if self.state is State.RESETTING:
            self.idle_since = now
        self.state = State.IDLE

    async def check(self) -> bool:
        """Ask an idle session for a sign of life. Return whether it is idle then.

        The wait is bounded by CHECK_SECONDS_MAX. If cancelled the session is in doubt.
        """
        if self.transport.is_closing():
            return False
        self.state = State.CHECKING
        self._checked = asyncio.get_running_loop().create_future()
        self._machine = check = SignOfLife(self._messages.parameters)
        self._start_timer(CHECK_SECONDS_MAX, partial(self._machine_failed, check))
        self.transport.write(check.begin())
        try:
            is_alive = await self._checked
        finally:
            self._checked = None
        return is_alive and self.state is State.IDLE  # it may have ended since its answer

    def close(self) -> None:
        """Send Terminate, and close when the upstream has, CLOSE_SECONDS_MAX later at most.

        Its protocol may be another one, such as that of a client who left.
        """
        self._stop_machine()
        self.state = State.CLOSING
        transport = self.transport
        if transport.is_closing():
            self._closed()
            return
        transport.set_protocol(self)
        transport.resume_reading()
        transport.write(_TERMINATE)
        end_stream(transport)
        self._start_timer(CLOSE_SECONDS_MAX, transport.abort)

    # -- the protocol ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Pass what the upstream sends to what awaits it; an idle session awaits nothing."""
        machine = self._machine
        if machine is None:
            if self.state is State.IDLE:
                self._owner.idle_ended(self)
            return
        for event in machine.receive_data(data):
            if machine.trailing_data():
                self._machine_failed(machine)
            else:
                self._machine_ended(event)

    def eof_received(self) -> bool:
        """End the session: PostgreSQL has no half-close. Ours stays open for a Terminate."""
        self._ended()
        return self.state is not State.CLOSING

    def connection_lost(self, exc: Exception | None) -> None:
        """End the session."""
        self._ended()
        self._closed()

    # -- inside ----------------------------------------------------------------------------------

    def _ended(self) -> None:
        if self._machine is not None:
            self._machine_failed(self._machine, ended=True)
        elif self.state is State.IDLE:
            self._owner.idle_ended(self)

    def _closed(self) -> None:
        self._stop_machine()
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            # It and this refer to each other: both would wait for the garbage collector.
            self.transport.set_protocol(_IGNORING)
            self._owner.session_closed(self)

    def _machine_ended(self, event: ResetEvent | CheckEvent) -> None:
        """Act on the one event of a machine."""
        match event:
            case ResetDone(changed, login_triggers):
                self._stop_machine()
                failure = RetireReason.PARAMETER_CHANGED if changed else None
                if login_triggers:
                    failure = RetireReason.LOGIN_TRIGGER
                self._owner.reset_ended(self, failure)
            case Alive(changed) if not changed:
                self._stop_machine()
                self.state = State.IDLE
                self._answer_check(is_alive=True)
            case _:
                assert self._machine is not None
                is_end = isinstance(event, UpstreamRefused) and event.error.sqlstate[:3] == _ENDED
                self._machine_failed(self._machine, ended=is_end)

    def _machine_failed(self, machine: SessionReset | SignOfLife, *, ended: bool = False) -> None:
        """End what has failed: the session is in doubt. `ended`: the upstream has ended it."""
        self._stop_machine()
        if isinstance(machine, SessionReset):
            self._owner.reset_ended(self, RetireReason.RESET_FAILED, ended=ended)
        else:
            self._answer_check(is_alive=False)

    def _answer_check(self, *, is_alive: bool) -> None:
        if self._checked is not None and not self._checked.done():
            self._checked.set_result(is_alive)

    def _start_timer(self, seconds: float, run: Callable[[], object]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, run)

    def _stop_machine(self) -> None:
        self._machine = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
