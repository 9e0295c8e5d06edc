"""Whether a relayed session is idle, derived from the message headers of both directions.

For: deciding when a session can be ended without cutting an answer (W47). Not for: interpreting
messages; payloads are skipped. The invariant: `idle` is true only if every expected ReadyForQuery
of the upstream has arrived, the last one had status `I`, and both streams are between two messages.
If that cannot be determined, the session counts as busy for the rest of its life: a drain ends it
at the deadline only, and the idle timeout never.

The tracker counts the ReadyForQuery messages that the upstream still has to send: one for each
Query, FunctionCall and Sync. For nearly every session that is all, and the two short loops do it.
The rest of the code is about Syncs that may have no answer: while the upstream receives COPY data,
it ignores Sync (PostgreSQL documentation, "COPY Operations"). A Sync that was sent between the
command that CopyInResponse answers and the end of the data is *in doubt*: if the COPY succeeds,
which CommandComplete reports, it is ignored; if the COPY fails, it is answered or not, depending on
how far the upstream had read.

So the count is an upper bound: `_doubt` of the counted messages may never come. The session is idle
when the bound is reached. Remaining doubt ends with the next request: when everything certain has
been answered and a request is sent after that, the first answer other than a bare ReadyForQuery
belongs to that request, and no earlier Sync is in doubt any more.

This is correct as long as the client sends nothing but bare Syncs between the COPY and that
request. Two cases are not tracked, and make the session busy: another request among those Syncs;
and a Query that follows extended-query messages without a Sync between, which the upstream skips if
one of them fails. No known driver sends either.

A session of a pool is walked before its reads are sent (`client_ahead`), so that a Terminate can be
withheld: the upstream session then serves another client. What the upstream reports meanwhile is
kept, the last of each name, for the comparison after the reset: a server says only once that it has
become a standby.

`proxy/native/activity.pyx` is the same algorithm, compiled. A change here must be made there too;
`tests/native` compares the two.

Reference: PostgreSQL documentation, "Message Flow".
"""

from struct import Struct
from typing import Final

from proxy.wire.messages import IDLE

_HEADER: Final = Struct("!BI").unpack_from
_HEADER_BYTES: Final = 5
_LENGTH_MIN: Final = 4  # the length counts itself
_READY_LENGTH: Final = 5
# Bound on CopyDone and CopyFail messages sent before the upstream's CopyInResponse. Clients send
# one or two at most; beyond this bound the session counts as busy.
_ENDS_MAX: Final = 64

# The parse position after message synchronization is lost. No read reaches it, so the session
# stays busy.
_SYNC_LOST: Final = 1 << 62

_SKIP_MAX: Final = 1 << 32  # of a message; beyond it synchronization is lost
# What is kept of ParameterStatus, of which the last of each name counts. There are some 15 names,
# and values are words; beyond it nothing is known of them.
REPORTED_BYTES_MAX: Final = 4096
# So much must be free once only the last ones are left, so that they are not looked for each time.
_REPORTED_BYTES_FREE: Final = 1024

_IDLE: Final = IDLE[0]
# From the client.
_QUERY: Final = ord("Q")
_FUNCTION_CALL: Final = ord("F")
_SYNC: Final = ord("S")
_COPY_DATA: Final = ord("d")  # in both directions
_FLUSH: Final = ord("H")
_TERMINATE: Final = ord("X")
_TERMINATE_STUB: Final = b"X"
_WORK: Final = frozenset(b"BEDPC")  # Bind, Execute, Describe, Parse, Close: a Sync must follow
_COPY_ENDS: Final = frozenset(b"cf")  # CopyDone, CopyFail
# From the upstream.
_DATA_ROW: Final = ord("D")
_READY: Final = ord("Z")
_COPY_IN: Final = ord("G")
_COPY_BOTH: Final = ord("W")
_PARAMETER: Final = ord("S")
_COPY_STARTS: Final = frozenset((_COPY_IN, _COPY_BOTH))
_FOLLOWED: Final = _COPY_STARTS | {_PARAMETER}
_COPY_DONE: Final = ord("c")
_COMPLETE: Final = ord("C")
_ERROR: Final = ord("E")
_STREAM_ENDS: Final = frozenset((_COPY_DONE, _COMPLETE, _ERROR))
# NoticeResponse, ParameterStatus, NotificationResponse: they are no answer to a request.
_ASYNCHRONOUS: Final = frozenset(b"NSA")


