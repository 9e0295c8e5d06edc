"""Whether a relayed session is idle, read off the message headers of both directions.

For: knowing when a session can be ended without cutting an answer (W47). Not for: understanding
anything; payloads are skipped. The invariant: `idle` is true only if every ReadyForQuery that the
upstream owes has come, the last one said `I`, and both streams stand between two messages. Where
that cannot be known the session is busy: for ever, which means that a drain ends it at its deadline
and not before, and an idle timeout never.

What the upstream owes is counted: one ReadyForQuery for each Query, FunctionCall and Sync. That is
all there is to nearly every session, and what the two short loops do. The rest is about Syncs that
may have no answer: while the upstream takes COPY data it ignores Sync (PostgreSQL documentation,
"COPY Operations"). One that was sent between CopyInResponse's command and the end of the data is
*in doubt*: swallowed if the COPY succeeds (CommandComplete says so); if it fails, answered or not,
depending on how far the upstream had read.

So the count is an upper bound, of which `_doubt` may never be answered, and the session is idle
when the bound is reached. Doubt that is left behind ends with the next request: if everything that
is certain has been answered and then a request is sent, the first answer other than a bare
ReadyForQuery belongs to that request, and what was in doubt before it is settled.

That holds as long as nothing but bare Syncs is sent behind the COPY until then; a request among
them is not followed, nor is a Query behind extended messages without a Sync between, which is
skipped if one of those fails. No driver that is known to us sends either.

`proxy/native/activity.pyx` is the same once more, compiled: a step that is changed here is changed
there, and `tests/native` compares the two.

Reference: PostgreSQL documentation, "Message Flow".
"""

from struct import Struct
from typing import Final

from proxy.wire.messages import IDLE

_HEADER: Final = Struct("!BI").unpack_from
_HEADER_BYTES: Final = 5
_LENGTH_MIN: Final = 4  # the length counts itself
_READY_LENGTH: Final = 5
# Ends of COPY data that a client may send ahead of the upstream's go-ahead. None sends more than
# one or two; beyond this the session counts as busy.
_ENDS_MAX: Final = 64

# Where a walk goes that has lost its stream: no read comes that far, so the session stays busy.
_SYNC_LOST: Final = 1 << 62

_IDLE: Final = IDLE[0]
# From the client.
_QUERY: Final = ord("Q")
_FUNCTION_CALL: Final = ord("F")
_SYNC: Final = ord("S")
_COPY_DATA: Final = ord("d")  # in both directions
_FLUSH: Final = ord("H")
_TERMINATE: Final = ord("X")
_WORK: Final = frozenset(b"BEDPC")  # Bind, Execute, Describe, Parse, Close: a Sync must follow
_COPY_ENDS: Final = frozenset(b"cf")  # CopyDone, CopyFail
# From the upstream.
_DATA_ROW: Final = ord("D")
_READY: Final = ord("Z")
_COPY_IN: Final = ord("G")
_COMPLETE: Final = ord("C")
_ERROR: Final = ord("E")
_ASYNCHRONOUS: Final = frozenset(b"NSA")  # notice, parameter, notification: they answer nothing


