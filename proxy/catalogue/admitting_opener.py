"""Opening a session for a shard key: dial its shard, have the shard admit it, or look again.

For: what the proxy does with a verdict, a failed dial and a mapping that is offline. Not for: the
query (`admission`), the dial (`upstream`), or finding the mapping (`map_source`).

The invariants: the client gets a session only of a shard that has admitted it, unless
`catalogue.validate` is false. All that is asked and dialled for it together takes
`connect_timeout_seconds`; the time in which it is parked is bounded by itself and holds nothing.
A key that moved meanwhile costs one look past the cache and one more dial.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Final, Protocol
from uuid import UUID

from proxy.catalogue.admission import Admission, AdmissionRequest, Consequence, admit
from proxy.catalogue.model import Located
from proxy.catalogue.parking import Parking, ParkMetrics, ParkResult
from proxy.catalogue.shard_upstreams import ShardUpstreams, target_name
from proxy.errors import NOT_THE_OPERATORS, ErrorKind, ProxyError
from proxy.transport.stream import StartupStream
from proxy.upstream.phases import DialPhases, StartStep
from proxy.upstream.upstream_session import AdmittedBy, UpstreamSession
from proxy.upstream.upstreams import RouteReplaced, Upstream
from proxy.wire.secret import Secret
from proxy.wire.startup import StartupMessage

# A look past the cache after a dial that took all of the time.
LOOK_SECONDS_MIN: Final = 1.0

# Failures that another shard would not have: they say nothing of the mapping.
_OF_THE_CLIENT: Final = NOT_THE_OPERATORS - {ErrorKind.DATABASE_MISSING}
# A parked client is not refused for these: the catalogue may answer again, and a map that is
# exchanged is so in the supervisor before it is in its workers.
_WAITED_FOR: Final = frozenset(
    {
        ErrorKind.CATALOGUE_UNREACHABLE,
        ErrorKind.CATALOGUE_REFUSED,
        ErrorKind.CATALOGUE_STALE,
        ErrorKind.MAPPING_STALE,
    }
)


class MapSource(Protocol):
    """Finds mappings: the cache in front of the catalogue."""

    async def find(self, routing_key: bytes, *, deadline: float | None = None) -> Located:
        """Return where a key is, as it is known. One that is offline is asked for again.

        A catalogue that cannot be reached is tried again until the deadline, by the loop's time.

        Raises ProxyError: MAPPING_NOT_FOUND, CATALOGUE_UNREACHABLE, ...
        """

    async def refresh(self, routing_key: bytes, stale: Located) -> Located:
        """Return where a key is now, by the catalogue: a shard refused what was known.

        Raises ProxyError as `find` does.
        """

    async def dial_failed(self, routing_key: bytes, located: Located) -> Located:
        """Return where a key is after its shard could not be reached.

        The catalogue is asked once, and then not for a while. Raises ProxyError as `find` does.
        """

    def dial_succeeded(self, located: Located) -> None:
        """Record that the shard of a mapping was reached."""


class OpenMetrics(ParkMetrics, Protocol):
    """Where admissions are counted."""

    def admitted(self, shard_map: str, verdict: str, seconds: float) -> None:
        """Count a verdict, and the time that it took."""

    def stale_retried(self, shard_map: str) -> None:
        """Count a second dial because a mapping was not as it was known."""


@dataclass(frozen=True, slots=True)
class OpenerParts:
    """What all sessions of a map share. `proxy` is this process's name in the shards' registry."""

    map_name: str
    source: MapSource
    shards: ShardUpstreams
    parking: Parking
    metrics: OpenMetrics
    proxy: str
    validate: bool
    connect_timeout_seconds: float
    clock: Callable[[], float]
    """The event loop's time."""
    is_in_force: Callable[[], bool]
    """Returns whether the map is still that of the configuration."""

    @contextmanager
    def replaceable(self) -> Iterator[None]:
        """Raise RouteReplaced for a refusal in the block by a map that is not in force any more."""
        try:
            yield
        except ProxyError as error:
            if self.is_in_force():
                raise
            raise RouteReplaced from error


