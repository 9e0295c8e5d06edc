"""The bounds of a mapping as a person writes and reads them.

For: one mapping on a command line or in an answer, and what is said of a key. Not for: the many of
a file (`map_builder`).
"""

from collections.abc import Sequence

from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import Located
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import hash_key, parse_key
from proxy.routing.map_builder import lowest_key, parse_hash_bound
from proxy.routing.shard_map import (
    HIGHEST_BOUND,
    LOWEST_BOUND,
    Kind,
    MapKeys,
    MapSpec,
    ShardMapping,
)

Bounds = tuple[bytes, bytes | None]
"""Canonical bytes as the catalogue has them: "" is -inf, None is +inf."""


def parse_bounds(texts: Sequence[str], spec: MapSpec) -> Bounds:
    """Return the bounds of a mapping: KEY of a list map, LOW and HIGH of the others.

    Raises CatalogueError (INVALID_BOUNDS), and ProxyError for what is no key.
    """
    if spec.kind is Kind.LIST:
        if len(texts) != 1:
            raise _invalid("a mapping of a list map is one KEY")
        key = parse_key(texts[0], spec.key_type, spec.normalise) if texts[0] else b""
        if not key:
            raise _invalid("the key is empty")
        return key, key + b"\0"
    if len(texts) != 2:
        raise _invalid(f"a mapping of a {spec.kind} map is LOW and HIGH")
    low, high = (parse_bound(text, spec) for text in (texts[0] or LOWEST_BOUND, texts[1]))
    if low is None:
        raise _invalid("low is above every key")
    if high is not None and (low >= high or high <= lowest_key(spec)):
        raise _invalid("low is not below high, so there is no key between them")
    return low, high


def parse_bound(text: str, spec: MapSpec) -> bytes | None:
    """Return one bound, of a list map a key; -inf is empty, +inf (or no text) None.

    Raises ProxyError: KEY_SYNTAX, KEY_RANGE, KEY_INVALID, KEY_TOO_LONG.
    """
    if text == LOWEST_BOUND:
        return b""
    if text in ("", HIGHEST_BOUND):
        return None
    if spec.kind is Kind.HASH:
        return parse_hash_bound(text)
    return parse_key(text, spec.key_type, spec.normalise)


def given_key(keys: MapKeys, text: str) -> bytes:
    """Return the key that a person gives.

    Raises ProxyError: KEY_MISSING for an empty one, and what `parse_bound` does.
    """
    key = keys.parse_key(text) if text else b""
    if not key:
        raise ProxyError(ErrorKind.KEY_MISSING)
    return key


def show_bounds(spec: MapSpec, lo: bytes, hi: bytes | None) -> tuple[str, str]:
    """Return low and high as `resolve` shows them; of a list map, both are the key."""
    return spec.show_bounds(ShardMapping(lo, hi, ""))


def in_words(spec: MapSpec, lo: bytes, hi: bytes | None) -> str:
    """Return a mapping's bounds for a sentence: the key of a list map, else [low, high)."""
    low, high = show_bounds(spec, lo, hi)
    return low if spec.kind is Kind.LIST else f"[{low}, {high})"


def lookup_facts(spec: MapSpec, key: bytes, located: Located) -> dict[str, object]:
    """Return what `lookup` answers for a key: the mapping, and where that leads."""
    low, high = show_bounds(spec, located.mapping.lo, located.mapping.hi)
    shard = located.shard
    return {
        "canonical_key": key.hex(),
        "hash": hash_key(key).hex() if spec.kind is Kind.HASH else "",
        "low": low,
        "high": high,
        "shard": shard.name,
        "host": shard.host,
        "port": shard.port,
        "database": shard.database,
        "status": str(located.mapping.status),
        "epoch": located.mapping.epoch,
    }


def _invalid(text: str) -> CatalogueError:
    return CatalogueError(Reason.INVALID_BOUNDS, text)
