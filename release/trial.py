"""Try what is installed beside this Python: version, demo, and a query through the compiled relay.

It runs with `python -I`, so that nothing is imported from a checkout. Prints one sentence, and ends
with 1 and the reason if anything is not as it should be.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any, Final

import asyncpg

COMMAND: Final = str(Path(sys.executable).parent / "lakebase-auth-proxy")
LAST_LINE: Final = "Ctrl-C stops everything"
DEMO_SECONDS_MAX: Final = 120


async def printed(demo: Process) -> str:
    """Return what the demo prints until it is ready."""
    assert demo.stdout is not None
    text = ""
    while LAST_LINE not in text:
        line = (await demo.stdout.readline()).decode()
        if not line:
            sys.exit(f"the demo ended: {text}")
        text += line
    return text


async def user_of(port: int) -> str:
    """Return as whom a client is logged in."""
    connection = await asyncpg.connect(
        host="127.0.0.1", port=port, user="anyone", database="databricks_postgres", ssl=False
    )
    try:
        return str(await connection.fetchval("SELECT current_user"))
    finally:
        await connection.close()


def status_of(page: str) -> dict[str, Any]:
    """Return what the proxy says of itself."""
    with urllib.request.urlopen(f"{page}status", timeout=10) as answer:  # noqa: S310 - loopback
        status: dict[str, Any] = json.load(answer)
        return status


async def query_through_the_demo() -> tuple[str, str]:
    """Return as whom a client of the demo is logged in, and what relays it."""
    ports = ("--listen.port", "0", "--admin.port", "0")
    demo = await asyncio.create_subprocess_exec(COMMAND, "demo", *ports, stdout=PIPE)
    try:
        async with asyncio.timeout(DEMO_SECONDS_MAX):
            text = await printed(demo)
            port = re.search(r"psql -h 127\.0\.0\.1 -p (\d+)", text)
            page = re.search(r"http://127\.0\.0\.1:\d+/", text)
            assert port is not None
            assert page is not None
            user = await user_of(int(port[1]))
            return user, status_of(page[0])["acceleration"]
    finally:
        if demo.returncode is None:
            demo.send_signal(signal.SIGINT)
        ended = await demo.wait()
        if ended != 0:
            sys.exit(f"the demo ended with {ended}")


def main() -> None:
    """Try it."""
    build = subprocess.check_output([COMMAND, "version", "--build"], text=True)  # noqa: S603
    version, _, relay = build.strip().partition("\n")
    user, acceleration = asyncio.run(query_through_the_demo())
    if acceleration != "used":
        sys.exit(f"the relay is not the compiled one: {relay}")
    print(f"version {version}, {relay}, logged a client in as {user}")


if __name__ == "__main__":
    main()
