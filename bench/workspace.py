"""`python -m bench.workspace`: a stand-in workspace that the proxy mints its tokens in.

A process of its own: libpq's blocking calls in the harness hold the interpreter's lock, and a
proxy that waits for a token while the harness waits for the proxy would wait for ever.
"""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.children import child
from proxy.emulator.cluster import CLIENT_ID, Cluster
from proxy.emulator.endpoints import Dialect, Endpoint
from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.emulator.workspace import Workspace

ENDPOINT: Final = "projects/bench/branches/production/endpoints/primary"


@contextmanager
def workspace(directory: Path) -> Iterator[str]:
    """Run one while the block runs; give its URL."""
    command = [sys.executable, "-m", "bench.workspace"]
    with child(command, directory / "workspace.log") as started:
        started.wait_until(lambda: started.tail().endswith("\n"))
        yield started.tail().strip()


async def _serve() -> None:
    """Print the URL and serve until the process is ended."""
    # The endpoint is only a name here: its cluster is never started.
    endpoint = Endpoint(ENDPOINT, "ep-bench", Dialect.AUTOSCALING, Cluster())
    async with Workspace([endpoint], {CLIENT_ID: CLIENT_SECRET}) as served:
        sys.stdout.write(served.url + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
