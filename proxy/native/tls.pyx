# cython: language_level=3
"""TLS to an upstream through OpenSSL itself: an `ssl.SSLObject` for the compiled relay.

For: lanes, which decrypt from one shared buffer into another. Python's ssl module cannot do that.
Not for: policy. A context is a copy of an `ssl.SSLContext`, and a `TLSConnection` does and raises
what an `ssl.SSLObject` would, so that the code above it is the same for both.

The invariant: a TLSConnection uses no descriptor except the `sink` that a lane sets for one call.
The input belongs to its caller, and is empty before a lane sets its own buffer.
"""

import os
import ssl

from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from proxy.native cimport openssl
from proxy.native.openssl cimport BIO, BIO_METHOD

cdef extern from "sys/socket.h" nogil:
    ssize_t send(int descriptor, const void* source, size_t size, int flags)
    int MSG_NOSIGNAL

cdef int _PENDING_OUT_BYTES_STEP = 4096  # a message of the handshake; more is allocated as needed


# -- OpenSSL's reads and writes ----------------------------------------------------------------

cdef int _read(BIO* bio, char* into, int size) noexcept nogil:
    """Pass input to OpenSSL. If there is none, OpenSSL has to try again later."""
    cdef Ciphertext* ciphertext = <Ciphertext*>openssl.BIO_get_data(bio)
    if ciphertext.input_bytes == 0:
        openssl.BIO_set_retry_read(bio)
        return -1
    if size > ciphertext.input_bytes:
        size = <int>ciphertext.input_bytes
    memcpy(into, ciphertext.input, size)
    ciphertext.input += size
    ciphertext.input_bytes -= size
    return size


cdef int _write(BIO* bio, const char* source, int size) noexcept nogil:
    """Send a record to the sink if possible, and store the rest."""
    cdef Ciphertext* ciphertext = <Ciphertext*>openssl.BIO_get_data(bio)
    cdef ssize_t sent = 0
    if ciphertext.sink >= 0 and ciphertext.pending_out_bytes == 0 and not ciphertext.blocked:
        sent = send(ciphertext.sink, source, size, MSG_NOSIGNAL)
        if sent == size:
            return size
        if sent < 0:
            sent = 0  # full or lost: the transport that sends the rest will find out
    if _append_pending_out(ciphertext, source + sent, size - sent):
        return size
    openssl.BIO_clear_retry_flags(bio)  # no memory: a retry would not help
    return -1


cdef bint _append_pending_out(
    Ciphertext* ciphertext, const char* source, Py_ssize_t size
) noexcept nogil:
    cdef Py_ssize_t needed = ciphertext.pending_out_bytes + size
    cdef char* pending_out
    if needed > ciphertext.pending_out_bytes_max:
        needed += _PENDING_OUT_BYTES_STEP
        pending_out = <char*>realloc(ciphertext.pending_out, needed)
        if pending_out is NULL:
            return False
        ciphertext.pending_out = pending_out
        ciphertext.pending_out_bytes_max = needed
    memcpy(ciphertext.pending_out + ciphertext.pending_out_bytes, source, size)
    ciphertext.pending_out_bytes += size
    return True


cdef long _control(BIO* bio, int command, long number, void* held) noexcept nogil:
    return 1 if command == openssl.BIO_CTRL_FLUSH else 0


cdef BIO_METHOD* _METHOD = openssl.BIO_meth_new(
    openssl.BIO_get_new_index() | openssl.BIO_TYPE_SOURCE_SINK, b"input"
)
openssl.BIO_meth_set_read(_METHOD, _read)
openssl.BIO_meth_set_write(_METHOD, _write)
openssl.BIO_meth_set_ctrl(_METHOD, _control)


# -- a context -----------------------------------------------------------------------------------

