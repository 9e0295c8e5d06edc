"""What the sessions of a pool have in common, kept once for all of them.

For: an idle session's memory: its key, its address and its welcome are those of others, too. Not
for: what a session has for itself (`pooled_session`).
"""

from dataclasses import replace
from typing import Final
from weakref import WeakValueDictionary

from proxy.upstream.address_lookup import Target
from proxy.upstream.upstream_session import Prepared, UpstreamSession
from proxy.wire.kept_welcome import KeptWelcome

# Those of one target differ by the client's own settings. The oldest makes room.
WELCOMES_MAX: Final = 64


class SharedParts:
    """The parts of one pool's sessions."""

    def __init__(self) -> None:
        self._keys = WeakValueDictionary[Prepared, Prepared]()
        self._welcomes: dict[KeptWelcome, KeptWelcome] = {}
        self._reached: Target | None = None

    def of(self, opened: UpstreamSession) -> UpstreamSession:
        """Return the session with the key and the address that others have."""
        assert opened.prepared is not None
        prepared = self._keys.setdefault(opened.prepared, opened.prepared)
        if opened.target != self._reached:
            self._reached = opened.target
        return replace(opened, prepared=prepared, target=self._reached)

    def welcome(self, opened: UpstreamSession) -> KeptWelcome:
        """Return the welcome that others have, but for the key."""
        startup = opened.startup
        own = KeptWelcome.of(startup.welcome(startup.key))
        found = self._welcomes.get(own)
        if found is None:
            if len(self._welcomes) >= WELCOMES_MAX:
                del self._welcomes[next(iter(self._welcomes))]
            self._welcomes[own] = found = own
        return found
