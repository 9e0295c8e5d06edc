"""Since when each key is served, as the soak itself knows it.

A key is not served while a change of it is under way, or its shard or the catalogue is down. `ends`
counts what may end its sessions. Not for: what a client is told (`clients`).
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from proxy.catalogue.feed import RECONNECT_SECONDS
from tests.support.catalogue import MAP, SHARD_NAMES

REGIONS: Final = 4
KEYS_A_REGION: Final = 50
# Of a sidecar whose dials fail, and of the dial that is under way at its end.
BACKOFF_SECONDS_MAX: Final = 40.0
# Keys between two regions are on no shard, so that no merge crosses them.
REGION_WIDTH: Final = 100


def keys_of(region: int) -> range:
    """Return the keys of a region, which one writer changes."""
    return range(region * REGION_WIDTH, region * REGION_WIDTH + KEYS_A_REGION)


ALL_KEYS: Final = tuple(key for region in range(REGIONS) for key in keys_of(region))


@dataclass
class Served:
    """The state of all keys and servers; None: not served now."""

    owners: dict[int, str] = field(default_factory=dict)
    _keys: dict[int, float | None] = field(default_factory=dict)
    _servers: dict[str, float | None] = field(default_factory=dict)
    _ends: dict[int, int] = field(default_factory=dict)
    # Until when a sidecar may not have heard of another host: one with a feed, and one without.
    _elsewhere: dict[str, tuple[float, float]] = field(default_factory=dict)
    _feeds_by: float = 0.0

    def __post_init__(self) -> None:
        now = time.monotonic()
        self._keys.update(dict.fromkeys(ALL_KEYS, now))
        self._ends.update(dict.fromkeys(ALL_KEYS, 0))
        self._servers.update(dict.fromkeys((MAP, *SHARD_NAMES), now))

    def stops(self, keys: Iterable[int], *, ends: bool) -> None:
        """A change of these keys begins; it may end their sessions."""
        for key in keys:
            self._keys[key] = None
            self._ends[key] += ends

    def serves(self, keys: Iterable[int], owner: str) -> None:
        """A change of these keys is done, and they are online."""
        now = time.monotonic()
        for key in keys:
            self._keys[key], self.owners[key] = now, owner

    def falls(self, server: str) -> None:
        """A server goes down, and its sessions with it."""
        self._servers[server] = None
        for key, owner in self.owners.items():
            self._ends[key] += owner == server

    def rises(self, server: str, *, elsewhere: bool = False) -> None:
        """A server is up again, at another host if it is elsewhere."""
        self._servers[server] = now = time.monotonic()
        if server == MAP:
            self._feeds_by = now + RECONNECT_SECONDS[1]
        if elsewhere:
            self._elsewhere[server] = self._feeds_by, now + BACKOFF_SECONDS_MAX

    def seconds(self, key: int, *, has_feed: bool = True) -> float | None:
        """Return for how long a key can have been served; None: it may not be.

        A sidecar hears of another host when its feed is back after a restart of the catalogue;
        without a feed when it asks again, after its back-off.
        """
        owner, now = self.owners[key], time.monotonic()
        since = [self._keys[key], self._servers[MAP], self._servers[owner]]
        since.append(self._elsewhere.get(owner, (0.0, 0.0))[not has_feed])
        known = [one for one in since if one is not None]
        is_served = len(known) == len(since) and max(known) <= now
        return now - max(known) if is_served else None

    def ends(self, key: int) -> int:
        """Return a number that changes when something may end the key's sessions."""
        return self._ends[key]

    def is_changing(self, key: int) -> bool:
        """Return whether a change of the key is under way."""
        return self._keys[key] is None