class Activity:
    """Tracks whether one relayed session is idle, from each read of each side in order of arrival.

    Create it when the upstream's first ReadyForQuery has been read, and no byte after it.
    """

    __slots__ = (
        "_answered",
        "_client_skip",
        "_client_stub",
        "_copy_both",
        "_copying",
        "_doubt",
        "_ends",
        "_entered",
        "_last_group",
        "_last_query",
        "_lost",
        "_noticed",
        "_renewed",
        "_sent",
        "_settled",
        "_status",
        "_tracks_copy",
        "_unsynced",
        "_upstream_skip",
        "_upstream_stub",
        "_walks_ahead",
        "reported",
        "terminated",
        "withheld",
    )

    def __init__(self, *, walks_ahead: bool = False) -> None:
        """With `walks_ahead` each read of the client goes through `client_ahead`."""
        self._walks_ahead = walks_ahead
        self._noticed = _FOLLOWED if walks_ahead else _COPY_STARTS
        self.reported: bytes | None = b""
        """The ParameterStatus messages so far, with `walks_ahead`; None if they were too many.

        An earlier one of the same name may be missing.
        """
        self.terminated = False
        """The client has sent Terminate."""
        self.withheld = False
        """It was withheld from the upstream: `client_ahead` returned nothing of it."""
        self._lost = False  # the session cannot be tracked any more: it counts as busy
        # Bytes of the current message still to come, and the received part of an incomplete header.
        self._client_skip = self._upstream_skip = 0
        self._client_stub = self._upstream_stub = b""
        # Sync points sent, and those answered or ignored; both counted from the session's start.
        self._sent = self._answered = 0
        # The number of the last Query, and of the last Sync that ended extended-query messages.
        self._last_query = self._last_group = 0
        self._unsynced = False  # extended-query messages were sent, and no sync point after them
        self._status = _IDLE
        # The following is in use only if there is COPY data or doubt: then `_tracks_copy` is true.
        self._tracks_copy = False
        self._entered = False  # CopyInResponse came, and neither its completion nor its error
        self._copying = False  # the same, and the client has not sent the end of the data
        self._copy_both = False  # CopyBothResponse came, and neither side has ended the stream
        self._ends: list[int] = []  # `_sent` at each end of COPY data sent before CopyInResponse
        self._doubt = 0  # how many of the unanswered sync points may never be answered
        self._settled = False  # everything certain has been answered, and something is in doubt
        self._renewed = False  # `_settled`, and a request was sent after that

    @property
    def idle(self) -> bool:
        """Whether the session can end now without cutting an answer that the client waits for."""
        return (
            self._answered == self._sent
            and self._status == _IDLE
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub)
            and not (self._upstream_skip or self._upstream_stub)
        )

    @property
    def in_transaction(self) -> bool:
        """Whether the session is within a transaction and everything was answered."""
        return (
            self._answered == self._sent
            and self._status != _IDLE
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub)
            and not (self._upstream_skip or self._upstream_stub)
        )

    @property
    def reusable(self) -> bool:
        """Whether the upstream session can serve another client: all is answered (P12).

        It is idle, or was when the Terminate came that was withheld.
        """
        return self._is_quiet() and (self.idle or self.withheld)

    def _is_quiet(self) -> bool:
        """Return whether nothing is owed for the messages that the client has completed."""
        return (
            self._answered == self._sent
            and self._status == _IDLE
            and not (self._unsynced or self._lost or self._tracks_copy)
            and not (self._upstream_skip or self._upstream_stub)
        )

    @property
    def streaming(self) -> bool:
        """Whether the session is a replication stream between two messages.

        PostgreSQL ends such a stream at any time, as its fast shutdown does: no answer is owed but
        that of START_REPLICATION, which comes at the stream's end.
        """
        return (
            self._copy_both
            and self._answered + 1 == self._sent
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub)
            and not (self._upstream_skip or self._upstream_stub)
        )

    @property
    def awaits_answer(self) -> bool:
        """Whether a request has had no ReadyForQuery; false where that cannot be known.

        A Terminate ends a replication stream, and the request that began it has no other answer.
        """
        left_stream = self._copy_both and self.terminated
        return self._sent - self._answered > self._doubt + left_stream and not self._lost

    @property
    def copying(self) -> bool:
        """Whether the client sends COPY data and has not ended it: the command cannot commit."""
        followed = max(self._client_skip, self._upstream_skip) <= _SKIP_MAX
        return self._copying and followed and not self._lost

    # -- the client's stream ---------------------------------------------------------------------

    def client_ahead(self, data: bytes) -> bytes:
        """Process a read from the client before it is sent. Return what is to be sent (P13).

        That is all of it, but for a Terminate while nothing is owed, with all that follows; and a
        cut header that begins as a Terminate does, which is returned with the next read.
        """
        if self.withheld:
            return b""
        stub, position = self._client_stub, self._client_skip
        self.client_sent(data)
        if self.terminated:
            return self._up_to_terminate(stub, position, data)
        # A stub that begins so is a header of its own: its first byte was read at a boundary.
        if self._client_stub and self._client_stub[0] == _TERMINATE:
            return data[: max(0, len(data) - len(self._client_stub))]
        return data

    def _up_to_terminate(self, stub: bytes, position: int, data: bytes) -> bytes:
        """Return what is to be sent of the read that completes the header of a Terminate.

        `stub` and `position` are those of before the read.
        """
        if position > _SKIP_MAX:
            return data  # it was sent before
        joined = stub + data
        while joined[position] != _TERMINATE:
            position += 1 + _HEADER(joined, position)[1]
        # Another length is an error, or content that is not defined: the upstream answers it.
        if self._is_quiet() and _HEADER(joined, position)[1] == _LENGTH_MIN:
            self.withheld = True
            return joined[len(stub) : position]
        return joined if stub[:1] == _TERMINATE_STUB else data

    def client_sent(self, data: bytes) -> None:
        """Process a read from the client."""
        if self._client_stub:
            data = self._client_stub + data
            self._client_stub = b""
        position, size = self._client_skip, len(data)
        last = size - _HEADER_BYTES
        unsynced = self._unsynced
        while position <= last:
            kind, length = _HEADER(data, position)
            position += length + 1
            if kind == _COPY_DATA:
                pass
            elif kind in _WORK:
                unsynced = True
                if self._tracks_copy:
                    self._on_request()
            elif kind == _SYNC:
                self._sent = sent = self._sent + 1
                self._last_group = sent if unsynced else self._last_group
                unsynced = False
                if self._tracks_copy:
                    self._on_sync()
            elif kind == _QUERY or kind == _FUNCTION_CALL:  # noqa: PLR1714, SIM109 - faster
                self._sent = self._last_query = self._sent + 1
                if unsynced or self._tracks_copy:
                    self._on_query(unsynced=unsynced)
            elif not self._is_known(kind, unsynced=unsynced):
                # A length below 4 ends here too: the next byte, part of the length, is no type.
                position = _SYNC_LOST
        self._unsynced = unsynced
        if position < size:
            self._client_stub = data[position:]
            self._client_skip = 0
        else:
            self._client_skip = position - size

    def _is_known(self, kind: int, *, unsynced: bool) -> bool:
        """Process a message that is neither a request nor data; return False for unknown types."""
        if kind in _COPY_ENDS:
            self._copy_both = False
            if self._copying:
                self._copying = False
            elif self._sent > self._answered or unsynced:
                self._ends.append(self._sent)
                self._tracks_copy = True
                return len(self._ends) <= _ENDS_MAX
            # else: PostgreSQL ignores it, as the late end of a COPY that has failed.
        elif kind == _TERMINATE:
            self.terminated = True
            return not self._walks_ahead  # the upstream reads nothing that follows
        else:
            return kind == _FLUSH
        return True

    def _on_sync(self) -> None:
        if self._copying:
            self._doubt += 1
        self._settled = False

    def _on_query(self, *, unsynced: bool) -> None:
        self._on_request()
        self._lost |= unsynced

    def _on_request(self) -> None:
        """Record a request that is sent while `_tracks_copy` is true."""
        if self._copying:
            self._lost = True  # not allowed within COPY data
        elif self._settled:
            self._renewed = True
        elif self._doubt and not self._renewed:
            self._lost = True

    # -- the upstream's stream -------------------------------------------------------------------

    def upstream_sent(self, data: bytes) -> None:
        """Process a read from the upstream."""
        if self._upstream_stub:
            data = self._upstream_stub + data
            self._upstream_stub = b""
        position, size = self._upstream_skip, len(data)
        # A header alone is kept for the next read: the status of ReadyForQuery follows its header.
        end = size - _HEADER_BYTES
        while position < end:
            kind, length = _HEADER(data, position)
            if kind == _DATA_ROW or kind == _COPY_DATA:  # noqa: PLR1714, SIM109 - faster
                position += length + 1
                continue
            if kind == _READY:
                self._status = data[position + _HEADER_BYTES]
                self._answered += 1
                if length != _READY_LENGTH or self._answered > self._sent:
                    length = _SYNC_LOST
                elif self._tracks_copy:
                    self._on_ready()
            elif length < _LENGTH_MIN:
                length = _SYNC_LOST
            elif self._tracks_copy or kind in self._noticed:
                if kind == _PARAMETER and self._is_cut(data, position, length):
                    break  # it is walked again with the next read
                self._on_reply(kind)
            position += length + 1
        if position < size:
            self._upstream_stub = data[position:]
            self._upstream_skip = 0
        else:
            self._upstream_skip = position - size

    def _is_cut(self, data: bytes, position: int, length: int) -> bool:
        """Keep a ParameterStatus. Return whether it has to be kept, and its end has not come."""
        if not self._walks_ahead or self.reported is None:
            return False
        end = position + 1 + length
        if len(self.reported) + 1 + length > REPORTED_BYTES_MAX:
            self.reported = last_reports(self.reported)
        if self.reported is None or len(self.reported) + 1 + length > REPORTED_BYTES_MAX:
            self.reported = None
        elif end > len(data):
            return True
        else:
            self.reported += data[position:end]
        return False

    def _on_ready(self) -> None:
        """Process a ReadyForQuery while `_tracks_copy` is true."""
        unanswered = self._sent - self._answered
        if self._renewed:
            # It came before any answer to the new request, so it answers a Sync that was in doubt.
            self._doubt -= 1
        self._doubt = min(self._doubt, unanswered)
        self._entered = self._copying = self._copy_both = False
        if not unanswered and not self._unsynced:
            self._ends.clear()
        if not self._doubt:
            self._end_doubt()
        elif unanswered == self._doubt:
            self._settled = True

    def _on_reply(self, kind: int) -> None:
        """Process any other message that can resolve doubt."""
        if kind in _ASYNCHRONOUS:
            return
        if self._renewed:
            self._answered += self._doubt
            self._end_doubt()
        if kind == _COPY_IN:
            self._copy_began()
        elif kind == _COPY_BOTH:
            self._copy_both = self._tracks_copy = True
        elif self._copy_both:
            self._copy_both = kind not in _STREAM_ENDS
        elif self._entered and kind == _COMPLETE:
            self._answered += self._doubt  # the upstream ignored them while it read the data
            # The COPY's own Sync was among them: its transaction waits for another one.
            self._unsynced |= self._answered == self._sent
            self._entered = self._copying = False
            self._end_doubt()
        elif self._entered and kind == _ERROR:
            self._entered = self._copying = False
            if not self._doubt:
                self._end_doubt()

    def _copy_began(self) -> None:
        """Start a COPY from the client. Its data, and their end, may have been sent already."""
        while self._ends and self._ends[0] < self._answered:
            del self._ends[0]  # the late end of a COPY that has failed
        self._copying = not self._ends
        end = self._ends.pop(0) if self._ends else self._sent
        own = self._answered + 1  # the sync point that the COPY itself belongs to
        # The ReadyForQuery of a Query is sent whether the COPY succeeds or fails.
        self._doubt = max(0, end - max(self._answered, self._last_query))
        asked = self._sent + 1 if self._unsynced else max(self._last_query, self._last_group)
        self._lost |= self._doubt > 0 and asked > own
        self._entered = self._tracks_copy = True

    def _end_doubt(self) -> None:
        """Clear doubt that has been resolved."""
        self._doubt = 0
        self._settled = self._renewed = False
        self._tracks_copy = self._entered or bool(self._ends)


def last_reports(messages: bytes) -> bytes | None:
    """Return of whole ParameterStatus messages the last one of each name; None for too many."""
    last: dict[bytes, bytes] = {}
    position = 0
    while position < len(messages):
        end = position + 1 + _HEADER(messages, position)[1]
        name, _, _ = messages[position + _HEADER_BYTES : end].partition(b"\0")
        last[name] = messages[position:end]
        position = end
    kept = b"".join(last.values())
    return kept if len(kept) <= REPORTED_BYTES_MAX - _REPORTED_BYTES_FREE else None
