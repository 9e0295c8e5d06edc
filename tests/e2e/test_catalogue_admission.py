"""Sessions of a shard key, with real shards: admitted, refused, parked, and where keys move."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytest
import pytest_asyncio

from proxy.catalogue.admission import Admission, AdmissionRequest, Verdict, admit
from proxy.catalogue.admitting_opener import AdmittingOpener, OpenerParts
from proxy.catalogue.model import Located, Mapping, SessionsMode, Shard, Status
from proxy.catalogue.parking import Parking, ParkResult
from proxy.catalogue.shard_upstreams import ShardUpstreams
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.server.metric_labels import build_metrics
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstream_session import UpstreamSession
from proxy.upstream.upstreams import RouteReplaced, Upstreams
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workspace.registry import LocalWorkspaceRegistry
from tests.support.catalogue import MAP, Stores
from tests.support.dialing import asked
from tests.support.operator import Operator, Placed
from tests.support.running import eventually

SPEC: Final = MapSpec(Kind.RANGE, KeyType.INT4)
KEY: Final = "5"
SECONDS_MAX: Final = 30.0
FIND: Final = (
    "select * from (select * from shardmap.mapping where map_id = $1 and lo <= $2"
    " order by lo desc limit 1) m where hi is null or hi > $2"
)


class DirectSource:
    """The catalogue itself, without a cache: what is `known` is remembered until asked past it."""

    def __init__(self, operator: Operator, catalogue: Any) -> None:
        self._operator = operator
        self._catalogue = catalogue
        self._lock = asyncio.Lock()
        self.known: Located | None = None
        self.queries = 0
        self.reached: list[str] = []
        self.fails = False

    async def find(self, routing_key: bytes, *, deadline: float | None = None) -> Located:
        if self.known is not None and self.known.mapping.status is Status.ONLINE:
            return self.known
        return await self.ask(routing_key)

    async def refresh(self, routing_key: bytes, stale: Located) -> Located:
        return await self.ask(routing_key)

    async def dial_failed(self, routing_key: bytes, located: Located) -> Located:
        self.reached.append("no")
        return await self.ask(routing_key)

    def dial_succeeded(self, located: Located) -> None:
        self.reached.append("yes")

    async def ask(self, routing_key: bytes) -> Located:
        if self.fails:
            raise ProxyError(ErrorKind.CATALOGUE_UNREACHABLE)
        async with self._lock:
            self.queries += 1
            row = await self._catalogue.fetchrow(FIND, self._operator.map_id, routing_key)
            if row is None:
                raise ProxyError(ErrorKind.MAPPING_NOT_FOUND)
            shard = await self._catalogue.fetchrow(
                "select * from shardmap.shard where shard_id = $1", row["shard_id"]
            )
        mapping = Mapping(
            *(row["mapping_id"], row["map_id"], row["shard_id"], row["lo"], row["hi"]),
            Status(row["status"]),
            SessionsMode(row["sessions"]),
            epoch=row["epoch"],
            op_id=row["op_id"],
        )
        self.known = Located(
            mapping,
            Shard(
                *(shard["shard_id"], shard["map_id"], shard["name"], shard["host"], shard["port"]),
                *(shard["dbname"], shard["endpoint"], shard["instance"], shard["workspace"]),
                Status(shard["status"]),
                op_id=shard["op_id"],
            ),
        )
        return self.known


@dataclass
class Counts:
    """What was counted."""

    verdicts: list[str] = field(default_factory=list)
    stale: int = 0
    parked_now: int = 0
    parks: list[str] = field(default_factory=list)

    def admitted(self, shard_map: str, verdict: str, seconds: float) -> None:
        assert shard_map == "tenants"
        assert seconds >= 0
        self.verdicts.append(verdict)

    def stale_retried(self, shard_map: str) -> None:
        self.stale += 1

    def parked(self, now: int) -> None:
        self.parked_now = now

    def park_ended(self, result: str) -> None:
        self.parks.append(result)


@dataclass
class Sidecar:
    """What opens sessions for keys."""

    operator: Operator
    source: DirectSource
    parts: OpenerParts
    counts: Counts
    sessions: list[UpstreamSession] = field(default_factory=list)

    async def opener(self, key: str = KEY) -> AdmittingOpener:
        routing_key = self.operator.keys.routing_key(self.operator.keys.parse_key(key))
        located = await self.source.find(routing_key)
        return AdmittingOpener(self.parts, located, routing_key)

    async def open(self, key: str = KEY, options: bytes = b"") -> UpstreamSession:
        opener = await self.opener(key)
        return await self.open_with(opener, options)

    async def open_with(self, opener: AdmittingOpener, options: bytes = b"") -> UpstreamSession:
        pairs = [(b"user", b"app"), (b"options", options)]
        async with asyncio.timeout(SECONDS_MAX):
            session = await opener.open(StartupMessage(V3_0, tuple(pairs)), DialPhases())
        self.sessions.append(session)
        return session

    async def refusal(self, key: str = KEY, options: bytes = b"") -> ProxyError:
        with pytest.raises(ProxyError) as refused:
            await self.open(key, options)
        return refused.value

    async def port_of(self, session: UpstreamSession) -> bytes:
        return await asked(session, "select current_setting('cluster_name')")


Start = Callable[..., Any]


@asynccontextmanager
async def sidecar_of(operator: Operator, **sections: Any) -> AsyncIterator[Sidecar]:
    stores = operator.stores
    settings = stores.settings(stores.roles.session, **sections)
    metrics = build_metrics()
    registry = LocalWorkspaceRegistry(metrics, version="1")
    upstreams = Upstreams(settings, registry, lambda *_: None)
    counts = Counts()

    async def catalogue_host() -> str:
        return stores.host(MAP)

    catalogue = settings.catalogue
    shards = ShardUpstreams(settings, upstreams.factory, (), catalogue_host)
    loop = asyncio.get_running_loop()
    async with stores.connect(MAP, stores.roles.reader) as connection:
        source = DirectSource(operator, connection)
        parts = OpenerParts(
            "tenants",
            source,
            shards,
            Parking(settings.park_max, catalogue.park_timeout_seconds, counts),
            counts,
            "proxy-1/17",
            catalogue.validate,
            settings.upstream.connect_timeout_seconds,
            loop.time,
            lambda: True,
        )
        sidecar = Sidecar(operator, source, parts, counts)
        try:
            yield sidecar
        finally:
            for session in sidecar.sessions:
                session.stream.transport.abort()
            shards.close()
            upstreams.close()
            await registry.close()


@pytest_asyncio.fixture
async def sidecar(operator: Operator) -> AsyncIterator[Sidecar]:
    async with sidecar_of(operator) as made:
        yield made


# -- verdicts ------------------------------------------------------------------------------------


async def test_s15_session_is_opened_in_the_shard_that_has_the_key_and_registered(
    sidecar: Sidecar, placed: Placed
) -> None:
    session = await sidecar.open()
    pid = int(await asked(session, "select pg_backend_pid()"))
    (row,) = await sidecar.operator.registered("one")
    assert (row["pid"], row["mapping_id"], row["epoch"]) == (pid, placed.mapping_id, 1)
    assert (row["key"], row["proxy"]) == (sidecar.operator.keys.parse_key("5"), "proxy-1/17")
    assert len(row["ticket"]) == 32
    by = session.admitted_by
    assert by is not None
    assert (by.target, by.mapping_id, by.epoch) == ("tenants/one", placed.mapping_id, 1)
    assert sidecar.counts.verdicts == [Verdict.OK]
    assert (await sidecar.open("1000")).admitted_by.target == "tenants/two"  # type: ignore[union-attr]


async def test_s18_key_that_moved_costs_one_look_and_one_dial(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.move(placed, "two")
    queries = sidecar.source.queries
    session = await sidecar.open()
    assert session.admitted_by is not None
    assert session.admitted_by.target == "tenants/two"
    assert sidecar.source.queries == queries + 1
    assert sidecar.counts.stale == 1
    assert sidecar.counts.verdicts[-2:] == [Verdict.MAPPING_MISSING, Verdict.OK]


async def test_s18_r3_without_validation_the_known_shard_gets_it(
    operator: Operator, placed: Placed
) -> None:
    catalogue = {"validate": False, "allow_unvalidated": True}
    async with sidecar_of(operator, catalogue=catalogue) as sidecar:
        await sidecar.open()
        await operator.move(placed, "two")
        session = await sidecar.open()
        assert session.admitted_by is not None
        assert session.admitted_by.target == "tenants/one"
        assert sidecar.counts.verdicts == []


async def test_s19_key_that_was_deleted_is_not_found(sidecar: Sidecar, placed: Placed) -> None:
    await sidecar.open()
    await sidecar.operator.delete(placed)
    assert (await sidecar.refusal()).kind is ErrorKind.MAPPING_NOT_FOUND


async def test_mapping_that_changes_with_every_look_is_stale(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    # The shard is ahead of the catalogue, whatever is asked.
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.mapping set epoch = epoch + 5")
    error = await sidecar.refusal()
    assert error.kind is ErrorKind.MAPPING_STALE
    assert sidecar.counts.verdicts[-2:] == [Verdict.STALE, Verdict.STALE]


async def test_s40_copy_of_a_shard_is_another_shard(sidecar: Sidecar, placed: Placed) -> None:
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.identity set location = 'other:5432/app'")
    queries = sidecar.source.queries
    error = await sidecar.refusal()
    assert error.kind is ErrorKind.WRONG_SHARD
    assert error.response().sqlstate == "55000"
    assert sidecar.counts.verdicts == [Verdict.WRONG_SHARD]
    assert sidecar.source.queries == queries + 1, "the first look, and no other"


async def test_s41_restored_shard_is_behind_and_is_not_asked_again(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.operator.catalogue("update shardmap.mapping set epoch = 9")
    assert (await sidecar.refusal()).kind is ErrorKind.SHARD_BEHIND
    assert sidecar.counts.verdicts == [Verdict.SHARD_BEHIND]


async def test_s25_database_without_the_schema_is_no_valid_shard(
    sidecar: Sidecar, placed: Placed
) -> None:
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("drop schema shardmap_local cascade")
    assert (await sidecar.refusal()).kind is ErrorKind.SHARD_NOT_VALID


async def test_session_role_without_the_right_is_denied(stores: Stores) -> None:
    operator = Operator(stores, SPEC)
    await operator.install(grants=False)
    await operator.add("0", "10", "one")
    async with sidecar_of(operator) as sidecar:
        error = await sidecar.refusal()
        assert error.kind is ErrorKind.VALIDATE_DENIED


async def test_s52_owner_that_cannot_see_sessions_registers_none(
    sidecar: Sidecar, placed: Placed
) -> None:
    stores = sidecar.operator.stores
    stores.execute("one", f'revoke pg_read_all_stats from "{stores.roles.admin}"')
    assert (await sidecar.refusal()).kind is ErrorKind.UNREGISTERED


async def test_store_of_another_major_version_is_refused(sidecar: Sidecar, placed: Placed) -> None:
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.identity set store_major = 2")
    assert (await sidecar.refusal()).kind is ErrorKind.STORE_VERSION


async def test_s76_backend_that_serves_several_clients_is_registered_for_the_last(
    sidecar: Sidecar, placed: Placed
) -> None:
    other = await sidecar.operator.add("20", "30", "one")
    session = await sidecar.open()
    pid = int(await asked(session, "select pg_backend_pid()"))

    async def take(key: str, secret: Secret | None) -> Admission:
        routing_key = sidecar.operator.keys.parse_key(key)
        located = await sidecar.source.ask(routing_key)
        return await admit(session.stream, AdmissionRequest(located, routing_key, "p", secret))

    # What a client without the secret asks changes nothing.
    assert (await take("25", None)).verdict is Verdict.UNREGISTERED
    (row,) = await sidecar.operator.registered("one")
    assert (row["pid"], row["mapping_id"]) == (pid, placed.mapping_id)
    # A new backend: three takes of two mappings.
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("delete from shardmap_local.session")
    first = await take("5", None)
    second = await take("25", first.secret)
    third = await take("5", second.secret)
    verdicts = [one.verdict for one in (first, second, third)]
    assert verdicts == [Verdict.OK] * 3
    (row,) = await sidecar.operator.registered("one")
    assert (row["pid"], row["mapping_id"]) == (pid, placed.mapping_id)
    assert (await take("25", second.secret)).verdict is Verdict.UNREGISTERED
    await sidecar.operator.end_sessions(other)
    assert len(await sidecar.operator.registered("one")) == 1
    await sidecar.operator.end_sessions(placed)
    await eventually(session.stream.gone.done, "the fence has ended it")


# -- hostile clients -----------------------------------------------------------------------------


HOSTILE: Final = {
    "read-only": "-c default_transaction_read_only=on",
    "serializable": "-c default_transaction_isolation=serializable",
    "strings": "-c standard_conforming_strings=off -c escape_string_warning=off",
    "search path": "-c search_path=evil,pg_temp",
    "encoding": "-c client_encoding=SJIS",
    "deferrable": "-c default_transaction_deferrable=on -c default_transaction_read_only=on",
    "floats and dates": "-c extra_float_digits=-15 -c DateStyle=German -c bytea_output=escape",
    "no scans": "-c enable_seqscan=off -c enable_indexscan=off -c jit=on -c jit_above_cost=0",
    "notices": "-c client_min_messages=debug5",
}


@pytest.mark.parametrize("options", HOSTILE.values(), ids=HOSTILE)
async def test_s51_defaults_of_the_client_do_not_disturb_the_admission(
    sidecar: Sidecar, placed: Placed, options: str
) -> None:
    session = await sidecar.open(options=options.encode())
    assert len(await sidecar.operator.registered("one")) == 1
    assert await asked(session, "select 1") == b"1"


async def test_s65_session_with_another_role_needs_the_right_itself(
    sidecar: Sidecar, placed: Placed
) -> None:
    stores = sidecar.operator.stores
    other = f"other-{stores.database}"
    stores.execute("one", f'create role "{other}"; grant "{other}" to "{stores.roles.session}"')
    try:
        options = f"-c role={other}".encode()
        assert (await sidecar.refusal(options=options)).kind is ErrorKind.VALIDATE_DENIED
        stores.execute(
            "one",
            f'grant usage on schema shardmap_local to "{other}";'
            f'grant execute on function shardmap_local.admit to "{other}"',
        )
        session = await sidecar.open(options=options)
        assert await asked(session, "select current_user") == other.encode()
        session.stream.transport.abort()
    finally:
        stores.execute("one", f'drop owned by "{other}"; drop role "{other}"')


async def test_statement_timeout_of_the_client_is_a_lost_upstream(
    sidecar: Sidecar, placed: Placed
) -> None:
    async with sidecar.operator.stores.connect("one") as local, local.transaction():
        await local.execute("select * from shardmap_local.mapping for update")
        error = await sidecar.refusal(options=b"-c statement_timeout=20")
        assert error.kind is ErrorKind.UPSTREAM_LOST


# -- offline -------------------------------------------------------------------------------------


async def test_s47_client_is_parked_until_the_mapping_is_online(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    assert not opening.done()
    await sidecar.operator.online(placed)
    sidecar.parts.parking.changed([placed.mapping_id])
    session = await opening
    assert session.admitted_by is not None
    assert session.admitted_by.epoch == 3
    assert sidecar.counts.parks == [ParkResult.SERVED]
    assert sidecar.counts.parked_now == 0


async def test_s47_parked_client_finds_out_by_itself(sidecar: Sidecar, placed: Placed) -> None:
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    await sidecar.operator.online(placed)
    assert (await opening).admitted_by is not None


async def test_s47_client_that_waits_too_long_is_refused(
    operator: Operator, placed: Placed
) -> None:
    async with sidecar_of(operator, catalogue={"park_timeout_seconds": 0.2}) as sidecar:
        await operator.offline(placed)
        error = await sidecar.refusal()
        assert error.kind is ErrorKind.MAPPING_OFFLINE
        assert error.response().sqlstate == "57P03"
        assert sidecar.counts.parks == [ParkResult.TIMED_OUT]


async def test_s64_client_beyond_the_bound_is_refused_at_once(
    operator: Operator, placed: Placed
) -> None:
    async with sidecar_of(operator, catalogue={"park_max": 1}) as sidecar:
        await operator.offline(placed)
        first = asyncio.ensure_future(sidecar.open())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        assert (await sidecar.refusal()).kind is ErrorKind.MAPPING_OFFLINE
        assert (await sidecar.open("1000")).admitted_by, "others connect meanwhile"
        first.cancel()
        await asyncio.wait((first,))
        assert sidecar.counts.parks == [ParkResult.FULL, ParkResult.LEFT]
        assert len(sidecar.parts.parking) == 0


async def test_parking_that_is_off_refuses_at_once(operator: Operator, placed: Placed) -> None:
    async with sidecar_of(operator, catalogue={"park_timeout_seconds": 0}) as sidecar:
        await operator.offline(placed)
        assert (await sidecar.refusal()).kind is ErrorKind.MAPPING_OFFLINE


class HeldTurns(Parking):
    """Holds each client whose turn has come."""

    def hold(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Return what is set when a client waits for its turn, and what ends that."""
        self._reached, self._goes_on = asyncio.Event(), asyncio.Event()
        return self._reached, self._goes_on

    async def turn(self) -> None:
        """Wait until the test lets it go on."""
        self._reached.set()
        await self._goes_on.wait()
        await super().turn()


