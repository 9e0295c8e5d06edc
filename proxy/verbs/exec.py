"""`exec -- COMMAND ...`: run a command beside a proxy of its own, and end with its exit code.

For migrations, CI, notebooks and jobs: no port to choose, nothing to wait for, nothing to end. The
proxy takes a free port on loopback, or with --socket a unix socket in a private directory.
"""

import asyncio
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

from proxy.config import Problem, Settings, load_settings
from proxy.errors import ProxyError
from proxy.exit_codes import EXIT_FAILURE
from proxy.server.app import App
from proxy.server.router_factory import map_problems
from proxy.server.serving import serving
from proxy.verbs.child_environment import (
    child_environment,
    client_database,
    client_options,
    client_user,
)
from proxy.verbs.child_process import (
    KILLED_BY,
    CommandNotStarted,
    FileLimit,
    PassedSignals,
    run_command,
)
from proxy.verbs.event_loop import run_on_event_loop
from proxy.verbs.local_client import log_in
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import Arguments, UsageError
from proxy.verbs.verb_table import SHARD_KEY, SOCKET, VERBS

# The number in the socket's name, as every driver looks for it.
_SOCKET_PORT: Final = 5432
# What the proxy's own time limits leave to a login: refusing a client takes no longer.
_LOGIN_SECONDS: Final = 5.0
_CLOSE_SECONDS_MAX: Final = 5.0


def run(arguments: Arguments) -> int:
    """Run the command and return its exit code. Raises ConfigurationError before it starts."""
    if not arguments.last or arguments.words != arguments.last:
        raise UsageError(f"exec needs a command after --\n{VERBS['exec'].shown_usage}")
    file_limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # before it is raised for the proxy
    with ExitStack() as stack:
        directory = None
        if arguments.has(SOCKET):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lakebase-"))
        settings = _load(arguments, directory)
        return run_on_event_loop(
            settings, lambda settings: _run_beside(settings, arguments, file_limit)
        )


def _load(given: Arguments, directory: str | None) -> Settings:
    """Return settings to serve the command with. Raises ConfigurationError.

    A file may be that of a proxy that runs here now: where this one listens comes from no file and
    no variable, only from flags. Of two flags for a key the later one counts.
    """
    own = [
        f"--listen.host={'' if directory else '127.0.0.1'}",
        f"--listen.port={_SOCKET_PORT if directory else 0}",
        f"--listen.unix_socket_directory={directory or ''}",
        *("--listen.unix_socket_mode=0600", "--listen.allow_remote=false", "--listen.workers=1"),
        *("--listen.tls=", "--listen.tls_certificate=", "--listen.tls_key="),
        *("--admin.enabled=false", "--admin.quit=false"),
    ]
    key = given.get(SHARD_KEY.name)
    if key is not None:  # a client without it must not reach another shard
        own.append("--routing.require_key=true")

    def key_problems(settings: Settings) -> Iterator[Problem]:
        if key is not None and not settings.routing.shard_map:
            yield Problem(SHARD_KEY.flag, "needs a shard map: set routing.shard_map")
        if key is not None and "\0" in key:
            yield Problem(SHARD_KEY.flag, "must not contain NUL")

    return load_settings(
        [*own, *given.flags],
        {"LAKEBASE_PROXY_LOG__LEVEL": "warning", **os.environ},
        upstream_required=True,
        inspect=[map_problems, key_problems],
    )


async def _run_beside(settings: Settings, given: Arguments, file_limit: FileLimit) -> int:
    """Serve, log in, run the command, drain. Return its exit code."""
    cut = asyncio.Event()
    signals = PassedSignals(cut.set)
    try:
        async with serving(settings) as app:
            options = client_options(os.environ, given.get(SHARD_KEY.name))
            await _wait_for_login(app, settings, options)
            environment = child_environment(
                os.environ,
                settings,
                host=app.listen_host,
                port=app.listen_port,
                options=options,
            )
            code = await run_command(given.last, environment, signals, file_limit)
            await _drain(app, cut)
            return code
    except ProxyError as error:
        return _refuse(error)
    except CommandNotStarted as error:
        fail(str(error))
        return error.exit_code
    except asyncio.CancelledError:
        if signals.received is None:
            raise
        return KILLED_BY + signals.received


async def _wait_for_login(app: App, settings: Settings, options: str) -> None:
    """Log in once as the command will. Raises ProxyError.

    The dialer repeats what can succeed later, such as reaching an endpoint that resumes.
    """
    seconds = settings.upstream.connect_timeout_seconds + _LOGIN_SECONDS
    user, database = client_user(settings, os.environ), client_database(settings)
    parameters = {"options": options} if options else {}
    connection = await log_in(app, user, database, seconds, parameters)
    await connection.close(timeout=_CLOSE_SECONDS_MAX)


async def _drain(app: App, cut: asyncio.Event) -> None:
    """End the sessions that the command has left, such as those of its children.

    A signal ends at once what is left.
    """
    async with asyncio.TaskGroup() as tasks:

        async def cut_at_signal() -> None:
            await cut.wait()
            await app.drain(0)

        cutting = tasks.create_task(cut_at_signal())
        await app.drain(app.settings.shutdown.drain_seconds)
        cutting.cancel()


def _refuse(error: ProxyError) -> int:
    """Print why no client can log in."""
    answer = error.response()
    lines = [f"no client can log in: {answer.message} ({answer.sqlstate}, {error.reason})"]
    lines += [text for text in (error.detail, answer.text(b"H")) if text]
    fail("\n  ".join(lines))
    return EXIT_FAILURE
