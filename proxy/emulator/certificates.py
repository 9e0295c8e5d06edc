"""The certificates that the gateway presents: a valid one, and kinds that a client must refuse.

A certificate authority created for this emulator signs them. Its certificate is written to a file
that clients can trust. The system's certificate store is not changed.
"""

import datetime
import ssl
from enum import Enum
from pathlib import Path

import trustme


class Certificate(Enum):
    """Which certificate the gateway presents."""

    GOOD = "for the host names served, signed by the emulator's authority"
    WRONG_NAME = "for another host"
    EXPIRED = "valid until yesterday"
    UNTRUSTED = "for the host names served, signed by an unknown authority"


class Certificates:
    """Server TLS contexts by kind of certificate, each created on first use."""

    def __init__(self, names: tuple[str, ...], ca_file: Path) -> None:
        """`names` are host names or `*.domain`; the authority's certificate goes to `ca_file`."""
        self._names = names
        self._authority = trustme.CA()
        self._authority.cert_pem.write_to_path(str(ca_file))
        self._contexts: dict[Certificate, ssl.SSLContext] = {}

    def context(self, kind: Certificate) -> ssl.SSLContext:
        """Return the context that presents this kind of certificate, with TLS 1.2 or newer."""
        if kind not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._issue(kind).configure_cert(context)
            self._contexts[kind] = context
        return self._contexts[kind]

    def _issue(self, kind: Certificate) -> trustme.LeafCert:
        match kind:
            case Certificate.GOOD:
                return self._authority.issue_cert(*self._names)
            case Certificate.WRONG_NAME:
                return self._authority.issue_cert("somewhere-else.example.com")
            case Certificate.EXPIRED:
                now = datetime.datetime.now(datetime.UTC)
                day = datetime.timedelta(days=1)
                return self._authority.issue_cert(
                    *self._names, not_before=now - 30 * day, not_after=now - day
                )
            case Certificate.UNTRUSTED:
                return trustme.CA().issue_cert(*self._names)
