# cython: language_level=3, boundscheck=False, wraparound=False
"""The idle tracker of `proxy/wire/activity.py`, compiled: the same state, the same steps.

For: lanes, which have a read in a buffer and make no object of it. What is tracked, and why, is
described there. A step that changes there changes here; `tests/native` drives both with the same
reads and compares them after each.
"""

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_FromStringAndSize

from proxy.wire.activity import last_reports

cdef int _HEADER_BYTES = 5
cdef int _LENGTH_MIN = 4
cdef int _READY_LENGTH = 5
cdef int _REPORTED_BYTES_MAX = 4096
cdef int _ENDS_MAX = 64
cdef Py_ssize_t _SYNC_LOST = 1 << 62
cdef Py_ssize_t _SKIP_MAX = 1 << 32


cdef inline Py_ssize_t _length(const unsigned char* header) noexcept nogil:
    """Return a message's length, which counts itself and not the type before it."""
    return (<Py_ssize_t>header[1] << 24) | (header[2] << 16) | (header[3] << 8) | header[4]


cdef unsigned char* _joined(
    const unsigned char* stub, int stub_bytes, const unsigned char* read, Py_ssize_t size
) except NULL:
    """Return the part of a header that came before, and the read. The caller frees it."""
    cdef unsigned char* joined = <unsigned char*>malloc(stub_bytes + size)
    if joined is NULL:
        raise MemoryError
    memcpy(joined, stub, stub_bytes)
    memcpy(joined + stub_bytes, read, size)
    return joined


# By type: the messages of the upstream that are noticed also while no COPY is tracked.
cdef unsigned char[256] _COPY_STARTS, _FOLLOWED
_COPY_STARTS[c"G"] = _COPY_STARTS[c"W"] = 1
_FOLLOWED[c"G"] = _FOLLOWED[c"W"] = _FOLLOWED[c"S"] = 1


