"""The reset of a pooled session: back to its state after login, for the next client.

Two queries in one write, `DISCARD ALL` and `RESET ROLE`: some minor versions of PostgreSQL leave
the role that a default of the session set. The first reset of a session also counts the login event
triggers, which DISCARD ALL undoes and no login of the next client repeats.

    AWAIT_RESET --BEGIN--> AWAIT_DISCARD ... AWAIT_ROLE_READY --COMPLETE--> RESET
                                                \\--NEXT--> AWAIT_COLUMNS ... --COMPLETE--> RESET
    any of these --error, other message, end of stream--> FAILED

The invariants:

- RESET is reached by exactly the expected messages in order, each ReadyForQuery with status `I`.
  Notices and notifications between them are dropped, ParameterStatus is compared with the login.
- The caller must look at `trailing_data` too: a byte after the answer is no part of it.
- A hostile upstream can make it buffer at most `OWN_ANSWER_BYTES_MAX` plus one read.

PostgreSQL documentation, "DISCARD", "RESET", "Event Trigger on Login".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from proxy.wire.messages import Frame
from proxy.wire.own_answer import OwnAnswer, Unanswered
from proxy.wire.simple_query import row_values
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamRefused, UpstreamViolated
from proxy.wire.violations import StateMachineMisuse, UpstreamViolation

_VERSION_NAME: Final = b"server_version"
_LOGIN_TRIGGERS_SINCE: Final = 17


class ResetState(Enum):
    """The state of a reset."""

    AWAIT_RESET = auto()
    AWAIT_DISCARD = auto()
    AWAIT_DISCARD_READY = auto()
    AWAIT_ROLE = auto()
    AWAIT_ROLE_READY = auto()
    AWAIT_COLUMNS = auto()
    AWAIT_COUNT = auto()
    AWAIT_COUNTED = auto()
    AWAIT_COUNT_READY = auto()
    RESET = auto()
    FAILED = auto()


class ResetStep(Enum):
    """A transition of a reset: the input of the table below."""

    BEGIN = auto()
    DISCARDED = auto()
    ROLE_RESET = auto()
    COLUMNS = auto()
    COUNT = auto()
    COUNTED = auto()
    NEXT = auto()
    COMPLETE = auto()
    DROP = auto()
    FAIL = auto()


_QUERIED: Final = tuple(ResetState)[1:-2]

# (state, step) -> state, as in `upstream_startup`. NEXT and COMPLETE are a ReadyForQuery, COMPLETE
# the last one.
RESET_TABLE: Final[dict[tuple[ResetState, ResetStep], ResetState]] = {
    (ResetState.AWAIT_RESET, ResetStep.BEGIN): ResetState.AWAIT_DISCARD,
    (ResetState.AWAIT_RESET, ResetStep.FAIL): ResetState.FAILED,
    (ResetState.AWAIT_DISCARD, ResetStep.DISCARDED): ResetState.AWAIT_DISCARD_READY,
    (ResetState.AWAIT_DISCARD_READY, ResetStep.NEXT): ResetState.AWAIT_ROLE,
    (ResetState.AWAIT_ROLE, ResetStep.ROLE_RESET): ResetState.AWAIT_ROLE_READY,
    (ResetState.AWAIT_ROLE_READY, ResetStep.NEXT): ResetState.AWAIT_COLUMNS,
    (ResetState.AWAIT_ROLE_READY, ResetStep.COMPLETE): ResetState.RESET,
    (ResetState.AWAIT_COLUMNS, ResetStep.COLUMNS): ResetState.AWAIT_COUNT,
    (ResetState.AWAIT_COUNT, ResetStep.COUNT): ResetState.AWAIT_COUNTED,
    (ResetState.AWAIT_COUNTED, ResetStep.COUNTED): ResetState.AWAIT_COUNT_READY,
    (ResetState.AWAIT_COUNT_READY, ResetStep.COMPLETE): ResetState.RESET,
    **{(state, ResetStep.DROP): state for state in _QUERIED},
    **{(state, ResetStep.FAIL): ResetState.FAILED for state in _QUERIED},
}

# The messages that are a step by what they say, and those that are one by their type alone.
_BY_TEXT: Final[Mapping[tuple[bytes, bytes], ResetStep]] = {
    (b"C", b"DISCARD ALL\0"): ResetStep.DISCARDED,
    (b"C", b"RESET\0"): ResetStep.ROLE_RESET,
    (b"C", b"SELECT 1\0"): ResetStep.COUNTED,
}
_BY_TYPE: Final[Mapping[bytes, ResetStep]] = {
    b"T": ResetStep.COLUMNS,
    b"D": ResetStep.COUNT,
    b"A": ResetStep.DROP,  # a notification of the client that has gone
}

_DISCARD_ALL: Final = Frame(b"Q", b"DISCARD ALL\0").encode()
_RESET_ROLE: Final = Frame(b"Q", b"RESET ROLE\0").encode()
# Each name is qualified: search_path may be anything after a reset, too.
_COUNT_TRIGGERS: Final = Frame(
    b"Q",
    b"SELECT pg_catalog.count(*) FROM pg_catalog.pg_event_trigger"
    b" WHERE evtevent OPERATOR(pg_catalog.=) 'login'"
    b" AND evtenabled OPERATOR(pg_catalog.<>) 'D'\0",
).encode()

_READY: Final = Frame(b"Z", b"I")
# The answer to nearly every reset, in one read. Comparing it takes a tenth of the time of parsing.
_USUAL_ANSWER: Final = b"".join(
    frame.encode()
    for frame in (Frame(b"C", b"DISCARD ALL\0"), _READY, Frame(b"C", b"RESET\0"), _READY)
)


@dataclass(frozen=True, slots=True)
class ResetDone:
    """The session is as after its login, unless `changed` has names or there are triggers.

    `changed` are the parameters that have another value than the login reported (P22).
    """

    changed: tuple[bytes, ...] = ()
    login_triggers: int = 0


ResetEvent = ResetDone | Unanswered


class SessionReset:
    """The state machine of one reset. Every byte from the upstream belongs to it until RESET."""

    def __init__(
        self,
        login: Mapping[bytes, bytes],
        *,
        counts_triggers: bool = False,
        reported: bytes = b"",
    ) -> None:
        """`login` are the parameters that the session's login reported.

        `reported` are the ParameterStatus messages that its client was sent.
        """
        self.state = ResetState.AWAIT_RESET
        self._answer = OwnAnswer(login, reported)
        self._counts_triggers = counts_triggers
        self._login_triggers = 0
        self._last = ResetState.AWAIT_ROLE_READY
        if counts_triggers:
            self._last = ResetState.AWAIT_COUNT_READY

    def begin(self) -> bytes:
        """Return the queries, to be sent in one write."""
        self._move(ResetStep.BEGIN)
        return _DISCARD_ALL + _RESET_ROLE + (_COUNT_TRIGGERS if self._counts_triggers else b"")

    def receive_data(self, data: bytes) -> list[ResetEvent]:
        """Process received bytes and return their events."""
        if self.state is ResetState.FAILED or not data:
            return []
        if self.state is ResetState.RESET:
            raise StateMachineMisuse("what comes after a reset is no part of it")
        try:
            if self.state is ResetState.AWAIT_RESET:
                raise UpstreamViolation("a message before the reset")
            if data == _USUAL_ANSWER and self._is_usual():
                return [ResetDone(self._answer.changed)]
            self._answer.feed(data)
            return self._receive_messages()
        except UpstreamViolation as violation:
            self._move(ResetStep.FAIL)
            return [UpstreamViolated(violation)]

    def receive_eof(self) -> list[ResetEvent]:
        """Process the end of the upstream's stream."""
        if (self.state, ResetStep.FAIL) not in RESET_TABLE:
            return []
        self._move(ResetStep.FAIL)
        return [UpstreamDisconnected()]

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the answer."""
        return self._answer.trailing_data()

    # -- inside ----------------------------------------------------------------------------------

    def _move(self, step: ResetStep) -> None:
        following = RESET_TABLE.get((self.state, step))
        if following is None:
            raise StateMachineMisuse(f"{step.name} in {self.state.name}")
        self.state = following

    def _is_usual(self) -> bool:
        """Move to RESET if the usual answer is all that there is. Return whether it is."""
        is_first = self.state is ResetState.AWAIT_DISCARD and self._answer.is_empty
        if is_first and not self._counts_triggers:
            self.state = ResetState.RESET
        return self.state is ResetState.RESET

    def _receive_messages(self) -> list[ResetEvent]:
        while (frame := self._answer.next()) is not None:
            if isinstance(frame, UpstreamRefused):
                self._move(ResetStep.FAIL)
                return [frame]
            step = self._step(frame)
            if step is None or (self.state, step) not in RESET_TABLE:
                raise UpstreamViolation(f"a message that is not expected in {self.state.name}")
            if step is ResetStep.COUNT:
                self._login_triggers = _count(frame.payload)
            self._move(step)
            if self.state is ResetState.RESET:
                return [ResetDone(self._answer.changed, self._login_triggers)]
        return []

    def _step(self, frame: Frame) -> ResetStep | None:
        if frame == _READY:
            return ResetStep.COMPLETE if self.state is self._last else ResetStep.NEXT
        return _BY_TYPE.get(frame.type) or _BY_TEXT.get((frame.type, frame.payload))


def may_have_login_triggers(login: Mapping[bytes, bytes]) -> bool:
    """Return whether a server that reports these parameters is of version 17 or newer (P21).

    A version that cannot be read may be.
    """
    major = login.get(_VERSION_NAME, b"").partition(b".")[0]
    return not major.isdigit() or int(major) >= _LOGIN_TRIGGERS_SINCE


def _count(payload: bytes) -> int:
    """Return the number in a row of one value. Raises UpstreamViolation."""
    match row_values(payload):
        case (bytes() as digits,) if digits.isdigit():
            return int(digits)
        case _:
            raise UpstreamViolation("a row that is no number")
