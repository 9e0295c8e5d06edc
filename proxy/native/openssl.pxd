"""The functions of OpenSSL 3 (or 1.1.1) in use. They are described in its manual pages."""

cdef extern from "openssl/ssl.h" nogil:
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL_METHOD:
        pass
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    ctypedef struct X509_VERIFY_PARAM:
        pass
    ctypedef struct ASN1_OCTET_STRING:
        pass
    ctypedef struct EVP_PKEY:
        pass

    int BIO_CTRL_FLUSH
    int BIO_TYPE_SOURCE_SINK
    int SSL_ERROR_WANT_READ
    int SSL_ERROR_ZERO_RETURN
    int SSL_READING
    int SSL_RECEIVED_SHUTDOWN
    long SSL_MODE_RELEASE_BUFFERS
    long SSL_SESS_CACHE_OFF
    int SSL_VERIFY_NONE
    int SSL_VERIFY_PEER
    long X509_V_OK
    long X509_V_ERR_HOSTNAME_MISMATCH
    long X509_V_ERR_IP_ADDRESS_MISMATCH
    unsigned int X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS

    const SSL_METHOD* TLS_client_method()
    SSL_CTX* SSL_CTX_new(const SSL_METHOD* method)
    void SSL_CTX_free(SSL_CTX* context)
    unsigned long SSL_CTX_set_options(SSL_CTX* context, unsigned long options)
    unsigned long SSL_CTX_clear_options(SSL_CTX* context, unsigned long options)
    unsigned long SSL_CTX_get_options(SSL_CTX* context)
    long SSL_CTX_set_mode(SSL_CTX* context, long mode)
    long SSL_CTX_set_session_cache_mode(SSL_CTX* context, long mode)
    int SSL_CTX_set_min_proto_version(SSL_CTX* context, int version)
    int SSL_CTX_set_max_proto_version(SSL_CTX* context, int version)
    int SSL_CTX_set_cipher_list(SSL_CTX* context, const char* names)
    void SSL_CTX_set_security_level(SSL_CTX* context, int level)
    int SSL_CTX_set1_groups_list(SSL_CTX* context, const char* names)
    void SSL_CTX_set_verify(SSL_CTX* context, int mode, void* callback)
    int SSL_CTX_load_verify_locations(SSL_CTX* context, const char* file, const char* directory)
    X509_VERIFY_PARAM* SSL_CTX_get0_param(SSL_CTX* context)

    SSL* SSL_new(SSL_CTX* context)
    void SSL_free(SSL* ssl)
    void SSL_set_bio(SSL* ssl, BIO* reads, BIO* writes)
    void SSL_set_connect_state(SSL* ssl)
    long SSL_set_tlsext_host_name(SSL* ssl, const char* name)
    X509_VERIFY_PARAM* SSL_get0_param(SSL* ssl)
    int SSL_do_handshake(SSL* ssl)
    int SSL_read(SSL* ssl, void* into, int size)
    int SSL_write(SSL* ssl, const void* source, int size)
    int SSL_pending(const SSL* ssl)
    int SSL_shutdown(SSL* ssl)
    int SSL_get_shutdown(const SSL* ssl)
    int SSL_get_error(const SSL* ssl, int result)
    int SSL_want(const SSL* ssl)
    long SSL_get_verify_result(const SSL* ssl)
    const char* SSL_get_version(const SSL* ssl)
    long SSL_get_tmp_key(SSL* ssl, EVP_PKEY** key)
    long SSL_get_peer_tmp_key(SSL* ssl, EVP_PKEY** key)

cdef extern from "openssl/bio.h" nogil:
    BIO_METHOD* BIO_meth_new(int kind, const char* name)
    int BIO_get_new_index()
    int BIO_meth_set_write(BIO_METHOD* method, int (*write)(BIO*, const char*, int) noexcept nogil)
    int BIO_meth_set_read(BIO_METHOD* method, int (*read)(BIO*, char*, int) noexcept nogil)
    int BIO_meth_set_ctrl(BIO_METHOD* method, long (*ctrl)(BIO*, int, long, void*) noexcept nogil)
    BIO* BIO_new(const BIO_METHOD* method)
    void BIO_set_data(BIO* bio, void* held)
    void* BIO_get_data(BIO* bio)
    void BIO_set_init(BIO* bio, int init)
    void BIO_set_retry_read(BIO* bio)
    void BIO_clear_retry_flags(BIO* bio)

cdef extern from "openssl/evp.h" nogil:
    int EVP_PKEY_RSA
    int EVP_PKEY_set_type(EVP_PKEY* key, int kind)
    void EVP_PKEY_free(EVP_PKEY* key)

cdef extern from "openssl/err.h" nogil:
    unsigned long ERR_peek_last_error()
    void ERR_clear_error()
    const char* ERR_reason_error_string(unsigned long code)

cdef extern from "openssl/x509v3.h" nogil:
    ASN1_OCTET_STRING* a2i_IPADDRESS(const char* address)
    void ASN1_OCTET_STRING_free(ASN1_OCTET_STRING* string)
    int X509_VERIFY_PARAM_set_flags(X509_VERIFY_PARAM* rules, unsigned long flags)
    int X509_VERIFY_PARAM_set1_host(X509_VERIFY_PARAM* rules, const char* name, size_t size)
    int X509_VERIFY_PARAM_set1_ip_asc(X509_VERIFY_PARAM* rules, const char* address)
    void X509_VERIFY_PARAM_set_hostflags(X509_VERIFY_PARAM* rules, unsigned int flags)
    const char* X509_verify_cert_error_string(long code)
