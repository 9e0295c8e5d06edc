"""Certificates with any fault that is asked for, and a TLS server for each."""

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

DAY: Final = datetime.timedelta(days=1)
NOW: Final = datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Leaf:
    """What a server's certificate says."""

    names: Sequence[str] = ("db.example.com",)
    common_name: str = "somebody"
    begins: datetime.datetime = NOW - DAY
    ends: datetime.datetime = NOW + DAY
    purposes: Sequence[ObjectIdentifier] = (ExtendedKeyUsageOID.SERVER_AUTH,)
    rsa_bits: int = 0
    self_signed: bool = False
    is_authority: bool = False


class Authority:
    """An authority, or one that such a one has (or has not) made one."""

    def __init__(
        self, name: str, above: "Authority | None" = None, *, real: bool = True, only: str = ""
    ) -> None:
        self.key: Key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        signer = self if above is None else above
        made = (
            _begun(self.name, signer.name, self.key, NOW - DAY, NOW + DAY)
            .add_extension(x509.BasicConstraints(ca=real, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
        )
        if only:
            permitted = [x509.DNSName(only)]
            made = made.add_extension(x509.NameConstraints(permitted, None), critical=True)
        self.certificate = made.sign(signer.key, hashes.SHA256())

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def chain(self, leaf: Leaf) -> bytes:
        """Return a key, and a certificate for it."""
        key: Key = ec.generate_private_key(ec.SECP256R1())
        if leaf.rsa_bits:
            key = rsa.generate_private_key(65537, leaf.rsa_bits)
        subject = _name(leaf.common_name)
        made = _begun(
            subject, subject if leaf.self_signed else self.name, key, leaf.begins, leaf.ends
        )
        if leaf.names:
            names = x509.SubjectAlternativeName([_general(name) for name in leaf.names])
            made = made.add_extension(names, critical=False)
        if leaf.purposes:
            made = made.add_extension(x509.ExtendedKeyUsage(leaf.purposes), critical=False)
        if leaf.is_authority:
            basic = x509.BasicConstraints(ca=True, path_length=None)
            made = made.add_extension(basic, critical=True)
        signed = made.sign(key if leaf.self_signed else self.key, hashes.SHA256())
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ) + signed.public_bytes(serialization.Encoding.PEM)


def server_context(chain: bytes, directory: Path) -> ssl.SSLContext:
    """Return a server's context that takes whatever a chain is."""
    path = directory / "chain.pem"
    path.write_bytes(chain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_cert_chain(path)
    return context


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: Key,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
