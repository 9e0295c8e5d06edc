"""`demo`: the whole system on one machine, with nothing to install or sign up for.

A stand-in for Lakebase (its workspace API, its TLS front end, real PostgreSQL behind it) and, in
front of it, the very proxy that `run` serves. What it tells a person to paste works as printed.
"""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from proxy.app import App, serving
from proxy.config import Settings

if TYPE_CHECKING:
    from proxy.standin.lakebase import Lakebase


class DemoError(Exception):
    """The stand-in cannot start; the text says why."""


def demo_settings(settings: Settings, lakebase: "Lakebase") -> Settings:
    """Return the settings with everything upstream of the proxy pointed at the stand-in."""
    endpoint = lakebase.shards[0].endpoint
    return settings.model_copy(
        update={
            "workspace": settings.workspace.model_copy(
                update={
                    "host": lakebase.workspace_url,
                    "client_id": lakebase.client_id,
                    "client_secret": SecretStr(lakebase.client_secret),
                    "auth_type": "oauth-m2m",
                }
            ),
            "credentials": settings.credentials.model_copy(update={"password_file": ""}),
            "upstream": settings.upstream.model_copy(
                update={
                    "endpoint": endpoint.name,
                    "host": "",
                    "user": "",
                    "hostaddr": lakebase.host_address,
                    "port": lakebase.port,
                    "ssl_root_cert": str(lakebase.ca_file),
                }
            ),
        }
    )


@asynccontextmanager
async def demonstrating(settings: Settings) -> AsyncIterator[tuple[App, "Lakebase"]]:
    """Run stand-in and proxy while the block runs; leave nothing behind.

    Raises ImportError when the extra `demo` is not installed, OSError when a port is taken, and
    DemoError when the stand-in does not start.
    """
    # An extra; only the demo needs it.
    from proxy.standin.cluster import ClusterError  # noqa: PLC0415
    from proxy.standin.lakebase import Lakebase  # noqa: PLC0415

    _forget_databricks()
    async with AsyncExitStack() as stack:
        try:
            lakebase = await stack.enter_async_context(Lakebase())
        except ClusterError as error:
            raise DemoError(str(error)) from error
        app = await stack.enter_async_context(serving(demo_settings(settings, lakebase)))
        yield app, lakebase


def _forget_databricks() -> None:
    """Keep the SDK to the stand-in: no account of the person's own, no HTTP proxy on the way."""
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        del os.environ[name]
    os.environ["DATABRICKS_CONFIG_FILE"] = os.devnull
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def greeting(app: App, lakebase: "Lakebase") -> str:
    """Return what the demo prints when it is ready."""
    psql = f"psql -h {app.listen_host} -p {app.listen_port} -U anyone -d {lakebase.database}"
    lines = [
        "The demo is ready: a Lakebase stand-in, and lakebase-auth-proxy in front of it.",
        "No password is needed. Paste into another terminal:",
        "",
        f"  {psql} -c 'SELECT current_user, current_database()'",
        f"  {psql} -c 'TABLE shard_identity'",
        "",
        f"The first prints the service principal: {lakebase.client_id}",
        f"and the database: {lakebase.database}",
    ]
    bundled = lakebase.shards[0].cluster.binaries / "psql"
    lines += ["", f"No psql here? There is one in {_shown(bundled.parent)}"]
    if app.admin is not None:
        admin = f"http://{app.admin.host}:{app.admin.port}"
        lines.append(f"Health and metrics: {admin}/readiness {admin}/metrics")
    return "\n".join([*lines, "", "Ctrl-C stops everything and leaves nothing behind."])


def _shown(path: Path) -> str:
    """Return a path as a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
