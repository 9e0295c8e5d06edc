"""The composition root: builds every object from the settings, hands them down, serves, drains.

Nothing below makes its own collaborators; nothing here decides anything. `serving` is the whole
program for `run`, for `demo` and for tests alike.
"""

import ssl
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from proxy import __version__
from proxy.config import Changes, ConfigurationError, ListenSettings, Problem, Settings, compare
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.admin import AdminAddress, AdminState, serve_admin
from proxy.observe.aggregation import Reading, total
from proxy.observe.logs import configure_logging, get_logger
from proxy.observe.loop_lag import sampling_lag
from proxy.observe.metrics import Metrics
from proxy.observe.status import State, Status, StatusSource, Token, report
from proxy.routing.router import Route, Router
from proxy.server.lifecycle import Lifecycle
from proxy.server.snapshot import ConfigSnapshot
from proxy.session.cancel import CancelForwarder, CancelKeys, Elsewhere
from proxy.session.drain import AcceptPeriod
from proxy.session.end_reason import EndReason
from proxy.session.fast_path import watched_lanes
from proxy.session.listener import STARTING_MAX, TOO_MANY_STARTING, Listener, socket_name
from proxy.session.session import Session, SessionParts
from proxy.session.session_log import StartupFailure
from proxy.session.slots import Slots, SlotSource
from proxy.transport.tls import server_context
from proxy.upstream.connector import Connector
from proxy.upstream.phases import ConnectPhase, RecordTargetPhase
from proxy.upstream.upstreams import Upstream
from proxy.wire.startup import StartupMessage
from proxy.wire.violations import ClientReason
from proxy.workspace.registry import LocalWorkspaceRegistry, WorkspaceRegistry

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

_log = get_logger(__name__)


class ConnectionSource(Protocol):
    """Where client connections come from."""

    def accepting(self) -> AbstractAsyncContextManager[tuple[str, int]]:
        """Accept while the block runs, and yield the address; then end what is left."""

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
    def slots_taken(self) -> int:
        """The slots that their sessions take."""

    def reading(self) -> Reading:
        """Return what they had counted when they were read last."""

    async def refresh(self) -> None:
        """Read what they have counted."""

    async def reload(self) -> bool:
        """Have them serve new sessions by the App's settings. Return whether all do."""


