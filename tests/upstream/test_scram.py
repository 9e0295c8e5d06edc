"""SCRAM against PostgreSQL, against scramp's server, and against servers that mean harm."""

import asyncio
import base64
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import ScramMechanism

from proxy.emulator.cluster import DATABASE, Cluster
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.scram import (
    ITERATIONS_MAX,
    ITERATIONS_MIN,
    NONCE_BYTES_MAX,
    SCRAM_SHA_256,
    Scram,
)
from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    ErrorResponse,
    SASLInitialResponse,
    SASLResponse,
    decode_backend,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, StartupMessage

PASSWORD = "not-a-real-password"
SALT = base64.b64encode(b"0123456789abcdef").decode()


def exchange() -> tuple[Scram, str]:
    """Return an exchange whose first message is out, and its nonce."""
    scram = Scram((SCRAM_SHA_256,), Secret(PASSWORD.encode()))
    return scram, scram.client_first().decode().rpartition("r=")[2]


@pytest.mark.parametrize("password", [PASSWORD, "pässwörd", "x" * 1000, " , = "])
def test_w28_a_right_password_proves_itself_and_so_does_the_server(password: str) -> None:
    mechanism = ScramMechanism("SCRAM-SHA-256")
    stored = mechanism.make_auth_info(password)
    server = mechanism.make_server(lambda user: stored)
    scram = Scram((b"SCRAM-SHA-256-PLUS", SCRAM_SHA_256), Secret(password.encode()))
    server.set_client_first(scram.client_first().decode())
    server.set_client_final(scram.client_final(server.get_server_first().encode()).decode())
    scram.verify_server(server.get_server_final().encode())


# -- PostgreSQL itself ---------------------------------------------------------------------------

ROLE = "app_scram"
# What SASLprep changes, and what it refuses, so that PostgreSQL takes the bytes as they are.
PASSWORDS = {
    "ascii": PASSWORD,
    "umlaut": "p\u00e4ssw\u00f6rd",
    "decomposed": "pa\u0308ssword",
    "no_break_space": "a\u00a0b",
    "soft_hyphen": "soft\u00adhyphen",
    "roman_nine": "\u2168",
    "full_width": "\uff50\uff57",
    "right_to_left": "\u0627\u0628",
    "joiner": "zwj\u200d",
    "emoji": "emoji\U0001f600",
    "tab": "tab\tinside",
    "control": "bell\x07",
    "control_and_umlaut": "b\u00e4ll\x07",
    "mixed_directions": "\u06271x",
    "private_use": "\ue000",
    "nothing_left": "\u00ad",
    "comma_and_equals": " , = ",
    "long": "x" * 900,
}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Cluster]:
    """Return a PostgreSQL that asks one role for its password."""
    with Cluster("scram") as cluster:
        cluster.execute(f"CREATE ROLE {ROLE} LOGIN")
        hba = Path(cluster.execute("SHOW hba_file"))
        hba.write_text(f"local all {ROLE} scram-sha-256\n{hba.read_text()}")
        loaded = cluster.execute("SELECT pg_conf_load_time()")
        cluster.execute("SELECT pg_reload_conf()")
        ends_at = time.monotonic() + 10
        while cluster.execute("SELECT pg_conf_load_time()") == loaded:
            assert time.monotonic() < ends_at, "PostgreSQL does not read its rules again"
        yield cluster


async def logs_in(postgres: Cluster, password: str) -> bool:
    """Log in by SCRAM alone and tell whether PostgreSQL lets us."""
    scram = Scram((SCRAM_SHA_256,), Secret(password.encode()))
    messages = MessageReader(1 << 16)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_unix_connection(postgres.socket_path)
        pairs = ((b"user", ROLE.encode()), (b"database", DATABASE.encode()))
        writer.write(StartupMessage(V3_0, pairs).encode())
        try:
            while True:  # ends with PostgreSQL's decision
                while (frame := messages.next()) is None:
                    messages.feed(await reader.read(1 << 16))
                match decode_backend(frame):
                    case AuthenticationSASL():
                        writer.write(
                            SASLInitialResponse(SCRAM_SHA_256, scram.client_first()).encode()
                        )
                    case AuthenticationSASLContinue(data):
                        writer.write(SASLResponse(scram.client_final(data)).encode())
                    case AuthenticationSASLFinal(data):
                        scram.verify_server(data)
                    case AuthenticationOk():
                        return True
                    case ErrorResponse() as error:
                        assert error.sqlstate == "28P01"
                        return False
        finally:
            writer.close()


@pytest.mark.e2e
@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
async def test_postgres_accepts_the_proof_for_any_password(
    postgres: Cluster, password: str
) -> None:
    # An emoji in a password ended the session without a word: SASLprep refuses it, and what
    # PostgreSQL and libpq do then is to take the password as it is.
    postgres.execute(f"ALTER ROLE {ROLE} PASSWORD '{password}'")
    assert await logs_in(postgres, password)
    assert not await logs_in(postgres, password + "x")


