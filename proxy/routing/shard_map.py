"""A static shard map in memory: from a key's canonical bytes to its target.

Not for reading and checking a map (`map_builder`). Every kind of map is sorted bounds and one
bisection: the bounds of a list are its keys; those of range and hash are the begin of each mapping,
and the end of a mapping if no other begins there.

Invariant: a map is immutable. A reload makes a new one; sessions that use this one keep it.
"""

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from proxy.routing.keys import (
    HASH_BYTES,
    KEY_BYTES,
    KeyType,
    Normalise,
    hash_key,
    key_parser,
    show_key,
)

# The owner of a gap between two mappings.
UNASSIGNED: Final = 0xFFFFFFFF
_WORD_BYTES: Final = 8  # an array's longest integer
_DIGEST_DIGITS: Final = 8
_PART_BOUNDS: Final = 50_000

LOWEST_BOUND: Final = "-inf"
HIGHEST_BOUND: Final = "+inf"


class Kind(StrEnum):
    """How a map assigns keys: single keys, ranges of keys, or ranges of their hash."""

    LIST = "list"
    RANGE = "range"
    HASH = "hash"


@dataclass(frozen=True, slots=True)
class MapSpec:
    """The kind of a map and the type of its keys. It is fixed for the map's life."""

    kind: Kind
    key_type: KeyType
    normalise: Normalise = Normalise.NONE

    def show_bounds(self, mapping: "ShardMapping") -> tuple[str, str]:
        """Return the bounds as written in a configuration; for a list, both are the key."""
        low = self.show_bound(mapping.lo)
        if self.kind is Kind.LIST:
            return low, low
        return low, HIGHEST_BOUND if mapping.hi is None else self.show_bound(mapping.hi)

    def show_bound(self, bound: bytes) -> str:
        """Return a lower bound, or an upper one that is not open, as a configuration has it."""
        if not bound:
            return LOWEST_BOUND
        if self.kind is Kind.HASH:
            return "0x" + bound.hex()
        return show_key(bound, self.key_type)


class ShardMapping(NamedTuple):
    """The keys (of a hash map: hashes) of one target, from `lo` to below `hi` (None: unbounded)."""

    lo: bytes
    hi: bytes | None
    target: str


class MapKeys:
    """The keys of a map: how they are written, and which bytes its mappings are compared with."""

    def __init__(self, spec: MapSpec) -> None:
        self.spec = spec
        self._parse = key_parser(spec.key_type, spec.normalise)
        self._is_hash = spec.kind is Kind.HASH

    def parse_key(self, text: str) -> bytes:
        """Return a key's canonical bytes. Raises ProxyError, as `keys.parse_key` does."""
        return self._parse(text)

    def show_key(self, key: bytes) -> str:
        """Return the canonical text of a key."""
        return show_key(key, self.spec.key_type)

    def routing_key(self, key: bytes) -> bytes:
        """Return what is compared with the bounds: the canonical bytes; of a hash map, the hash."""
        return hash_key(key) if self._is_hash else key


