"""The composition root: builds every object from the settings, hands them down, serves, drains.

Nothing below makes its own collaborators; nothing here decides anything. `serve` is the whole
program for `run`, for `demo` and for tests alike.
"""

import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from proxy import __version__
from proxy.config import ConfigurationError, ListenSettings, Problem, Settings, UpstreamSettings
from proxy.errors import ErrorKind
from proxy.observe.admin import AdminAddress, AdminState, serve_admin
from proxy.observe.lag import sampling_lag
from proxy.observe.logs import get_logger
from proxy.observe.metrics import ConnectPhase, Metrics
from proxy.observe.status import State, StatusSource, Token, report
from proxy.session.cancel import CancelForwarder, CancelKeys
from proxy.session.listener import UNSERVED, Listener, Places
from proxy.session.relay import EndReason
from proxy.session.session import TARGET, Session, SessionParts, StartupFailure
from proxy.transport.tls import client_context, server_context
from proxy.upstream.connector import Connector
from proxy.upstream.credentials import Credentials, CredentialSource, PasswordFile
from proxy.upstream.dialer import Dialer
from proxy.upstream.resources import Resource, resource_of
from proxy.upstream.targets import Targets
from proxy.upstream.workspace import Workspace
from proxy.wire.violations import ClientReason

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class App:
    """A running proxy: its bound addresses, where 0 was asked for a port, and its parts."""

    listen_host: str
    listen_port: int
    admin: AdminAddress | None
    metrics: Metrics
    cancel_keys: CancelKeys
    _listener: Listener
    _life: "_Life"

    async def drain(self, seconds: float) -> int:
        """Take no more connections, let sessions end for so long, cut the rest; return how many."""
        self._life.drain(seconds)
        return await self._listener.drain(seconds)


@dataclass(slots=True)
class _Life:
    """How far the proxy is; what it listens on and whom it reaches become known on the way."""

    began_at: float
    listen: str = ""
    places: Places | None = None
    upstream: "Upstream | None" = None
    started: bool = False
    draining: bool = False
    cut_at: float = 0

    @property
    def state(self) -> State:
        if self.draining:
            return State.DRAINING
        return State.SERVING if self.started else State.STARTING

    @property
    def drain_seconds_left(self) -> float | None:
        return max(0.0, self.cut_at - time.monotonic()) if self.draining else None

    def drain(self, seconds: float) -> None:
        self.draining = True
        self.cut_at = time.monotonic() + seconds


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[App]:
    """Serve while the block runs.

    Raises OSError when an address cannot be listened on, and ConfigurationError for a file that
    a setting names and that cannot be used.
    """
    async with AsyncExitStack() as stack:
        metrics, life, cancel_keys = build_metrics(), _Life(time.monotonic()), CancelKeys()
        stack.enter_context(sampling_lag(metrics.loop_lagged))
        state = _admin_state(metrics, _status_source(settings, life), life)
        if settings.admin.enabled:
            admin = await stack.enter_async_context(
                serve_admin(state, host=settings.admin.host, port=settings.admin.port)
            )
        else:
            admin = None
        upstream = await stack.enter_async_context(reaching_upstream(settings, metrics))
        life.upstream = upstream
        dialer = upstream.dialer
        life.places = places = Places(settings.listen.max_connections)
        parts = SessionParts(
            dialer=dialer,
            cancel_keys=cancel_keys,
            cancels=CancelForwarder(cancel_keys, upstream.connector, metrics),
            metrics=metrics,
            startup_timeout_seconds=settings.listen.startup_timeout_seconds,
            cancel_on_disconnect=settings.upstream.cancel_on_disconnect,
            tls=_listener_tls(settings.listen),
            place=places.take,
        )
        listener = Listener(
            settings.listen, places, metrics, lambda link: Session(link, parts).run()
        )
        host, port = await stack.enter_async_context(listener.accepting())
        life.listen, life.started = _address(host, port), True
        _log.info("serving", host=host, port=port, version=__version__)
        yield App(host, port, admin, metrics, cancel_keys, listener, life)


def _admin_state(metrics: Metrics, source: StatusSource, life: _Life) -> AdminState:
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
    )