async def test_s62_client_is_routed_anew_if_the_map_is_exchanged_before_its_turn(
    sidecar: Sidecar, placed: Placed
) -> None:
    """It was served by the map that was not in force any more."""
    is_in_force = True
    parking = HeldTurns(5, 10, sidecar.counts)
    reached, goes_on = parking.hold()
    sidecar.parts = replace(sidecar.parts, parking=parking, is_in_force=lambda: is_in_force)
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(parking) == 1, "the client is parked")
    await sidecar.operator.online(placed)
    async with asyncio.timeout(SECONDS_MAX):
        await reached.wait()
        is_in_force = False
        parking.exchanged()
        goes_on.set()
        with pytest.raises(RouteReplaced):
            await opening
    assert sidecar.counts.parks == [ParkResult.REROUTED]


async def test_s62_client_that_is_routed_anew_is_parked_for_what_is_left_of_its_time(
    operator: Operator, placed: Placed
) -> None:
    """Each reload that exchanged the map began its time anew."""
    async with sidecar_of(operator, catalogue={"park_timeout_seconds": 1}) as sidecar:
        is_in_force = True
        sidecar.parts = replace(sidecar.parts, is_in_force=lambda: is_in_force)
        await operator.offline(placed)
        phases = DialPhases()

        async def open_session() -> None:
            opener = await sidecar.opener()
            await opener.open(StartupMessage(V3_0, ((b"user", b"app"),)), phases)

        opening = asyncio.ensure_future(open_session())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        is_in_force = False
        sidecar.parts.parking.exchanged()
        with pytest.raises(RouteReplaced):
            await opening
        is_in_force = True
        await asyncio.sleep(1)
        with pytest.raises(ProxyError) as refused:
            await open_session()
        assert refused.value.kind is ErrorKind.MAPPING_OFFLINE
        assert sidecar.counts.parks == [ParkResult.REROUTED, ParkResult.FULL]


