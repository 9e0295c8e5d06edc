"""The compiled TLS refuses what Python's refuses, with the same words, and nothing else."""

import re
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from proxy import native
from proxy.transport.tls import client_context
from tests.native.certificates import DAY, NOW, Authority, Leaf, server_context

if TYPE_CHECKING:
    from proxy.native.tls import ClientContext

HOST: Final = "db.example.com"
MODES: Final = ("verify-full", "verify-ca", "require")
Flights = Callable[[], bytes]


@dataclass(frozen=True)
class Case:
    """A server, and the name by which it is asked for."""

    leaf: Leaf = field(default_factory=Leaf)
    host: str = HOST
    authority: str = "known"
    prepare: Callable[[ssl.SSLContext], None] = lambda context: None


def at_most(version: ssl.TLSVersion) -> Callable[[ssl.SSLContext], None]:
    def prepare(context: ssl.SSLContext) -> None:
        warned = pytest.warns(DeprecationWarning, match="TLSVersion")
        with warned if version < ssl.TLSVersion.TLSv1_2 else nullcontext():
            context.minimum_version = min(version, ssl.TLSVersion.TLSv1_2)
            context.maximum_version = version

    return prepare


def only_ciphers(names: str) -> Callable[[ssl.SSLContext], None]:
    def prepare(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(names)

    return prepare


def named(*names: str, host: str = HOST) -> Case:
    return Case(Leaf(names), host)


CASES: Final = {
    "a good one": Case(),
    "TLS 1.2": Case(prepare=at_most(ssl.TLSVersion.TLSv1_2)),
    "TLS 1.1": Case(prepare=at_most(ssl.TLSVersion.TLSv1_1)),
    "TLS 1.0": Case(prepare=at_most(ssl.TLSVersion.TLSv1)),
    "an anonymous cipher": Case(prepare=only_ciphers("aNULL:@SECLEVEL=0")),
    "a cipher without encryption": Case(prepare=only_ciphers("eNULL:@SECLEVEL=0")),
    "a cipher that is weak": Case(
        Leaf(rsa_bits=2048), prepare=only_ciphers("AES128-SHA:@SECLEVEL=0")
    ),
    "a cipher that is old": Case(
        Leaf(rsa_bits=2048), prepare=only_ciphers("ECDHE-RSA-AES128-SHA:@SECLEVEL=0")
    ),
    "expired": Case(Leaf(begins=NOW - 2 * DAY, ends=NOW - DAY)),
    "not valid yet": Case(Leaf(begins=NOW + DAY / 2)),
    "self-signed": Case(Leaf(self_signed=True)),
    "an unknown authority": Case(authority="unknown"),
    "another authority of that name": Case(authority="of the same name"),
    "one below the authority": Case(authority="below"),
    "one below it that is no authority": Case(authority="pretender"),
    "an authority for other names": Case(authority="constrained"),
    "a client's": Case(Leaf(purposes=[ExtendedKeyUsageOID.CLIENT_AUTH])),
    "for any purpose": Case(Leaf(purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])),
    "for no purpose": Case(Leaf(purposes=[])),
    "an authority's own": Case(Leaf(is_authority=True)),
    "1024 bits": Case(Leaf(rsa_bits=1024)),
    "another name": named("other.example.com"),
    "a common name only": Case(Leaf((), common_name=HOST)),
    "a common name beside another name": Case(Leaf(["other.example.com"], common_name=HOST)),
    "capitals in the certificate": named("DB.Example.COM"),
    "capitals in the name": named(HOST, host="DB.Example.COM"),
    "a dot after the name": named(HOST, host=f"{HOST}."),
    "a wildcard": named("*.example.com"),
    "a wildcard for two labels": named("*.example.com", host="a.b.example.com"),
    "a wildcard for none": named("*.example.com", host="example.com"),
    "a wildcard for a part": named("d*.example.com"),
    "a wildcard in the middle": named("db.*.com"),
    "a wildcard for a whole domain": named("*.com", host="example.com"),
    "a wildcard for everything": named("*"),
    "a wildcard of an international label": named(
        "*.example.com", host="b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example.com"
    ),
    "an international name": named(
        "xn--bcher-kva.example", host="b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example"
    ),
    "another international name": named(
        HOST, host="b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example"
    ),
    "an underscore": named("a_b.example.com", host="a_b.example.com"),
    "one label": named("db", host="db"),
    "an address": named("192.0.2.7", host="192.0.2.7"),
    "another address": named("192.0.2.7", host="192.0.2.8"),
    "an address of version 6": named("2001:db8::7", host="2001:db8:0::7"),
    "another address of version 6": named("2001:db8::7", host="2001:db8::8"),
    "an address with zeros": named("192.0.2.7", host="192.000.002.007"),
    "an address with a zone": named("fe80::1", host="fe80::1%lo"),
    "an address as a name": Case(Leaf([HOST], common_name="192.0.2.7"), "192.0.2.7"),
    "a name for an address": named(HOST, host="192.0.2.7"),
    "a short address": named("127.0.0.1", host="127.1"),
    "no name": Case(host=""),
    "a dot in front": Case(host=".example.com"),
    "NUL in the name": Case(host=f"{HOST}\0.evil.example"),
    "an empty label": Case(host="db..example.com"),
    "a label that is too long": Case(host=f"{'a' * 64}.example.com"),
    "a name that is too long": Case(host=".".join(["a" * 60] * 6)),
    "no international name": Case(host="\N{ZERO WIDTH JOINER}.example.com"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_both_come_to_the_same_verdict(
    authorities: dict[str, Authority], tmp_path: Path, case: Case, mode: str
) -> None:
    chain = authorities[case.authority].chain(case.leaf)
    if case.authority in ("below", "pretender"):
        chain += authorities[case.authority].pem()
    server = server_context(chain, tmp_path)
    case.prepare(server)
    cafile = tmp_path / "ca.pem"
    cafile.write_bytes(authorities["known"].pem() + authorities["constrained"].pem())
    pythons = verdict(server, client_context(mode, str(cafile)), case.host)
    own = verdict(server, client_context(mode, str(cafile), accelerated=True), case.host)
    assert own == pythons
    if mode == "verify-full" and case == CASES["a good one"]:
        assert own[:2] == ("TLSv1.3", HOST)


@pytest.mark.parametrize("accepts", [True, False], ids=["known", "unknown"])
def test_the_systems_authorities_are_those_of_python(
    authorities: dict[str, Authority],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accepts: bool,
) -> None:
    cafile = tmp_path / "ca.pem"
    cafile.write_bytes(authorities["known" if accepts else "unknown"].pem())
    monkeypatch.setenv("SSL_CERT_FILE", str(cafile))
    python = ssl.create_default_context()
    server = server_context(authorities["known"].chain(Leaf()), tmp_path)
    own = verdict(server, native.tls.ClientContext(python, None), HOST)
    assert own == verdict(server, python, HOST)
    assert (own == ("TLSv1.3", HOST)) is accepts


def test_the_systems_authorities_are_where_pythons_libssl_looks_for_them(
    authorities: dict[str, Authority], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel's own libssl was built on another system, which may keep them in another place."""
    cafile = tmp_path / "ca.pem"
    cafile.write_bytes(authorities["known"].pem())
    paths = ssl.get_default_verify_paths()._replace(cafile=str(cafile), capath=str(tmp_path))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    own = native.tls.ClientContext(ssl.create_default_context(), None)
    server = server_context(authorities["known"].chain(Leaf()), tmp_path)
    assert verdict(server, own, HOST) == ("TLSv1.3", HOST)


@pytest.mark.parametrize(
    "content", [None, b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\n!\n"]
)
def test_a_file_that_is_no_authoritys_is_an_error_of_the_same_kind(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    assert refusal_of(path) == refusal_of(path, accelerated=True)


def test_a_directory_and_a_name_that_is_no_text_are_errors_of_the_same_kind(
    tmp_path: Path,
) -> None:
    for path in (tmp_path, tmp_path / "\udcff"):
        assert refusal_of(path) == refusal_of(path, accelerated=True)


def refusal_of(path: Path, *, accelerated: bool = False) -> tuple[object, ...]:
    with pytest.raises(OSError) as refused:  # noqa: PT011 - any of its kinds
        client_context("verify-full", str(path), accelerated=accelerated)
    return refused.type, refused.value.errno


def test_a_file_that_goes_bad_unnoticed_by_python_is_refused_too(tmp_path: Path) -> None:
    # The compiled context reads it a second time.
    path = tmp_path / "ca.pem"
    path.write_bytes(b"no certificate")
    with pytest.raises(ssl.SSLError, match="no certificate"):
        native.tls.ClientContext(ssl.create_default_context(), str(path))
    with pytest.raises(FileNotFoundError):
        native.tls.ClientContext(ssl.create_default_context(), str(tmp_path / "none"))


def test_without_a_name_nothing_that_checks_it_is_made() -> None:
    context = native.tls.ClientContext(ssl.create_default_context(), None)
    with pytest.raises(ValueError, match="server_hostname"):
        native.tls.TLSConnection(context, None)


@pytest.fixture(scope="module")
def authorities() -> dict[str, Authority]:
    known = Authority("known")
    return {
        "known": known,
        "unknown": Authority("unknown"),
        "of the same name": Authority("known"),
        "below": Authority("below", known),
        "pretender": Authority("pretender", known, real=False),
        "constrained": Authority("constrained", only="other.example"),
    }


# -- a handshake in memory -----------------------------------------------------------------------


def verdict(
    server: ssl.SSLContext, context: "ssl.SSLContext | ClientContext", host: str
) -> tuple[object, ...]:
    """Shake hands; return the version and the name sent, or what was refused and how."""
    sent: list[str | None] = []
    server.sni_callback = lambda tls, name, _: sent.append(name)
    reads, writes = ssl.MemoryBIO(), ssl.MemoryBIO()
    other = server.wrap_bio(reads, writes, server_side=True)
    try:
        tls, feed, take = _client(context, host)
    except (ValueError, TypeError, ssl.SSLError):  # Python's has a word for each fault
        return ("no name",)
    for _ in range(6):
        try:
            tls.do_handshake()
            reads.write(take())
            with _wanting():
                other.do_handshake()
            return tls.version(), *sent
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            return _words(error)
        reads.write(take())
        with _wanting():
            other.do_handshake()
        feed(writes.read())
    raise AssertionError("no end of the handshake")


def _client(
    context: "ssl.SSLContext | ClientContext", host: str
) -> tuple[ssl.SSLObject, Callable[[bytes], int], Flights]:
    if isinstance(context, ssl.SSLContext):
        reads, writes = ssl.MemoryBIO(), ssl.MemoryBIO()
        return context.wrap_bio(reads, writes, server_hostname=host), reads.write, writes.read
    connection = native.tls.TLSConnection(context, host)
    incoming, outgoing = native.tls.Incoming(connection), native.tls.Outgoing(connection)
    return connection, incoming.write, outgoing.read  # type: ignore[return-value]


def _words(error: ssl.SSLError) -> tuple[object, ...]:
    said = re.sub(r"^\[.*?\] | \(_ssl\.c:\d+\)$", "", str(error.args[1]))
    checked = getattr(error, "verify_code", None), getattr(error, "verify_message", None)
    return type(error), error.args[0], error.library, error.reason, *checked, said


def _wanting() -> AbstractContextManager[None]:
    """Return a context that ignores the server's error: the client's verdict is compared."""
    return suppress(ssl.SSLError)
