"""`check`: test every step of a connection, and print one line a step, with the fix if it fails.

It uses the parts that `run` serves with: workspace, credentials, address lookup and dialer, and for
the last step a proxy on a free port with an ordinary driver as its client. A target's first failure
is its last step, because the later ones depend on it. No line shows a secret.
"""

import asyncio
import getpass
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Final

import asyncpg

from proxy.config import (
    UPSTREAM,
    AdminSettings,
    ListenSettings,
    LogSettings,
    RoutingSettings,
    Settings,
)
from proxy.errors import ErrorKind, ProxyError
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.server.app import App, open_snapshot, serving
from proxy.server.process import Signals
from proxy.upstream.address_lookup import ANY_USER
from proxy.upstream.dialer import UpstreamSession
from proxy.upstream.phases import ConnectPhase, DialProgress
from proxy.upstream.upstreams import Upstream
from proxy.verbs.event_loop import PRINT_CONFIG, print_config, run_on_event_loop, serving_settings
from proxy.verbs.stderr import fail
from proxy.wire.messages import ErrorResponse, Terminate
from proxy.wire.startup import V3_0, StartupMessage
from proxy.workspace.resources import Resource

# A token lives for an hour. One that seems to live longer, or hardly at all, was dated by a clock
# that differs from this machine's.
TOKEN_SECONDS_MAX: Final = 3600 + 300
TOKEN_SECONDS_MIN: Final = 300
# Half of the default margin before a token's expiry: beyond it tokens expire too early or too late.
CLOCK_OFF_SECONDS_MAX: Final = 60.0
QUERY_SECONDS_MAX: Final = 30.0

_JSON: Final = "--json"
_ALL_SHARDS: Final = "--all-shards"
_PROGRAM: Final = "lakebase-auth-proxy"
_QUERY: Final = "SELECT current_user::text, current_database()::text"
# The driver would take these from the environment, where they are meant for the upstream.
_DRIVER: Final = {
    "ssl": False,
    "direct_tls": False,
    "password": "",
    "target_session_attrs": "any",
    "gsslib": "gssapi",
    "statement_cache_size": 0,
}
_REASON: Final = re.compile(r"reason=(\w+) ?")
_PHASES: Final = {
    ConnectPhase.DNS: "DNS",
    ConnectPhase.TCP: "TCP",
    ConnectPhase.TLS: "TLS",
    ConnectPhase.LOGIN: "Postgres login",
}
_BEFORE_LOGIN: Final = list(_PHASES)[:-1]


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one step at one target. `reason`, `sqlstate` and `fix` are empty if `ok`."""

    name: str
    target: str
    ok: bool
    seconds: float
    text: str
    reason: str = ""
    sqlstate: str = ""
    fix: str = ""


class Phases:
    """The seconds of each phase of the dialer's last attempt that succeeded."""

    def __init__(self) -> None:
        self.seconds: dict[ConnectPhase, float] = {}

    def record(self, target: str, phase: ConnectPhase, seconds: float) -> None:
        """Record one phase. The first phase of an attempt drops the attempt before."""
        if phase is ConnectPhase.DNS:
            self.seconds.clear()
        self.seconds[phase] = seconds


async def check(settings: Settings, *, all_targets: bool = False) -> AsyncIterator[Step]:
    """Yield the outcome of each step. A target's first failure is its last step.

    It checks the target of a client that names nothing, or all targets, one after another.
    Raises ConfigurationError for a file that a setting names and that cannot be used.
    """
    names = settings.target_names()
    usual = UPSTREAM if UPSTREAM in names else names[0]
    phases = Phases()
    async with open_snapshot(settings, phases.record) as snapshot:
        for name in names if all_targets else [usual]:
            target = _TargetCheck(settings, name, snapshot.upstreams[name], phases)
            async for step in target.steps():
                yield step


