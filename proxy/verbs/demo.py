"""`demo`: run the whole system on one machine, with nothing to install or sign up for.

An emulator of Lakebase (its workspace API, its TLS gateway, real PostgreSQL) and, in front of it,
the same proxy that `run` serves. The commands that it prints work as printed.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Final

from pydantic import SecretStr

from proxy.config import (
    MappingEntry,
    RoutingSettings,
    Settings,
    ShardMapSettings,
    UpstreamSettings,
    WorkspaceSettings,
    load_settings,
)
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind
from proxy.server.app import App
from proxy.server.first_tokens import mint_first_tokens
from proxy.server.process import Signals, run_until_stopped
from proxy.server.serving import serving
from proxy.verbs.event_loop import run_on_event_loop
from proxy.verbs.stderr import fail

if TYPE_CHECKING:
    from proxy.emulator.lakebase import Lakebase


class DemoError(Exception):
    """The emulator cannot start. The text says why."""


# Tenants 0 to 999 are on the first shard, 1000 to 1999 on the second, all others on none.
TENANTS_A_SHARD: Final = 1000


def demo_settings(settings: Settings, lakebase: "Lakebase") -> Settings:
    """Return settings that lead to the emulator. Only how this process serves is kept.

    The user's own workspace, role and database do not exist in the emulator.
    """
    shards = lakebase.shards
    mappings = tuple(
        MappingEntry(
            target=shard.name,
            low=str(number * TENANTS_A_SHARD),
            high=str((number + 1) * TENANTS_A_SHARD),
        )
        for number, shard in enumerate(shards)
    )
    address = lakebase.host_address
    return Settings(
        listen=settings.listen,
        admin=settings.admin,
        log=settings.log,
        shutdown=settings.shutdown,
        workspace=WorkspaceSettings(
            host=lakebase.workspace_url,
            client_id=lakebase.client_id,
            client_secret=SecretStr(lakebase.client_secret),
            auth_type="oauth-m2m",
        ),
        upstream=UpstreamSettings(
            endpoint=shards[0].endpoint.name,
            hostaddr=address,
            port=lakebase.port,
            ssl_root_cert=str(lakebase.ca_file),
        ),
        # With the address: a target that sets where to dial takes none of that from [upstream].
        targets={
            shard.name: UpstreamSettings(endpoint=shard.endpoint.name, hostaddr=address)
            for shard in shards
        },
        shard_maps={
            "tenants": ShardMapSettings(kind=Kind.RANGE, key_type=KeyType.INT4, mappings=mappings)
        },
        # A client that names no tenant gets the first shard.
        routing=RoutingSettings(shard_map="tenants", require_key=False),
    )


@asynccontextmanager
async def demonstrating(settings: Settings) -> AsyncIterator[tuple[App, "Lakebase"]]:
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
            lakebase = await stack.enter_async_context(Lakebase())
        except ClusterError as error:
            raise DemoError(str(error)) from error
        app = await stack.enter_async_context(serving(demo_settings(settings, lakebase)))
        await mint_first_tokens(app)
        yield app, lakebase


def _hide_databricks() -> None:
    """Direct the SDK to the emulator only: no account of the user, no HTTP proxy."""
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        del os.environ[name]
    os.environ["DATABRICKS_CONFIG_FILE"] = os.devnull
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def greeting(app: App, lakebase: "Lakebase") -> str:
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
    bundled = lakebase.shards[0].cluster.binaries / "psql"
    lines += ["", f"No psql here? There is one in {_shown(bundled.parent)}"]
    if app.admin is not None:
        admin = f"http://{app.admin.host}:{app.admin.port}"
        lines.append(f"Status and metrics: {admin}/ {admin}/metrics")
    return "\n".join([*lines, "", "Ctrl-C stops everything and removes what the demo created."])


def _shown(path: Path) -> str:
    """Return a path as one would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def run(arguments: Sequence[str]) -> int:
    """Run emulator and proxy until asked to stop. Raises ConfigurationError."""
    # The variables of the Lakebase guide point to a real Lakebase, which the demo must not touch.
    own = {name: value for name, value in os.environ.items() if name.startswith("LAKEBASE_PROXY_")}
    settings = load_settings(arguments, {"LAKEBASE_PROXY_LOG__LEVEL": "warning", **own})
    try:
        return run_on_event_loop(settings, _serve)
    except ImportError as error:
        return fail(f"{error}. For the demo: pip install 'lakebase-auth-proxy[demo]'")
    except DemoError as error:
        return fail(f"the demo cannot start: {error}")


async def _serve(settings: Settings) -> int:
    signals = Signals()
    async with demonstrating(settings) as (app, lakebase):
        print(greeting(app, lakebase), flush=True)
        return await run_until_stopped(app, signals)
