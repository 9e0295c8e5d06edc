"""The certificates: a client that verifies them accepts one kind of four."""

import contextlib
import ssl
from pathlib import Path

import pytest

from proxy.emulator.certificates import Certificate, Certificates

HOST = "ep-demo-one.database.example.com"
REASONS = {
    Certificate.WRONG_NAME: "Hostname mismatch",
    Certificate.EXPIRED: "certificate has expired",
    Certificate.UNTRUSTED: "unable to get local issuer certificate",
}


def _shake_hands(server: ssl.SSLContext, ca_file: Path) -> None:
    """Run a handshake between a verifying client and the server, in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    strict = ssl.create_default_context(cafile=str(ca_file))
    client = strict.wrap_bio(to_client, to_server, server_hostname=HOST)
    listening = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, listening, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()


def test_the_good_one_is_taken_and_made_once(tmp_path: Path) -> None:
    certificates = Certificates(("*.database.example.com",), tmp_path / "ca.pem")
    context = certificates.context(Certificate.GOOD)
    _shake_hands(context, tmp_path / "ca.pem")
    assert certificates.context(Certificate.GOOD) is context


@pytest.mark.parametrize("kind", list(REASONS))
def test_a_bad_one_is_refused_for_its_reason(tmp_path: Path, kind: Certificate) -> None:
    certificates = Certificates(("*.database.example.com",), tmp_path / "ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError, match=REASONS[kind]):
        _shake_hands(certificates.context(kind), tmp_path / "ca.pem")