# -- another server ------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanisms", [(), (b"SCRAM-SHA-256-PLUS",), (b"\xff", b"OAUTHBEARER")])
def test_w28_another_mechanism_is_unsupported_and_named(mechanisms: tuple[bytes, ...]) -> None:
    with pytest.raises(ProxyError) as refused:
        Scram(mechanisms, Secret(PASSWORD.encode()))
    assert refused.value.kind is ErrorKind.UNSUPPORTED_AUTH
    assert "SASL" in refused.value.detail


def test_a_password_that_is_no_utf_8_is_the_password_files_fault() -> None:
    with pytest.raises(ProxyError) as refused:
        Scram((SCRAM_SHA_256,), Secret(b"\xff\xfe"))
    assert refused.value.kind is ErrorKind.PASSWORD_FILE_UNREADABLE


@pytest.mark.parametrize(
    "challenge",
    [
        "",
        "nonsense",
        "r={nonce}x",
        "r={nonce}x,s={salt}",
        "r={nonce}x,s={salt},i=",
        "r={nonce}x,s={salt},i=abc",
        "r={nonce}x,s={salt},i=-1",
        "r={nonce}x,s={salt},i=0",
        "r={nonce}x,s={salt},i=+4096",
        "r={nonce}x,s={salt},i=4_096",
        "r={nonce}x,s={salt},i=\u0664\u0660",
        "r={nonce}x,s={salt},i=100001",
        "r={nonce}x,s={salt},i=9999999",
        "r={nonce}x,s={salt},i=99999999999999999999",
        "r={nonce}x,s={salt},i=4096,i=9999999",
        "r={nonce}x,s={salt},iX9999999",
        "r={nonce}x,s=not base64!,i=4096",
        "r={nonce}x,s=,i=4096",
        "r={nonce},s={salt},i=4096",  # the server added nothing of its own
        "r=another-nonce,s={salt},i=4096",
        "m=extension,r={nonce}x,s={salt},i=4096",
        "e=other-error",
        "i=4096,s={salt},r={nonce}x",
    ],
)
def test_w53_a_hostile_challenge_is_a_violation_and_costs_nothing(challenge: str) -> None:
    scram, nonce = exchange()
    begun = time.process_time()
    with pytest.raises(ProxyError) as refused:
        scram.client_final(challenge.format(nonce=nonce, salt=SALT).encode())
    assert refused.value.kind is ErrorKind.UPSTREAM_PROTOCOL
    assert time.process_time() - begun < 0.05
    assert PASSWORD not in repr(refused.value.response())


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_w53_the_bounds_of_nonce_and_iterations_are_exact(over: int) -> None:
    for count, size in ((ITERATIONS_MAX + over, 100), (4096, NONCE_BYTES_MAX + over)):
        scram, nonce = exchange()
        long_nonce = nonce + "x" * (size - len(nonce))
        challenge = f"r={long_nonce},s={SALT},i={count}".encode()
        if over <= 0:
            assert scram.client_final(challenge).startswith(b"c=biws,r=")
        else:
            with pytest.raises(ProxyError, match="beyond its bounds"):
                scram.client_final(challenge)


def test_w53_a_challenge_that_is_no_utf_8_is_a_violation() -> None:
    scram, nonce = exchange()
    with pytest.raises(ProxyError, match="SCRAM"):
        scram.client_final(b"r=" + nonce.encode() + b"\xff,s=" + SALT.encode() + b",i=4096")


@pytest.mark.parametrize("under", [0, 1])
def test_w53_so_few_iterations_that_a_password_could_be_guessed_are_refused(under: int) -> None:
    scram, nonce = exchange()
    challenge = f"r={nonce}x,s={SALT},i={ITERATIONS_MIN - under}".encode()
    if not under:
        assert scram.client_final(challenge)
        return
    with pytest.raises(ProxyError, match="beyond its bounds"):
        scram.client_final(challenge)


def test_a_server_that_proves_itself_before_it_was_asked_is_not_believed() -> None:
    scram, _ = exchange()
    for answer in (b"", b"v="):
        with pytest.raises(ProxyError):
            scram.verify_server(answer)


@given(
    challenge=st.binary(max_size=200) | st.text("rsim=,+/0123456789", max_size=60).map(str.encode)
)
def test_w53_any_challenge_is_answered_or_a_violation(challenge: bytes) -> None:
    scram, _ = exchange()
    with pytest.raises(ProxyError):  # none of these knows the nonce
        scram.client_final(challenge)


@pytest.mark.parametrize(
    "proof", [b"", b"v=AAAA", b"v=", b"v=!", b"e=invalid-proof", b"e=nonsense", b"\xff", b"x"]
)
def test_a_server_that_does_not_know_the_password_is_not_believed(proof: bytes) -> None:
    scram, nonce = exchange()
    scram.client_final(f"r={nonce}x,s={SALT},i=4096".encode())
    with pytest.raises(ProxyError) as refused:
        scram.verify_server(proof)
    assert refused.value.kind is ErrorKind.UPSTREAM_PROTOCOL