class Activity:
    """One relayed session's state. Feed it each read of each side, in the order of arrival.

    It is made when the upstream has said its first ReadyForQuery and nothing behind it was read.
    """

    __slots__ = (
        "_answered",
        "_client_skip",
        "_client_stub",
        "_copying",
        "_doubt",
        "_ends",
        "_entered",
        "_last_group",
        "_last_query",
        "_lost",
        "_renewed",
        "_sent",
        "_settled",
        "_status",
        "_tracks_copy",
        "_unsynced",
        "_upstream_skip",
        "_upstream_stub",
        "terminated",
    )

    def __init__(self) -> None:
        self.terminated = False
        """The client has said Terminate."""
        self._lost = False  # what happens cannot be followed: busy for ever
        # Bytes of the present message still to come, and the part of a header that has come.
        self._client_skip = self._upstream_skip = 0
        self._client_stub = self._upstream_stub = b""
        # Sync points sent and those that are done with, both counted from the session's start.
        self._sent = self._answered = 0
        # Which of those sent was the last Query, and the last Sync that ended extended messages.
        self._last_query = self._last_group = 0
        self._unsynced = False  # extended messages have been sent that no sync point follows yet
        self._status = _IDLE
        # The rest is unused unless there is COPY data or doubt, which `_tracks_copy` says.
        self._tracks_copy = False
        self._entered = False  # CopyInResponse came, and neither its completion nor its error
        self._copying = False  # the same, and the client has not sent the end of the data
        self._ends: list[int] = []  # `_sent` at each end of COPY data that came before its response
        self._doubt = 0  # how many of those not answered yet may never be
        self._settled = False  # all that is certain has been answered, and something is in doubt
        self._renewed = False  # and then a request was sent

    @property
    def idle(self) -> bool:
        """Whether the session could end now without cutting anything that the client asked for."""
        return (
            self._answered == self._sent
            and self._status == _IDLE
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub)
            and not (self._upstream_skip or self._upstream_stub)
        )

    # -- the client's stream ---------------------------------------------------------------------

    def client_sent(self, data: bytes) -> None:
        """Take a read of the client's."""
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
                # A length below 4 leads here, too: the byte behind it, one of its own, is no type.
                position = _SYNC_LOST
        self._unsynced = unsynced
        if position < size:
            self._client_stub = data[position:]
            self._client_skip = 0
        else:
            self._client_skip = position - size

    def _is_known(self, kind: int, *, unsynced: bool) -> bool:
        """Take a message that asks for nothing and is no data; False if there is no such one."""
        if kind in _COPY_ENDS:
            if self._copying:
                self._copying = False
            elif self._sent > self._answered or unsynced:
                self._ends.append(self._sent)
                self._tracks_copy = True
                return len(self._ends) <= _ENDS_MAX
            # else: PostgreSQL ignores it, being the late end of a COPY that failed.
        elif kind == _TERMINATE:
            self.terminated = True
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
        """Note a request that is sent while something is odd."""
        if self._copying:
            self._lost = True  # not allowed among the data
        elif self._settled:
            self._renewed = True
        elif self._doubt and not self._renewed:
            self._lost = True

    # -- the upstream's stream -------------------------------------------------------------------

    def upstream_sent(self, data: bytes) -> None:
        """Take a read of the upstream's."""
        if self._upstream_stub:
            data = self._upstream_stub + data
            self._upstream_stub = b""
        position, size = self._upstream_skip, len(data)
        # A header alone is kept back as a stub: behind that of ReadyForQuery comes its status.
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
            elif self._tracks_copy or kind == _COPY_IN:
                self._on_reply(kind)
            position += length + 1
        if position < size:
            self._upstream_stub = data[position:]
            self._upstream_skip = 0
        else:
            self._upstream_skip = position - size

    def _on_ready(self) -> None:
        """Take a ReadyForQuery while something is odd."""
        owed = self._sent - self._answered
        if self._renewed:
            self._doubt -= 1  # it came before any answer to the new request: a late Sync's
        self._doubt = min(self._doubt, owed)
        self._entered = self._copying = False
        if not owed and not self._unsynced:
            self._ends.clear()
        if not self._doubt:
            self._end_doubt()
        elif owed == self._doubt:
            self._settled = True

    def _on_reply(self, kind: int) -> None:
        """Take any other message that could tell what became of what is in doubt."""
        if kind in _ASYNCHRONOUS:
            return
        if self._renewed:
            self._answered += self._doubt
            self._end_doubt()
        if kind == _COPY_IN:
            self._copy_began()
        elif self._entered and kind == _COMPLETE:
            self._answered += self._doubt  # the data's reader has swallowed them
            self._entered = self._copying = False
            self._end_doubt()
        elif self._entered and kind == _ERROR:
            self._entered = self._copying = False
            if not self._doubt:
                self._end_doubt()

    def _copy_began(self) -> None:
        """Begin a COPY of the client's, whose data and their end may have been sent already."""
        while self._ends and self._ends[0] < self._answered:
            del self._ends[0]  # the late end of a COPY that failed
        self._copying = not self._ends
        end = self._ends.pop(0) if self._ends else self._sent
        own = self._answered + 1  # the sync point that the COPY itself belongs to
        # A Query's own ReadyForQuery comes whatever the COPY does.
        self._doubt = max(0, end - max(self._answered, self._last_query))
        asked = self._sent + 1 if self._unsynced else max(self._last_query, self._last_group)
        self._lost |= self._doubt > 0 and asked > own
        self._entered = self._tracks_copy = True

    def _end_doubt(self) -> None:
        """Forget doubt that has been settled."""
        self._doubt = 0
        self._settled = self._renewed = False
        self._tracks_copy = self._entered or bool(self._ends)
