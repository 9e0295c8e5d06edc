"""`check`: the whole way to the database once, one line a step, and the fix for what fails.

It uses the very parts that `run` serves with: workspace, credentials, targets, dialer, and for the
last step a proxy on a free port with an ordinary driver in front. The first failure ends it, since
nothing behind it could be told apart from it. No line shows a secret.
"""

import asyncio
import getpass
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
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
from proxy.errors import ErrorKind, Origin, ProxyError
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK
from proxy.server.app import open_snapshot, serving
from proxy.server.process import Signals
from proxy.upstream.address_lookup import ANY_USER
from proxy.upstream.phases import ConnectPhase
from proxy.upstream.upstreams import Upstream
from proxy.verbs.event_loop import PRINT_CONFIG, print_config, settings_of, until_done
from proxy.verbs.stderr import fail
from proxy.wire.messages import ErrorResponse, Terminate
from proxy.wire.startup import V3_0, StartupMessage

# A token lives an hour. One that seems to live longer, or hardly at all, was dated by another
# clock than this machine's.
TOKEN_SECONDS_MAX: Final = 3600 + 300
TOKEN_SECONDS_MIN: Final = 300
# Half of the default margin before a token's expiry: with more, it is used too long or too little.
CLOCK_OFF_SECONDS_MAX: Final = 60.0
QUERY_SECONDS_MAX: Final = 30.0

_QUESTION: Final = "SELECT current_user::text, current_database()::text"
# The driver is to look at nothing but this: its environment is the upstream's.
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


@dataclass(frozen=True, slots=True)
class Step:
    """One step at one target. `reason`, `sqlstate` and `fix` are empty when it is `ok`."""

    name: str
    target: str
    ok: bool
    seconds: float
    text: str
    reason: str = ""
    sqlstate: str = ""
    fix: str = ""


async def check(settings: Settings, *, all_targets: bool = False) -> AsyncIterator[Step]:
    """Yield each step's outcome as it is known; the first that is not ok is its target's last.

    The way checked is that of a client that names nothing, or every target's, one after another.
    Raises ConfigurationError for a file that a setting names and that cannot be used.
    """
    names = settings.target_names()
    usual = UPSTREAM if UPSTREAM in names else names[0]
    phases = Phases()
    async with open_snapshot(settings, phases.took) as snapshot:
        for name in names if all_targets else [usual]:
            async for step in _check_target(settings, name, snapshot.upstreams[name], phases):
                yield step


async def _check_target(
    settings: Settings, name: str, upstream: Upstream, phases: "Phases"
) -> AsyncIterator[Step]:
    yield Step("configuration", name, True, 0.0, _configuration(settings, upstream))
    for title, answer in _workspace_steps(settings, upstream):
        step = await _timed(title, name, answer())
        yield step
        if not step.ok:
            return
    user = await _client_user(upstream)
    for step in await _dial(name, upstream, user, phases):
        yield step
        if not step.ok:
            return
    yield await _timed("query", name, _query(settings, name, user))


async def _timed(name: str, target: str, answer: Awaitable[str]) -> Step:
    begun = time.perf_counter()
    try:
        text = await answer
    except ProxyError as error:
        return _failed(name, target, error, time.perf_counter() - begun)
    return Step(name, target, True, time.perf_counter() - begun, text)


def _failed(name: str, target: str, error: ProxyError, seconds: float) -> Step:
    response = error.response()
    said = (response.message, error.detail)
    text = ": ".join(dict.fromkeys(one for one in said if one))  # PostgreSQL's own is both
    fix = response.text(b"H")
    return Step(name, target, False, seconds, text, error.reason, response.sqlstate, fix)


def _configuration(settings: Settings, upstream: Upstream) -> str:
    what = upstream.resource.name if upstream.resource else upstream.settings.host
    how = "a native password" if settings.credentials.password_file else "OAuth tokens"
    return f"{what}, with {how}, sslmode {upstream.settings.sslmode}"


