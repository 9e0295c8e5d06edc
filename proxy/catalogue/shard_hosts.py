"""Which hosts shards may have, so that their tokens may be sent there.

For: the rule of `catalogue.shard_hosts`. Who can write the catalogue must not be able to have
tokens sent to a host of their own. Not for: dialling.
"""

from collections.abc import Sequence
from typing import Final

from proxy.addresses import address_of
from proxy.config import ANY_LABELS

# A domain of fewer labels, such as example.com, may have hosts of others.
SHARED_LABELS_MIN: Final = 3


def is_allowed(host: str, patterns: Sequence[str], catalogue_host: str) -> bool:
    """Return whether a shard may have this host.

    Without `patterns`: the catalogue's own, and names that share all after its first dot.
    """
    host = _plain(host)
    if patterns:
        return any(_matches(host, pattern) for pattern in patterns)
    own = _plain(catalogue_host)
    shared = own.partition(".")[2]
    is_shared = len(shared.split(".")) >= SHARED_LABELS_MIN and address_of(own) is None
    return host == own or (is_shared and host.partition(".")[2] == shared)


def _matches(host: str, pattern: str) -> bool:
    pattern = _plain(pattern)
    if not pattern.startswith(ANY_LABELS):
        return host == pattern
    ending = pattern.removeprefix("*")
    return host.endswith(ending) and len(host) > len(ending)


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")
