"""The composition root: builds every object from the settings, passes them on, drains.

For: connecting the parts, which get each other as arguments. Not for: deciding anything, or opening
what serves (`serving`).
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from proxy import __version__
from proxy.blocking import BlockingCalls, NoThreadStarted
from proxy.config import Changes, Settings, UpstreamSettings, compare, with_running_values
from proxy.errors import ErrorKind, ProxyError
from proxy.native import Acceleration
from proxy.observe.admin import AdminAddress
from proxy.observe.admin_state import ReloadConfiguration, not_serving
from proxy.observe.aggregation import Reading, total
from proxy.observe.client_processes import ClientProcesses
from proxy.observe.facts import Configuration, Facts
from proxy.observe.history import History
from proxy.observe.logs import configure_logging, get_logger
from proxy.observe.metrics import Metrics
from proxy.observe.session_page import SessionPage
from proxy.observe.shard_map_metrics import PARKED
from proxy.observe.status import CatalogueFacts, ShardMapStatus, Status, Token, WorkspaceApi, report
from proxy.observe.traces import CLOSE_SECONDS_MAX, Traces
from proxy.pool.pool import Pool
from proxy.routing.router import LookupResult, Route, Router, RouteResult
from proxy.server.catalogue_maps import CatalogueMaps
from proxy.server.connection_source import ConnectionSource, Workers
from proxy.server.file_limit import forwards_max, full_error, slots_max
from proxy.server.lifecycle import Lifecycle, State
from proxy.server.map_service import MapService
from proxy.server.metric_labels import build_metrics, configure_metrics, phase_recorder
from proxy.server.snapshot import ConfigSnapshot
from proxy.session.cancel import CancelForwarder, CancelKeys, Elsewhere
from proxy.session.drain import AcceptPeriod
from proxy.session.listen_sockets import Address, shown
from proxy.session.listener import STARTING_MAX, Listener, listener_tls
from proxy.session.session import Session, SessionParts
from proxy.session.slots import Slots, SlotSource
from proxy.upstream.address_lookup import Target
from proxy.upstream.connector import Connector
from proxy.upstream.dialer import Dialer
from proxy.upstream.name_lookup import Addresses
from proxy.upstream.upstreams import MakePool, SessionOpener
from proxy.wire.startup import StartupMessage
from proxy.workspace.registry import LocalWorkspaceRegistry, WorkspaceRegistry

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

_log = get_logger(__name__)


class App:
    """A running proxy: its parts, and the addresses that it listens on.

    A proxy of several processes has an App in each. The supervisor's has `workers`; a worker is
    given `workspaces`, `slots`, `cancel_elsewhere` and `map_elsewhere` that lead to the supervisor.
    """

    listen_addresses: Sequence[Address] = ()
    """Where clients connect, TCP first; none before the listener is open, and none in a worker."""
    admin: AdminAddress | None = None
    workers: Workers | None = None
    reload_configuration: ReloadConfiguration = staticmethod(not_serving)
    """Reads the configuration again. It is set where that can be done: not in a worker."""
    configuration = Configuration()
    lanes: "Lanes | None" = None
    """Those of the compiled relay, while the event loop watches them."""
    traces: Traces | None = None
    """Where the starts of sessions are sent, while it serves."""

    def __init__(
        self,
        settings: Settings,
        *,
        starting_max: int = STARTING_MAX,
        serves_clients: bool = True,
        workspaces: WorkspaceRegistry | None = None,
        slots: SlotSource | None = None,
        cancel_elsewhere: Elsewhere | None = None,
        map_elsewhere: Callable[[Settings, Metrics], MapService] | None = None,
        share_parked: Callable[[int], int] = lambda parked: parked,
    ) -> None:
        """`starting_max` connections may be starting at a time. `share_parked`: see `Parking`.

        Without `serves_clients`, as in a supervisor, no target has a pool.

        Raises ConfigurationError for a file that a setting names and that cannot be used.
        """
        self.lifecycle = Lifecycle()
        self.history = History()
        self._token_awaited = settings.startup.require == "token"
        self._map_awaited = True
        self.metrics = build_metrics(settings.target_names())
        self.cancel_keys = CancelKeys()
        self.workspaces = workspaces or LocalWorkspaceRegistry(self.metrics, version=__version__)
        self._tls = listener_tls(settings.listen)
        self.slots = slots or Slots(slots_max(settings.listen), full_error(settings.listen))
        self.cancels = CancelForwarder(
            self.cancel_keys,
            Connector(self._resolve),
            self.metrics,
            cancel_elsewhere,
            forwards_max=forwards_max(settings.listen),
        )
        self.catalogue = CatalogueMaps(
            self.metrics, self.cancel_keys, self.cancels, share_parked, map_elsewhere
        )
        self._make_pool: MakePool | None = None
        if serves_clients:
            self._make_pool = self._new_pool
        self.snapshot = ConfigSnapshot(
            settings,
            self.workspaces,
            phase_recorder(self.metrics),
            find_map=self.catalogue.find,
            make_pool=self._make_pool,
        )
        self.catalogue.use(self.snapshot)
        configure_metrics(self.metrics, self.snapshot)
        self._sessions_max = slots_max(settings.listen)
        self.listener = self._make_listener(settings, starting_max)
        self.connection_source: ConnectionSource = self.listener
        self._accept_period = AcceptPeriod()
        self._client_processes = ClientProcesses()

    @property
    def settings(self) -> Settings:
        """The settings in force. Those that need a restart are as they were at the start."""
        return self.snapshot.settings

    def reload(self, settings: Settings, router: Router | None = None) -> Changes:
        """Apply the settings that can change while sessions run. Return what changed.

        `router` is that of the settings, if it was made already (`ConfigSnapshot`).
        Raises ConfigurationError; then nothing has changed. A map of a catalogue that is not in
        force yet is not waited for, as `reload_when_loaded` does.
        """
        kept = with_running_values(settings, self.settings)
        return self._exchange(settings, self._snapshot_of(kept, router))

    async def reload_when_loaded(self, settings: Settings, router: Router) -> Changes:
        """Do `reload` when the map of these settings is loaded. Raises ConfigurationError."""
        kept = with_running_values(settings, self.settings)
        snapshot = self._snapshot_of(kept, router)
        try:
            await self.catalogue.load(snapshot.map_service)
        except BaseException:
            snapshot.close()
            raise
        return self._exchange(settings, snapshot)

    def _snapshot_of(self, settings: Settings, router: Router | None) -> ConfigSnapshot:
        return ConfigSnapshot(
            settings,
            self.workspaces,
            phase_recorder(self.metrics),
            self.snapshot,
            router,
            find_map=self.catalogue.find,
            make_pool=self._make_pool,
        )

    def _exchange(self, settings: Settings, snapshot: ConfigSnapshot) -> Changes:
        changes = compare(self.settings, settings)
        kept = snapshot.settings
        try:
            tls = listener_tls(kept.listen)
        except BaseException:
            snapshot.close()
            raise
        configure_metrics(self.metrics, snapshot)
        if kept.log != self.settings.log:
            configure_logging(**kept.log.model_dump())
        before = self.snapshot
        changes = changes.with_contents(before.rewritten(snapshot))
        self.snapshot, self._tls = snapshot, tls
        self.catalogue.use(snapshot)
        before.close()
        return changes

    async def drain(self, drain_seconds: float, *, accept_seconds: float = 0) -> int:
        """Fail readiness, then end all sessions. Return how many had to be cut.

        New connections are accepted for `accept_seconds` more; from then on the sessions have
        `drain_seconds`. Called again meanwhile, it stops accepting at once and ends what is left in
        the shorter time.
        """
        self.lifecycle.drain(accept_seconds + drain_seconds)
        for pool in self.snapshot.pools:
            pool.drain()
        await self._accept_period.wait(accept_seconds)
        return await self.connection_source.drain(drain_seconds)

    async def close_pools(self) -> None:
        """Close the upstream sessions that are kept, when there are no clients any more."""
        for pool in self.snapshot.pools:
            pool.drain()
            await pool.wait_closed()

    async def close_traces(self) -> None:
        """Send the traces that are left, for a bounded time. Further sessions are not traced."""
        traces, self.traces = self.traces, None
        if traces is not None:
            with suppress(TimeoutError, NoThreadStarted):
                await BlockingCalls("traces").run(traces.close, CLOSE_SECONDS_MAX)

    def _make_listener(self, settings: Settings, starting_max: int) -> Listener:
        parts = SessionParts(
            route=self._route,
            cancel_keys=self.cancel_keys,
            cancels=self.cancels,
            metrics=self.metrics,
            startup_timeout_seconds=settings.listen.startup_timeout_seconds,
            tls=lambda: self._tls,
            slot=self.slots.take,
            mapped_sessions=self.catalogue.mapped_sessions,
            idle_timeout_seconds=settings.listen.idle_timeout_seconds,
            lanes=lambda: self.lanes,
            traces=lambda: self.traces,
        )
        return Listener(
            settings.listen,
            self.slots,
            self.metrics,
            lambda stream, entry: Session(stream, entry, parts).run(),
            starting_max=starting_max,
        )

    # -- what operators see, as `observe.admin.AdminState` and `observe.status.StatusSource` -------

    version = __version__

    @property
    def started(self) -> bool:
        """Whether it has served, and each workspace has issued a token if `startup.require` says.

        Once true it stays so: an outage of the workspace API must not end a proxy that works.
        """
        if self._token_awaited and not self.snapshot.accounts_without_token():
            self._token_awaited = False
        self._map_awaited = self._map_awaited and not self.catalogue.loaded
        return self.lifecycle.started and not (self._token_awaited or self._map_awaited)

    @property
    def ready(self) -> bool:
        """Whether it serves and does not drain."""
        serving = self.lifecycle.state is State.SERVING and self.catalogue.loaded
        return serving and (self.workers is None or self.workers.ready)

    @property
    def acceleration(self) -> Acceleration:
        """Whether new sessions use the compiled relay."""
        return self.snapshot.acceleration

    @property
    def listen_address(self) -> str:
        """The addresses where clients connect; empty before the listener is open."""
        return ", ".join(map(shown, self.listen_addresses))

    @property
    def listen_host(self) -> str:
        """The first address's host; without TCP the directory of the unix socket."""
        return self.listen_addresses[0][0]

    @property
    def listen_port(self) -> int:
        """The port of every address."""
        return self.listen_addresses[0][1]

    @property
    def sessions_max(self) -> int:
        """The bound of `session_slots_used`."""
        return self._sessions_max

    @property
    def session_slots_used(self) -> int:
        """The sessions that are served, and those whose upstream is being opened."""
        return self.slots.used if self.workers is None else self.workers.slots_used

    def facts(self) -> Facts:
        """Return what is the same for a long time."""
        serving = 1 if self.workers is None else self.workers.serving
        workers = self.settings.listen.workers
        return Facts(workers, serving, self.snapshot.roles(), self.configuration)

    def target_names(self) -> Sequence[str]:
        """Return the names of the configured targets."""
        return self.settings.target_names()

    def workspace_apis(self) -> Sequence[WorkspaceApi]:
        """Return whether tokens can be minted, for each workspace."""
        return self.snapshot.workspace_apis()

    def tokens(self) -> Sequence[Token]:
        """Return the times of each workspace's newest token."""
        return self.snapshot.tokens()

    def warnings(self) -> Sequence[str]:
        """Return a sentence for each risk in the configuration."""
        return self.settings.warnings()

    def shard_map(self) -> ShardMapStatus | None:
        """Return the state of the shard map, None without one."""
        shown = self.catalogue.status() or self.snapshot.static_map_status()
        if shown is None or shown.parked is None:
            return shown
        parked = sum(one.value for one in self._workers_reading().samples if one.name == PARKED)
        return replace(shown, parked=shown.parked + int(parked))

    def catalogue_facts(self) -> CatalogueFacts:
        """Return what else metrics show of a map in a catalogue."""
        return self.catalogue.facts()

    def look_up(self, key: str) -> Mapping[str, object]:
        """Return where a key leads by what is known of the catalogue's map. Raises ProxyError."""
        return self.catalogue.look_up(key)

    async def reconnect(self) -> bool:
        """Retire every pooled session in all processes. Return whether each has done so."""
        for pool in self.snapshot.pools:
            pool.reconnect()
        return self.workers is None or await self.workers.reconnect()

    async def sessions(self, after: int, limit: int, *, processes: bool) -> SessionPage:
        """Return open connections of all processes whose id is higher than `after`."""
        page = await (self.workers or self.listener).sessions(after, limit)
        if processes:
            ports = {port for _, port in self.listen_addresses}
            await self._client_processes.add_to(page["sessions"], ports)
        return page

    async def end_session(self, number: int) -> bool:
        """End the connection that has this id. Return whether there is one."""
        return await (self.workers or self.listener).end_session(number)

    def quit(self) -> None:
        """Ask the process to drain and end."""
        self.lifecycle.quit_asked.set()

    async def refresh(self) -> None:
        """Read the password file, and ask the other processes what they have counted."""
        await self.snapshot.read_password()
        if self.workers is not None:
            await self.workers.refresh()

    def exposition(self) -> bytes:
        """Return the metrics of all processes in Prometheus's text format."""
        return self.metrics.exposition(self._workers_reading().samples)

    def status(self) -> Status:
        """Return the status of all processes."""
        whole = self.whole_reading()
        minute = self.history.last_minute(whole.totals)
        found = whole.targets, whole.errors
        return report(self, *found, time.time(), pools=whole.pools, last_minute=minute)

    def reading(self) -> Reading:
        """Return what this process has counted."""
        return replace(self._own_rows(), samples=self.metrics.samples())

    def whole_reading(self) -> Reading:
        """Return what all processes had counted at the last `refresh`, without samples."""
        return total([self._own_rows(), self._workers_reading()])

    def _own_rows(self) -> Reading:
        stats, errors = self.metrics.targets, self.metrics.recent_errors.latest()
        rows, pools = stats.rows(self.snapshot.hosts()), self.metrics.pools.rows()
        return Reading((), rows, errors, pools, stats.refused, stats.connects)

    def _workers_reading(self) -> Reading:
        return Reading() if self.workers is None else self.workers.reading()

    # -- inside ----------------------------------------------------------------------------------

    async def _route(self, startup: StartupMessage) -> tuple[Route, SessionOpener]:
        snapshot = self.snapshot  # the present one: a reload replaces it
        shard_map = snapshot.settings.routing.shard_map
        try:
            route, upstream = await snapshot.route(startup)
        except ProxyError as error:
            # Look-ups in a catalogue's map are counted as they are made.
            if error.kind is ErrorKind.MAPPING_NOT_FOUND and snapshot.map_service is None:
                self.metrics.key_looked_up(shard_map, LookupResult.MISS)
            if shard_map:
                self.metrics.client_routed(shard_map, RouteResult.REFUSED)
            raise
        if route.shard_map:
            self.metrics.client_routed(shard_map, RouteResult.ROUTED, route.target)
            if snapshot.map_service is None:
                self.metrics.key_looked_up(shard_map, LookupResult.HIT)
        return route, upstream

    def _new_pool(self, name: str, target: UpstreamSettings, dialer: Dialer) -> Pool:
        pool = Pool(name, target, dialer, self.metrics.pools.register)
        if self.lifecycle.draining:  # a shard's, for its first client
            pool.drain()
        return pool

    def _resolve(self, target: Target) -> Awaitable[Addresses]:
        return self.snapshot.upstreams.name_lookup.resolve(target)