cdef class ClientContext:
    """A copy of the context `like`.

    Authorities and curve cannot be read out of it: `cafile` is the file of the authorities, or
    None for the system's; `curve` is offered for the key exchange. Raises OSError (ssl.SSLError
    too) for an unusable file.
    """

    def __cinit__(self) -> None:
        self._context = openssl.SSL_CTX_new(openssl.TLS_client_method())
        if self._context is NULL:
            raise MemoryError

    def __init__(self, like: ssl.SSLContext, cafile: str | None, curve: str | None = None) -> None:
        cdef openssl.SSL_CTX* context = self._context
        names = [one["name"] for one in like.get_ciphers() if one["protocol"] != "TLSv1.3"]
        ciphers = ":".join(names).encode()
        openssl.SSL_CTX_clear_options(context, openssl.SSL_CTX_get_options(context))
        openssl.SSL_CTX_set_options(context, like.options)
        openssl.SSL_CTX_set_mode(context, openssl.SSL_MODE_RELEASE_BUFFERS)
        openssl.SSL_CTX_set_session_cache_mode(context, openssl.SSL_SESS_CACHE_OFF)
        openssl.SSL_CTX_set_security_level(context, like.security_level)
        self._check_hostname = like.check_hostname
        verify = openssl.SSL_VERIFY_PEER
        if like.verify_mode == ssl.CERT_NONE:
            verify = openssl.SSL_VERIFY_NONE
        openssl.SSL_CTX_set_verify(context, verify, NULL)
        cdef openssl.X509_VERIFY_PARAM* rules = openssl.SSL_CTX_get0_param(context)
        openssl.X509_VERIFY_PARAM_set_hostflags(rules, openssl.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS)
        taken = (
            openssl.SSL_CTX_set_min_proto_version(context, _version(like.minimum_version))
            and openssl.SSL_CTX_set_max_proto_version(context, _version(like.maximum_version))
            and openssl.SSL_CTX_set_cipher_list(context, ciphers)
            and openssl.X509_VERIFY_PARAM_set_flags(rules, like.verify_flags)
        )
        if curve is not None:
            named = curve.encode()
            taken = taken and openssl.SSL_CTX_set1_groups_list(context, named)
        if not taken:
            raise _error(ssl.SSLError)
        if verify == openssl.SSL_VERIFY_PEER:
            self._load_authorities(cafile)

    def __dealloc__(self) -> None:
        openssl.SSL_CTX_free(self._context)

    def _load_authorities(self, cafile: str | None) -> None:
        openssl.ERR_clear_error()
        if cafile is None:
            self._load_system_authorities()
            return
        open(cafile, "rb").close()  # its error is more precise than OpenSSL's
        path = os.fsencode(cafile)
        if not openssl.SSL_CTX_load_verify_locations(self._context, path, NULL):
            raise _error(ssl.SSLError)

    def _load_system_authorities(self) -> None:
        """Load what Python's libssl loads. A wheel's own libssl has the paths of another system."""
        paths = ssl.get_default_verify_paths()
        if paths.cafile is not None:
            path = os.fsencode(paths.cafile)
            openssl.SSL_CTX_load_verify_locations(self._context, path, NULL)
        if paths.capath is not None:
            path = os.fsencode(paths.capath)
            openssl.SSL_CTX_load_verify_locations(self._context, NULL, path)
        openssl.ERR_clear_error()  # as Python ignores them here


cdef int _version(object version) except -1:
    """Return a bound on the version for OpenSSL, where 0 is "none"."""
    return 0 if version < 0 else version


cdef int _release_keys(openssl.SSL* connection) except -1:
    """Release both ephemeral keys, which a connection would keep: 3.5 kB with prime256v1.

    Nothing uses them after the handshake. Another type makes OpenSSL release what a key consists
    of, the private part too; RSA is never ephemeral.
    """
    cdef openssl.EVP_PKEY* key = NULL
    if openssl.SSL_get_tmp_key(connection, &key):
        openssl.EVP_PKEY_set_type(key, openssl.EVP_PKEY_RSA)
        openssl.EVP_PKEY_free(key)
    if openssl.SSL_get_peer_tmp_key(connection, &key):
        openssl.EVP_PKEY_set_type(key, openssl.EVP_PKEY_RSA)
        openssl.EVP_PKEY_free(key)
    openssl.ERR_clear_error()
    return 0