# -- the workspace -------------------------------------------------------------------------------

_Ask = tuple[str, Callable[[], Awaitable[str]]]


def _workspace_steps(settings: Settings, upstream: Upstream) -> list[_Ask]:
    """Return what is to be asked of the workspace: nothing, where a password and a host are set."""
    resource = upstream.resource
    if resource is None:
        return []

    async def login() -> str:
        identity = await upstream.workspace.identity()
        return f"as {identity.role}, by {identity.auth_type}, at {identity.host}"

    async def clock() -> str:
        try:
            ahead_seconds = await upstream.workspace.clock_ahead_seconds()
        except ProxyError:  # an old workspace has no such document; what is broken shows below
            ahead_seconds = None
        if ahead_seconds is None:
            return "the workspace does not say what time it is"
        text = f"{abs(ahead_seconds):.0f} s {'ahead of' if ahead_seconds > 0 else 'behind'}"
        if abs(ahead_seconds) > CLOCK_OFF_SECONDS_MAX:
            raise ProxyError(ErrorKind.CLOCK_OFF, f"it is {text} the workspace's")
        return f"{text} the workspace's"

    async def credential() -> str:
        minted = await upstream.credentials.fresh()
        lifetime_seconds = minted.expires_at - time.time()
        if not TOKEN_SECONDS_MIN <= lifetime_seconds <= TOKEN_SECONDS_MAX:
            detail = f"the token's life ends in {lifetime_seconds:.0f} s by this machine's clock"
            raise ProxyError(ErrorKind.CREDENTIAL_INVALID, detail)
        age_seconds = time.time() - minted.requested_at
        return f"a token {age_seconds:.1f} s old, valid for {lifetime_seconds / 60:.0f} min more"

    async def host() -> str:
        status = await upstream.workspace.status(resource)
        target = await upstream.address_lookup.target()
        return f"{status.state}, host {target.host}"

    if settings.credentials.password_file:
        return [("workspace login", login), ("endpoint", host)]
    return [
        ("workspace login", login),
        ("clock", clock),
        ("credential", credential),
        ("endpoint", host),
    ]


# -- the database --------------------------------------------------------------------------------


class Phases:
    """How long each phase of the dialer's last try took: those that succeeded."""

    def __init__(self) -> None:
        self.seconds: dict[ConnectPhase, float] = {}

    def took(self, target: str, phase: ConnectPhase, seconds: float) -> None:
        """Take one phase; the first of a try forgets the tries before."""
        if phase is ConnectPhase.DNS:
            self.seconds.clear()
        self.seconds[phase] = seconds


async def _dial(target: str, upstream: Upstream, user: str, phases: Phases) -> list[Step]:
    """Dial once as for a client, and return a step for each phase up to the one that failed."""
    pairs = ((b"user", user.encode()), (b"application_name", b"lakebase-auth-proxy"))
    begun = time.perf_counter()
    failure: ProxyError | None = None
    where = ""
    try:
        session = await upstream.dialer.dial(StartupMessage(V3_0, pairs))
    except ProxyError as error:
        failure = error
    else:
        where = f"{session.target.host}:{session.target.port}"
        session.stream.write(Terminate().encode())
        await session.stream.close()
    spent = time.perf_counter() - begun
    if failure is not None and failure.kind.value.origin is Origin.WORKSPACE:
        return [_failed("credential", target, failure, spent)]  # it was asked for once more
    steps: list[Step] = []
    for phase, name in _PHASES.items():
        seconds = phases.seconds.get(phase)
        if failure is not None and (seconds is None or phase is ConnectPhase.LOGIN):
            return [*steps, _failed(name, target, failure, spent)]
        steps.append(Step(name, target, True, seconds or 0.0, where))
    return steps