class App:
    """A running proxy: its parts, and the addresses where 0 was asked for a port.

    Without TCP `listen_host` is the directory of the unix socket, as drivers take it for a host.

    A proxy of several processes has an App in each: the first accepts and has the `workers`; in
    those `workspaces`, `slots` and `cancel_elsewhere` lead to it.
    """

    listen_host: str
    listen_port: int
    admin: AdminAddress | None = None
    workers: Workers | None = None
    lanes: "Lanes | None" = None
    """The compiled relay's, while the loop carries them."""

    def __init__(
        self,
        settings: Settings,
        *,
        starting_max: int = STARTING_MAX,
        workspaces: WorkspaceRegistry | None = None,
        slots: SlotSource | None = None,
        cancel_elsewhere: Elsewhere | None = None,
    ) -> None:
        """`starting_max` connections may be starting at a time.

        Raises ConfigurationError for a file that a setting names and that cannot be used."""
        self.lifecycle = Lifecycle()
        self.metrics = build_metrics(settings.target_names())
        self.cancel_keys = CancelKeys()
        self.workspaces = workspaces or LocalWorkspaceRegistry(self.metrics, version=__version__)
        self.snapshot = ConfigSnapshot(settings, self.workspaces, self._record_phase)
        self._count_by(self.snapshot)
        self._tls = _listener_tls(settings.listen)
        self.slots = slots or Slots(settings.listen.max_connections)
        # A cancel is no connect: its phases are nobody's.
        connector = Connector(lambda phase, seconds: None)
        self.cancels = CancelForwarder(self.cancel_keys, connector, self.metrics, cancel_elsewhere)
        self.listener = self._make_listener(settings, starting_max)
        self.connection_source: ConnectionSource = self.listener
        self._accept_period = AcceptPeriod()

    @property
    def settings(self) -> Settings:
        """What is in force now. What needs a restart is as it was at the start."""
        return self.snapshot.settings

    def reload(self, settings: Settings, router: Router | None = None) -> Changes:
        """Take over what can change while sessions go on; return what changed.

        `router` is that of the settings, if it was made already (`ConfigSnapshot`).
        New sessions go by the new settings, all of them or, when they cannot be used, none.
        Raises ConfigurationError, and nothing has changed then.
        """
        changes = compare(self.settings, settings)
        kept = self._without_restart(settings)
        tls = _listener_tls(kept.listen)
        snapshot = ConfigSnapshot(kept, self.workspaces, self._record_phase, self.snapshot, router)
        self._count_by(snapshot)
        if kept.log != self.settings.log:
            configure_logging(format=kept.log.format, level=kept.log.level)
        before = self.snapshot
        changes = changes.and_contents(before.rewritten(snapshot))
        self.snapshot, self._tls = snapshot, tls
        before.upstreams.close()
        return changes

    def _without_restart(self, settings: Settings) -> Settings:
        """Return the settings with what was made once at the start as it was then."""
        certificate = {
            "tls_certificate": settings.listen.tls_certificate,
            "tls_key": settings.listen.tls_key,
        }
        return settings.model_copy(
            update={
                "listen": self.settings.listen.model_copy(update=certificate),
                "admin": self.settings.admin,
                "log": settings.log.model_copy(update={"format": self.settings.log.format}),
            }
        )

    async def drain(self, drain_seconds: float, *, accept_seconds: float = 0) -> int:
        """Fail readiness, then end all sessions. Return how many had to be cut.

        New connections are accepted for `accept_seconds` more; from then on the sessions have
        `drain_seconds`. Called again meanwhile, it stops accepting at once and ends what is left in
        the shorter time.
        """
        self.lifecycle.drain(accept_seconds + drain_seconds)
        await self._accept_period.wait(accept_seconds)
        return await self.connection_source.drain(drain_seconds)

    def _make_listener(self, settings: Settings, starting_max: int) -> Listener:
        parts = SessionParts(
            route=self._route,
            cancel_keys=self.cancel_keys,
            cancels=self.cancels,
            metrics=self.metrics,
            startup_timeout_seconds=settings.listen.startup_timeout_seconds,
            tls=lambda: self._tls,
            slot=self.slots.take,
            idle_timeout_seconds=settings.listen.idle_timeout_seconds,
            lanes=lambda: self.lanes,
        )
        return Listener(
            settings.listen,
            self.slots,
            self.metrics,
            lambda stream, entry: Session(stream, entry, parts).run(),
            starting_max=starting_max,
        )

    def reading(self) -> Reading:
        """Return what this process has counted."""
        metrics = self.metrics
        return Reading(
            metrics.samples(),
            metrics.live.readings(),
            metrics.failures.latest(),
            self.snapshot.hosts(),
        )

    async def _route(self, startup: StartupMessage) -> tuple[Route, Upstream]:
        snapshot = self.snapshot  # the present one: a reload replaces it
        shard_map = snapshot.settings.routing.shard_map
        try:
            route, upstream = await snapshot.route(startup)
        except ProxyError as error:
            if shard_map:
                missed = error.kind is ErrorKind.MAPPING_NOT_FOUND
                self.metrics.route_refused(shard_map, missed=missed)
            raise
        if route.shard_map:
            self.metrics.routed(shard_map, route.target)
        return route, upstream

    def _count_by(self, snapshot: ConfigSnapshot) -> None:
        shard_map = snapshot.router.shard_map
        mappings = 0 if shard_map is None else len(shard_map)
        names = snapshot.settings.target_names()
        self.metrics.know(names, snapshot.settings.routing.shard_map, mappings)
        self.metrics.build_is(snapshot.acceleration)

    def _record_phase(self, target: str, phase: ConnectPhase, seconds: float) -> None:
        self.metrics.connect_phase_took(phase, seconds, target)


@asynccontextmanager
async def serving(settings: Settings, *, starting_max: int = STARTING_MAX) -> AsyncIterator[App]:
    """Serve while the block runs; `starting_max` connections may be starting at a time.

    Raises OSError when an address cannot be listened on, and ConfigurationError for a file that
    a setting names and that cannot be used.
    """
    app = App(settings, starting_max=starting_max)
    async with running(app):
        log_serving(app)
        yield app