# -- one connection ------------------------------------------------------------------------------

cdef class TLSConnection:
    """The TLS of one connection, with the methods of ssl.SSLObject."""

    def __cinit__(self, ClientContext context not None, server_hostname: str | None) -> None:
        cdef BIO* bio
        self.ciphertext.sink = -1
        self.ssl = openssl.SSL_new(context._context)
        if self.ssl is NULL:
            raise MemoryError
        bio = openssl.BIO_new(_METHOD)
        if bio is NULL:
            raise MemoryError
        openssl.BIO_set_data(bio, &self.ciphertext)
        openssl.BIO_set_init(bio, 1)
        openssl.SSL_set_bio(self.ssl, bio, bio)
        openssl.SSL_set_connect_state(self.ssl)
        if server_hostname is not None:
            self._set_server_hostname(server_hostname, context._check_hostname)
        elif context._check_hostname:
            raise ValueError("check_hostname requires server_hostname")

    def __dealloc__(self) -> None:
        openssl.SSL_free(self.ssl)
        free(self.ciphertext.pending_out)

    def _set_server_hostname(self, server_hostname: str, check: bool) -> None:
        """Set the name to send, and to verify the certificate for. Raises ValueError."""
        if not server_hostname or server_hostname.startswith(".") or "\0" in server_hostname:
            raise ValueError("server_hostname cannot be an empty string or start with a dot.")
        plain = server_hostname.encode("idna")
        self._server_hostname = plain.decode()
        cdef openssl.X509_VERIFY_PARAM* rules = openssl.SSL_get0_param(self.ssl)
        if _is_address(plain):
            taken = not check or openssl.X509_VERIFY_PARAM_set1_ip_asc(rules, plain)
        else:
            taken = openssl.SSL_set_tlsext_host_name(self.ssl, plain)
            if check:
                taken = taken and openssl.X509_VERIFY_PARAM_set1_host(rules, plain, len(plain))
        if not taken:
            openssl.ERR_clear_error()
            raise ValueError("server_hostname is no name of a host")

    # -- the methods of ssl.SSLObject ------------------------------------------------------------

    def do_handshake(self) -> None:
        openssl.ERR_clear_error()
        result = openssl.SSL_do_handshake(self.ssl)
        self._release_input()
        if result != 1:
            raise self.failure(result)
        _release_keys(self.ssl)

    def read(self, int size) -> bytes:
        piece = PyBytes_FromStringAndSize(NULL, size)
        openssl.ERR_clear_error()
        taken = openssl.SSL_read(self.ssl, PyBytes_AS_STRING(piece), size)
        self._release_input()
        if taken > 0:
            return piece if taken == size else piece[:taken]
        error = self.failure(taken)
        if (
            isinstance(error, ssl.SSLZeroReturnError)
            and openssl.SSL_get_shutdown(self.ssl) == openssl.SSL_RECEIVED_SHUTDOWN
        ):
            return b""
        raise error

    def write(self, const unsigned char[::1] source) -> int:
        if source.shape[0] == 0:
            return 0
        openssl.ERR_clear_error()
        taken = openssl.SSL_write(self.ssl, &source[0], <int>source.shape[0])
        if taken <= 0:
            raise self.failure(taken)
        return taken

    def pending(self) -> int:
        return openssl.SSL_pending(self.ssl)

    def unwrap(self) -> None:
        openssl.ERR_clear_error()
        result = openssl.SSL_shutdown(self.ssl)
        if result == 0:
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the peer's has not come yet")
        if result < 0:
            raise self.failure(result)

    def version(self) -> str:
        return openssl.SSL_get_version(self.ssl).decode()

    # -- inside ----------------------------------------------------------------------------------

    cdef void feed(self, bytes fed):
        """Append ciphertext of the peer to the input."""
        if self.ciphertext.input_bytes:
            fed = self.ciphertext.input[: self.ciphertext.input_bytes] + fed
        self._input_buffer = fed
        self.ciphertext.input = PyBytes_AS_STRING(fed)
        self.ciphertext.input_bytes = PyBytes_GET_SIZE(fed)

    cdef void _release_input(self):
        """Release the input when it is used up: an idle session keeps no read."""
        if self.ciphertext.input_bytes == 0:
            self._input_buffer = None

    cdef bytes take_pending_out(self):
        """Return what is to be sent to the peer, and release it."""
        pending_out = PyBytes_FromStringAndSize(
            self.ciphertext.pending_out, self.ciphertext.pending_out_bytes
        )
        free(self.ciphertext.pending_out)
        self.ciphertext.pending_out = NULL
        self.ciphertext.pending_out_bytes = self.ciphertext.pending_out_bytes_max = 0
        return pending_out

    cdef object failure(self, int result):
        """Return the error that ssl.SSLObject would raise for this result.

        OpenSSL reports it in the thread's error queue, which was empty before the call.
        """
        kind = openssl.SSL_get_error(self.ssl, result)
        if kind == openssl.SSL_ERROR_WANT_READ:
            return ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "more is to come")
        if kind == openssl.SSL_ERROR_ZERO_RETURN:
            return ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "the peer has ended TLS")
        verified = openssl.SSL_get_verify_result(self.ssl)
        error = _error(ssl.SSLError)
        if error.reason != "CERTIFICATE_VERIFY_FAILED" or verified == openssl.X509_V_OK:
            return error
        message = _verify_message(verified, self._server_hostname)
        error = ssl.SSLCertVerificationError(1, f"certificate verify failed: {message}")
        error.library, error.reason = "SSL", "CERTIFICATE_VERIFY_FAILED"
        error.verify_code, error.verify_message = verified, message
        return error


