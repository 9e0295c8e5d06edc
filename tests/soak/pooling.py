"""A pool under constant use: every client finds its session as new, whatever the one before left.

200 clients connect, do one of thirty things that leave something in a session, and leave in one of
twelve ways. Meanwhile backends are terminated, all sessions end at once, another server becomes the
primary, cancel requests arrive late, and the proxy reloads and reconnects. Everything is random by
a seed that is printed. For: `make pooling`, and less of the same in the suite.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import uvloop

from proxy.emulator.endpoints import SessionEnd
from proxy.emulator.lakebase import Lakebase
from tests.soak.outcome import Outcome
from tests.soak.pool_clients import (
    ANSWER_SECONDS_MAX,
    APPLICATIONS,
    LEAVINGS,
    LEFT,
    Life,
    PoolClient,
)
from tests.support.admin_address import ask, metrics_once
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import eventually, proxy_values, toml

SECONDS: Final = 1200.0
CLIENTS: Final = 200
SIZE_MAX: Final = 40
END_SECONDS_MAX: Final = 60.0
# It goes on until each kind has happened, at most this many times as long.
LONGER_MAX: Final = 4
_ENDS: Final = (SessionEnd.ADMIN_SHUTDOWN, SessionEnd.END_OF_FILE, SessionEnd.RESET)
_DISTURBANCES: Final = (
    *("terminate", "end all", "promote", "terminate", "reload", "reconnect", "terminate"),
    *("reload", "reload of the pool", "promote"),
)
# A client stays no longer, so that then no session of the pool before a reload is left.
_CHANGE_SECONDS: Final = ANSWER_SECONDS_MAX
KINDS: Final = (
    *(f"left: {what}" for what in LEFT),
    *(f"leaves: {how}" for how in LEAVINGS),
    *(f"disturbed: {kind}" for kind in sorted(set(_DISTURBANCES))),
)
_SESSIONS: Final = "lakebase_proxy_pool_sessions{"


class Soak:
    """The state of one run."""

    def __init__(self, lakebase: Lakebase, folder: Path, seed: int) -> None:
        self.outcome = Outcome(seed)
        self.life = Life(self.outcome)
        self._lakebase = lakebase
        self._endpoint = lakebase.shards[0].endpoint
        self._endpoint.passes_real_key = True  # so that a client knows its backend
        lakebase.gateway.cancel_delay_seconds = 0.2
        self._folder = folder
        self._idle_max = 20
        self._changed_at = -_CHANGE_SECONDS
        self._dice = random.Random(f"{seed} disturbances")

    async def run(self, seconds: float, clients: int) -> None:
        """Run for a while; afterwards no upstream session may be left."""
        async with started_process("run", "--config", str(self._file())) as proxy:
            await proxy.serving()
            port = int(proxy.events("serving")[0]["admin_port"])
            # Two lines a session would fill this process' memory.
            self._file(level="warning")
            proxy.send(signal.SIGHUP)
            await self._use(proxy, port, seconds, clients)
            await self._judge_end(proxy, port)

    async def _use(self, proxy: ProxyProcess, port: int, seconds: float, clients: int) -> None:
        workers = [PoolClient(n, self.outcome.seed, proxy, self.life) for n in range(clients)]
        for name in APPLICATIONS:
            await workers[0].first(name)
        async with asyncio.TaskGroup() as tasks:
            for worker in workers:
                tasks.create_task(worker.work())
            tasks.create_task(self._disturb(proxy, port))
            tasks.create_task(self._watch(port))
            tasks.create_task(self._time(seconds))

    def _file(self, *, level: str = "info") -> Path:
        pool = {"pool": "session", "pool_size_max": SIZE_MAX, "pool_idle_max": self._idle_max}
        sections: dict[str, dict[str, object]] = {
            "admin": {"enabled": True, "port": 0},
            "log": {"level": level, "format": "json"},
            "upstream": {**pool, "pool_wait_seconds": 60, "pool_check_seconds": 1},
        }
        file, new = self._folder / "proxy.toml", self._folder / "proxy.toml.new"
        new.write_text(toml(proxy_values(self._lakebase, sections)))
        new.replace(file)  # the proxy may be reading it for the reload before
        return file

    async def _disturb(self, proxy: ProxyProcess, port: int) -> None:
        """Disturb until it is over; each kind comes once before one comes again."""
        deck: list[str] = []
        while not self.life.over:
            await asyncio.sleep(self._dice.uniform(0.2, 1))
            deck = deck or self._dice.sample(_DISTURBANCES, len(_DISTURBANCES))
            kind = deck.pop()
            match kind:
                case "terminate":
                    for record in self._dice.sample(self._open_records(), 3):
                        self._terminate(record)
                case "end all":
                    self.life.all_ended_at = time.monotonic()
                    self._endpoint.end_sessions(self._dice.choice(_ENDS))
                case "promote":
                    self._endpoint.promote_another()
                case "reload":
                    self._file(level=self._dice.choice(("warning", "error")))
                    proxy.send(signal.SIGHUP)
                case "reload of the pool" if self._pools() == 1:
                    # The pool before lives until its clients have left.
                    self._changed_at = time.monotonic()
                    others = [number for number in range(5, 40) if number != self._idle_max]
                    self._idle_max = self._dice.choice(others)
                    self._file(level="warning")
                    proxy.send(signal.SIGHUP)
                case "reconnect":
                    await ask(port, "/reconnect", "POST")
                case _:
                    continue
            self.outcome.counts[f"disturbed: {kind}"] += 1

    def _open_records(self) -> list[int]:
        records = self._lakebase.gateway.sessions
        return [one.real_pid for one in records if one.real_pid and not one.closed] + [0, 0, 0]

    def _terminate(self, pid: int) -> None:
        """Do what pg_terminate_backend does."""
        if pid:
            self.life.ended_at[pid] = time.monotonic()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def _watch(self, port: int) -> None:
        """Compare the number of upstream sessions with the bound."""
        while not self.life.over:
            await asyncio.sleep(0.2)
            counted = _pool_sessions((await ask(port, "/metrics")).body.decode())
            most = max(self.outcome.counts["most upstream sessions"], counted)
            self.outcome.counts["most upstream sessions"] = most
            bound = SIZE_MAX * self._pools()
            if counted > bound:
                self.outcome.wrong.append(f"{counted} upstream sessions, not {bound}")
            slots = max(self.outcome.counts["most slots of the database"], self._endpoint.slots)
            self.outcome.counts["most slots of the database"] = slots

    def _pools(self) -> int:
        """Return how many pools there may be: that before a reload lives on for a while."""
        return 2 if time.monotonic() < self._changed_at + _CHANGE_SECONDS else 1

    async def _time(self, seconds: float) -> None:
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds * LONGER_MAX:
            if elapsed >= seconds and not self.outcome.missing(KINDS):
                break
            await asyncio.sleep(0.2)
        self.life.over = True
        self.outcome.longest("all of it", time.monotonic() - began)

    async def _judge_end(self, proxy: ProxyProcess, port: int) -> None:
        wrong = self.outcome.wrong
        wrong += [f"did not happen: {kind}" for kind in self.outcome.missing(KINDS)]
        self.outcome.counts["upstream logins"] = self._lakebase.gateway.logins.total()
        text = await metrics_once(port, lambda text: "\nlakebase_proxy_connections 0.0\n" in text)
        self.outcome.counts.update(_counts(text))
        proxy.send(signal.SIGTERM)
        code = await proxy.ended(END_SECONDS_MAX)
        errors = [line for line in proxy.lines if line["level"] in ("error", "critical")]
        if code or errors:
            wrong.append(f"the proxy: {code}, {errors[:3]}")
        await eventually(lambda: not self._endpoint.slots, "no upstream session is left")


def _pool_sessions(text: str) -> int:
    lines = text.splitlines()
    return int(sum(float(one.rpartition(" ")[2]) for one in lines if one.startswith(_SESSIONS)))


def _counts(text: str) -> dict[str, int]:
    """Return the pool's own numbers, for a person who reads the outcome."""
    names = ("pool_takes_total", "pool_retired_total", "pool_spares_total")
    found = {}
    for line in text.splitlines():
        sample, _, count = line.removeprefix("lakebase_proxy_").rpartition(" ")
        if sample.startswith(names) and float(count):
            found[sample] = int(float(count))
    return found


async def run(
    lakebase: Lakebase, folder: Path, seconds: float, seed: int, clients: int = CLIENTS
) -> Outcome:
    """Run in front of an emulator."""
    soak = Soak(lakebase, folder, seed)
    await soak.run(seconds, clients)
    return soak.outcome


async def soak(seconds: float, seed: int, clients: int) -> Outcome:
    """Run with servers of our own, and remove them afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        async with Lakebase(("one",)) as lakebase:
            return await run(lakebase, Path(folder), seconds, seed, clients)


def main() -> int:
    """Run as `python -m tests.soak.pooling`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    sys.stderr.write(f"seed {options.seed}, {options.seconds:g} s\n")
    outcome = uvloop.run(soak(options.seconds, options.seed, options.clients))
    sys.stdout.write(f"{outcome}\n")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