cdef class Activity:
    """The state of one relayed session: proxy.wire.activity.Activity, compiled."""

    def __cinit__(self, *, bint walks_ahead=False) -> None:
        self._walks_ahead = walks_ahead
        self._noticed = &_FOLLOWED[0] if walks_ahead else &_COPY_STARTS[0]
        self.reported = b""
        self._status = b"I"
        self._ends = None  # a list from the first entry on

    @property
    def idle(self) -> bool:
        """Whether the session can end now without cutting an answer that the client waits for."""
        return (
            self._answered == self._sent
            and self._status == b"I"
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub_bytes)
            and not (self._upstream_skip or self._upstream_stub_bytes)
        )

    @property
    def in_transaction(self) -> bool:
        """Whether the session is within a transaction and everything was answered."""
        return (
            self._answered == self._sent
            and self._status != b"I"
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub_bytes)
            and not (self._upstream_skip or self._upstream_stub_bytes)
        )

    def client_sent(self, const unsigned char[::1] data) -> None:
        """Process a read from the client."""
        if data.shape[0]:
            self.client(&data[0], data.shape[0])

    def client_ahead(self, const unsigned char[::1] data) -> bytes:
        """Process a read from the client before it is sent. Return what is to be sent."""
        if not data.shape[0]:
            return b""
        cdef Py_ssize_t sent = self.ahead(&data[0], data.shape[0])
        ahead = PyBytes_FromStringAndSize(<const char*>&data[0], sent)
        if self.released_bytes:
            ahead = self.released[: self.released_bytes] + ahead
        return ahead

    def upstream_sent(self, const unsigned char[::1] data) -> None:
        """Process a read from the upstream."""
        if data.shape[0]:
            self.upstream(&data[0], data.shape[0])

    @property
    def reusable(self) -> bool:
        """Whether the upstream session can serve another client: all is answered (P12)."""
        return self._is_quiet() and (self.withheld or self.idle)

    cdef bint _is_quiet(self) noexcept:
        return (
            self._answered == self._sent
            and self._status == b"I"
            and not (self._unsynced or self._lost or self._tracks_copy)
            and not (self._upstream_skip or self._upstream_stub_bytes)
        )

    @property
    def streaming(self) -> bool:
        """Whether the session is a replication stream between two messages."""
        return (
            self._copy_both
            and self._answered + 1 == self._sent
            and not (self._unsynced or self._lost or self.terminated)
            and not (self._client_skip or self._client_stub_bytes)
            and not (self._upstream_skip or self._upstream_stub_bytes)
        )

    @property
    def awaits_answer(self) -> bool:
        """Whether a request has had no ReadyForQuery; false where that cannot be known."""
        left_stream = self._copy_both and self.terminated  # the stream has no other answer
        return self._sent - self._answered > self._doubt + left_stream and not self._lost

    @property
    def copying(self) -> bool:
        """Whether the client sends COPY data and has not ended it: the command cannot commit."""
        followed = max(self._client_skip, self._upstream_skip) <= _SKIP_MAX
        return self._copying and followed and not self._lost

    # -- the client's stream ---------------------------------------------------------------------

    cdef Py_ssize_t ahead(self, const unsigned char* read, Py_ssize_t size) except -1:
        """Return how much of the read is to be sent, after `released_bytes` of `released`."""
        cdef int stub_bytes = self._client_stub_bytes, left
        cdef Py_ssize_t position = self._client_skip
        cdef unsigned char stub[8]
        self.released_bytes = 0
        if self.withheld:
            return 0
        memcpy(stub, self._client_stub, 8)
        self.client(read, size)
        if self.terminated:
            return self._up_to_terminate(stub, stub_bytes, position, read, size)
        left = self._client_stub_bytes
        if left and self._client_stub[0] == b"X":
            return size - left if size > left else 0
        return size

    cdef Py_ssize_t _up_to_terminate(
        self, const unsigned char* stub, int stub_bytes, Py_ssize_t position,
        const unsigned char* read, Py_ssize_t size
    ) except -1:
        if position > _SKIP_MAX:
            return size
        cdef unsigned char* joined = _joined(stub, stub_bytes, read, size)
        while joined[position] != b"X":
            position += _length(joined + position) + 1
        self.withheld = self._is_quiet() and _length(joined + position) == _LENGTH_MIN
        free(joined)
        if self.withheld:
            return position - stub_bytes if position > stub_bytes else 0
        if stub_bytes and stub[0] == b"X":
            memcpy(self.released, stub, stub_bytes)
            self.released_bytes = stub_bytes
        return size

    cdef int client(self, const unsigned char* read, Py_ssize_t size) except -1:
        if self._client_stub_bytes == 0:
            return self._walk_client(read, size)
        cdef int stub = self._client_stub_bytes
        cdef unsigned char* joined = _joined(self._client_stub, stub, read, size)
        self._client_stub_bytes = 0
        try:
            return self._walk_client(joined, stub + size)
        finally:
            free(joined)

    cdef int _walk_client(self, const unsigned char* read, Py_ssize_t size) except -1:
        cdef Py_ssize_t position = self._client_skip, last = size - _HEADER_BYTES
        cdef bint unsynced = self._unsynced
        cdef int kind
        while position <= last:
            kind = read[position]
            position += _length(read + position) + 1
            if kind == b"d":
                pass
            elif kind == b"B" or kind == b"E" or kind == b"D" or kind == b"P" or kind == b"C":
                unsynced = True
                if self._tracks_copy:
                    self._on_request()
            elif kind == b"S":
                self._sent += 1
                if unsynced:
                    self._last_group = self._sent
                unsynced = False
                if self._tracks_copy:
                    self._on_sync()
            elif kind == b"Q" or kind == b"F":
                self._sent += 1
                self._last_query = self._sent
                if unsynced or self._tracks_copy:
                    self._on_query(unsynced)
            elif not self._is_known(kind, unsynced):
                position = _SYNC_LOST
        self._unsynced = unsynced
        if position < size:
            self._client_stub_bytes = <int>(size - position)
            memcpy(self._client_stub, read + position, size - position)
            self._client_skip = 0
        else:
            self._client_skip = position - size
        return 0

    cdef bint _is_known(self, int kind, bint unsynced) except -1:
        if kind == b"c" or kind == b"f":
            self._copy_both = False
            if self._copying:
                self._copying = False
            elif self._sent > self._answered or unsynced:
                if self._ends is None:
                    self._ends = []
                self._ends.append(self._sent)
                self._tracks_copy = True
                return len(self._ends) <= _ENDS_MAX
        elif kind == b"X":
            self.terminated = True
            return not self._walks_ahead
        else:
            return kind == b"H"
        return True

    cdef int _on_sync(self) except -1:
        if self._copying:
            self._doubt += 1
        self._settled = False
        return 0

    cdef int _on_query(self, bint unsynced) except -1:
        self._on_request()
        self._lost |= unsynced
        return 0

    cdef int _on_request(self) except -1:
        if self._copying:
            self._lost = True
        elif self._settled:
            self._renewed = True
        elif self._doubt and not self._renewed:
            self._lost = True
        return 0

    # -- the upstream's stream -------------------------------------------------------------------

    cdef int upstream(self, const unsigned char* read, Py_ssize_t size) except -1:
        if self._upstream_stub_bytes == 0:
            return self._walk_upstream(read, size)
        cdef int stub = self._upstream_stub_bytes
        cdef const unsigned char* cut = self._upstream_stub
        if stub < 0:
            stub, cut = <int>len(self._cut), <const unsigned char*>self._cut
        cdef unsigned char* joined = _joined(cut, stub, read, size)
        self._upstream_stub_bytes = 0
        try:
            return self._walk_upstream(joined, stub + size)
        finally:
            free(joined)

    cdef int _walk_upstream(self, const unsigned char* read, Py_ssize_t size) except -1:
        # A header alone is kept as a stub: the status of ReadyForQuery comes after it.
        cdef Py_ssize_t position = self._upstream_skip, end = size - _HEADER_BYTES, length
        cdef int kind
        while position < end:
            kind = read[position]
            length = _length(read + position)
            if kind == b"D" or kind == b"d":
                position += length + 1
                continue
            if kind == b"Z":
                self._status = read[position + _HEADER_BYTES]
                self._answered += 1
                if length != _READY_LENGTH or self._answered > self._sent:
                    length = _SYNC_LOST
                elif self._tracks_copy:
                    self._on_ready()
            elif length < _LENGTH_MIN:
                length = _SYNC_LOST
            elif self._tracks_copy or self._noticed[kind]:
                if kind == b"S" and self._is_cut(read + position, size - position, length):
                    break
                self._on_reply(kind)
            position += length + 1
        if position >= size:
            self._upstream_skip = position - size
        elif position < end:
            self._cut = PyBytes_FromStringAndSize(<const char*>read + position, size - position)
            self._upstream_stub_bytes = -1
            self._upstream_skip = 0
        else:
            self._upstream_stub_bytes = <int>(size - position)
            memcpy(self._upstream_stub, read + position, size - position)
            self._upstream_skip = 0
        return 0

    cdef bint _is_cut(
        self, const unsigned char* message, Py_ssize_t size, Py_ssize_t length
    ) except -1:
        if not self._walks_ahead or self.reported is None:
            return False
        if len(self.reported) + 1 + length > _REPORTED_BYTES_MAX:
            self.reported = last_reports(self.reported)
        if self.reported is None or len(self.reported) + 1 + length > _REPORTED_BYTES_MAX:
            self.reported = None
        elif length + 1 > size:
            return True
        else:
            self.reported += PyBytes_FromStringAndSize(<const char*>message, length + 1)
        return False

    cdef int _on_ready(self) except -1:
        cdef long long unanswered = self._sent - self._answered
        if self._renewed:
            self._doubt -= 1
        self._doubt = min(self._doubt, unanswered)
        self._entered = self._copying = self._copy_both = False
        if not unanswered and not self._unsynced:
            self._ends = None
        if not self._doubt:
            self._end_doubt()
        elif unanswered == self._doubt:
            self._settled = True
        return 0

    cdef int _on_reply(self, int kind) except -1:
        if kind == b"N" or kind == b"S" or kind == b"A":
            return 0
        if self._renewed:
            self._answered += self._doubt
            self._end_doubt()
        if kind == b"G":
            self._copy_began()
        elif kind == b"W":
            self._copy_both = self._tracks_copy = True
        elif self._copy_both:
            self._copy_both = kind != b"c" and kind != b"C" and kind != b"E"
        elif self._entered and kind == b"C":
            self._answered += self._doubt
            self._unsynced |= self._answered == self._sent
            self._entered = self._copying = False
            self._end_doubt()
        elif self._entered and kind == b"E":
            self._entered = self._copying = False
            if not self._doubt:
                self._end_doubt()
        return 0

    cdef int _copy_began(self) except -1:
        cdef long long end, own, asked
        ends = self._ends or []
        while ends and ends[0] < self._answered:
            del ends[0]
        self._copying = not ends
        end = ends.pop(0) if ends else self._sent
        own = self._answered + 1
        self._doubt = max(0, end - max(self._answered, self._last_query))
        asked = self._sent + 1 if self._unsynced else max(self._last_query, self._last_group)
        self._lost |= self._doubt > 0 and asked > own
        self._entered = self._tracks_copy = True
        return 0

    cdef int _end_doubt(self) except -1:
        self._doubt = 0
        self._settled = self._renewed = False
        self._tracks_copy = self._entered or bool(self._ends)
        return 0