@asynccontextmanager
async def running(app: App) -> AsyncIterator[None]:
    """Serve with the parts of `app` while the block runs. Raises OSError as `serving` does.

    This is the same in every process of a proxy: with one, in the supervisor, and in a worker.
    """
    settings = app.settings
    async with AsyncExitStack() as stack:
        app.lanes = stack.enter_context(watched_lanes())
        stack.push_async_callback(app.workspaces.close)
        stack.enter_context(sampling_lag(app.metrics.loop_lagged))
        if settings.admin.enabled:
            app.admin = await stack.enter_async_context(
                serve_admin(_admin_state(app), host=settings.admin.host, port=settings.admin.port)
            )
        host, port = await stack.enter_async_context(app.connection_source.accepting())
        app.listen_host, app.listen_port = host, port
        app.lifecycle.serve()
        yield


def log_serving(app: App) -> None:
    """Log where the proxy serves, and with what."""
    _log.info(
        "serving",
        host=app.listen_host,
        port=app.listen_port,
        admin_port=None if app.admin is None else app.admin.port,
        version=__version__,
        acceleration=app.snapshot.acceleration,
        **app.snapshot.map_facts,
    )


@asynccontextmanager
async def open_snapshot(
    settings: Settings, record_phase: RecordTargetPhase
) -> AsyncIterator[ConfigSnapshot]:
    """Give what sessions would be served by while the block runs, without a listener.

    Raises ConfigurationError for a file that a setting names and that cannot be used.
    """
    workspaces = LocalWorkspaceRegistry(build_metrics(settings.target_names()), version=__version__)
    try:
        yield ConfigSnapshot(settings, workspaces, record_phase)
    finally:
        await workspaces.close()


def _admin_state(app: App) -> AdminState:
    source, metrics, lifecycle, workers = (
        _status_source(app),
        app.metrics,
        app.lifecycle,
        app.workers,
    )
    metrics.watch(source)

    def status() -> Status:
        own = (metrics.live.readings(), metrics.failures.latest())
        both = total([Reading((), *own), _workers_reading(app)]) if workers else Reading((), *own)
        return report(source, both.targets, both.failures, time.time())

    return AdminState(
        started=lambda: lifecycle.started,
        ready=lambda: lifecycle.state is State.SERVING and (workers is None or workers.ready),
        metrics=lambda: metrics.exposition(_workers_reading(app).samples),
        status=status,
        failed=metrics.admin_failed,
        restarted=metrics.admin_restarted,
        quit=lifecycle.quit_asked.set if app.settings.admin.quit else None,
        refresh=None if workers is None else workers.refresh,
    )


def _workers_reading(app: App) -> Reading:
    return Reading() if app.workers is None else app.workers.reading()


def _status_source(app: App) -> StatusSource:
    def listen() -> str:
        if not app.lifecycle.started:
            return ""
        host, port = app.listen_host, app.listen_port
        if host.startswith("/"):
            return f"{host}/{socket_name(port)}"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def hosts() -> Mapping[str, str]:
        known = _workers_reading(app).hosts
        return {name: host or known.get(name, "") for name, host in app.snapshot.hosts().items()}

    def tokens() -> Sequence[Token]:
        return app.snapshot.tokens()

    def warnings() -> Sequence[str]:
        return app.settings.warnings()

    return StatusSource(
        version=__version__,
        acceleration=lambda: app.snapshot.acceleration,
        state=lambda: app.lifecycle.state,
        uptime_seconds=lambda: app.lifecycle.uptime_seconds,
        listen=listen,
        sessions_max=lambda: app.settings.listen.max_connections,
        session_slots_used=lambda: (
            app.slots.taken if app.workers is None else app.workers.slots_taken
        ),
        hosts=hosts,
        tokens=tokens,
        drain_seconds_left=lambda: app.lifecycle.drain_seconds_left,
        warnings=warnings,
    )


def _listener_tls(settings: ListenSettings) -> ssl.SSLContext | None:
    """Return the context for clients that want TLS, if there is a certificate for it."""
    if not settings.tls_certificate:
        return None
    try:
        return server_context(settings.tls_certificate, settings.tls_key)
    except OSError as error:
        text = f"cannot be used with its key: {error.strerror or error}"
        raise ConfigurationError([Problem("listen.tls_certificate", text)]) from error


def build_metrics(targets: Iterable[str] = ()) -> Metrics:
    """Return the metrics with every reason word that the program has, and these targets."""
    refusals = [kind.value.reason for kind in ErrorKind]
    return Metrics(
        version=__version__,
        session_end_reasons=list(EndReason),
        startup_failure_reasons=[*refusals, *ClientReason, *StartupFailure, TOO_MANY_STARTING],
        connect_phases=list(ConnectPhase),
        target_names=targets,
    )
