"""A file of a million mappings by the command line: `python -m bench.catalogue_file`.

Measures `shards add --file` into a new map and `shards show --json` of it, each as a process: how
long it takes, and its most resident memory. PostgreSQL has its own TLS; catalogue and shard are two
databases of it. Statistics of the catalogue's tables are those that PostgreSQL has by itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.catalogue_server import ADMIN, prepare, settings, write
from bench.errors import BenchError
from bench.postgres import HOST, Postgres, postgres

MAPPINGS: Final = 1_000_000
_ROUNDS: Final = 3  # a minute and more each
_WIDTH: Final = 10
Took = tuple[float, float]
"""Seconds, and megabytes."""


def _run(words: Sequence[str | Path], out: Path) -> Took:
    """Run a verb to its end. Raises BenchError."""
    began = time.monotonic()
    with out.open("wb") as file:
        verb = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-m", "proxy", "shards", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(verb.pid, 0)
    verb.returncode = os.waitstatus_to_exitcode(status)
    if verb.returncode:
        raise BenchError(f"shards {words[0]} failed:\n{out.read_text()[:2000]}")
    return time.monotonic() - began, used.ru_maxrss * 1024 / 1e6


def _write_mappings(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.write("low,high,shard\n")
        for low in range(0, count * _WIDTH, _WIDTH):
            file.write(f"{low},{low + _WIDTH},one\n")


def _measure(server: Postgres, folder: Path, number: int, mappings: Path) -> tuple[Took, Took]:
    """Fill a new map and show it."""
    sections = settings(server, folder, ADMIN)
    name = f"map{number}"
    del sections["shard_maps.tenants"]
    sections[f"shard_maps.{name}"] = {"catalogue": True}
    sections["routing"]["shard_map"] = name
    config = ("--config", write(folder, name, sections))
    out = folder / "out"
    _run(("create", name, "--kind", "range", "--key-type", "int8", *config), out)
    port = str(server.address.port)
    _run(("add-shard", "one", "--host", HOST, "--port", port, *config), out)
    added = _run(("add", "--file", mappings, "--json", *config), out)
    return added, _run(("show", "--json", *config), out)


def measure(count: int, rounds: int) -> None:
    """Measure in a server of our own, and print the medians of the rounds."""
    found: dict[str, list[Took]] = {"add --file": [], "show --json": []}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        folder.chmod(0o711)
        with postgres(folder) as server:
            prepare(server, folder)
            mappings = folder / "mappings.csv"
            _write_mappings(mappings, count)
            admin = write(folder, "admin", settings(server, folder, ADMIN))
            _run(("init", "--config", admin), folder / "out")
            for number in range(rounds):
                for values, took in zip(
                    found.values(), _measure(server, folder, number, mappings), strict=True
                ):
                    values.append(took)
    for verb, values in found.items():
        seconds, megabytes = (statistics.median(column) for column in zip(*values, strict=True))
        sys.stdout.write(
            f"{verb} of {count:,} mappings: {seconds:.1f} s, {megabytes:.0f} MB"
            f"   (median of {rounds}, load {os.getloadavg()[0]:.1f})\n"
        )


def main() -> None:
    """Run as `python -m bench.catalogue_file`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mappings", type=int, default=MAPPINGS)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    wanted = parser.parse_args()
    measure(wanted.mappings, wanted.rounds)


if __name__ == "__main__":
    main()
