cdef class Activity:
    cdef public bint terminated
    cdef readonly bint withheld
    cdef readonly bytes reported
    cdef bytes _cut
    cdef const unsigned char* _noticed
    cdef bint _lost
    cdef Py_ssize_t _client_skip, _upstream_skip
    cdef unsigned char _client_stub[8]
    cdef unsigned char _upstream_stub[8]
    cdef int _client_stub_bytes, _upstream_stub_bytes
    cdef long long _sent, _answered, _last_query, _last_group
    cdef bint _unsynced
    cdef int _status
    cdef bint _tracks_copy, _entered, _copying, _copy_both
    cdef list _ends
    cdef long long _doubt
    cdef bint _settled, _renewed
    cdef bint _walks_ahead
    cdef int released_bytes
    cdef unsigned char released[8]

    cdef int client(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef int upstream(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef Py_ssize_t ahead(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef Py_ssize_t _up_to_terminate(
        self, const unsigned char* stub, int stub_bytes, Py_ssize_t position,
        const unsigned char* read, Py_ssize_t size
    ) except -1
    cdef bint _is_quiet(self) noexcept
    cdef int _walk_client(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef int _walk_upstream(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef bint _is_known(self, int kind, bint unsynced) except -1
    cdef int _on_sync(self) except -1
    cdef int _on_query(self, bint unsynced) except -1
    cdef int _on_request(self) except -1
    cdef bint _is_cut(
        self, const unsigned char* message, Py_ssize_t size, Py_ssize_t length
    ) except -1
    cdef int _on_ready(self) except -1
    cdef int _on_reply(self, int kind) except -1
    cdef int _copy_began(self) except -1
    cdef int _end_doubt(self) except -1
