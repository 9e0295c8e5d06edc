"""`check`: test every step of a connection, and print one line a step, with the fix if it fails.

It uses the parts that `run` serves with: workspace, credentials, address lookup and dialer, and for
the last step a proxy on a free port with an ordinary driver as its client. A target's first failure
is its last step, because the later ones depend on it. No line shows a secret.
"""

import asyncio
import getpass
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import asyncpg

from proxy.blocking import BlockingCalls
from proxy.config import (
    UPSTREAM,
    AdminSettings,
    ConfigurationError,
    ListenSettings,
    LogSettings,
    RoutingSettings,
    Settings,
    UpstreamSettings,
)
from proxy.errors import ErrorKind, ProxyError
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.server.app import App
from proxy.server.metric_labels import build_metrics
from proxy.server.process import Signals
from proxy.server.serving import open_snapshot, serving
from proxy.session.listen_sockets import shown
from proxy.upstream.address_lookup import ANY_USER
from proxy.upstream.phases import ConnectPhase, DialPhases
from proxy.upstream.upstream_session import UpstreamSession
from proxy.upstream.upstreams import Upstream
from proxy.verbs.admin_client import REQUEST_SECONDS_MAX, running_proxy
from proxy.verbs.check_catalogue import check_map, failed_step
from proxy.verbs.check_facts import reach, upstream_facts, workspace_host
from proxy.verbs.check_grants import GRANTS_SECONDS_MAX, missing_grants
from proxy.verbs.check_report import PrintedReport, Report, Step
from proxy.verbs.endpoint_list import with_endpoints
from proxy.verbs.event_loop import print_config, run_on_event_loop, serving_settings
from proxy.verbs.local_client import error_received, failed, log_in
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import PRINT_CONFIG, Arguments
from proxy.verbs.verb_table import ALL_SHARDS
from proxy.wire.messages import Terminate
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workspace.resources import Resource

# A token lives for an hour. One that seems to live longer, or hardly at all, was dated by a clock
# that differs from this machine's.
TOKEN_SECONDS_MAX: Final = 3600 + 300
TOKEN_SECONDS_MIN: Final = 300
# Half of the default margin before a token's expiry: beyond it tokens expire too early or too late.
CLOCK_OFF_SECONDS_MAX: Final = 60.0
QUERY_SECONDS_MAX: Final = 30.0

_PROGRAM: Final = "lakebase-auth-proxy"
_QUERY: Final = "SELECT current_user::text, current_database()::text"
_PHASES: Final = {
    ConnectPhase.DNS: "DNS",
    ConnectPhase.TCP: "TCP",
    ConnectPhase.TLS: "TLS",
    ConnectPhase.LOGIN: "Postgres login",
}
# A check does not wait for a restart, and says soon that a workspace refuses.
CONNECT_RETRY_SECONDS_MAX: Final = 2.0
LISTENER_SECONDS_MAX: Final = REQUEST_SECONDS_MAX

_Ask = tuple[str, float, Callable[[], Awaitable[str]]]
"""A step: its name, its bound in seconds, and what it does."""


async def check(settings: Settings, report: Report, *, all_targets: bool = False) -> None:
    """Report each step when it begins and when it ends. A target's first failure is its last step.

    It checks the target of a client that names nothing, or all targets, one after another.
    Raises ConfigurationError for a file that a setting names and that cannot be used.
    """
    names = settings.target_names()
    usual = UPSTREAM if UPSTREAM in names else names[0]
    opening = open_snapshot(_impatient(settings), lambda *_: None, retries=False)
    async with opening as snapshot:

        async def check_target(name: str, upstream: Upstream) -> bool:
            return await _TargetCheck(settings, name, upstream, report).run()

        for name in names if all_targets else [usual]:
            await check_target(name, snapshot.upstreams[name])
        if settings.catalogue_map:
            every = check_target if all_targets else None
            await check_map(snapshot, build_metrics(), report, every)


