"""The check of an idle pooled session before a client gets it: Sync, and the ReadyForQuery for it.

    AWAIT_CHECK --BEGIN--> AWAIT_READY --COMPLETE--> ALIVE
    any of these --error, other message, end of stream--> FAILED

Invariants: as of `session_reset`. A session that was reset listens on no channel, so a notification
is a violation here. A Sync starts no transaction, and Lakebase counts none as activity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from proxy.wire.messages import Frame
from proxy.wire.own_answer import OwnAnswer, Unanswered
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamRefused, UpstreamViolated
from proxy.wire.violations import StateMachineMisuse, UpstreamViolation

_SYNC: Final = Frame(b"S", b"").encode()
_READY: Final = Frame(b"Z", b"I")


class CheckState(Enum):
    """The state of a check."""

    AWAIT_CHECK = auto()
    AWAIT_READY = auto()
    ALIVE = auto()
    FAILED = auto()


class CheckStep(Enum):
    """A transition of a check: the input of the table below."""

    BEGIN = auto()
    COMPLETE = auto()
    FAIL = auto()


# (state, step) -> state, as in `upstream_startup`.
CHECK_TABLE: Final[dict[tuple[CheckState, CheckStep], CheckState]] = {
    (CheckState.AWAIT_CHECK, CheckStep.BEGIN): CheckState.AWAIT_READY,
    (CheckState.AWAIT_CHECK, CheckStep.FAIL): CheckState.FAILED,
    (CheckState.AWAIT_READY, CheckStep.COMPLETE): CheckState.ALIVE,
    (CheckState.AWAIT_READY, CheckStep.FAIL): CheckState.FAILED,
}


@dataclass(frozen=True, slots=True)
class Alive:
    """The upstream has answered. `changed`: parameters with another value than at the login."""

    changed: tuple[bytes, ...] = ()


CheckEvent = Alive | Unanswered


class SignOfLife:
    """The state machine of one check. Every byte from the upstream belongs to it until ALIVE."""

    def __init__(self, login: Mapping[bytes, bytes]) -> None:
        """`login` are the parameters that the session's login reported."""
        self.state = CheckState.AWAIT_CHECK
        self._answer = OwnAnswer(login)

    def begin(self) -> bytes:
        """Return the Sync."""
        self._move(CheckStep.BEGIN)
        return _SYNC

    def receive_data(self, data: bytes) -> list[CheckEvent]:
        """Process received bytes and return their events."""
        if self.state is CheckState.FAILED or not data:
            return []
        if self.state is CheckState.ALIVE:
            raise StateMachineMisuse("what comes after a check is no part of it")
        try:
            if self.state is CheckState.AWAIT_CHECK:
                raise UpstreamViolation("a message before the check")
            self._answer.feed(data)
            return self._receive_message()
        except UpstreamViolation as violation:
            self._move(CheckStep.FAIL)
            return [UpstreamViolated(violation)]

    def receive_eof(self) -> list[CheckEvent]:
        """Process the end of the upstream's stream."""
        if (self.state, CheckStep.FAIL) not in CHECK_TABLE:
            return []
        self._move(CheckStep.FAIL)
        return [UpstreamDisconnected()]

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the answer."""
        return self._answer.trailing_data()

    # -- inside ----------------------------------------------------------------------------------

    def _receive_message(self) -> list[CheckEvent]:
        frame = self._answer.next()
        if frame is None:
            return []
        if isinstance(frame, UpstreamRefused):
            self._move(CheckStep.FAIL)
            return [frame]
        if frame != _READY:
            raise UpstreamViolation("a message that is not expected in a check")
        self._move(CheckStep.COMPLETE)
        return [Alive(self._answer.changed)]

    def _move(self, step: CheckStep) -> None:
        following = CHECK_TABLE.get((self.state, step))
        if following is None:
            raise StateMachineMisuse(f"{step.name} in {self.state.name}")
        self.state = following
