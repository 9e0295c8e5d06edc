"""One simple Query that the proxy itself asks an upstream session, and its whole answer.

For: a question of a few short rows before the session is the client's, such as the admission to a
shard. The text may have several statements; their rows are returned together. Not for: a client's
queries, which are relayed.

    AWAIT_QUERY --query--> AWAIT_ANSWER --ReadyForQuery--> ANSWERED
    any of these --violation, end of stream--> FAILED

The invariants:

- Notices and notifications within the answer are dropped. ParameterStatus messages are returned: a
  server says only once that a default has changed, or that it has become a standby.
- After an ErrorResponse no row counts; the end of the stream after it is part of the answer.
- A hostile upstream can make it buffer at most `ANSWER_BYTES_MAX` plus one message (W53).

PostgreSQL documentation, "Message Flow", section Simple Query.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from struct import Struct, error
from typing import Final

from proxy.wire.framing import MessageReader
from proxy.wire.messages import INT32, ErrorResponse, Frame, ReadyForQuery, decode_backend
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamViolated
from proxy.wire.violations import StateMachineMisuse, UpstreamViolation

# The rows are a few words. Notices may come too: their bound is that of a startup.
ANSWER_MESSAGE_BYTES_MAX: Final = 64 * 1024
ANSWER_BYTES_MAX: Final = 256 * 1024

_INT16: Final = Struct("!h")
_NULL: Final = -1
# RowDescription, CommandComplete, EmptyQueryResponse; NoticeResponse, NotificationResponse.
_DROPPED: Final = frozenset((b"T", b"C", b"I", b"N", b"A"))

Row = tuple[bytes | None, ...]


class QueryState(Enum):
    """The state of a query."""

    AWAIT_QUERY = auto()
    AWAIT_ANSWER = auto()
    ANSWERED = auto()
    FAILED = auto()


class QueryStep(Enum):
    """A transition: the input of the table below."""

    ASK = auto()
    HOLD = auto()
    COMPLETE = auto()
    FAIL = auto()


# (state, step) -> state, as in `upstream_startup`.
QUERY_TABLE: Final[dict[tuple[QueryState, QueryStep], QueryState]] = {
    (QueryState.AWAIT_QUERY, QueryStep.ASK): QueryState.AWAIT_ANSWER,
    (QueryState.AWAIT_QUERY, QueryStep.FAIL): QueryState.FAILED,
    (QueryState.AWAIT_ANSWER, QueryStep.HOLD): QueryState.AWAIT_ANSWER,
    (QueryState.AWAIT_ANSWER, QueryStep.COMPLETE): QueryState.ANSWERED,
    (QueryState.AWAIT_ANSWER, QueryStep.FAIL): QueryState.FAILED,
}


@dataclass(frozen=True, slots=True)
class QueryAnswered:
    """The whole answer: the rows of all statements in text format, or the error.

    `transaction_status` is that of ReadyForQuery; empty if the upstream ended after the error.
    """

    rows: tuple[Row, ...] = field(repr=False)
    error: ErrorResponse | None
    transaction_status: bytes
    parameters: bytes = field(default=b"", repr=False)
    """The ParameterStatus messages."""


QueryEvent = QueryAnswered | UpstreamViolated | UpstreamDisconnected


class SimpleQuery:
    """The state machine of one query. Every byte from the upstream belongs to it until ANSWERED."""

    def __init__(self) -> None:
        self.state = QueryState.AWAIT_QUERY
        self._reader = MessageReader(ANSWER_MESSAGE_BYTES_MAX)
        self._answer_bytes = 0
        self._rows: list[Row] = []
        self._parameters = b""
        self._error: ErrorResponse | None = None

    def ask(self, sql: bytes) -> bytes:
        """Return the Query message. Raises ValueError for a NUL, which would truncate it."""
        if b"\0" in sql:
            raise ValueError("a query cannot contain a NUL byte")
        self._move(QueryStep.ASK)
        return Frame(b"Q", sql + b"\0").encode()

    def receive_data(self, data: bytes) -> list[QueryEvent]:
        """Process received bytes and return their events."""
        if self.state is QueryState.FAILED or not data:
            return []
        if self.state is QueryState.ANSWERED:
            raise StateMachineMisuse("what comes after the answer is the client's")
        self._reader.feed(data)
        try:
            return self._receive_messages()
        except UpstreamViolation as violation:
            self._move(QueryStep.FAIL)
            return [UpstreamViolated(violation)]

    def receive_eof(self) -> list[QueryEvent]:
        """Process the end of the upstream's stream."""
        if (self.state, QueryStep.FAIL) not in QUERY_TABLE:
            return []
        self._move(QueryStep.FAIL)
        if self._error is not None:
            return [QueryAnswered((), self._error, b"")]
        return [UpstreamDisconnected()]

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the answer."""
        return self._reader.trailing_data()

    # -- inside ----------------------------------------------------------------------------------

    def _move(self, step: QueryStep) -> None:
        following = QUERY_TABLE.get((self.state, step))
        if following is None:
            raise StateMachineMisuse(f"{step.name} in {self.state.name}")
        self.state = following

    def _receive_messages(self) -> list[QueryEvent]:
        while (frame := self._reader.next()) is not None:
            self._hold(frame)
            if frame.type == b"Z":
                return [self._complete(frame)]
        return []

    def _hold(self, frame: Frame) -> None:
        if self.state is not QueryState.AWAIT_ANSWER:
            raise UpstreamViolation("a message before the query")
        self._answer_bytes += len(frame.payload)
        if self._answer_bytes > ANSWER_BYTES_MAX:
            raise UpstreamViolation(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        if frame.type == b"D":
            self._rows.append(row_values(frame.payload))
        elif frame.type == b"S":
            self._parameters += frame.encode()
        elif frame.type == b"E":
            refused = decode_backend(frame)
            assert isinstance(refused, ErrorResponse)
            self._error = self._error or refused
        elif frame.type != b"Z" and frame.type not in _DROPPED:
            raise UpstreamViolation("a message that is not allowed in the answer to a query")
        self._move(QueryStep.HOLD)

    def _complete(self, frame: Frame) -> QueryAnswered:
        ready = decode_backend(frame)
        assert isinstance(ready, ReadyForQuery)
        self._move(QueryStep.COMPLETE)
        rows = () if self._error is not None else tuple(self._rows)
        return QueryAnswered(rows, self._error, ready.status, self._parameters)


def row_values(payload: bytes) -> Row:
    """Return the values of a DataRow. Raises UpstreamViolation."""
    try:
        (count,) = _INT16.unpack_from(payload)
        at = _INT16.size
        values: list[bytes | None] = []
        for _ in range(count):
            (size,) = INT32.unpack_from(payload, at)
            at += INT32.size
            if size == _NULL:
                values.append(None)
                continue
            if not 0 <= size <= len(payload) - at:
                raise UpstreamViolation("malformed message of type D: a value's length")
            values.append(payload[at : at + size])
            at += size
    except error as exception:
        raise UpstreamViolation(f"malformed message of type D: {exception}") from exception
    if count < 0 or at != len(payload):
        raise UpstreamViolation("malformed message of type D: bytes too many")
    return tuple(values)
