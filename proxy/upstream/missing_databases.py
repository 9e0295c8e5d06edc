"""The databases that an upstream did not have when they were requested last.

For: clients that request a database called as their user. Most drivers do so when no database is
given, so the name is tried once and then, for a minute, not again. Not for: deciding which client
may get another database (`routing.router`).

Invariant: at most `NAMES_MAX` names are kept, each for `KEPT_SECONDS`.
"""

import time
from collections.abc import Callable
from typing import Final

# A database that is created is found after this time. Each try costs a login upstream.
KEPT_SECONDS: Final = 60.0
# Clients choose the names; without a bound they could fill the memory. The oldest makes room.
NAMES_MAX: Final = 1000


class MissingDatabases:
    """Names of databases that one upstream does not have."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}  # in the order of their times

    def __contains__(self, name: object) -> bool:
        return isinstance(name, bytes) and self._until.get(name, 0.0) > self._clock()

    def add(self, name: bytes) -> None:
        """Register a name that the upstream has refused as unknown."""
        self._until.pop(name, None)
        if len(self._until) >= NAMES_MAX:
            del self._until[next(iter(self._until))]
        self._until[name] = self._clock() + KEPT_SECONDS
