"""Sessions by the hundred thousand over many shard keys: every one is on the right shard.

Everything is real: the proxy as a process of its own, the emulator's API and TLS gateway, two
PostgreSQL servers, of which each tells its name. Which is right is worked out here, by SHA-256 and
arithmetic, not by the product's code. For: `make routes`, and less of the same in the suite. Not
for measuring: client, gateway and servers share the machine with the proxy.
"""

import argparse
import asyncio
import hashlib
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from proxy.emulator.lakebase import SHARDS, Lakebase
from proxy.wire.framing import MessageReader
from proxy.wire.messages import Frame
from proxy.wire.startup import V3_0
from tests.support.client import query, startup
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import eventually, proxy_values, toml
from tests.support.sharding import TABLE, Section, sharded

SESSIONS: Final = 100_000
KEYS: Final = 1_000
LOOPBACK: Final = "127.0.0.1"
AT_ONCE: Final = 32  # keeps both cores busy; the servers allow 300
RANGES_BITS: Final = 6  # the hash map has 64 ranges, by turns on either shard
SESSION_SECONDS_MAX: Final = 60.0
_SHOW_EVERY: Final = 10_000
_WRONG_SHOWN_MAX: Final = 20

_GOODBYE: Final = Frame(b"X", b"").encode()


@dataclass
class Outcome:
    """What became of the sessions; `wrong` has a sentence for each that is not where it should."""

    seconds: float = 0.0
    shards: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    mints: int = 0

    def __str__(self) -> str:
        sessions = self.shards.total() + len(self.wrong)
        by_shard = ", ".join(f"{count:,} on {name}" for name, count in sorted(self.shards.items()))
        return (
            f"{sessions:,} sessions over {len(self.keys):,} keys in {self.seconds:.0f} s"
            f" ({sessions / self.seconds:.0f} a second): {by_shard}; {len(self.wrong)} wrong;"
            f" {self.mints} tokens minted"
        )


def key_of(number: int, keys: int) -> str:
    """Return the key of a session; neighbours have different ones."""
    return f"tenant-{number % keys}"


def shard_of(key: str) -> str:
    """Return where a key belongs."""
    hashed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return SHARDS[(hashed >> 32 - RANGES_BITS) % 2]


def hash_map() -> Section:
    """Return the shard map that says the same."""
    width = 1 << 32 - RANGES_BITS
    mappings = [
        {"low": n * width, "high": (n + 1) * width, "target": SHARDS[n % 2]}
        for n in range(1 << RANGES_BITS)
    ]
    return {"kind": "hash", "key_type": "text", "mappings": mappings}


def greeting(number: int, key: str) -> bytes:
    """Return a StartupMessage that gives the key in one of the five ways, by turns."""
    ways: Sequence[dict[str, str]] = (
        {"options": f"-c shard_key={key}"},
        {"options": f"--shard-key={key} -c work_mem=5MB"},
        {"database": f"app@{key}"},
        {"shard_key": key},
        {"lakebase.shard_key": key, "database": "databricks_postgres"},
    )
    return startup(V3_0, **ways[number % len(ways)])


def named(answer: bytes) -> str:
    """Return the shard that an answer names, or what it says instead."""
    framing = MessageReader(1 << 20)
    framing.feed(answer)
    while (frame := framing.next()) is not None:
        if frame.type == b"D":
            return frame.payload[6:].decode()  # after the number of columns and the length
        if frame.type == b"E":
            return frame.payload.replace(b"\0", b" ").decode(errors="replace")
    return "nothing"


async def ask(proxy: ProxyProcess, port: int, number: int, key: str) -> str:
    """Open a session, ask for the shard's name, say goodbye; return the answer."""
    async with asyncio.timeout(SESSION_SECONDS_MAX):
        assert proxy.running, proxy.err
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        try:
            writer.write(greeting(number, key) + query(TABLE) + _GOODBYE)
            return named(await reader.read())
        finally:
            writer.close()


async def lane(
    proxy: ProxyProcess, port: int, numbers: Iterator[int], keys: int, outcome: Outcome
) -> None:
    """Open sessions one after the other, until there are none left to open."""
    for number in numbers:
        key = key_of(number, keys)
        outcome.keys.add(key)
        try:
            found = await ask(proxy, port, number, key)
        except OSError as error:
            found = f"{type(error).__name__}: {error}"
        if found == shard_of(key):
            outcome.shards[found] += 1
        else:
            outcome.wrong.append(f"session {number}, {key}: {found}, not {shard_of(key)}")
        if number and number % _SHOW_EVERY == 0:
            sys.stderr.write(f"{number:,} sessions\n")


async def run(lakebase: Lakebase, directory: Path, sessions: int, keys: int) -> Outcome:
    """Open sessions through a proxy process in front of the emulator; return what they found."""
    file = directory / "proxy.toml"
    sections = sharded(lakebase, hash_map())
    file.write_text(toml(proxy_values(lakebase, sections)))
    async with started_process("run", "--config", str(file)) as proxy:
        await proxy.serving()
        port = proxy.listen_port
        # Two lines a session would fill this process' memory.
        file.write_text(toml(proxy_values(lakebase, {**sections, "log": {"level": "warning"}})))
        proxy.send(signal.SIGHUP)
        outcome, numbers, began = Outcome(), iter(range(sessions)), time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(lane(proxy, port, numbers, keys, outcome))
        outcome.seconds = time.monotonic() - began
        outcome.mints = len(lakebase.workspace.mints)
        await eventually(lambda: lakebase.gateway.open_sessions == 0, "all sessions are over")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0, proxy.err
        assert [line for line in proxy.lines if line["level"] not in ("debug", "info")] == []
    return outcome


async def soak(sessions: int, keys: int) -> Outcome:
    """Run with an emulator of our own, and remove it afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        async with Lakebase() as lakebase:
            return await run(lakebase, Path(directory), sessions, keys)


def main() -> int:
    """Run as `python -m tests.soak.routing`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--keys", type=int, default=KEYS)
    options = parser.parse_args()
    outcome = uvloop.run(soak(options.sessions, options.keys))
    sys.stdout.write(f"{outcome}\n" + "".join(f"  {w}\n" for w in outcome.wrong[:_WRONG_SHOWN_MAX]))
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
