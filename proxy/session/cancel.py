"""Cancel keys, and the forwarding of cancel requests.

A client gets the upstream's own key where possible, so that the pid which a driver shows is the
backend's (W27). Where an upstream session serves several clients, each gets the pid with a secret
of its own: a request of one that has disconnected must not reach the next one's query (P30). A key
lives exactly as long as its session, so there are never more keys than sessions.

A client's own cancel is forwarded within seconds or not at all: a late one would hit another query
(W40). One for a client that has disconnected may wait: its session runs nothing new.
"""

import asyncio
import hmac
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final

from proxy.errors import ProxyError
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.upstream.address_lookup import Target
from proxy.upstream.connector import CANCEL_SECONDS_MAX, Connector
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_2, CancelRequest, ProtocolVersion

_PID_BITS: Final = 31  # a pid is signed, and some drivers cannot handle a negative one
_KEY_BYTES: Final = 4
_KEY_BYTES_V3_2: Final = 32

# Concurrent cancels. Each is a TLS connection upstream of some milliseconds, so the others wait for
# no longer than some seconds, even if an application with hundreds of queries ends (W42).
FORWARDS_MAX: Final = 100

Elsewhere = Callable[[CancelRequest], Awaitable[bool]]
"""Passes a cancel request to the other processes; returns whether one of them has its key."""

# The reason of a failure that no ErrorResponse reports.
CANCEL_NOT_DELIVERED: Final = "cancel_not_delivered"

_log = get_logger(__name__)


