"""Addresses as texts: which of them only this machine reaches."""

import pytest

from proxy.addresses import address_of, is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.0.6", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.7", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_known_without_asking_dns(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_an_ipv4_address_is_the_same_one_inside_an_ipv6_address() -> None:
    assert address_of("::ffff:10.0.0.7") == address_of("10.0.0.7")
    assert address_of("::ffff:10.0.0.7") != address_of("10.0.0.8")


@pytest.mark.parametrize("host", ["", "localhost", "10.0.0", "10.0.0.7/8", "[::1]"])
def test_a_name_is_no_address(host: str) -> None:
    assert address_of(host) is None
