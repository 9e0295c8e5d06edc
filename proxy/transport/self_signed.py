"""A certificate for the listener that is made when the proxy starts and exists in memory only.

For: `listen.tls = "self-signed"`, for applications with sslmode=require, which verifies no
certificate. Not for: clients that verify one; they need `listen.tls_certificate`.

Invariant: the private key is in no file system, except for a moment where the system has no
memory-backed files.
"""

import datetime
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from proxy.transport.tls import server_context

_NAME: Final = "localhost"
_ADDRESSES: Final = ("127.0.0.1", "::1")
# No client verifies it. A process that runs for years keeps its certificate.
_VALID_DAYS: Final = 3650
_CLOCK_SKEW: Final = datetime.timedelta(days=1)


@lru_cache(maxsize=1)
def self_signed_context() -> ssl.SSLContext:
    """Return the context for clients, the same one for the life of the process."""
    with _memory_file(_certificate_and_key()) as path:
        return server_context(path, path)


def _certificate_and_key() -> bytes:
    """Return a certificate and its private key as PEM."""
    # Imported here: it takes time and memory, and few proxies need it.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    addresses = [x509.IPAddress(ip_address(address)) for address in _ADDRESSES]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME), *addresses]), False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(encoding) + private


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """Yield the path of a file with this content: `ssl` reads certificates from files only."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("certificate"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield named.name