cdef class Incoming:
    """The input of a TLSConnection, with the methods of ssl.MemoryBIO."""

    def __init__(self, TLSConnection connection not None) -> None:
        self._connection = connection

    @property
    def pending(self) -> int:
        return self._connection.ciphertext.input_bytes

    def write(self, source) -> int:
        self._connection.feed(bytes(source))
        return len(source)


cdef class Outgoing:
    """The output of a TLSConnection, with the methods of ssl.MemoryBIO."""

    def __init__(self, TLSConnection connection not None) -> None:
        self._connection = connection

    @property
    def pending(self) -> int:
        return self._connection.ciphertext.pending_out_bytes

    def read(self) -> bytes:
        return self._connection.take_pending_out()


cdef bint _is_address(bytes name) except -1:
    """Return whether OpenSSL, which verifies the certificate, takes the name for an address."""
    cdef openssl.ASN1_OCTET_STRING* address = openssl.a2i_IPADDRESS(name)
    openssl.ERR_clear_error()
    openssl.ASN1_OCTET_STRING_free(address)
    return address is not NULL


cdef str _verify_message(long code, object name):
    if code == openssl.X509_V_ERR_HOSTNAME_MISMATCH:
        return f"Hostname mismatch, certificate is not valid for '{name}'."
    if code == openssl.X509_V_ERR_IP_ADDRESS_MISMATCH:
        return f"IP address mismatch, certificate is not valid for '{name}'."
    return openssl.X509_verify_cert_error_string(code).decode()


cdef object _error(object kind):
    """Take OpenSSL's last error. Return it with the attributes of Python's."""
    cdef const char* text = openssl.ERR_reason_error_string(openssl.ERR_peek_last_error())
    openssl.ERR_clear_error()
    message = "unknown error" if text is NULL else text.decode()
    error = kind(1, message)
    error.library = "SSL"
    error.reason = "".join(one if one.isalnum() else "_" for one in message).upper()
    return error
