"""What an admission adds to opening a session: `python -m bench.catalogue_opening`.

Catalogue and shard are two databases of a PostgreSQL with its own TLS. A proxy that validates and
one that does not open sessions in turns. `--base CHECKOUT` adds both of another checkout. The CPU
time is the proxy's own.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from bench.catalogue_server import ADMIN, READER, SESSION, prepare, serving, settings, write
from bench.child_processes import LOOPBACK, run
from bench.launch import installed_in
from bench.postgres import HOST, Postgres, postgres
from bench.process_usage import cpu_time

_ROUNDS: Final = 5
_OPENED_EACH_ROUND: Final = 100
_WARM_UP: Final = 20
_PAUSE_SECONDS: Final = 0.005
_OPEN_SECONDS_MAX: Final = 60.0
_VERB_SECONDS_MAX: Final = 60.0


@dataclass(slots=True)
class Opener:
    """One proxy, and the medians of the rounds in milliseconds."""

    name: str
    port: int
    pid: int
    cpu_milliseconds: float = 0.0
    took: list[float] = field(default_factory=list)
    fastest: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)

    async def open(self) -> float:
        """Open a session and return how long that took."""
        began = time.perf_counter()
        connection = await asyncpg.connect(
            host=LOOPBACK,
            port=self.port,
            user="anyone",
            database="app@5",
            ssl=False,
            timeout=_OPEN_SECONDS_MAX,
        )
        seconds = time.perf_counter() - began
        connection.terminate()
        await asyncio.sleep(_PAUSE_SECONDS)
        return seconds * 1e3

    def end_round(self) -> None:
        """Take the round's values."""
        self.medians.append(statistics.median(self.took))
        self.fastest.append(statistics.quantiles(self.took, n=10)[0])
        self.took.clear()


def _fill(server: Postgres, folder: Path, program: Sequence[str | Path]) -> None:
    """Make a map with one mapping."""
    prepare(server, folder)
    file = write(folder, "admin", settings(server, folder, ADMIN))
    for words in (
        ("init",),
        ("create", "tenants", "--kind", "range", "--key-type", "int8"),
        ("add-shard", "one", "--host", HOST, "--port", str(server.address.port)),
        ("grant", "reader", READER),
        ("grant", "session", SESSION),
        ("add", "0", "1000", "--shard", "one"),
    ):
        command = [*program, "shards", words[0], *words[1:], "--config", file]
        run(command, folder / f"{words[0]}.log", seconds_max=_VERB_SECONDS_MAX)


def _opener(stack: ExitStack, name: str, program: Sequence[str | Path], file: Path) -> Opener:
    pid, port = stack.enter_context(serving(program, file, name.replace(" ", "-")))
    return Opener(name, port, pid)


async def _measure(openers: Sequence[Opener], rounds: int, opened: int) -> None:
    for opener in openers:
        for _ in range(_WARM_UP):
            await opener.open()
    before = [cpu_time(opener.pid).total for opener in openers]
    for _ in range(rounds):
        for _ in range(opened):
            for opener in openers:
                opener.took.append(await opener.open())
        for opener in openers:
            opener.end_round()
    for opener, began in zip(openers, before, strict=True):
        seconds = cpu_time(opener.pid).total - began
        opener.cpu_milliseconds = seconds * 1e3 / (rounds * opened)


def _print(openers: Sequence[Opener]) -> None:
    sys.stdout.write(f"{f'opening, ms (load {os.getloadavg()[0]:.1f})':<32}")
    sys.stdout.write(f"{'p50':>10}{'fastest tenth':>16}{'CPU':>8}\n")
    for one in openers:
        median, fastest = statistics.median(one.medians), statistics.median(one.fastest)
        sys.stdout.write(f"{one.name:<32}{median:>10.2f}{fastest:>16.2f}")
        sys.stdout.write(f"{one.cpu_milliseconds:>8.2f}\n")
    for one, other in zip(openers[::2], openers[1::2], strict=True):
        ratios = [a / b for a, b in zip(one.medians, other.medians, strict=True)]
        fast = [a / b for a, b in zip(one.fastest, other.fastest, strict=True)]
        what = f"{one.name} / {other.name}"
        sys.stdout.write(f"{what:<32}{statistics.median(ratios):>10.2f}")
        sys.stdout.write(f"{statistics.median(fast):>16.2f}\n")


def measure(rounds: int, opened: int, base: Path | None) -> None:
    """Run the servers and proxies, and print the medians of the rounds."""
    own = [sys.executable, "-m", "proxy"]
    programs: dict[str, Sequence[str | Path]] = (
        {"": own} if base is None else {"": own, "base, ": [installed_in(base)]}
    )
    off: dict[str, object] = {"validate": False, "allow_unvalidated": True}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o711)
        server = stack.enter_context(postgres(folder))
        _fill(server, folder, own)
        sections = settings(server, folder, SESSION)
        validated = write(folder, "validated", sections)
        sections["catalogue"] |= off
        unvalidated = write(folder, "unvalidated", sections)
        openers = [
            _opener(stack, f"{word}{name}", program, file)
            for word, program in programs.items()
            for name, file in (("validated", validated), ("not validated", unvalidated))
        ]
        uvloop.run(_measure(openers, rounds, opened))
        _print(openers)


def main() -> None:
    """Run as `python -m bench.catalogue_opening`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--opened", type=int, default=_OPENED_EACH_ROUND)
    parser.add_argument("--base", type=Path, metavar="CHECKOUT")
    wanted = parser.parse_args()
    measure(wanted.rounds, wanted.opened, wanted.base)


if __name__ == "__main__":
    main()
