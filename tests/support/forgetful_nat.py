"""`python -m tests.support.forgetful_nat`: a proxy after an hour, with a NAT that has forgotten it.

Run it in a network namespace of its own, as root: the kernel drops each packet of the connections
to the workspace that exist by then, in both directions and without a reset. It prints how long
clients took to connect before that, how long the first one after it, and how many packets were
dropped. Of the hour only the adapter's clock knows.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psycopg

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.server.serving import serving
from proxy.workspace import http_adapter
from tests.support.running import libpq, proxy_settings

IDLE_SECONDS: Final = 3600.0
_BEFORE: Final = 5
_ESTABLISHED: Final = "01"


class MovedClock:
    """The adapter's clock, which can be moved ahead."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def monotonic(self) -> float:
        """Return the time as the adapter sees it."""
        return time.monotonic() + self.ahead_seconds


def connections_to(port: int) -> list[int]:
    """Return the local port of each connection to this port."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    ends = [
        (int(row[1].partition(":")[2], 16), int(row[2].partition(":")[2], 16))
        for row in rows
        if row[3] == _ESTABLISHED
    ]
    return [local for local, remote in ends if remote == port]


def iptables(*arguments: str) -> str:
    """Run iptables in this namespace and return its output."""
    command = ["iptables", "--wait", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def forget(port: int) -> int:
    """Drop all packets of the connections to this port. Return how many connections there are."""
    forgotten = connections_to(port)
    for local in forgotten:
        for flag in ("--sport", "--dport"):
            iptables("-A", "INPUT", "-p", "tcp", flag, str(local), "-j", "DROP")
    return len(forgotten)


def dropped_packets() -> int:
    """Return how many packets were dropped."""
    rules = iptables("-L", "INPUT", "-v", "-n", "-x").splitlines()[2:]
    return sum(int(rule.split()[0]) for rule in rules)


async def connect(proxy: App) -> float:
    """Connect and return how long it took."""
    begun = time.monotonic()
    connection = await psycopg.AsyncConnection.connect(**libpq(proxy, connect_timeout=60))
    seconds = time.monotonic() - begun
    await connection.close()
    return seconds


async def main() -> None:
    """Measure, and print the results as JSON."""
    clock = MovedClock()
    vars(http_adapter)["time"] = clock
    every_session_mints = {"token_max_age_seconds": 0}
    async with Lakebase(("one",)) as lakebase:
        port = urlsplit(lakebase.workspace_url).port
        assert port is not None
        async with serving(proxy_settings(lakebase, credentials=every_session_mints)) as proxy:
            before = [await connect(proxy) for _ in range(_BEFORE)][1:]
            forgotten = forget(port)
            clock.ahead_seconds = float(sys.argv[1])
            first = await connect(proxy)
            result = {"before": before, "first": first, "forgotten": forgotten}
            sys.stdout.write(json.dumps({**result, "dropped": dropped_packets()}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