def _impatient(settings: Settings) -> Settings:
    """Return settings for the dials of a check.

    A port that refuses is reported soon. Python's own TLS can show the certificate.
    """

    def impatient(target: UpstreamSettings) -> UpstreamSettings:
        seconds = min(target.connect_retry_seconds, CONNECT_RETRY_SECONDS_MAX)
        return target.model_copy(update={"connect_retry_seconds": seconds, "accelerated": False})

    return settings.with_targets(impatient)


class _ReportedPhases(DialPhases):
    """Reports the phases of a dial as they begin and end. A retry does not report them again."""

    def __init__(self, begin: Callable[[str], None], end: Callable[[float], None]) -> None:
        super().__init__()
        self._begin = begin
        self._end = end
        self._left = list(_PHASES)  # those that have not ended yet, in order
        self.begun_at: float | None = None

    def start(self, phase: ConnectPhase) -> None:
        """Start a phase. The first one that has not ended yet begins its step."""
        super().start(phase)
        if self.begun_at is None and self._left and phase is self._left[0]:
            self.begun_at = time.perf_counter()
            self._begin(_PHASES[phase])

    def finish(self) -> None:
        """Finish the phase, and with it the step that it began. The last one ends with the dial."""
        super().finish()
        last = len(self._left) == 1
        if self.begun_at is not None and self.current is self._left[0] and not last:
            seconds, self.begun_at = time.perf_counter() - self.begun_at, None
            del self._left[0]
            self._end(seconds)