class ShardMap(MapKeys):
    """Finds a key's mapping in one bisection; uses about 20 bytes a bound besides the bound."""

    def __init__(
        self,
        spec: MapSpec,
        bounds: list[bytes],
        owners: "array[int]",
        targets: Sequence[str],
    ) -> None:
        """`bounds` are sorted and distinct; `owners` has the target of each bound's mapping.

        An owner is a position in `targets`, or UNASSIGNED. `map_builder` creates both.
        """
        assert len(bounds) == len(owners), "every bound has its owner"
        super().__init__(spec)
        self._is_list = spec.kind is Kind.LIST
        # The garbage collector soon untracks a tuple of bytes. A list of a million it would
        # traverse again and again, and stop everything meanwhile.
        self._bounds = tuple(bounds)
        self._index = _BoundIndex(
            self._bounds, HASH_BYTES if self._is_hash else KEY_BYTES[spec.key_type]
        )
        self._owners = owners
        self._targets = tuple(targets)
        self._length = len(owners) - owners.count(UNASSIGNED)
        self.digest = self._digest()
        """Identifies the content: maps with the same mappings have the same digest."""

    def __len__(self) -> int:
        """Return the number of mappings."""
        return self._length

    def targets(self) -> frozenset[str]:
        """Return the names of the targets that have keys."""
        return frozenset(self._targets[owner] for owner in set(self._owners) - {UNASSIGNED})

    def target(self, key: bytes) -> str | None:
        """Return the target of these canonical bytes, if any. Called once for each session."""
        sought = hash_key(key) if self._is_hash else key
        at = self._index.find_le(sought)
        if at < 0 or (self._is_list and self._bounds[at] != sought):
            return None
        owner = self._owners[at]
        return None if owner == UNASSIGNED else self._targets[owner]

    def find(self, key: bytes) -> ShardMapping | None:
        """Return the mapping that contains these canonical bytes, if any."""
        target = self.target(key)
        if target is None:
            return None
        at = self._index.find_le(self.routing_key(key))
        lo = self._bounds[at]
        if self._is_list:
            return ShardMapping(lo, lo + b"\0", target)
        return ShardMapping(lo, next(iter(self._bounds[at + 1 : at + 2]), None), target)

    def _digest(self) -> str:
        # Owners number all targets of a configuration, and another configuration may have others.
        # So renumber: only the targets in use matter here.
        used = sorted(set(self._owners), key=lambda owner: self._name(owner) or "")
        numbers = {owner: number for number, owner in enumerate(used)}
        found = hashlib.sha256(repr((self.spec, [self._name(owner) for owner in used])).encode())
        # In parts, so that other threads run between them: a reload must not stop the sessions.
        parts = [slice(at, at + _PART_BOUNDS) for at in range(0, len(self._bounds), _PART_BOUNDS)]
        for part in parts:
            found.update(array("I", map(numbers.__getitem__, self._owners[part])).tobytes())
        for part in parts:
            found.update(array("I", map(len, self._bounds[part])).tobytes())
        for part in parts:
            found.update(b"".join(self._bounds[part]))
        return found.hexdigest()[:_DIGEST_DIGITS]

    def _name(self, owner: int) -> str | None:
        return None if owner == UNASSIGNED else self._targets[owner]


class _BoundIndex:
    """Bisects sorted bounds by eight bytes of each, stored side by side as integers.

    A million bounds are objects scattered over the memory, and every step of a bisection would be a
    cache miss. The eight bytes are those after the common prefix of all bounds. They order two
    bounds as the bounds themselves do, unless they are equal.
    """

    def __init__(self, bounds: Sequence[bytes], size_bytes: int | None) -> None:
        """`size_bytes` is the size of every key, None if keys have any length."""
        self._bounds = bounds
        # The bounds are sorted, so the common prefix of the first and the last is that of all. Only
        # -inf, which is empty and the first, does not have it; its word is as low as any.
        lowest = next((bound for bound in bounds if bound), b"")
        self._common = _common_prefix(lowest, bounds[-1] if bounds else b"")
        end = len(self._common) + _WORD_BYTES
        self._is_exact = size_bytes is not None and size_bytes <= end
        self._part = part = slice(len(self._common), end)
        self._words = array(
            "Q", (int.from_bytes(bound[part].ljust(_WORD_BYTES, b"\0")) for bound in bounds)
        )

    def find_le(self, key: bytes) -> int:
        """Return the position of the last bound less than or equal to the key, or -1."""
        if not key.startswith(self._common):
            return bisect_right(self._bounds, key) - 1
        word = int.from_bytes(key[self._part].ljust(_WORD_BYTES, b"\0"))
        at = bisect_right(self._words, word) - 1
        if self._is_exact or at < 0 or self._words[at] != word or self._bounds[at] <= key:
            return at
        first = bisect_left(self._words, word, 0, at)
        return bisect_right(self._bounds, key, first, at) - 1


def _common_prefix(one: bytes, other: bytes) -> bytes:
    length = 0
    while one[length : length + 1] == other[length : length + 1] != b"":
        length += 1
    return one[:length]
