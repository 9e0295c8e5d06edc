"""What may come at any time within the answer to a request of the proxy's own, and the bounds.

For: the machines that bring a pooled session back to its state after login, and that check it.
Notices are dropped, and ParameterStatus is followed, as it is reported before ReadyForQuery.
"""

from collections.abc import Mapping
from typing import Final

from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    ErrorResponse,
    Frame,
    NoticeResponse,
    ParameterStatus,
    decode_backend,
)
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamRefused, UpstreamViolated
from proxy.wire.violations import UpstreamViolation

# One ParameterStatus can be as long as the value of a setting. Notices of triggers may be more.
OWN_ANSWER_BYTES_MAX: Final = 256 * 1024
_HEADER_BYTES: Final = 5

Unanswered = UpstreamViolated | UpstreamDisconnected | UpstreamRefused
"""The events of a request that is not answered as expected: the session is over."""


class OwnAnswer:
    """Reads the messages of one answer; holds at most OWN_ANSWER_BYTES_MAX plus one read."""

    def __init__(self, login: Mapping[bytes, bytes], reported: bytes = b"") -> None:
        """`login` are the parameters that the session's login reported.

        `reported` are the ParameterStatus messages since then. A malformed one is a change.
        """
        self._login = login
        self._reader = MessageReader(OWN_ANSWER_BYTES_MAX)
        self._bytes = 0
        self._fed = False
        self._reported: dict[bytes, bytes] = {}
        if reported:
            try:
                self._reported = reported_parameters(reported)
            except UpstreamViolation:
                self._reported[b""] = b""

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been fed."""
        return not self._fed

    def feed(self, data: bytes) -> None:
        """Append received bytes."""
        self._fed = True
        self._reader.feed(data)

    def next(self) -> Frame | UpstreamRefused | None:
        """Return the next message that is neither notice nor ParameterStatus; None until it came.

        Raises UpstreamViolation for a malformed one, or an answer that is too long.
        """
        while (frame := self._reader.next()) is not None:
            self._bytes += _HEADER_BYTES + len(frame.payload)
            if self._bytes > OWN_ANSWER_BYTES_MAX:
                raise UpstreamViolation(f"an answer of more than {OWN_ANSWER_BYTES_MAX} bytes")
            match decode_backend(frame):
                case ErrorResponse() as error:
                    return UpstreamRefused(error, frame.encode())
                case ParameterStatus(name, value):
                    self._reported[name] = value
                case NoticeResponse():
                    pass
                case _:
                    return frame
        return None

    @property
    def changed(self) -> tuple[bytes, ...]:
        """The parameters whose last reported value is not that of the login, in order (P22)."""
        login = self._login
        return tuple(name for name, value in self._reported.items() if login.get(name) != value)

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the last whole message."""
        return self._reader.trailing_data()


def reported_parameters(welcome: bytes) -> dict[bytes, bytes]:
    """Return the parameters that a login reported, from its messages before ReadyForQuery."""
    reader = MessageReader(len(welcome))
    reader.feed(welcome)
    found: dict[bytes, bytes] = {}
    while (frame := reader.next()) is not None:
        message = decode_backend(frame)
        if isinstance(message, ParameterStatus):
            found[message.name] = message.value
    return found
