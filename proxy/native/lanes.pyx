# cython: language_level=3, boundscheck=False, wraparound=False
"""Lanes, the fast path of the relay: reads go from socket to socket without a Python object.

For: the ordinary read, which is received, decrypted or encrypted, sent completely, and counted. Not
for: anything else. What the kernel does not take goes to the sink's transport. At the end of a
stream, an error or a message of TLS itself the lane closes and leaves the connection to transports
and protocols (`proxy/session/fast_path.py`), so that each such case is handled once, in Python.

A lane reads the socket of a transport whose reading is paused. Both are in one thread. A descriptor
is closed only after `connection_lost`, in which the relay has closed its lanes.

`Lanes` is one epoll set, which the event loop watches as one descriptor: one call carries all that
is ready. All lanes share two buffers, which are empty between two reads: a session holds none.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from cpython.array cimport array
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno

from proxy.native cimport openssl
from proxy.native.activity cimport Activity
from proxy.native.tls cimport TLSConnection

cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        int fd

    struct epoll_event:
        uint32_t events
        epoll_data_t data

    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_DEL
    uint32_t EPOLLIN
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int descriptor, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int events_max, int milliseconds)

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int descriptor, void* into, size_t size, int flags)
    ssize_t send(int descriptor, const void* source, size_t size, int flags)
    int MSG_NOSIGNAL

cdef extern from "unistd.h" nogil:
    int c_close "close"(int descriptor)

# Large enough for COPY, small enough for a CPU cache.
cdef Py_ssize_t _READ_BYTES = 256 * 1024
cdef int _WITHHELD_BYTES_MAX = 4  # of a header
# A read, and the part of a record that came before it (RFC 8446: records are longer than their
# plaintext).
cdef Py_ssize_t _PLAIN_BYTES = 256 * 1024 + 2 * 16 * 1024
# The bounds of one `run_ready`, for which everything else in the process waits.
cdef enum:
    _EVENTS_MAX = 64  # of one poll
cdef int _POLLS_MAX = 3
cdef Py_ssize_t _RUN_BYTES_MAX = 1024 * 1024


cdef class Lanes:
    """The lanes of one event loop, which watches `fileno` and calls `run_ready`.

    Raises OSError if there is no descriptor left.
    """

    cdef int _epoll
    cdef dict _by_descriptor
    cdef char* _read
    cdef char* _plain

    def __cinit__(self) -> None:
        self._epoll = -1
        self._by_descriptor = {}
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            PyErr_SetFromErrno(OSError)
        self._read = <char*>malloc(_READ_BYTES)
        self._plain = <char*>malloc(_PLAIN_BYTES)
        if self._read is NULL or self._plain is NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self._read)
        free(self._plain)
        self.close()

    cpdef close(self):
        """Close the epoll set. No lane can be opened any more."""
        if self._epoll >= 0:
            c_close(self._epoll)
            self._epoll = -1

    def __len__(self) -> int:
        return len(self._by_descriptor)

    def fileno(self) -> int:
        """Return the descriptor that is readable when the source of a lane is."""
        return self._epoll

    def run_ready(self) -> None:
        """Carry what is ready, and what becomes ready meanwhile."""
        cdef epoll_event events[_EVENTS_MAX]
        cdef Py_ssize_t carried = 0
        cdef int count, number
        cdef Lane lane
        for _ in range(_POLLS_MAX):
            count = epoll_wait(self._epoll, events, _EVENTS_MAX, 0)
            openssl.ERR_clear_error()  # the queue is the thread's: others may have left errors
            for number in range(count):
                # Carrying one event may close the lane of another one.
                lane = <Lane>self._by_descriptor.get(events[number].data.fd)
                if lane is not None:
                    carried += lane.carry_or_end(self._read, self._plain)
            # With one session alone nothing is ready again yet: its peer has just been woken.
            if count < 2 or carried > _RUN_BYTES_MAX:
                return

    cdef int add(self, Lane lane) except -1:
        cdef epoll_event event
        event.events = EPOLLIN
        event.data.fd = lane.source
        self._by_descriptor[lane.source] = lane
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, lane.source, &event) < 0:
            del self._by_descriptor[lane.source]
            PyErr_SetFromErrno(OSError)
        return 0

    cdef int remove(self, Lane lane) except -1:
        cdef epoll_event event  # kernels before 2.6.9 require one
        if self._by_descriptor.get(lane.source) is not lane:
            return 0  # the descriptor was closed, and its number belongs to another lane now
        del self._by_descriptor[lane.source]
        epoll_ctl(self._epoll, EPOLL_CTL_DEL, lane.source, &event)
        return 0


cdef class Lane:
    """One direction of a session: from the socket `source` to the socket `sink`.

    `source_tls` is the TLS of the source, `sink_tls` that of the sink; None is plain. What is
    carried is added to `total`, an `array("Q")` of one number. The owner's `overflow` is called
    with what the kernel did not take, which has to be sent before anything else: the lane has to be
    paused while the sink is full. Its `lane_ended` is called once, when the lane has closed itself:
    with None if the transport has to read on, else with the error by which the connection ends. Its
    `client_left` is that of an `AheadLane`.
    """

    cdef readonly unsigned long long carried_bytes
    """The plain bytes carried."""
    cdef readonly bint paused
    cdef int source
    cdef int _sink
    cdef Lanes _lanes
    cdef TLSConnection _source_tls
    cdef TLSConnection _sink_tls
    cdef Activity _activity
    cdef array _total
    cdef bint _is_upstream
    cdef bint _closed
    cdef object _owner

    def __init__(
        self,
        Lanes lanes not None,
        int source,
        int sink,
        *,
        TLSConnection source_tls,
        TLSConnection sink_tls,
        Activity activity not None,
        array total not None,
        bint from_upstream,
        owner,
        bint paused,
    ) -> None:
        self._lanes = lanes
        self.source, self._sink = source, sink
        self._source_tls, self._sink_tls = source_tls, sink_tls
        self._activity, self._is_upstream = activity, from_upstream
        assert total.typecode == "Q" and len(total) == 1
        self._total, self._owner = total, owner
        self.paused = paused
        if sink_tls is not None:
            sink_tls.ciphertext.blocked = paused
        if not paused:
            lanes.add(self)

    def pause(self) -> None:
        """Stop reading the source, because the sink is full."""
        if self._closed or self.paused:
            return
        self.paused = True
        if self._sink_tls is not None:
            self._sink_tls.ciphertext.blocked = True
        self._lanes.remove(self)

    def resume(self) -> None:
        """Read the source again."""
        if self._closed or not self.paused:
            return
        try:
            self._lanes.add(self)
        except OSError as error:
            self._end(error)
            return
        self.paused = False
        if self._sink_tls is not None:
            self._sink_tls.ciphertext.blocked = False

    def close(self) -> None:
        """Close the lane. It uses neither socket any more."""
        if self._closed:
            return
        self._closed = True
        if not self.paused:
            self._lanes.remove(self)
        self._owner = None

    # -- one read --------------------------------------------------------------------------------

    cdef Py_ssize_t carry_or_end(self, char* read, char* plain) except -1:
        """Carry one read. A bug, or a lack of memory, ends its own session only."""
        try:
            return self._carry(read, plain)
        except Exception as error:
            if self._closed:
                raise
            self._end(error)
            return 0

    cdef Py_ssize_t _carry(self, char* read, char* plain) except -1:
        """Carry one read. Return its size."""
        cdef Py_ssize_t size = recv(self.source, read, _READ_BYTES, 0)
        if size < 0:
            if errno != EAGAIN and errno != EINTR:
                self._end(ConnectionResetError(errno, "lost"))
            return 0
        if size == 0:
            self._end(None)
            return 0
        if self._source_tls is not None:
            self._decrypt_and_send(read, plain, size)
        elif self._sink_tls is not None:
            self._encrypt_and_send(read, size)
        else:
            self._send(read, size)
        return size

    cdef int _send(self, char* plain, Py_ssize_t size) except -1:
        """Send plain bytes, and count them."""
        cdef ssize_t sent = 0
        if not self.paused:
            sent = send(self._sink, plain, size, MSG_NOSIGNAL)
            if sent < 0:
                sent = 0  # full or lost: the transport will find out
        if sent < size:
            self._overflow(PyBytes_FromStringAndSize(plain + sent, size - sent))
        return self._count(plain, size)

    cdef int _encrypt_and_send(self, char* plain, Py_ssize_t size) except -1:
        """Encrypt plain bytes, send and count them."""
        cdef TLSConnection tls = self._sink_tls
        cdef Py_ssize_t done = 0
        cdef int taken
        tls.ciphertext.sink = self._sink
        while done < size:
            taken = openssl.SSL_write(tls.ssl, plain + done, <int>(size - done))
            if taken <= 0:
                break
            done += taken
        tls.ciphertext.sink = -1
        if done < size:
            self._end(tls.failure(taken))
            return 0
        if tls.ciphertext.pending_out_bytes:
            self._overflow(tls.take_pending_out())
        return self._count(plain, size)

    cdef int _decrypt_and_send(self, char* read, char* plain, Py_ssize_t size) except -1:
        """Decrypt all complete records, send and count what they hold."""
        cdef TLSConnection tls = self._source_tls
        cdef Py_ssize_t done = 0, left
        cdef int taken
        tls.ciphertext.input = read
        tls.ciphertext.input_bytes = size
        while True:
            taken = openssl.SSL_read(tls.ssl, plain + done, <int>(_PLAIN_BYTES - done))
            if taken <= 0:
                break
            done += taken
            if tls.ciphertext.input_bytes == 0 and openssl.SSL_pending(tls.ssl) == 0:
                break  # most answers end with their read: this saves a call that finds nothing
        left = tls.ciphertext.input_bytes
        tls.ciphertext.input_bytes = 0  # before anything can fail: the buffer is shared
        error = None
        if taken <= 0 and (left or openssl.SSL_want(tls.ssl) != openssl.SSL_READING):
            error = tls.failure(taken)
        if done:
            self._send(plain, done)
        if error is not None or tls.ciphertext.pending_out_bytes:
            self._end(error)  # TLS has a message of its own to send, or its stream has ended
        return 0

    cdef int _count(self, char* plain, Py_ssize_t size) except -1:
        self.carried_bytes += size
        self._total.data.as_ulonglongs[0] += size
        if self._is_upstream:
            return self._activity.upstream(<const unsigned char*>plain, size)
        return self._activity.client(<const unsigned char*>plain, size)

    cdef int _overflow(self, rest) except -1:
        self._owner.overflow(rest)
        openssl.ERR_clear_error()
        return 0

    cdef int _end(self, error) except -1:
        if not self._closed:
            owner = self._owner
            self.close()
            owner.lane_ended(error)
            openssl.ERR_clear_error()
        return 0


cdef class AheadLane(Lane):
    """The lane from the client of a session whose upstream is kept; its source is plain.

    It walks what it has read before it sends it. Its owner's `client_left` is called once, after a
    Terminate that was withheld: then the lane has closed itself.
    """

    cdef Py_ssize_t _carry(self, char* read, char* plain) except -1:
        """Carry one read, but for what is withheld. Return its size."""
        # What was withheld of a header is put in front of the read that completes it.
        cdef char* into = read + _WITHHELD_BYTES_MAX
        cdef Py_ssize_t size = recv(self.source, into, _READ_BYTES - _WITHHELD_BYTES_MAX, 0), left
        if size < 0:
            if errno != EAGAIN and errno != EINTR:
                self._end(ConnectionResetError(errno, "lost"))
            return 0
        if size == 0:
            self._end(None)
            return 0
        left = self._activity.ahead(<const unsigned char*>into, size)
        if self._activity.released_bytes:
            into -= self._activity.released_bytes
            left += self._activity.released_bytes
            memcpy(into, self._activity.released, self._activity.released_bytes)
        self.carried_bytes += size
        self._total.data.as_ulonglongs[0] += size
        if left and self._sink_tls is not None:
            self._encrypt_and_send(into, left)
        elif left:
            self._send(into, left)
        if self._activity.withheld and not self._closed:
            owner = self._owner
            self.close()
            owner.client_left()
            openssl.ERR_clear_error()
        return size

    cdef int _count(self, char* plain, Py_ssize_t size) except -1:
        return 0  # it was walked, and counted, before it was sent