class _Budget:
    """What is left of `connect_timeout_seconds`; the clock stands still while nothing is done."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = seconds

    @asynccontextmanager
    async def spending(self, *, seconds_min: float = 0.0) -> AsyncIterator[float]:
        """Yield what is left, and take the time of the block from it."""
        began = self._clock()
        try:
            yield max(self._left, seconds_min)
        finally:
            self._left -= self._clock() - began


class _Admitting:
    """The admission within one dial; `admission` is the shard's answer."""

    def __init__(
        self, parts: OpenerParts, located: Located, routing_key: bytes, phases: DialPhases
    ) -> None:
        self._parts = parts
        self._phases = phases
        self._request = AdmissionRequest(located, routing_key, parts.proxy)
        self.admission: Admission | None = None

    async def __call__(self, stream: StartupStream, ticket: Secret | None) -> Secret:
        began = self._parts.clock()
        with self._phases.step(StartStep.ADMIT):
            self.admission = await admit(stream, replace(self._request, secret=ticket))
        seconds = self._parts.clock() - began
        self._parts.metrics.admitted(self._parts.map_name, self.admission.verdict, seconds)
        return self.admission.secret


class AdmittingOpener:
    """Opens one client's session: a `SessionOpener` for a key and the mapping that has it."""

    def __init__(self, parts: OpenerParts, located: Located, routing_key: bytes) -> None:
        self._parts = parts
        self._located = located
        self._routing_key = routing_key
        self._upstream: Upstream | None = None

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the query of a client that disappears is ended."""
        return self._upstream is not None and self._upstream.cancel_on_disconnect

    @property
    def checks_connection(self) -> bool:
        """Whether the database does that itself; a CancelRequest then ends COPY data only."""
        return self._upstream is not None and self._upstream.checks_connection

    async def open(
        self,
        client: StartupMessage,
        phases: DialPhases,
        fallback: StartupMessage | None = None,
    ) -> UpstreamSession:
        """Open a session in the shard that has the key.

        A shard's database is that of its row: `fallback` is None.

        Raises ProxyError, RouteReplaced or ClientViolation.
        """
        assert fallback is None, "a shard has one database"
        with self._parts.replaceable():
            return await self._open(client, phases)

    async def _open(self, client: StartupMessage, phases: DialPhases) -> UpstreamSession:
        budget = _Budget(self._parts.connect_timeout_seconds, self._parts.clock)
        located, is_second = self._located, False
        if located.is_offline:
            located = await self._park(located, phases)
        while True:  # bounded by the budget, and by the time in which it may be parked
            try:
                opened = await self._dial(located, client, phases, budget)
            except ProxyError as error:
                found = await self._after_failed_dial(error, located, budget)
                failure, waits = error, False
            else:
                if isinstance(opened, UpstreamSession):
                    return opened
                found = await self._after_refusal(opened, located, budget)
                failure = opened.refusal(self._name(located))
                # What the catalogue shows as online, and the shard as offline, is to change soon.
                unchanged = is_second or _state(found) == _state(located)
                waits = opened.consequence is Consequence.WAIT and unchanged
            if self._is_replaced(found):
                raise RouteReplaced
            if waits or _is_blocked(found):
                # A shard that refused, and has an operation under way, is waited for as well.
                by = found.shard.op_id if waits else None
                located, is_second = await self._park(found, phases, by), False
            elif is_second:
                raise failure
            else:
                located, is_second = found, True
                self._parts.metrics.stale_retried(self._parts.map_name)

    async def _dial(
        self, located: Located, client: StartupMessage, phases: DialPhases, budget: _Budget
    ) -> UpstreamSession | Admission:
        """Return the session, or the admission that its shard did not give. Raises ProxyError."""
        parts = self._parts
        admitting = None
        if parts.validate:
            admitting = _Admitting(parts, located, self._routing_key, phases)
        async with budget.spending() as seconds:
            self._upstream = upstream = await parts.shards.of(located.shard)
            session = await upstream.open(client, phases, admit=admitting, timeout_seconds=seconds)
        parts.source.dial_succeeded(located)
        admission = None if admitting is None else admitting.admission
        if admission is not None and admission.consequence is not Consequence.SERVE:
            session.close()
            return admission
        mapping = located.mapping
        admitted_by = AdmittedBy(
            self._name(located),
            mapping.map_id,
            mapping.mapping_id,
            mapping.shard_id,
            self._routing_key,
            mapping.epoch,
        )
        return replace(session, admitted_by=admitted_by)

    async def _after_failed_dial(
        self, error: ProxyError, located: Located, budget: _Budget
    ) -> Located:
        """Return where the key is if that is elsewhere. Raises the error, or what `find` does."""
        if error.kind in _OF_THE_CLIENT:
            raise error
        try:
            async with budget.spending(seconds_min=LOOK_SECONDS_MIN) as seconds:
                async with asyncio.timeout(seconds):
                    found = await self._parts.source.dial_failed(self._routing_key, located)
        except TimeoutError:
            raise error from None
        except ProxyError as later:
            raise (later if later.kind is ErrorKind.MAPPING_NOT_FOUND else error) from None
        if _where(found) == _where(located) and not found.is_offline:
            raise error
        return found

    async def _after_refusal(
        self, admission: Admission, located: Located, budget: _Budget
    ) -> Located:
        """Return where the key is by the catalogue. Raises ProxyError where that is no question."""
        refusal = admission.refusal(self._name(located))
        if admission.consequence is Consequence.REFUSE:
            raise refusal
        try:
            async with budget.spending() as seconds, asyncio.timeout(seconds):
                return await self._parts.source.refresh(self._routing_key, located)
        except TimeoutError:
            raise refusal from None

    async def _park(
        self, located: Located, phases: DialPhases, shards_op: UUID | None = None
    ) -> Located:
        """Wait until the mapping is online, and return where it is then. Raises ProxyError.

        `shards_op` is an operation that its shard waits for.
        """
        parking, clock = self._parts.parking, self._parts.clock
        began = clock()  # one time for a client, however often it is parked or routed
        deadline = began + parking.seconds_max - phases.parked_seconds
        refusal = ProxyError(ErrorKind.MAPPING_OFFLINE, self._name(located))
        waiting = parking.waiting(deadline - began, refusal)
        with phases.step(StartStep.PARK), waiting as set_result:
            phases.current, phases.waits_for_slot, phases.is_parked = None, False, True
            try:
                while (left := deadline - clock()) > 0:
                    ids = located.mapping.mapping_id, located.shard.shard_id
                    is_due = await parking.wait(*ids, left, until=deadline)
                    if self._parts.is_in_force():
                        located = await self._find_parked(located, deadline, is_due=is_due)
                    if is_free := not _is_blocked(located, shards_op):
                        await parking.turn()
                    if self._is_replaced(located):
                        set_result(ParkResult.REROUTED)
                        raise RouteReplaced
                    if is_free:
                        set_result(ParkResult.SERVED)
                        return located
                set_result(ParkResult.TIMED_OUT)
                raise refusal
            except ProxyError as error:
                if error is not refusal:
                    set_result(ParkResult.FAILED)
                raise
            finally:
                phases.is_parked = False
                phases.parked_seconds += clock() - began

    async def _find_parked(self, located: Located, deadline: float, *, is_due: bool) -> Located:
        """Return where the key is; what is known, while the catalogue cannot be asked."""
        seconds = max(deadline - self._parts.clock(), 0.0)
        source = self._parts.source
        try:
            async with asyncio.timeout(seconds):
                if is_due:
                    return await source.refresh(self._routing_key, located)
                return await source.find(self._routing_key)
        except TimeoutError:
            return located
        except ProxyError as error:
            if error.kind in _WAITED_FOR:
                return located
            raise

    def _is_replaced(self, located: Located) -> bool:
        """Return whether this is of another map: the key may be none there, or another one."""
        is_other = located.mapping.map_id != self._located.mapping.map_id
        return is_other or not self._parts.is_in_force()

    def _name(self, located: Located) -> str:
        return target_name(self._parts.map_name, located.shard)


def _is_blocked(located: Located, shards_op: UUID | None = None) -> bool:
    """Return whether the shard would not admit: an operation that has begun counts as offline.

    One of the whole shard does not, unless it is `shards_op`: it may be a grant, or a file that is
    added, and these stop no session.
    """
    waits_for_shard = shards_op is not None and located.shard.op_id == shards_op
    return located.is_offline or located.mapping.op_id is not None or waits_for_shard


def _state(located: Located) -> tuple[object, ...]:
    mapping, shard = located.mapping, located.shard
    return mapping.mapping_id, mapping.epoch, mapping.status, shard.status, _where(located)


def _where(located: Located) -> tuple[object, ...]:
    return located.mapping.shard_id, located.shard.location
