"""Cancel keys: what each live session's client was given, and whom it cancels.

The upstream's own key goes to the client where it can, so that the pid which a driver shows is the
backend's (W27). A key lives exactly as long as its session, so there are never more than sessions.
"""

import hmac
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from proxy.upstream.targets import Target
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_2, CancelRequest, ProtocolVersion

_PID_BITS: Final = 31  # a pid is a signed number, and drivers dislike negative ones
_KEY_BYTES: Final = 4
_KEY_BYTES_V3_2: Final = 32


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key that a client holds, and the upstream session that it stands for."""

    issued: BackendKeyData
    target: Target
    upstream: BackendKeyData


class CancelKeys:
    """The keys of all live sessions. `random_bits` and `random_bytes` are those of `secrets`."""

    def __init__(
        self,
        random_bits: Callable[[int], int] = secrets.randbits,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._random_bits = random_bits
        self._random_bytes = random_bytes
        self._by_pid: dict[int, list[IssuedKey]] = {}

    def __len__(self) -> int:
        return sum(len(held) for held in self._by_pid.values())

    @contextmanager
    def issue(
        self, upstream: BackendKeyData | None, target: Target, version: ProtocolVersion
    ) -> Iterator[BackendKeyData | None]:
        """Hold a key while the block runs, and give what the client is told.

        None where the upstream gave none (W26): a client without a key sends no CancelRequest.
        """
        if upstream is None:
            yield None
            return
        issued = upstream if self._may_pass(upstream) else self._own(version)
        entry = IssuedKey(issued, target, upstream)
        held = self._by_pid.setdefault(issued.pid, [])
        held.append(entry)
        try:
            yield issued
        finally:
            held.remove(entry)
            if not held:
                del self._by_pid[issued.pid]

    def find(self, request: CancelRequest) -> IssuedKey | None:
        """Return the session that a CancelRequest means, comparing its key in constant time."""
        found: IssuedKey | None = None
        for entry in self._by_pid.get(request.pid, ()):
            if hmac.compare_digest(entry.issued.key.reveal(), request.key.reveal()):
                found = entry
        return found

    def _may_pass(self, upstream: BackendKeyData) -> bool:
        held = self._by_pid.get(upstream.pid, ())
        return upstream.pid > 0 and all(entry.issued != upstream for entry in held)

    def _own(self, version: ProtocolVersion) -> BackendKeyData:
        pid = 0
        while pid == 0 or pid in self._by_pid:  # ends: far fewer sessions than numbers
            pid = self._random_bits(_PID_BITS)
        size = _KEY_BYTES_V3_2 if version >= V3_2 else _KEY_BYTES
        return BackendKeyData(pid, Secret(self._random_bytes(size)))
