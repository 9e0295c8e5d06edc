"""What the sessions of a pool have in common, kept once for all of them.

For: an idle session's memory: its key, its address and its welcome are those of others, too. Not
for: what a session has for itself (`pooled_session`).
"""

from dataclasses import replace
from typing import Final, TypeVar

from proxy.upstream.address_lookup import Target
from proxy.upstream.upstream_session import Prepared, UpstreamSession
from proxy.wire.kept_welcome import KeptWelcome

# Keys and welcomes that sessions share. Those of one target differ by the client's own settings.
# The oldest makes room.
SHARED_MAX: Final = 64

Part = TypeVar("Part")


class SharedParts:
    """The parts of one pool's sessions."""

    def __init__(self) -> None:
        self._keys: dict[Prepared, Prepared] = {}
        self._welcomes: dict[KeptWelcome, KeptWelcome] = {}
        self._reached: Target | None = None

    def of(self, opened: UpstreamSession) -> UpstreamSession:
        """Return the session with the key and the address that others have."""
        assert opened.prepared is not None
        if opened.target != self._reached:
            self._reached = opened.target
        prepared = _shared(self._keys, opened.prepared)
        return replace(opened, prepared=prepared, target=self._reached)

    def welcome(self, opened: UpstreamSession) -> KeptWelcome:
        """Return the welcome that others have, but for the key."""
        startup = opened.startup
        return _shared(self._welcomes, KeptWelcome.of(startup.welcome(startup.key)))


def _shared(known: dict[Part, Part], own: Part) -> Part:
    """Return the equal part that is known, which is this one if there is no other."""
    found = known.setdefault(own, own)
    if len(known) > SHARED_MAX:
        del known[next(iter(known))]
    return found
