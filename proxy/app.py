"""The composition root: builds every object from the settings, hands them down, serves, drains.

Nothing below makes its own collaborators; nothing here decides anything. `serving` is the whole
program for `run`, for `demo` and for tests alike.
"""

import ssl
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from proxy import __version__
from proxy.config import Changes, ConfigurationError, ListenSettings, Problem, Settings, compare
from proxy.errors import ErrorKind, ProxyError
from proxy.life import Life
from proxy.observe.admin import AdminAddress, AdminState, serve_admin
from proxy.observe.lag import sampling_lag
from proxy.observe.logs import configure_logging, get_logger
from proxy.observe.metrics import ConnectPhase, Metrics
from proxy.observe.status import State, StatusSource, Token, report
from proxy.plan import Plan
from proxy.routing.router import Router
from proxy.session.cancel import CancelForwarder, CancelKeys
from proxy.session.listener import UNSERVED, UNSERVED_MAX, Listener, Places, socket_name
from proxy.session.live import LiveSessions
from proxy.session.relay import EndReason
from proxy.session.session import Passage, Session, SessionParts, StartupFailure
from proxy.transport.lanes import watched_lanes
from proxy.transport.tls import server_context
from proxy.upstream.connector import Connector
from proxy.upstream.fleet import Accounts, PhaseTook
from proxy.wire.startup import StartupMessage
from proxy.wire.violations import ClientReason

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

_log = get_logger(__name__)


class App:
    """A running proxy: its parts, and the addresses where 0 was asked for a port.

    Without TCP `listen_host` is the directory of the unix socket, as drivers take it for a host.
    """

    listen_host: str
    listen_port: int
    admin: AdminAddress | None = None

    def __init__(
        self, settings: Settings, lanes: "Lanes | None" = None, *, unserved_max: int = UNSERVED_MAX
    ) -> None:
        """`unserved_max` connections may be starting at a time.

        Raises ConfigurationError for a file that a setting names and that cannot be used."""
        self.life = Life()
        self.metrics = build_metrics(settings.target_names())
        self.cancel_keys = CancelKeys()
        self.accounts = Accounts(self.metrics, version=__version__)
        self.plan = Plan(settings, self.accounts, self._phase_took)
        self._count_by(self.plan)
        self._tls = _listener_tls(settings.listen)
        self.places = Places(settings.listen.max_connections)
        self.listener = self._make_listener(settings, lanes, unserved_max)

    @property
    def settings(self) -> Settings:
        """What is in force now. What needs a restart is as it was at the start."""
        return self.plan.settings

    def reload(self, settings: Settings, router: Router | None = None) -> Changes:
        """Take over what can change while sessions go on; return what changed.

        `router` is that of the settings, if it was made already (`Plan`).
        New sessions go by the new settings, all of them or, when they cannot be used, none.
        Raises ConfigurationError, and nothing has changed then.
        """
        changes = compare(self.settings, settings)
        kept = self._without_restart(settings)
        plan = Plan(kept, self.accounts, self._phase_took, self.plan, router)
        tls = _listener_tls(kept.listen)
        self._count_by(plan)
        if kept.log != self.settings.log:
            configure_logging(format=kept.log.format, level=kept.log.level)
        changes = changes.and_contents(self.plan.rewritten(plan))
        self.plan, self._tls = plan, tls
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
        """Say no to readiness, then end all sessions; return how many had to be cut.

        New connections are taken for `accept_seconds` more; the sessions have `drain_seconds` from
        then on. Called again meanwhile it hastens: `drain(0)` ends what is left at once.
        """
        self.life.drain(accept_seconds + drain_seconds)
        return await self.listener.drain(drain_seconds, accept_seconds=accept_seconds)

    def _make_listener(
        self, settings: Settings, lanes: "Lanes | None", unserved_max: int
    ) -> Listener:
        live = LiveSessions()
        # A cancel is no connect: its phases are nobody's.
        connector = Connector(lambda phase, seconds: None)
        parts = SessionParts(
            route=self._passage,
            cancel_keys=self.cancel_keys,
            cancels=CancelForwarder(self.cancel_keys, connector, self.metrics),
            metrics=self.metrics,
            startup_timeout_seconds=settings.listen.startup_timeout_seconds,
            tls=lambda: self._tls,
            place=self.places.take,
            live=live,
            idle_timeout_seconds=settings.listen.idle_timeout_seconds,
            lanes=lanes,
        )
        return Listener(
            settings.listen,
            self.places,
            self.metrics,
            lambda link: Session(link, parts).run(),
            live,
            unserved_max=unserved_max,
        )

    def _passage(self, message: StartupMessage) -> Passage:
        plan = self.plan  # whichever it is then: a reload exchanges it
        shard_map = plan.settings.routing.shard_map
        try:
            passage = plan.passage(message)
        except ProxyError as error:
            if shard_map:
                missed = error.kind is ErrorKind.MAPPING_NOT_FOUND
                self.metrics.route_refused(shard_map, missed=missed)
            raise
        if passage.shard:
            self.metrics.routed(shard_map, passage.shard)
        return passage

    def _count_by(self, plan: Plan) -> None:
        shard_map = plan.router.shard_map
        mappings = 0 if shard_map is None else len(shard_map)
        names = plan.settings.target_names()
        self.metrics.know(names, plan.settings.routing.shard_map, mappings)
        self.metrics.build_is(plan.acceleration)

    def _phase_took(self, target: str, phase: ConnectPhase, seconds: float) -> None:
        self.metrics.connect_phase_took(phase, seconds, target)


