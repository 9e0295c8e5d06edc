"""Where tokens may go: the hosts that shards may have."""

import pytest

from proxy.catalogue.shard_hosts import is_allowed

OWN = "ep-map-1.database.cloud.example.com"


@pytest.mark.parametrize(
    ("host", "own", "allowed"),
    [
        (OWN, OWN, True),
        (OWN.upper() + ".", OWN, True),
        ("ep-one-2.database.cloud.example.com", OWN, True),
        ("a.ep-one-2.database.cloud.example.com", OWN, False),
        ("database.cloud.example.com", OWN, False),
        ("ep-one-2.database.cloud.example.com.evil.example", OWN, False),
        ("evil-database.cloud.example.com", OWN, False),
        # After its first dot there are two labels: others may have hosts there.
        ("b.example.com", "a.example.com", False),
        ("a.example.com", "a.example.com", True),
        ("b.c.example.com", "a.c.example.com", True),
        ("localhost", "localhost", True),
        # An address has no domain: what follows its first dot was taken for one.
        ("11.0.0.1", "10.0.0.1", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("", OWN, False),
    ],
)
def test_s63_without_patterns_a_shard_is_beside_the_catalogue(
    host: str, own: str, allowed: bool
) -> None:
    assert is_allowed(host, (), own) is allowed


@pytest.mark.parametrize(
    ("host", "pattern", "allowed"),
    [
        ("one.example.com", "one.example.com", True),
        ("ONE.example.com", "one.Example.com.", True),
        ("two.example.com", "one.example.com", False),
        ("one.example.com", "*.example.com", True),
        ("a.b.example.com", "*.example.com", True),
        ("example.com", "*.example.com", False),
        (".example.com", "*.example.com", False),
        ("evilexample.com", "*.example.com", False),
        ("one.example.com.evil.example", "*.example.com", False),
    ],
)
def test_s63_patterns_are_names_or_any_labels_in_front(
    host: str, pattern: str, allowed: bool
) -> None:
    assert is_allowed(host, ("other.example.org", pattern), OWN) is allowed


def test_s63_with_patterns_the_catalogues_own_host_is_not_allowed_by_itself() -> None:
    assert not is_allowed(OWN, ("one.example.com",), OWN)