class _TargetCheck:
    """The steps of one target."""

    def __init__(self, settings: Settings, name: str, upstream: Upstream, report: Report) -> None:
        self._settings = settings
        self._name = name
        self._upstream = upstream
        self._report = report
        self._step = ""  # the one that began last
        self._note = ""  # of the last step

    async def run(self) -> bool:
        """Report each step up to the first failure. Return whether all passed."""
        for name, seconds_max, ask in (*self._local_steps(), *self._workspace_steps()):
            if not await self._timed(name, seconds_max, ask()):
                return False
        user = await self._client_user()
        if not await self._dial(user):
            return False
        seconds_max = self._upstream.settings.connect_timeout_seconds
        seconds_max += QUERY_SECONDS_MAX + GRANTS_SECONDS_MAX
        return await self._timed("query", seconds_max, self._query(user))

    def _begin(self, name: str, seconds_max: float) -> None:
        self._step = name
        self._report.begin(name, self._name, seconds_max)

    def _end(self, seconds: float, text: str = "", error: ProxyError | None = None) -> None:
        if error is not None:
            self._report.end(failed_step(self._step, self._name, error, seconds))
        else:
            self._report.end(Step(self._step, self._name, True, seconds, text, note=self._note))

    def _local_steps(self) -> list[_Ask]:
        return [
            ("configuration", 0.0, self._configuration),
            ("listener", LISTENER_SECONDS_MAX, self._listener),
        ]

    async def _listener(self) -> str:
        """Return where the proxy listens, and whether one runs there now."""
        listen = self._settings.listen
        places = [shown((host, listen.port)) for host in listen.hosts]
        where = " and ".join(filter(None, [*places, listen.unix_socket_directory]))
        where += f" with {_tls_of(listen)}"
        ask = partial(running_proxy, self._settings.admin)
        try:
            running = await BlockingCalls("admin").run(ask, LISTENER_SECONDS_MAX)
        except TimeoutError:
            running = "the admin address does not answer"
        return f"{where}, {running}"

    async def _configuration(self) -> str:
        settings, resource = self._upstream.settings, self._upstream.resource
        endpoint = resource.name if resource else settings.host
        password_file = self._settings.credentials.password_file
        login = "a native password" if password_file else "OAuth tokens"
        return f"{endpoint}, with {login}, sslmode {settings.sslmode}"

    async def _timed(self, name: str, seconds_max: float, answer: Awaitable[str]) -> bool:
        """Report a step. Return whether it passed."""
        self._begin(name, seconds_max)
        started_at = time.perf_counter()
        try:
            text = await answer
        except ProxyError as error:
            self._end(time.perf_counter() - started_at, error=error)
            return False
        self._end(time.perf_counter() - started_at, text)
        return True

    # -- the workspace ---------------------------------------------------------------------------

    def _workspace_steps(self) -> list[_Ask]:
        """Return what is asked of the workspace: nothing, if a password and a host are set."""
        resource = self._upstream.resource
        if resource is None:
            return []
        seconds = self._settings.credentials.mint_timeout_seconds
        login = ("workspace login", seconds, self._login)
        endpoint = ("endpoint", seconds, lambda: self._endpoint(resource))
        if self._settings.credentials.password_file:
            return [login, endpoint]
        clock = ("clock", seconds, self._clock)
        return [login, clock, ("credential", seconds, self._credential), endpoint]

    async def _login(self) -> str:
        if host := workspace_host(self._settings, self._upstream.settings):
            await reach(host)
        identity = await self._upstream.workspace.identity()
        return f"as {identity.role}, by {identity.auth_type}, at {identity.host}"

    async def _clock(self) -> str:
        try:
            ahead_seconds = await self._upstream.workspace.clock_ahead_seconds()
        except ProxyError:  # an old workspace has no such document; other faults show later
            ahead_seconds = None
        if ahead_seconds is None:
            return "the workspace does not say what time it is"
        text = f"{abs(ahead_seconds):.0f} s {'ahead of' if ahead_seconds > 0 else 'behind'}"
        if abs(ahead_seconds) > CLOCK_OFF_SECONDS_MAX:
            raise ProxyError(ErrorKind.CLOCK_OFF, f"it is {text} the workspace's")
        return f"{text} the workspace's"

    async def _credential(self) -> str:
        minted = await self._upstream.credentials.fresh()
        lifetime_seconds = minted.expires_at - time.time()
        if not TOKEN_SECONDS_MIN <= lifetime_seconds <= TOKEN_SECONDS_MAX:
            detail = f"the token's life ends in {lifetime_seconds:.0f} s by this machine's clock"
            raise ProxyError(ErrorKind.CREDENTIAL_INVALID, detail)
        age_seconds = time.time() - minted.requested_at
        return f"a token {age_seconds:.1f} s old, valid for {lifetime_seconds / 60:.0f} min more"

    async def _endpoint(self, resource: Resource) -> str:
        status = await self._upstream.workspace.status(resource)
        if status.disabled:  # also where the host is set, and the dialer does not look it up
            raise ProxyError(ErrorKind.ENDPOINT_DISABLED, resource.name)
        target = await self._upstream.address_lookup.target()
        return f"{status.state}, host {target.host}"

    # -- the database ----------------------------------------------------------------------------

    async def _client_user(self) -> str:
        """Return the user that this check's client names.

        It matters if `user` is "*": there it is the token's own identity, which the token admits.
        """
        if self._upstream.settings.user == ANY_USER and self._upstream.account is not None:
            try:
                return (await self._upstream.workspace.identity()).role
            except ProxyError:
                pass  # it was known a moment ago; what is broken now shows in later steps
        try:
            return getpass.getuser()
        except (KeyError, OSError):  # in a container the number of a user may have no name
            return _PROGRAM

    async def _dial(self, user: str) -> bool:
        """Dial once as for a client, and report each phase. Return whether it succeeded."""
        pairs = ((b"user", user.encode()), (b"application_name", _PROGRAM.encode()))
        seconds_max = self._upstream.settings.connect_timeout_seconds
        phases = _ReportedPhases(lambda name: self._begin(name, seconds_max), self._end)
        try:
            message = StartupMessage(V3_0, pairs)
            session = await self._upstream.open(message, phases)
        except ProxyError as error:
            if phases.begun_at is None:  # the dialer needed another credential or host
                self._begin("credential", seconds_max)
            self._end(_seconds_since(phases.begun_at), error=error)
            return False
        self._end(_seconds_since(phases.begun_at), upstream_facts(session))
        await _terminate(session)
        return True

    async def _query(self, user: str) -> str:
        """Ask the database who and where we are, as an application would, through a proxy.

        This is the proxy's only target: no name of a user or a database could lead to another.
        """
        is_target = self._name in self._settings.target_names()  # else a shard of a catalogue
        target = self._settings.target(self._name) if is_target else self._upstream.settings
        own = self._settings.model_copy(
            update={
                "upstream": target,
                "targets": {},
                "databases": {},
                "routing": RoutingSettings(),
                "shard_maps": {},
                "listen": ListenSettings(host="127.0.0.1", port=0, max_connections=1),
                "admin": AdminSettings(enabled=False),
            }
        )
        async with serving(own) as app:
            try:
                row, note = await _fetch_row(app, user, target.connect_timeout_seconds)
            except asyncpg.PostgresError as error:
                raise error_received(error) from error
            except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
                raise failed(error) from error
        settings = self._settings
        if not (settings.catalogue_map and self._name == settings.catalogue.target):
            self._note = note  # who reads a catalogue needs nothing else
        return f"current_user {row[0]}, current_database {row[1]}"