@asynccontextmanager
async def serving(settings: Settings, *, unserved_max: int = UNSERVED_MAX) -> AsyncIterator[App]:
    """Serve while the block runs; `unserved_max` connections may be starting at a time.

    Raises OSError when an address cannot be listened on, and ConfigurationError for a file that
    a setting names and that cannot be used.
    """
    async with AsyncExitStack() as stack:
        lanes = stack.enter_context(watched_lanes())
        app = App(settings, lanes, unserved_max=unserved_max)
        stack.push_async_callback(app.accounts.close)
        stack.enter_context(sampling_lag(app.metrics.loop_lagged))
        if settings.admin.enabled:
            app.admin = await stack.enter_async_context(
                serve_admin(_admin_state(app), host=settings.admin.host, port=settings.admin.port)
            )
        host, port = await stack.enter_async_context(app.listener.accepting())
        app.listen_host, app.listen_port = host, port
        app.life.serve()
        admin_port = None if app.admin is None else app.admin.port
        _log.info(
            "serving",
            host=host,
            port=port,
            admin_port=admin_port,
            version=__version__,
            acceleration=app.plan.acceleration,
            **app.plan.map_facts,
        )
        yield app


@asynccontextmanager
async def planned(settings: Settings, phase_took: PhaseTook) -> AsyncIterator[Plan]:
    """Give what sessions would be served by while the block runs, without a listener.

    Raises ConfigurationError for a file that a setting names and that cannot be used.
    """
    accounts = Accounts(build_metrics(settings.target_names()), version=__version__)
    try:
        yield Plan(settings, accounts, phase_took)
    finally:
        await accounts.close()


def _admin_state(app: App) -> AdminState:
    source, metrics, life = _status_source(app), app.metrics, app.life
    metrics.watch(source)
    return AdminState(
        started=lambda: life.started,
        ready=lambda: life.state is State.SERVING,
        metrics=metrics.exposition,
        status=lambda: report(
            source, metrics.live.readings(), metrics.failures.latest(), time.time()
        ),
        failed=metrics.admin_failed,
        restarted=metrics.admin_restarted,
        quit=life.quit_asked.set if app.settings.admin.quit else None,
    )


def _status_source(app: App) -> StatusSource:
    def listen() -> str:
        if not app.life.started:
            return ""
        host, port = app.listen_host, app.listen_port
        if host.startswith("/"):
            return f"{host}/{socket_name(port)}"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def hosts() -> Mapping[str, str]:
        return app.plan.hosts()

    def tokens() -> Sequence[Token]:
        return app.plan.tokens()

    def warnings() -> Sequence[str]:
        return app.settings.warnings()

    return StatusSource(
        version=__version__,
        acceleration=lambda: app.plan.acceleration,
        state=lambda: app.life.state,
        uptime_seconds=lambda: app.life.uptime_seconds,
        listen=listen,
        sessions_max=lambda: app.settings.listen.max_connections,
        places_taken=lambda: app.places.taken,
        hosts=hosts,
        tokens=tokens,
        drain_seconds_left=lambda: app.life.drain_seconds_left,
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
        startup_failure_reasons=[*refusals, *ClientReason, *StartupFailure, UNSERVED],
        target_names=targets,
    )
