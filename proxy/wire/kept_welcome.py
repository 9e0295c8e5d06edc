"""The welcome of an upstream session that was logged in for an earlier client.

For: what each further client of the session is sent, and what its parameters were at the login. Not
for: the login itself (`upstream_startup`).

The invariant: but for notices and the key it is byte for byte what the login sent (P29). It holds
for as long as a reset finds the same parameters (P22).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from proxy.wire.messages import BackendKeyData
from proxy.wire.own_answer import reported_parameters

_HEADER: Final = Struct("!BI").unpack_from
_KEY: Final = ord("K")
_NOTICE: Final = ord("N")


@dataclass(frozen=True, slots=True)
class KeptWelcome:
    """The messages after AuthenticationOk, without notices and without the upstream's key.

    Sessions of one target have the same, so one object serves them all.
    """

    before_key: bytes
    after_key: bytes
    parameters: Mapping[bytes, bytes] = field(repr=False, compare=False)
    """The run-time parameters that the login reported."""

    @classmethod
    def of(cls, welcome: bytes) -> "KeptWelcome":
        """Return that of a login, from its messages with the upstream's own key."""
        parts = [bytearray(), bytearray()]
        at = after = 0
        while at < len(welcome):
            kind, length = _HEADER(welcome, at)
            end = at + 1 + length
            if kind == _KEY:
                after = 1
            elif kind != _NOTICE:
                parts[after] += welcome[at:end]
            at = end
        before_key, after_key = map(bytes, parts)
        return cls(before_key, after_key, reported_parameters(before_key + after_key))

    def with_key(self, key: BackendKeyData | None) -> bytes:
        """Return the welcome of a client with this key in the position of the upstream's."""
        return self.before_key + (b"" if key is None else key.encode()) + self.after_key