@unique
class CancelResult(StrEnum):
    """What became of a CancelRequest."""

    FORWARDED = "forwarded"
    UNKNOWN_KEY = "unknown_key"
    SESSION_ENDED = "session_ended"
    TOO_MANY = "too_many"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class IssuedKey:
    """A client's key, and the upstream's key of the same session.

    It is registered, and `live`, while a `with` block runs.
    """

    issued: BackendKeyData
    target: Target
    upstream: BackendKeyData
    keys: "CancelKeys"
    live: bool = True
    forwarded: bool = False
    """A cancel may have been sent. Read it after the block: until then one can still be (P17)."""

    def __enter__(self) -> "IssuedKey":
        """Register the key."""
        self.keys.register(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Unregister the key."""
        self.live = False
        self.keys.unregister(self)

    def record_forward(self) -> bool:
        """Record that a cancel is about to be sent. Return False if it must not be: no session."""
        self.forwarded |= self.live
        return self.live


class CancelKeys:
    """The keys of all open sessions. `random_bits` and `random_bytes` are those of `secrets`."""

    def __init__(
        self,
        random_bits: Callable[[int], int] = secrets.randbits,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._random_bits = random_bits
        self._random_bytes = random_bytes
        self._by_pid: dict[int, tuple[IssuedKey, ...]] = {}

    def __len__(self) -> int:
        return sum(len(keys) for keys in self._by_pid.values())

    def issue(
        self,
        upstream: BackendKeyData | None,
        target: Target,
        version: ProtocolVersion,
        *,
        own_secret: bool = False,
    ) -> AbstractContextManager[IssuedKey | None]:
        """Return a key, to be registered while a block runs. The client is sent its `issued`.

        With `own_secret` it is never the upstream's, of which only the pid is kept (P30). None if
        the upstream sent none (W26): a client without a key sends no CancelRequest.
        """
        if upstream is None:
            return nullcontext()
        if own_secret and upstream.pid > 0:
            issued = self._own_key(upstream, version)
        elif self._is_free(upstream) and not own_secret:
            issued = upstream
        else:
            issued = self._random_key(version)
        return IssuedKey(issued, target, upstream, self)

    def register(self, entry: IssuedKey) -> None:
        """Register a key."""
        pid = entry.issued.pid
        self._by_pid[pid] = (*self._by_pid.get(pid, ()), entry)

    def unregister(self, entry: IssuedKey) -> None:
        """Unregister a key."""
        pid = entry.issued.pid
        keys = self._by_pid.pop(pid)
        if left := tuple(other for other in keys if other is not entry):
            self._by_pid[pid] = left

    def find(self, request: CancelRequest) -> IssuedKey | None:
        """Return the key that a CancelRequest names. Keys are compared in constant time."""
        found: IssuedKey | None = None
        for entry in self._by_pid.get(request.pid, ()):
            if hmac.compare_digest(entry.issued.key.reveal(), request.key.reveal()):
                found = entry
        return found

    def _is_free(self, key: BackendKeyData) -> bool:
        keys = self._by_pid.get(key.pid, ())
        return key.pid > 0 and all(entry.issued != key for entry in keys)

    def _own_key(self, upstream: BackendKeyData, version: ProtocolVersion) -> BackendKeyData:
        """Return a key with the upstream's pid, which several upstreams may have given."""
        while True:  # ends: the secret is random
            key = BackendKeyData(upstream.pid, self._secret(version))
            if key != upstream and self._is_free(key):
                return key

    def _random_key(self, version: ProtocolVersion) -> BackendKeyData:
        pid = 0
        while pid == 0 or pid in self._by_pid:  # ends: there are far fewer sessions than pids
            pid = self._random_bits(_PID_BITS)
        return BackendKeyData(pid, self._secret(version))

    def _secret(self, version: ProtocolVersion) -> Secret:
        return Secret(self._random_bytes(_KEY_BYTES_V3_2 if version >= V3_2 else _KEY_BYTES))


class ForwardSlots:
    """Slots for a bounded number of forwards. Those that wait get one in order, `first` ones first.

    Each that waits belongs to a client connection, so there are never more than those.
    """

    def __init__(self, slots_max: int) -> None:
        self._free = slots_max
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    @asynccontextmanager
    async def slot(self, *, first: bool) -> AsyncIterator[None]:
        """Hold a slot while the block runs. The caller bounds the wait for it."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(self._waiting[0 if first else 1])
        try:
            yield
        finally:
            self._release()

    async def _wait(self, queue: deque[asyncio.Future[None]]) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(waiting)
        try:
            await waiting
        except asyncio.CancelledError:
            if not waiting.cancelled():  # it was given the slot at the same moment
                self._release()
            elif waiting in queue:
                queue.remove(waiting)
            raise

    def _release(self) -> None:
        """Release the slot, to the next waiter if there is one."""
        for queue in self._waiting:
            while queue:
                waiting = queue.popleft()
                if not waiting.done():
                    waiting.set_result(None)
                    return
        self._free += 1


class CancelForwarder:
    """Forwards cancel requests, a bounded number at a time."""

    def __init__(
        self,
        keys: CancelKeys,
        connector: Connector,
        metrics: Metrics,
        elsewhere: Elsewhere | None = None,
        *,
        forwards_max: int = FORWARDS_MAX,
    ) -> None:
        self._keys = keys
        self._connector = connector
        self._metrics = metrics
        self._elsewhere = elsewhere
        self._slots = ForwardSlots(forwards_max)
        self._elsewhere_slots = ForwardSlots(FORWARDS_MAX)

    async def request(self, request: CancelRequest) -> None:
        """Forward a cancel request. Return when the upstream has closed: it is delivered then.

        Close the client's connection only after that: libpq takes EOF as "delivered" (W39).
        """
        if not await self.request_here(request) and not await self._request_elsewhere(request):
            self._metrics.cancel_requested(CancelResult.UNKNOWN_KEY)
            _log.debug("cancel request with an unknown key")

    async def request_here(self, request: CancelRequest) -> bool:
        """Forward a cancel request if this process has its key. Return whether it has."""
        issued = self._keys.find(request)
        if issued is not None:
            await self.cancel(issued)
        return issued is not None

    async def _request_elsewhere(self, request: CancelRequest) -> bool:
        if self._elsewhere is None:
            return False
        try:
            async with asyncio.timeout(CANCEL_SECONDS_MAX), self._elsewhere_slots.slot(first=True):
                return await self._elsewhere(request)
        except TimeoutError:
            self._not_delivered(CancelResult.TOO_MANY, "no other process answered in time")
            return True

    async def cancel(self, issued: IssuedKey) -> None:
        """Cancel for a client, within CANCEL_SECONDS_MAX. Log and count a failure, never raise it.

        The time includes the wait for a slot.
        """
        try:
            async with asyncio.timeout(CANCEL_SECONDS_MAX):
                await self._forward(issued, first=True)
        except TimeoutError:
            pass  # recorded where it happened

    async def cancel_disconnected(self, issued: IssuedKey) -> None:
        """Cancel for a client that has disconnected, after those that clients ask for.

        The caller bounds the time. A failure is logged and counted.
        """
        await self._forward(issued, first=False)

    async def _forward(self, issued: IssuedKey, *, first: bool) -> None:
        """Forward a cancel when there is a slot. What is given up is logged and counted."""
        result, error = CancelResult.TOO_MANY, "all slots for cancel requests were in use"
        delivered = sent = False
        try:
            async with self._slots.slot(first=first):
                result, error = CancelResult.FAILED, "no answer in time"
                sent = await self._connector.cancel(
                    issued.target, issued.upstream, still_wanted=issued.record_forward
                )
            delivered = True
        except (ProxyError, TimeoutError) as failure:
            error = str(failure) or error
        finally:
            if not delivered:
                self._not_delivered(result, error)
        if delivered:
            self._metrics.cancel_requested(
                CancelResult.FORWARDED if sent else CancelResult.SESSION_ENDED
            )

    def _not_delivered(self, result: CancelResult, error: str) -> None:
        self._metrics.cancel_requested(result)
        self._metrics.record_error(
            CANCEL_NOT_DELIVERED, message="a cancel request did not reach the upstream"
        )
        # At level info, since it is counted: an unreachable upstream means one line a client.
        _log.info("cancel request not delivered", error=error)