async def _client_user(upstream: Upstream) -> str:
    """Return the user that the client of this check names.

    It counts where `user` is "*": there it is the token's own identity, whom the token lets in.
    """
    if upstream.settings.user == ANY_USER and upstream.account is not None:
        try:
            return (await upstream.workspace.identity()).role
        except ProxyError:
            pass  # it was known a moment ago; what is broken now shows below
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the number of a user may have no name
        return "lakebase-auth-proxy"


async def _query(settings: Settings, target: str, user: str) -> str:
    """Ask the database who and where we are, as an application would: through a proxy.

    Its one target is this one: no name of a user or a database could lead to another.
    """
    own = settings.model_copy(
        update={
            "upstream": settings.target(target),
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
            connection = await asyncpg.connect(
                host=app.listen_host,
                port=app.listen_port,
                user=user,
                database=user,  # what drivers send for the target's own
                timeout=settings.target(target).connect_timeout_seconds,
                **_DRIVER,
            )
            try:
                row = await connection.fetchrow(_QUESTION, timeout=QUERY_SECONDS_MAX)
            finally:
                await connection.close(timeout=QUERY_SECONDS_MAX)
        except asyncpg.PostgresError as error:
            raise _as_told(error) from error
        except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise ProxyError(ErrorKind.STARTUP_REFUSED, detail) from error
    assert row is not None
    return f"current_user {row[0]}, current_database {row[1]}"


def _as_told(error: asyncpg.PostgresError) -> ProxyError:
    """Return what the driver was told, by the proxy or by the database behind it."""
    detail, hint = error.detail or "", error.hint or ""
    told = ErrorResponse.fatal(error.sqlstate or "", error.message, detail, hint)
    found = _REASON.match(detail)
    word = found[1] if found else ErrorKind.STARTUP_REFUSED.value.reason
    kinds = (kind for kind in ErrorKind if kind.value.reason == word)
    kind = next(kinds, ErrorKind.STARTUP_REFUSED)
    return ProxyError(kind, _REASON.sub("", detail, count=1), original=told)


# -- for people and for machines -----------------------------------------------------------------


def as_line(step: Step) -> str:
    """Return a step for people: a line, and its fix below it where it failed."""
    mark = "ok  " if step.ok else "FAIL"
    line = f"{mark}  {step.name:<15} {step.seconds * 1000:7.0f} ms  {step.text}"
    if step.ok:
        return line
    line = f"{line}\n      SQLSTATE {step.sqlstate}, reason={step.reason}"
    return f"{line}\n      fix: {step.fix}" if step.fix else line


_JSON: Final = "--json"
_ALL_SHARDS: Final = "--all-shards"


def run(arguments: Sequence[str]) -> int:
    """Walk and print, or print the values in force. Raises ConfigurationError."""
    if PRINT_CONFIG in arguments:
        return print_config(arguments)
    flags = [argument for argument in arguments if argument not in (_JSON, _ALL_SHARDS)]

    async def walk_or_stop(settings: Settings) -> int:
        try:
            return await _walk(
                settings, as_json=_JSON in arguments, all_targets=_ALL_SHARDS in arguments
            )
        except asyncio.CancelledError:
            return fail("check was interrupted")  # 0 would say that all is well

    settings = settings_of(flags)
    quiet = settings.model_copy(update={"log": LogSettings(level="error")})
    return until_done(quiet, walk_or_stop)


async def _walk(settings: Settings, *, as_json: bool, all_targets: bool) -> int:
    Signals()  # which end it quietly
    steps: list[Step] = []
    async for step in check(settings, all_targets=all_targets):
        if not as_json:
            if all_targets and (not steps or steps[-1].target != step.target):
                print(f"target {step.target}")
            print(as_line(step), flush=True)
        steps.append(step)
    good = all(step.ok for step in steps)
    if as_json:
        print(json.dumps({"ok": good, "steps": [asdict(step) for step in steps]}))
    return EXIT_OK if good else EXIT_FAILURE
