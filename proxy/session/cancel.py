"""Cancel: the key that each live session's client was given, and forwarding what is asked with it.

The upstream's own key goes to the client where it can, so that the pid which a driver shows is the
backend's (W27). A key lives exactly as long as its session, so there are never more than sessions.

A cancel is forwarded at once or not at all: one that is late would hit another query (W40).
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

from proxy.errors import ProxyError
from proxy.observe.logs import get_logger
from proxy.observe.metrics import CancelResult, Metrics
from proxy.upstream.address_lookup import Target
from proxy.upstream.connector import Connector
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_2, CancelRequest, ProtocolVersion

_PID_BITS: Final = 31  # a pid is a signed number, and drivers dislike negative ones
_KEY_BYTES: Final = 4
_KEY_BYTES_V3_2: Final = 32


# Cancels under way at once. Each is a TLS connection upstream that lives some milliseconds; more
# than this is an attack or a broken client, and is closed without a word (W42).
FORWARDS_MAX: Final = 100

Elsewhere = Callable[[CancelRequest], Awaitable[bool]]
"""Asks the other processes of this proxy to do it; tells whether one of them knew the key."""

_log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class IssuedKey:
    """A key that a client holds, and the upstream session that it stands for while it is live:
    as long as a `with` block runs."""

    issued: BackendKeyData
    target: Target
    upstream: BackendKeyData
    held: "CancelKeys"
    live: bool = True

    def __enter__(self) -> "IssuedKey":
        """Be found from here on."""
        self.held.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stand for nothing any more."""
        self.live = False
        self.held.remove(self)


class CancelKeys:
    """The keys of all live sessions. `random_bits` and `random_bytes` are those of `secrets`."""

    def __init__(
        self,
        random_bits: Callable[[int], int] = secrets.randbits,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._random_bits = random_bits
        self._random_bytes = random_bytes
        self._by_pid: dict[int, tuple[IssuedKey, ...]] = {}

    def __len__(self) -> int:
        return sum(len(held) for held in self._by_pid.values())

    def issue(
        self, upstream: BackendKeyData | None, target: Target, version: ProtocolVersion
    ) -> AbstractContextManager[IssuedKey | None]:
        """Return a key to be held while a block runs; the client is told its `issued`.

        None where the upstream gave none (W26): a client without a key sends no CancelRequest.
        """
        if upstream is None:
            return nullcontext()
        issued = upstream if self._may_pass(upstream) else self._own(version)
        return IssuedKey(issued, target, upstream, self)

    def add(self, entry: IssuedKey) -> None:
        """Let a key be found."""
        pid = entry.issued.pid
        self._by_pid[pid] = (*self._by_pid.get(pid, ()), entry)

    def remove(self, entry: IssuedKey) -> None:
        """Forget a key."""
        pid = entry.issued.pid
        held = self._by_pid.pop(pid)
        if left := tuple(other for other in held if other is not entry):
            self._by_pid[pid] = left

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


class CancelForwarder:
    """Forwards cancel requests, a bounded number at once."""

    def __init__(
        self,
        keys: CancelKeys,
        connector: Connector,
        metrics: Metrics,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._keys = keys
        self._connector = connector
        self._metrics = metrics
        self._elsewhere = elsewhere
        self._under_way = 0

    async def request(self, request: CancelRequest) -> None:
        """Do what a client asks; return when the upstream has closed, which means delivered.

        The client is to be closed only then: libpq takes EOF as "delivered" (W39).
        """
        if not await self.request_here(request) and not await self._request_elsewhere(request):
            self._metrics.cancel_requested(CancelResult.UNKNOWN_KEY)
            _log.debug("cancel request with an unknown key")

    async def request_here(self, request: CancelRequest) -> bool:
        """Do it if its key is of this process, and tell whether it is; then as `request`."""
        issued = self._keys.find(request)
        if issued is not None:
            await self.cancel(issued)
        return issued is not None

    async def _request_elsewhere(self, request: CancelRequest) -> bool:
        if self._elsewhere is None:
            return False
        if self._under_way >= FORWARDS_MAX:
            self._metrics.cancel_requested(CancelResult.TOO_MANY)
            return True
        self._under_way += 1
        try:
            return await self._elsewhere(request)
        finally:
            self._under_way -= 1

    async def cancel(self, issued: IssuedKey) -> None:
        """Cancel what the session is running. A failure is logged and counted, never raised."""
        if self._under_way >= FORWARDS_MAX:
            self._metrics.cancel_requested(CancelResult.TOO_MANY)
            return
        self._under_way += 1
        try:
            sent = await self._connector.cancel(
                issued.target, issued.upstream, still_wanted=lambda: issued.live
            )
        except (ProxyError, TimeoutError) as error:
            self._metrics.cancel_requested(CancelResult.FAILED)
            # Quietly: it is counted, and an upstream that is away would write one for each client.
            _log.info("cancel request not delivered", error=str(error) or "no answer in time")
        else:
            self._metrics.cancel_requested(
                CancelResult.FORWARDED if sent else CancelResult.SESSION_ENDED
            )
        finally:
            self._under_way -= 1
