"""Whether a relayed session is idle: read off the message headers, never off the payloads.

A session is idle when every sync point that the client has sent (Query, Sync, FunctionCall) has
been answered by a ReadyForQuery, and the last of these said `I` (W47). Looking only at what the
upstream said last is wrong for a client that pipelines: the answer to its first Sync says `I` while
the second is being worked on.

Each direction is walked from header to header; a payload is skipped whatever its length, so a large
message costs nothing. `make bench` shows what the walk costs a transaction.

One rule goes beyond counting: while an upstream takes COPY data it ignores Sync (PostgreSQL
documentation, "COPY Operations"), so these will never be answered.
"""

from struct import Struct
from typing import Final

from proxy.wire.messages import IDLE

_HEADER: Final = Struct("!BI").unpack_from
_HEADER_BYTES: Final = 5

_SYNC: Final = b"S"
_COPY_END: Final = b"c"
_READY_FOR_QUERY: Final = ord("Z")
_COPY_RESPONSES: Final = b"GW"  # CopyInResponse, CopyBothResponse
_TERMINATE: Final = ord("X")
_SYNC_POINTS: Final = b"QSF"  # Query, Sync, FunctionCall
_COPY_ENDS: Final = b"cf"  # CopyDone, CopyFail
_UNSYNCED: Final = b"PBDECH"  # the extended protocol's work, which a sync point must follow


class Activity:
    """One relayed session's state. Feed it each read of each side, in order.

    It is made when the upstream has just said ReadyForQuery: both streams stand at a message's
    beginning.
    """

    __slots__ = (
        "_client_skip",
        "_client_stub",
        "_copying",
        "_pending",
        "_status",
        "_unsynced",
        "_upstream_skip",
        "_upstream_stub",
        "terminated",
    )

    def __init__(self) -> None:
        self.terminated = False  # the client has said Terminate
        # Bytes of the present message still to come, and the part of a header that has come.
        self._client_skip = self._upstream_skip = 0
        self._client_stub = self._upstream_stub = b""
        # Sync points not answered yet, oldest first; a `c` among them is an end of COPY data.
        self._pending = bytearray()
        self._unsynced = False
        self._copying = False
        self._status = IDLE

    @property
    def idle(self) -> bool:
        """Whether the session could end now without cutting anything that the client asked for."""
        return self._status == IDLE and not self.busy

    @property
    def busy(self) -> bool:
        """Whether the upstream may be working, or waits for the rest of what the client began.

        A session in a transaction whose last answer is complete is neither busy nor idle.
        """
        at_boundary = not (self._client_skip or self._client_stub)
        unanswered = self._pending.strip(_COPY_END)
        return bool(unanswered or self._unsynced or self._copying or not at_boundary)

    def client_sent(self, data: bytes) -> None:
        """Take a read of the client's."""
        position, size = self._client_skip, len(data)
        if self._client_stub:
            data, size = self._client_stub + data, size + len(self._client_stub)
            self._client_stub = b""
        while position + _HEADER_BYTES <= size:
            kind, length = _HEADER(data, position)
            if kind in _SYNC_POINTS:
                self._pending.append(kind)
                self._unsynced = False
            elif kind in _UNSYNCED:
                self._unsynced = True
            elif kind in _COPY_ENDS:
                self._pending += _COPY_END
            elif kind == _TERMINATE:
                self.terminated = True
            position += length + 1
        if position < size:
            self._client_stub = data[position:]
            position = size
        self._client_skip = position - size

    def upstream_sent(self, data: bytes) -> None:
        """Take a read of the upstream's."""
        position, size = self._upstream_skip, len(data)
        if self._upstream_stub:
            data, size = self._upstream_stub + data, size + len(self._upstream_stub)
            self._upstream_stub = b""
        # The last byte of a ReadyForQuery may come later than its header: then it is kept back.
        while position + _HEADER_BYTES < size:
            kind, length = _HEADER(data, position)
            if kind == _READY_FOR_QUERY:
                self._answered(data[position + _HEADER_BYTES : position + _HEADER_BYTES + 1])
            elif kind in _COPY_RESPONSES:
                self._copy_began()
            position += length + 1
        if position < size:
            self._upstream_stub = data[position:]
            position = size
        self._upstream_skip = position - size

    def _answered(self, status: bytes) -> None:
        self._status = status
        self._copying = False
        if len(self._pending) == 1:  # nearly always
            self._pending.clear()
        else:
            rest = self._pending.lstrip(_COPY_END)[1:]
            self._pending = rest.lstrip(_COPY_END)

    def _copy_began(self) -> None:
        """Forget the Syncs that the upstream reads while it takes COPY data: it ignores them."""
        self._copying = True
        end = self._pending.find(_COPY_END)
        end = len(self._pending) if end < 0 else end
        self._pending[:end] = self._pending[:end].replace(_SYNC, b"")
