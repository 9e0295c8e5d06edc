from proxy.native.openssl cimport SSL, SSL_CTX


cdef struct Ciphertext:
    # What was received from the peer and not read yet; the bytes belong to the caller.
    const char* input
    Py_ssize_t input_bytes
    # The descriptor to send to. With -1, or if `blocked`, the bytes wait in `pending_out`.
    int sink
    bint blocked
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
