"""`python -m bench.workspace`: the emulated workspace in which the proxy mints its tokens.

A process of its own, because libpq's blocking calls in the benchmark hold the interpreter's lock:
the proxy would wait for a token while the benchmark waits for the proxy.
"""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.child_processes import child
from proxy.emulator.cluster import CLIENT_ID, Cluster
from proxy.emulator.endpoints import Dialect, Endpoint
from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.emulator.workspace import Workspace

ENDPOINT: Final = "projects/bench/branches/production/endpoints/primary"


@contextmanager
def workspace(directory: Path) -> Iterator[str]:
    """Run a workspace while the block runs; yield its URL."""
    command = [sys.executable, "-m", "bench.workspace"]
    with child(command, directory / "workspace.log") as started:
        started.wait_until(lambda: started.tail().endswith("\n"))
        yield started.tail().strip()


async def _serve() -> None:
    """Print the URL and serve until the process exits."""
    # The endpoint is only a name here: its cluster is never started.
    endpoint = Endpoint(ENDPOINT, "ep-bench", Dialect.AUTOSCALING, Cluster())
    async with Workspace([endpoint], {CLIENT_ID: CLIENT_SECRET}) as served:
        sys.stdout.write(served.url + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