def _status_source(settings: Settings, life: _Life) -> StatusSource:
    def hosts() -> dict[str, str]:
        return {TARGET: life.upstream.targets.host if life.upstream else settings.upstream.host}

    def tokens() -> list[Token]:
        source = life.upstream.credentials if life.upstream else None
        newest = source.newest if isinstance(source, Credentials) else None
        if newest is None:
            return []
        now = time.time()
        return [Token("workspace", now - newest.requested_at, newest.expires_at - now)]

    return StatusSource(
        version=__version__,
        state=lambda: life.state,
        uptime_seconds=lambda: time.monotonic() - life.began_at,
        listen=lambda: life.listen,
        sessions_max=lambda: settings.listen.max_connections,
        places_taken=lambda: life.places.taken if life.places else 0,
        hosts=hosts,
        tokens=tokens,
        drain_seconds_left=lambda: life.drain_seconds_left,
        warnings=lambda: _warnings(settings),
    )


def _warnings(settings: Settings) -> list[str]:
    """Say what the configuration weakens. A person should see it wherever they look."""
    said = []
    if settings.upstream.sslmode != "verify-full":
        said.append(
            f'upstream.sslmode is "{settings.upstream.sslmode}": who is in between can read the '
            "token."
        )
    if settings.listen.allow_remote:
        said.append("listen.allow_remote is set: who reaches the listener is logged in.")
    return said


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Upstream:
    """The way upstream, part by part: `run` needs the dialer, `check` walks through all."""

    resource: Resource | None
    workspace: Workspace
    credentials: CredentialSource
    targets: Targets
    connector: Connector
    dialer: Dialer


@asynccontextmanager
async def reaching_upstream(
    settings: Settings,
    metrics: Metrics,
    phase_took: Callable[[ConnectPhase, float], None] | None = None,
) -> AsyncIterator[Upstream]:
    """Give the way upstream while the block runs. Raises ConfigurationError for a bad file.

    `phase_took` hears of each phase of a dial that succeeded, in place of the metrics.
    """
    upstream = settings.upstream
    _check_root_cert(upstream)
    workspace = Workspace(settings.workspace, settings.credentials, version=__version__)
    resource = resource_of(upstream)
    targets = Targets(upstream, resource, workspace)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(targets.close)
        credentials: CredentialSource
        if settings.credentials.password_file:
            credentials = PasswordFile(settings.credentials.password_file)
        else:
            assert resource is not None, "settings without a password name a resource"
            tokens = Credentials(partial(workspace.mint, resource), settings.credentials, metrics)
            stack.push_async_callback(tokens.close)
            credentials = tokens
        seconds = upstream.connect_timeout_seconds
        heard = phase_took or partial(metrics.connect_phase_took, target=TARGET)
        connector = Connector(heard)
        dialer = Dialer(connector, targets, credentials, heard, connect_timeout_seconds=seconds)
        yield Upstream(resource, workspace, credentials, targets, connector, dialer)


def _check_root_cert(upstream: UpstreamSettings) -> None:
    """Raise ConfigurationError for a file that cannot be used: it shall show now, not later."""
    try:
        client_context(upstream.sslmode, upstream.ssl_root_cert)
    except OSError as error:  # an ssl.SSLError is one
        text = f"{upstream.ssl_root_cert}: {error.strerror or error}"
        raise ConfigurationError([Problem("upstream.ssl_root_cert", text)]) from error


def _listener_tls(settings: ListenSettings) -> ssl.SSLContext | None:
    """Return the context for clients that want TLS, if there is a certificate for it."""
    if not settings.tls_certificate:
        return None
    try:
        return server_context(settings.tls_certificate, settings.tls_key)
    except OSError as error:
        text = f"cannot be used with its key: {error.strerror or error}"
        raise ConfigurationError([Problem("listen.tls_certificate", text)]) from error


def build_metrics(targets: Iterable[str] = (TARGET,)) -> Metrics:
    """Return the metrics with every reason word that the program has, and these targets."""
    refusals = [kind.value.reason for kind in ErrorKind]
    return Metrics(
        version=__version__,
        session_end_reasons=list(EndReason),
        startup_failure_reasons=[*refusals, *ClientReason, *StartupFailure, UNSERVED],
        target_names=targets,
    )
