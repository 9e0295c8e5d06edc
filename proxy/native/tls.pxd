from proxy.native.openssl cimport SSL, SSL_CTX


cdef struct Ciphertext:
    # What has come from the peer and was not looked at yet: bytes of somebody else's.
    const char* input
    Py_ssize_t input_bytes
    # Where to send what is for the peer; -1, or `blocked`: it waits here instead.
    int sink
    bint blocked
    # What waits to be sent.
    char* pending_out
    Py_ssize_t pending_out_bytes
    Py_ssize_t pending_out_bytes_max


cdef class ClientContext:
    cdef SSL_CTX* _context
    cdef bint _check_hostname


cdef class TLSConnection:
    cdef SSL* ssl
    cdef Ciphertext ciphertext
    cdef object _server_hostname
    cdef object _input_buffer

    cdef void feed(self, bytes fed)
    cdef bytes take_pending_out(self)
    cdef void _release_input(self)
    cdef object failure(self, int result)


cdef class Incoming:
    cdef TLSConnection _connection


cdef class Outgoing:
    cdef TLSConnection _connection