class _TargetCheck:
    """The steps of one target."""

    def __init__(self, settings: Settings, name: str, upstream: Upstream, phases: Phases) -> None:
        self._settings = settings
        self._name = name
        self._upstream = upstream
        self._phases = phases

    async def steps(self) -> AsyncIterator[Step]:
        """Yield the outcome of each step up to the first failure."""
        yield Step("configuration", self._name, True, 0.0, self._configuration())
        for name, ask in self._workspace_steps():
            step = await self._timed(name, ask())
            yield step
            if not step.ok:
                return
        user = await self._client_user()
        steps = await self._dial(user)
        for step in steps:
            yield step
        if steps[-1].ok:
            yield await self._timed("query", self._query(user))

    def _configuration(self) -> str:
        settings, resource = self._upstream.settings, self._upstream.resource
        endpoint = resource.name if resource else settings.host
        password_file = self._settings.credentials.password_file
        login = "a native password" if password_file else "OAuth tokens"
        return f"{endpoint}, with {login}, sslmode {settings.sslmode}"

    async def _timed(self, name: str, answer: Awaitable[str]) -> Step:
        started_at = time.perf_counter()
        try:
            text = await answer
        except ProxyError as error:
            return self._failed(name, error, time.perf_counter() - started_at)
        return Step(name, self._name, True, time.perf_counter() - started_at, text)

    def _failed(self, name: str, error: ProxyError, seconds: float) -> Step:
        response = error.response()
        texts = (response.message, error.detail)
        text = ": ".join(dict.fromkeys(filter(None, texts)))  # PostgreSQL's own error is both
        fix = response.text(b"H")
        return Step(name, self._name, False, seconds, text, error.reason, response.sqlstate, fix)

    # -- the workspace ---------------------------------------------------------------------------

    def _workspace_steps(self) -> list[tuple[str, Callable[[], Awaitable[str]]]]:
        """Return what is asked of the workspace: nothing, if a password and a host are set."""
        resource = self._upstream.resource
        if resource is None:
            return []
        login = ("workspace login", self._login)
        endpoint = ("endpoint", lambda: self._endpoint(resource))
        if self._settings.credentials.password_file:
            return [login, endpoint]
        return [login, ("clock", self._clock), ("credential", self._credential), endpoint]

    async def _login(self) -> str:
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

    async def _dial(self, user: str) -> list[Step]:
        """Dial once as for a client. Return a step for each phase up to the one that failed."""
        pairs = ((b"user", user.encode()), (b"application_name", _PROGRAM.encode()))
        started_at = time.perf_counter()
        try:
            session = await self._upstream.open(StartupMessage(V3_0, pairs), DialProgress())
        except ProxyError as error:
            return self._failed_phases(error, time.perf_counter() - started_at)
        await _terminate(session)
        return self._phase_steps(f"{session.target.host}:{session.target.port}")

    def _phase_steps(self, text: str) -> list[Step]:
        """Return a step for each phase of the dialer."""
        seconds = self._phases.seconds
        return [
            Step(name, self._name, True, seconds.get(phase, 0.0), text)
            for phase, name in _PHASES.items()
        ]

    def _failed_phases(self, error: ProxyError, seconds: float) -> list[Step]:
        """Return the steps of a dial that failed in this time."""
        has_credential = ConnectPhase.MINT in self._phases.seconds
        if not has_credential and error.kind is not ErrorKind.UPSTREAM_DNS:
            return [self._failed("credential", error, seconds)]  # the dialer needs another one
        steps = self._phase_steps("")
        done = len(list(takewhile(self._phases.seconds.__contains__, _BEFORE_LOGIN)))
        return [*steps[:done], self._failed(steps[done].name, error, seconds)]

    async def _query(self, user: str) -> str:
        """Ask the database who and where we are, as an application would, through a proxy.

        This is the proxy's only target: no name of a user or a database could lead to another.
        """
        target = self._settings.target(self._name)
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
                row = await _fetch_row(app, user, target.connect_timeout_seconds)
            except asyncpg.PostgresError as error:
                raise _error_received(error) from error
            except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
                detail = f"{type(error).__name__}: {error}"
                raise ProxyError(ErrorKind.STARTUP_REFUSED, detail) from error
        return f"current_user {row[0]}, current_database {row[1]}"


async def _terminate(session: UpstreamSession) -> None:
    session.stream.write(Terminate().encode())
    await session.stream.close()


async def _fetch_row(app: App, user: str, connect_seconds: float) -> Sequence[str]:
    """Return the answer to the query. Raises what asyncpg does."""
    connection = await asyncpg.connect(
        host=app.listen_host,
        port=app.listen_port,
        user=user,
        database="",  # the target's own; by default the driver sends the user's name
        timeout=connect_seconds,
        **_DRIVER,
    )
    try:
        row: Sequence[str] = await connection.fetchrow(_QUERY, timeout=QUERY_SECONDS_MAX)
    finally:
        await connection.close(timeout=QUERY_SECONDS_MAX)
    return row


def _error_received(error: asyncpg.PostgresError) -> ProxyError:
    """Return the error that the driver received, from the proxy or from the database."""
    detail, hint = error.detail or "", error.hint or ""
    response = ErrorResponse.fatal(error.sqlstate or "", error.message, detail, hint)
    found = _REASON.match(detail)
    word = found[1] if found else ErrorKind.STARTUP_REFUSED.value.reason
    kinds = (kind for kind in ErrorKind if kind.value.reason == word)
    kind = next(kinds, ErrorKind.STARTUP_REFUSED)
    return ProxyError(kind, _REASON.sub("", detail, count=1), original=response)


# -- the verb ------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Check and print, or print the values in force. Raises ConfigurationError."""
    if PRINT_CONFIG in arguments:
        return print_config(arguments)
    flags = [argument for argument in arguments if argument not in (_JSON, _ALL_SHARDS)]
    as_json, all_targets = _JSON in arguments, _ALL_SHARDS in arguments

    async def program(settings: Settings) -> int:
        try:
            return await _check_and_print(settings, as_json=as_json, all_targets=all_targets)
        except asyncio.CancelledError:
            return fail("check was interrupted")  # 0 would mean that every step passed

    settings = serving_settings(flags)
    quiet = settings.model_copy(update={"log": LogSettings(level="error")})
    return run_on_event_loop(quiet, program)


async def _check_and_print(settings: Settings, *, as_json: bool, all_targets: bool) -> int:
    Signals()  # which cancel this task
    steps: list[Step] = []
    async for step in check(settings, all_targets=all_targets):
        if not as_json:
            if all_targets and (not steps or steps[-1].target != step.target):
                print(f"target {step.target}")
            print(as_line(step), flush=True)
        steps.append(step)
    ok = all(step.ok for step in steps)
    if as_json:
        print(json.dumps({"ok": ok, "steps": [asdict(step) for step in steps]}))
    return EXIT_OK if ok else EXIT_FAILURE


def as_line(step: Step) -> str:
    """Return a step for people: one line, and if it failed its fix below."""
    mark = "ok  " if step.ok else "FAIL"
    line = f"{mark}  {step.name:<15} {step.seconds * 1000:7.0f} ms  {step.text}"
    if step.ok:
        return line
    line = f"{line}\n      SQLSTATE {step.sqlstate}, reason={step.reason}"
    return f"{line}\n      fix: {step.fix}" if step.fix else line
