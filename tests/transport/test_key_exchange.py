"""The curve that a server asks for: read from real handshakes, and how long it is kept."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.transport.key_exchange import (
    CURVE_SECONDS_MAX,
    CURVES_MAX,
    Curves,
    asked_curve,
)
from tests.support.fake_clock import FakeClock
from tests.transport.peers import HOST, contexts

TLS_1_2 = ssl.TLSVersion.TLSv1_2


def first_answer(
    server_curve: str | None, client_curve: str | None = None, version: ssl.TLSVersion | None = None
) -> bytes:
    """Return the answer of a real server to a real ClientHello."""
    tls = contexts()
    if server_curve is not None:
        tls.server.set_ecdh_curve(server_curve)
    if client_curve is not None:
        tls.client.set_ecdh_curve(client_curve)
    if version is not None:
        tls.server.maximum_version = version
    hello, answer = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls.client.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=HOST)
    server = tls.server.wrap_bio(hello, answer, server_side=True)
    for side in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    return answer.read()


RETRY = first_answer("prime256v1")
HELLO = first_answer("X25519")


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_a_curve_that_a_server_asks_for_is_read(curve: str) -> None:
    assert asked_curve(first_answer(curve)) == curve


@pytest.mark.parametrize(
    ("server_curve", "client_curve", "version"),
    [
        ("X25519", None, None),  # the client's own guess
        ("prime256v1", "prime256v1", None),  # the client offers it first
        ("prime256v1", None, TLS_1_2),  # has no HelloRetryRequest
        ("X448", None, None),  # not a curve that set_ecdh_curve takes
    ],
)
def test_an_answer_that_asks_for_no_known_curve_gives_none(
    server_curve: str, client_curve: str | None, version: ssl.TLSVersion | None
) -> None:
    assert asked_curve(first_answer(server_curve, client_curve, version)) is None


def test_another_random_makes_it_an_ordinary_server_hello() -> None:
    assert asked_curve(RETRY[:11] + bytes(32) + RETRY[43:]) is None


@pytest.mark.parametrize("size", range(len(RETRY)))
def test_a_part_of_the_request_is_never_misread(size: int) -> None:
    assert asked_curve(RETRY[:size]) in (None, "prime256v1")
    assert asked_curve(RETRY[: min(size, 43)]) is None  # not even the whole random


def test_bytes_after_the_request_are_not_part_of_it() -> None:
    assert asked_curve(RETRY + HELLO) == "prime256v1"
    share = RETRY.index(b"\x00\x33\x00\x02\x00\x17")
    other_type = RETRY[:share] + b"\x00\x34" + RETRY[share + 2 :]
    assert asked_curve(other_type) is None
    record_end = 5 + int.from_bytes(other_type[3:5])
    assert asked_curve(other_type[:record_end] + RETRY[share:]) is None


@given(st.binary())
def test_random_bytes_are_no_request(received: bytes) -> None:
    assert asked_curve(received) is None


@given(
    st.integers(0, len(RETRY) - 1),
    st.binary(min_size=1, max_size=8),
)
def test_a_damaged_request_gives_a_known_curve_or_none(at: int, damage: bytes) -> None:
    damaged = RETRY[:at] + damage + RETRY[at + len(damage) :]
    assert asked_curve(damaged) in (None, "prime256v1", "secp384r1", "secp521r1")


# -- what is kept --------------------------------------------------------------------------------


def test_a_curve_is_kept_for_the_server_that_asked_until_it_is_forgotten() -> None:
    curves = Curves()
    curves.keep("one", "prime256v1")
    assert curves.find("one") == "prime256v1"
    assert curves.find("other") is None
    curves.keep("one", "secp384r1")
    assert curves.find("one") == "secp384r1"
    curves.invalidate("one")
    curves.invalidate("one")
    assert curves.find("one") is None


def test_a_curve_expires() -> None:
    clock = FakeClock()
    curves = Curves(clock)
    curves.keep("one", "prime256v1")
    clock.move(CURVE_SECONDS_MAX - 1)
    assert curves.find("one") == "prime256v1"
    clock.move(1)
    assert curves.find("one") is None


def test_no_more_servers_are_kept_than_the_bound_says() -> None:
    curves = Curves()
    for number in range(CURVES_MAX):
        curves.keep(number, "prime256v1")
    curves.keep(0, "prime256v1")  # not the one recorded first any more
    curves.keep("one more", "prime256v1")
    assert curves.find(1) is None
    assert sum(curves.find(number) is not None for number in range(CURVES_MAX)) == CURVES_MAX - 1