def _seconds_since(begun_at: float | None) -> float:
    return 0.0 if begun_at is None else time.perf_counter() - begun_at


def _tls_of(listen: ListenSettings) -> str:
    """Return what clients get that request TLS."""
    if listen.tls_certificate:
        return "TLS"
    return f"TLS ({listen.tls})" if listen.tls else 'no TLS (listen.tls = "self-signed" offers it)'


async def _terminate(session: UpstreamSession) -> None:
    session.stream.write(Terminate().encode())
    await session.stream.close()


async def _fetch_row(app: App, user: str, connect_seconds: float) -> tuple[Sequence[str], str]:
    """Return the answer to the query, and a note on the role's grants.

    Raises ProxyError, and what asyncpg does.
    """
    connection = await log_in(app, user, "", connect_seconds)
    try:
        row: Sequence[str] = await connection.fetchrow(_QUERY, timeout=QUERY_SECONDS_MAX)
        note = await _note_on_grants(connection, row[0])
    finally:
        await connection.close(timeout=QUERY_SECONDS_MAX)
    return row, note


async def _note_on_grants(connection: Any, role: str) -> str:
    try:
        return (await missing_grants(connection, role)).note()
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        return f"the grants on schema public could not be read: {type(error).__name__}: {error}"


# -- the verb ------------------------------------------------------------------------------------


def run(arguments: Arguments) -> int:
    """Check and print, or print the values in force.

    Raises ConfigurationError, which has the endpoints that there are if none is set.
    """
    if arguments.has(PRINT_CONFIG):
        return print_config(arguments.flags)
    as_json, all_targets = arguments.as_json, arguments.has(ALL_SHARDS)

    async def program(settings: Settings) -> int:
        try:
            return await _check_and_print(settings, as_json=as_json, all_targets=all_targets)
        except asyncio.CancelledError:
            return fail("check was interrupted")  # 0 would mean that every step passed

    try:
        settings = serving_settings(arguments.flags)
    except ConfigurationError as error:
        raise with_endpoints(error, arguments.flags) from None
    quiet = settings.model_copy(update={"log": LogSettings(level="error")})
    return run_on_event_loop(quiet, program)


async def _check_and_print(settings: Settings, *, as_json: bool, all_targets: bool) -> int:
    Signals()  # which cancel this task
    report = Report() if as_json else PrintedReport(names_targets=all_targets)
    await check(settings, report, all_targets=all_targets)
    ok = all(step.ok for step in report.steps)
    if as_json:
        print(json.dumps({"ok": ok, "steps": [asdict(step) for step in report.steps]}))
    return EXIT_OK if ok else EXIT_FAILURE
