"""`demo`: run the whole system on one machine, with nothing to install or sign up for.

An emulator of Lakebase (its workspace API, its TLS gateway, real PostgreSQL) and, in front of it,
the same proxy that `run` serves. The commands that it prints work as printed.
"""

import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Final

from proxy.config import Settings, load_settings
from proxy.server.app import App
from proxy.server.first_tokens import mint_first_tokens
from proxy.server.process import Signals, run_until_stopped
from proxy.server.serving import serving
from proxy.verbs.demo_map import (
    TENANTS_A_SHARD,
    bounds_of,
    fill_catalogue,
    settings_values,
    write_settings,
)
from proxy.verbs.event_loop import run_on_event_loop
from proxy.verbs.stderr import fail, show_progress
from proxy.verbs.syntax import Arguments
from proxy.verbs.verb_table import GATEWAY_PORT, HTTPS

if TYPE_CHECKING:
    from proxy.emulator.lakebase import Lakebase


CLIENT_SECRET: Final = "fake-secret-of-the-demo"  # noqa: S105 - the emulator's, not a real one
_PORT_MAX: Final = 65535
_POOL_KEY: Final = re.compile("pool(_|$)")


class DemoError(Exception):
    """The emulator cannot start. The text says why."""


def demo_settings(settings: Settings, lakebase: "Lakebase") -> Settings:
    """Return settings that lead to the emulator. Only how this process serves is kept, and pools.

    The user's own workspace, role and database do not exist in the emulator.
    """
    nested: dict[str, Any] = {}
    for path, values in settings_values(lakebase).items():
        section, _, name = path.partition(".")
        nested.setdefault(section, {}).update({name: values} if name else values)
    upstream = settings.upstream.model_dump(exclude_unset=True)
    nested["upstream"] |= {key: upstream[key] for key in upstream if _POOL_KEY.match(key)}
    return Settings(
        listen=settings.listen,
        admin=settings.admin,
        log=settings.log,
        shutdown=settings.shutdown,
        **nested,
    )


@asynccontextmanager
async def demonstrating(
    settings: Settings, gateway_port: int = 0
) -> AsyncIterator[tuple[App, "Lakebase"]]:
    """Run emulator and proxy while the block runs, and remove every trace of them after it.

    Raises ImportError if the extra `demo` is not installed, OSError if a port is taken, and
    DemoError if the emulator does not start.
    """
    # It needs the extra `demo`.
    from proxy.emulator.cluster import ClusterError  # noqa: PLC0415
    from proxy.emulator.lakebase import Lakebase  # noqa: PLC0415

    _hide_databricks()
    async with AsyncExitStack() as stack:
        try:
            show_progress("Starting PostgreSQL, a server for each of two shards")
            lakebase = Lakebase(gateway_port=gateway_port)
            lakebase.client_secret = CLIENT_SECRET
            lakebase.answer_to_localhost()
            await stack.enter_async_context(lakebase)
        except ClusterError as error:
            raise DemoError(str(error)) from error
        except OSError as error:
            where = f"{GATEWAY_PORT.flag} {gateway_port}: " if gateway_port else ""
            raise DemoError(f"{where}{error.strerror or error}") from error
        show_progress("Filling the shard map")
        await fill_catalogue(lakebase)
        show_progress("Starting the proxy, and getting its first token")
        app = await stack.enter_async_context(serving(demo_settings(settings, lakebase)))
        await mint_first_tokens(app)
        yield app, lakebase


def _hide_databricks() -> None:
    """Direct the SDK to the emulator only: no account of the user, no HTTP proxy."""
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        del os.environ[name]
    os.environ["DATABRICKS_CONFIG_FILE"] = os.devnull
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def greeting(app: App, lakebase: "Lakebase", https_url: str = "") -> str:
    """Return the text that the demo prints when it is ready."""
    psql = f"psql -h {quote(app.listen_host)} -p {app.listen_port} -U anyone"
    table = "-c 'TABLE shard_identity'"
    uncovered = len(lakebase.shards) * TENANTS_A_SHARD
    lines = [
        "The demo is ready: a Lakebase emulator, and lakebase-auth-proxy in front of it.",
        "No password is needed. Paste into another terminal:",
        "",
        f"  {psql} -d {lakebase.database} -c 'SELECT current_user, current_database()'",
        "",
        f"It prints the service principal: {lakebase.client_id}",
        f"and the database: {lakebase.database}",
        "",
        "The same with a shard key: two tenants in two databases, and one in none.",
        "",
        f'  {psql} -d "dbname=app@42" {table}',
        f"  {psql} -d \"dbname={lakebase.database} options='-c shard_key=1500'\" {table}",
        f'  {psql} -d "dbname=app@{uncovered}" {table}',
    ]
    lines += ["", *_pooling(app, f"{psql} -d {lakebase.database}")]
    lines += ["", *_moving(app, lakebase, psql)]
    bundled = lakebase.shards[0].cluster.binaries / "psql"  # it has no TLS, so not for own tokens
    lines += ["", f"No psql here? There is one in {_shown(bundled.parent)}"]
    lines += ["", *_own_tokens(lakebase, https_url)]
    if app.admin is not None:
        admin = f"http://{app.admin.host}:{app.admin.port}"
        lines += ["", f"Status and metrics: {admin}/ {admin}/metrics"]
    return "\n".join([*lines, "", "Ctrl-C stops everything and removes what the demo created."])


