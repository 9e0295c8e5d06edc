from proxy.native.openssl cimport SSL, SSL_CTX


cdef struct Ciphertext:
    # What has come from the peer and was not looked at yet: bytes of somebody else's.
    const char* window
    Py_ssize_t window_bytes
    # Where to send what is for the peer; -1, or `full`: it waits here instead.
    int sink
    bint full
    # What waits to be sent.
    char* owed
    Py_ssize_t owed_bytes
    Py_ssize_t owed_bytes_max


cdef class ClientContext:
    cdef SSL_CTX* _context
    cdef bint _check_hostname


cdef class Engine:
    cdef SSL* ssl
    cdef Ciphertext ciphertext
    cdef object _name
    cdef object _held

    cdef void feed(self, bytes fed)
    cdef bytes take(self)
    cdef void _let_go(self)
    cdef object failure(self, int result)


cdef class Incoming:
    cdef Engine _engine


cdef class Outgoing:
    cdef Engine _engine
