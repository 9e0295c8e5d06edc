cdef class Activity:
    cdef public bint terminated
    cdef bint _lost
    cdef Py_ssize_t _client_skip, _upstream_skip
    cdef unsigned char _client_stub[8]
    cdef unsigned char _upstream_stub[8]
    cdef int _client_stub_bytes, _upstream_stub_bytes
    cdef long long _sent, _answered, _last_query, _last_group
    cdef bint _work
    cdef int _status
    cdef bint _odd, _entered, _copying
    cdef list _ends
    cdef long long _doubt
    cdef bint _settled, _renewed

    cdef int client(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef int upstream(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef int _walk_client(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef int _walk_upstream(self, const unsigned char* read, Py_ssize_t size) except -1
    cdef bint _is_known(self, int kind, bint work) except -1
    cdef int _sync(self) except -1
    cdef int _query(self, bint after_work) except -1
    cdef int _ask(self) except -1
    cdef int _ready(self) except -1
    cdef int _reply(self, int kind) except -1
    cdef int _copy_began(self) except -1
    cdef int _certain(self) except -1
