"""Slots for sessions: `listen.max_connections` of them.

A session takes one from its StartupMessage to its end; without a free one the client is refused
with 53300 (W44), or with 53000 where the limit of open files is the bound. Connections that are
still starting and cancel requests take none.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, Protocol

from proxy.errors import ErrorKind, ProxyError

FULL: Final = partial(ProxyError, ErrorKind.TOO_MANY_CONNECTIONS)


class SlotSource(Protocol):
    """Slots for sessions; `used` are those of this process."""

    @property
    def used(self) -> int: ...

    def take(self) -> AbstractContextManager[None]:
        """Hold a slot while the block runs. Raises ProxyError when none is free."""


class Slots:
    """The slots of a proxy that has one process."""

    def __init__(self, slots_max: int, full: Callable[[], ProxyError] = FULL) -> None:
        """`full` makes the error for a client without a slot."""
        self._slots_max = slots_max
        self._full = full
        self.used = 0

    def take(self) -> AbstractContextManager[None]:
        """Hold a slot while the block runs. Raises ProxyError when none is free."""
        return self

    def __enter__(self) -> None:
        """Take a slot. Slots are only counted, so one object serves every holder."""
        if self.used >= self._slots_max:
            raise self._full()
        self.used += 1

    def __exit__(self, *_: object) -> None:
        """Release a slot."""
        self.used -= 1
