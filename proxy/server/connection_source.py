"""Where an App's connections come from, and the other processes of its proxy.

For: what differs between a proxy with one process and one with several. Not for: doing it, which
`session.listener` and `workers` do.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from proxy.observe.aggregation import Reading
from proxy.observe.session_page import SessionPage
from proxy.session.listen_sockets import Address


class ConnectionSource(Protocol):
    """Where client connections come from."""

    def accepting(self) -> AbstractAsyncContextManager[Sequence[Address]]:
        """Accept while the block runs, and yield the addresses; then end what is left."""

    async def drain(self, seconds: float) -> int:
        """Stop accepting, and end all sessions within this time. Return how many were cut.

        Called again meanwhile, it does what is left in the shorter time.
        """


class Workers(Protocol):
    """The other processes of a proxy, where there are several."""

    @property
    def ready(self) -> bool:
        """Whether one of them serves."""

    @property
    def serving(self) -> int:
        """The number of them that serve."""

    @property
    def slots_used(self) -> int:
        """The slots that their sessions use."""

    def reading(self) -> Reading:
        """Return what they had counted when they were read last."""

    async def refresh(self) -> None:
        """Read what they have counted."""

    async def reload(self) -> bool:
        """Make them serve new sessions by the App's settings. Return whether all do."""

    async def sessions(self, after: int, limit: int) -> SessionPage:
        """Return their open connections whose id is higher than `after`."""

    async def end_session(self, number: int) -> bool:
        """End the connection that has this id. Return whether one of them has it."""

    async def reconnect(self) -> bool:
        """Make them retire their pooled sessions. Return whether all do."""
