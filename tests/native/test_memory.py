"""What the TLS of a connection keeps after its handshake."""

import ctypes
import gc
import ssl
from typing import TYPE_CHECKING

import pytest

from proxy import native
from tests.transport.peers import HOST, Contexts

if TYPE_CHECKING:
    from proxy.native.tls import ClientContext, TLSConnection

CONNECTIONS = 100


class HeapCounts(ctypes.Structure):
    """The result of mallinfo2(3)."""

    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(10)]


def heap_bytes() -> int:
    """Return how many bytes are allocated."""
    counts = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if counts is None:
        pytest.skip("this C library does not say what is allocated")
    counts.restype = HeapCounts
    gc.collect()
    found: int = counts().field_7
    return found


def connected(context: "ClientContext", server: ssl.SSLContext) -> "TLSConnection":
    """Return a connection after its handshake, over which both sides have said something."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    far = server.wrap_bio(to_server, to_client, server_side=True)
    near = native.tls.TLSConnection(context, HOST)
    incoming, outgoing = native.tls.Incoming(near), native.tls.Outgoing(near)
    waiting = {near.do_handshake, far.do_handshake}
    for _ in range(5):
        for handshake in tuple(waiting):
            try:
                handshake()
            except ssl.SSLWantReadError:
                pass
            else:
                waiting.remove(handshake)
            to_server.write(outgoing.read())
            incoming.write(to_client.read())
    assert not waiting
    near.write(b"asked")
    to_server.write(outgoing.read())
    assert far.read() == b"asked"
    far.write(b"answered")
    incoming.write(to_client.read())
    assert near.read(100) == b"answered"
    return near


def kept_bytes(context: "ClientContext", server: ssl.SSLContext) -> float:
    """Return what each of many connections keeps."""
    connected(context, server)
    before = heap_bytes()
    kept = [connected(context, server) for _ in range(CONNECTIONS)]
    return (heap_bytes() - before) / len(kept)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_connection_keeps_no_ephemeral_key(tls: Contexts, version: ssl.TLSVersion) -> None:
    # With PostgreSQL's own curve both of them were a sixth of what a connection takes.
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.maximum_version = version
    tls.authority.issue_cert(HOST).configure_cert(server)
    with tls.authority.cert_pem.tempfile() as cafile:
        context = native.tls.ClientContext(tls.client, cafile, "X25519:prime256v1")
    usual = kept_bytes(context, server)
    server.set_ecdh_curve("prime256v1")
    assert kept_bytes(context, server) < usual + 1000