async def test_s64_parked_client_holds_no_connect(operator: Operator, placed: Placed) -> None:
    async with sidecar_of(operator, upstream={"connects_max": 1}) as sidecar:
        other = await operator.add("20", "30", "one")
        await operator.offline(placed, announces=False)
        opening = asyncio.ensure_future(sidecar.open())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        sidecar.source.known = None
        session = await sidecar.open("25")
        assert session.admitted_by is not None
        assert session.admitted_by.mapping_id == other.mapping_id
        opening.cancel()
        await asyncio.wait((opening,))


async def test_mapping_that_is_deleted_under_parked_clients_is_not_found(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    await sidecar.operator.delete(placed)
    with pytest.raises(ProxyError) as refused:
        await opening
    assert refused.value.kind is ErrorKind.MAPPING_NOT_FOUND
    assert sidecar.counts.parks == [ParkResult.FAILED]


async def test_s58_shard_that_is_offline_refuses_a_proxy_that_has_not_heard(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.shard_status("one", "offline", announces=False)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    assert Verdict.OFFLINE in sidecar.counts.verdicts
    await sidecar.operator.shard_status("one", "online", announces=False)
    assert (await opening).admitted_by is not None


async def test_operation_that_has_begun_counts_as_offline_once_a_shard_refused(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.catalogue(
        "update shardmap.mapping set op_id = gen_random_uuid() where mapping_id = $1",
        placed.mapping_id,
    )
    await sidecar.open()  # known: the shard decides, and still admits
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.mapping set epoch = epoch + 1")
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    await sidecar.operator.catalogue(
        "update shardmap.mapping set op_id = null, epoch = epoch + 1 where mapping_id = $1",
        placed.mapping_id,
    )
    assert (await opening).admitted_by is not None


async def test_operation_of_the_shard_that_stops_no_session_is_not_waited_for(
    operator: Operator, placed: Placed
) -> None:
    """A file of mappings that is added, or a login that is granted, marks the shard's row.

    A client whose mapping had changed meanwhile was refused for as long as that took.
    """
    async with sidecar_of(operator, catalogue={"park_timeout_seconds": 0}) as sidecar:
        await sidecar.open()
        known = sidecar.source.known
        await operator.offline(placed)
        await operator.online(placed)
        await operator.catalogue("update shardmap.shard set op_id = gen_random_uuid()")
        sidecar.source.known = known
        assert (await sidecar.open()).admitted_by is not None
        assert sidecar.counts.verdicts[-2:] == [Verdict.STALE, Verdict.OK]


async def test_operation_of_the_shard_is_waited_for_once_the_shard_refused(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    mark = "update shardmap.shard set op_id = {} where shard_id = $1"
    shard_id = sidecar.operator.shard_ids["one"]
    await sidecar.operator.catalogue(mark.format("gen_random_uuid()"), shard_id)
    await sidecar.operator.shard_status("one", "offline", announces=False)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    dials = len(sidecar.counts.verdicts)
    queries = sidecar.source.queries
    await eventually(lambda: sidecar.source.queries >= queries + 2, "it has looked twice")
    assert (len(sidecar.counts.verdicts), len(sidecar.parts.parking)) == (dials, 1)
    await sidecar.operator.shard_status("one", "online", announces=False)
    await sidecar.operator.catalogue(mark.format("null"), shard_id)
    assert (await opening).admitted_by is not None


async def test_r1_admission_that_waits_for_a_fence_reads_what_the_fence_left(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    async with sidecar.operator.stores.connect("one") as local:
        fence = local.transaction()
        await fence.start()
        await local.execute(
            "update shardmap_local.mapping set status = 'offline', epoch = epoch + 1"
            " where mapping_id = $1",
            placed.mapping_id,
        )
        opening = asyncio.ensure_future(sidecar.open())
        await asyncio.sleep(0.1)
        assert not opening.done()
        await fence.commit()
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    assert sidecar.counts.verdicts[-1] == Verdict.OFFLINE
    opening.cancel()
    await asyncio.wait((opening,))


# -- failed dials --------------------------------------------------------------------------------


async def test_s20_shard_that_cannot_be_reached_is_looked_up_once(
    operator: Operator, placed: Placed
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        await operator.catalogue(
            "update shardmap.shard set port = $2 where shard_id = $1",
            *(operator.shard_ids["one"], port),
        )
        upstream = {"connect_retry_seconds": 0.05}
        async with sidecar_of(operator, upstream=upstream) as sidecar:
            error = await sidecar.refusal()
            assert error.kind is ErrorKind.UPSTREAM_UNREACHABLE
            assert sidecar.source.reached == ["no"]
            # It is elsewhere by now, and the proxy has not heard of it.
            known = sidecar.source.known
            await operator.catalogue(
                "update shardmap.shard set port = $2 where shard_id = $1",
                *(operator.shard_ids["one"], operator.stores.lakebase.port),
            )
            sidecar.source.known = known
            assert (await sidecar.open()).admitted_by is not None
            assert sidecar.source.reached == ["no", "no", "yes"]


async def test_clients_own_mistake_asks_nothing(sidecar: Sidecar, placed: Placed) -> None:
    error = await sidecar.refusal(options=b"-c no_such_setting=1")
    assert error.kind is ErrorKind.SETTING_UNKNOWN
    assert sidecar.source.reached == []


async def test_failed_look_leaves_the_dials_own_error(operator: Operator, placed: Placed) -> None:
    await operator.catalogue("update shardmap.shard set dbname = 'nowhere'")
    async with sidecar_of(operator) as sidecar:
        opener = await sidecar.opener()
        sidecar.source.fails = True
        with pytest.raises(ProxyError) as refused:
            await sidecar.open_with(opener)
        assert refused.value.kind is ErrorKind.DATABASE_MISSING


# -- one budget ----------------------------------------------------------------------------------


async def test_one_budget_bounds_both_dials_and_not_the_time_parked(
    operator: Operator, placed: Placed
) -> None:
    async with sidecar_of(operator, upstream={"connect_timeout_seconds": 1.5}) as sidecar:
        await operator.offline(placed)
        opening = asyncio.ensure_future(sidecar.open())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        await asyncio.sleep(2)
        await operator.online(placed)
        assert (await opening).admitted_by is not None
        async with operator.stores.connect("one") as local, local.transaction():
            await local.execute("select * from shardmap_local.mapping for update")
            error = await sidecar.refusal()
            assert error.kind is ErrorKind.LOGIN_TIMEOUT


async def test_s28_one_lost_connection_within_the_budget_is_invisible(
    sidecar: Sidecar, placed: Placed
) -> None:
    async with sidecar.operator.stores.connect("one") as local, local.transaction():
        await local.execute("select * from shardmap_local.mapping for update")
        opening = asyncio.ensure_future(sidecar.open())
        async with sidecar.operator.stores.connect("one") as other:
            ended = 0
            while not ended:
                ended = await other.fetchval(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                    " where wait_event_type = 'Lock' and query like '%admit(%'"
                )
    assert (await opening).admitted_by is not None
    assert sidecar.counts.verdicts == [Verdict.OK]