def _pooling(app: App, psql: str) -> list[str]:
    """Return the lines on a session that two clients have, one after the other."""
    if app.settings.upstream.pool == "off":
        return ["With --upstream.pool session a login serves several clients: see docs/pooling.md."]
    query = f"  {psql} -Atc 'SELECT pg_backend_pid()'"
    return ["A session goes to the next client: both print the same process id.", "", query, query]


def _moving(app: App, lakebase: "Lakebase", psql: str) -> list[str]:
    """Return the lines on moving tenants to another shard while one of them works."""
    admin = {} if app.admin is None else {"host": app.admin.host, "port": app.admin.port}
    listen = {
        "host": app.listen_host,
        "port": app.listen_port,
        "allow_remote": app.settings.listen.allow_remote,
    }
    file = write_settings(lakebase, {"listen": listen, "admin": admin})
    (low, high), other = bounds_of(0), lakebase.shards[1].name
    query = "echo 'TABLE shard_identity \\watch 1'"
    shards = f"{_command()} shards"
    return [
        f"Tenants {low} to {int(high) - 1} can move while they work. A loop of queries for one:",
        "",
        f"  while sleep 1; do {query} | {psql} -d dbname=app@42 -At; done",
        "",
        "In a third terminal. The loop loses one session, and continues on the other shard:",
        "",
        f"  export LAKEBASE_PROXY_CONFIG={quote(str(file))}",
        f"  {shards} move {low} {high} --to {other}",
        f"  {shards} ops",
        f"  {shards} verify",
    ]


def _own_tokens(lakebase: "Lakebase", https_url: str) -> list[str]:
    """Return the guide's environment, for programs that get their tokens and log in themselves."""
    authority = str(lakebase.ca_file)
    workspace = {
        "DATABRICKS_HOST": https_url or lakebase.workspace_url,
        "DATABRICKS_CLIENT_ID": lakebase.client_id,
        "DATABRICKS_CLIENT_SECRET": lakebase.client_secret,
    }
    of_https = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE") if https_url else ()
    endpoint = lakebase.shards[0].endpoint
    database = {
        "PGHOST": endpoint.host,
        "PGPORT": str(lakebase.port),
        "PGDATABASE": lakebase.database,
        "PGUSER": lakebase.client_id,
    }
    groups = (
        workspace,
        dict.fromkeys(of_https, authority),
        dict.fromkeys(("ENDPOINT_NAME", "LAKEBASE_ENDPOINT"), endpoint.name),
        database,
        {"PGSSLMODE": "require", "PGSSLROOTCERT": authority, "NODE_EXTRA_CA_CERTS": authority},
    )
    exports = (" ".join(f"{name}={quote(one[name])}" for name in one) for one in groups if one)
    return [
        "Programs that get their own tokens, as the Lakebase guide shows, run with its variables.",
        "Only in a terminal of theirs: clients of the proxy must not inherit PGSSLMODE=require.",
        "",
        *(f"  export {line}" for line in exports),
    ]


def _command() -> str:
    """Return this program as one would type it from here."""
    name = "lakebase-auth-proxy"
    installed = Path(sys.executable).with_name(name)
    if not os.access(installed, os.X_OK):  # it may be in a folder that is closed to us
        return f"{quote(sys.executable)} -m proxy"
    return name if shutil.which(name) == str(installed) else quote(_shown(installed))


def _shown(path: Path) -> str:
    """Return a path as one would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def run(arguments: Arguments) -> int:
    """Run emulator and proxy until asked to stop. Raises ConfigurationError."""
    # The variables of the Lakebase guide point to a real Lakebase, which the demo must not touch.
    own = {name: value for name, value in os.environ.items() if name.startswith("LAKEBASE_PROXY_")}
    settings = load_settings(arguments.flags, {"LAKEBASE_PROXY_LOG__LEVEL": "warning", **own})
    port = arguments.number(GATEWAY_PORT.name, 0, _PORT_MAX, 0)
    program = partial(_serve, gateway_port=port or 0, https=arguments.has(HTTPS))
    try:
        return run_on_event_loop(settings, program)
    except ImportError as error:
        return fail(f"{error}. For the demo: pip install 'lakebase-auth-proxy[demo]'")
    except DemoError as error:
        return fail(f"the demo cannot start: {error}")


async def _serve(settings: Settings, *, gateway_port: int, https: bool) -> int:
    signals = Signals()
    async with AsyncExitStack() as stack:
        app, lakebase = await stack.enter_async_context(demonstrating(settings, gateway_port))
        url = (await stack.enter_async_context(lakebase.https())).url if https else ""
        print(greeting(app, lakebase, url), flush=True)
        return await run_until_stopped(app, signals)
