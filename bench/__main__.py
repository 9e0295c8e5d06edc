"""`python -m bench`: the command line and the order of a run.

What is started is ended again on every way out: at the end, on a failure, on Ctrl-C and SIGTERM.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench import memory, queries, sessions, shard_maps
from bench.accounting import others_seconds
from bench.bulk import Bulk
from bench.children import run
from bench.contenders import (
    PGBOUNCER,
    PROXY,
    Contender,
    Start,
    direct,
    find_pgbouncer,
    pgbouncer,
    proxy,
)
from bench.errors import BenchError
from bench.postgres import Postgres, find_binaries, postgres
from bench.queries import Load
from bench.readings import Readings
from bench.report import as_json, machine, table
from bench.workspace import workspace

_SHARD_MAPS: Final = "shardmap"  # the one subject that needs no PostgreSQL
_SUBJECTS: Final = ("pgbench", "copy", "connect", "memory", _SHARD_MAPS)
_MISSING: Final = "PgBouncer is MISSING, nothing is compared with it: apt-get install pgbouncer"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures, and how much of it."""

    subjects: frozenset[str]
    rounds: int
    loads: tuple[Load, ...]
    megabytes: int
    connects: int
    idle_sessions: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = _options(arguments)
    plan = _plan(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if _SHARD_MAPS in plan.subjects:
        sys.stdout.write(shard_maps.report() + "\n")
        if len(plan.subjects) == 1:
            return 0
    readings, status = Readings(), 0
    described: dict[str, str] = {}
    try:
        described |= _describe()
        begun, others = time.monotonic(), others_seconds()
        with _scratch() as directory:
            _run(plan, directory, readings)
        disturbed = (others_seconds() - others) / (time.monotonic() - begun)
        described["disturbance"] = f"other programs took {disturbed:.2f} cores meanwhile"
    except BenchError as error:
        _say(f"bench: {error}")
        status = 1
    except KeyboardInterrupt:
        _say("bench: stopped; nothing is left running")
        status = 130
    if readings.values:  # those of an interrupted run are no worse for that
        sys.stdout.write(table(readings, described, plan.rounds) + "\n")
        if options.json:
            text = json.dumps(as_json(readings, described, plan.rounds), indent=1)
            options.json.write_text(text + "\n")
    return status


def _run(plan: Plan, directory: Path, readings: Readings) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(postgres(directory))
        starts = _starts(upstream, directory, stack.enter_context(workspace(directory)))
        bulk = Bulk(plan.megabytes, upstream)
        with ExitStack() as contest:
            started = [contest.enter_context(start()) for start in starts.values()]
            contenders = [direct(upstream), *started]
            if "copy" in plan.subjects:
                bulk.prepare(contenders[0])
            for number in range(plan.rounds):
                _say(f"round {number + 1} of {plan.rounds}")
                _round(plan, _rotated(contenders, number), upstream, bulk, readings)
        if "memory" in plan.subjects:
            for name, start in starts.items():
                _say(f"memory of {name}")
                memory.measure(start, plan.idle_sessions, bulk, readings)


def _round(
    plan: Plan, contenders: list[Contender], upstream: Postgres, bulk: Bulk, readings: Readings
) -> None:
    """Measure everything once; for each thing all contenders, right after each other."""
    if "pgbench" in plan.subjects:
        for load in plan.loads:
            for contender in contenders:
                queries.measure(load, contender, upstream, readings)
    if "copy" in plan.subjects:
        for contender in contenders:
            bulk.measure(contender, readings)
    if "connect" in plan.subjects:
        sessions.measure(plan.connects, contenders, readings)


def _starts(upstream: Postgres, directory: Path, workspace_url: str) -> dict[str, Start]:
    starts: dict[str, Start] = {}
    program = find_pgbouncer()
    if program is None:
        _say(_MISSING)
    else:
        starts[PGBOUNCER] = partial(pgbouncer, upstream, directory, program)
    starts[PROXY] = partial(proxy, upstream, directory, workspace_url)
    return starts


def _rotated(contenders: list[Contender], number: int) -> list[Contender]:
    """Let another one be first in each round: the first finds the caches as nobody else does."""
    first = number % len(contenders)
    return contenders[first:] + contenders[:first]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--only", default=",".join(_SUBJECTS), help="some of %(default)s")
    parser.add_argument("--full", action="store_true", help="longer, with 32 clients and 1 GB")
    parser.add_argument("--megabytes", type=int, help="size of a COPY (256; with --full 1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(_SUBJECTS)
    if unknown or options.rounds < 1:
        parser.error(f"--only takes {','.join(_SUBJECTS)}; --rounds at least 1")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    full: bool = options.full
    protocols = ("simple", "extended", "prepared") if full else ("simple", "prepared")
    clients = (1, 8, 32) if full else (1, 8)
    seconds = 5 if full else 2
    return Plan(
        subjects=frozenset(options.only.split(",")),
        rounds=options.rounds,
        loads=tuple(Load(one, count, seconds) for one in protocols for count in clients),
        megabytes=options.megabytes or (1024 if full else 256),
        connects=500 if full else 150,
        idle_sessions=1000,
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    """Give a directory for the run, with a name short enough for a socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    directory.chmod(0o711)  # servers of another user reach their own part of it
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _describe() -> dict[str, str]:
    """Return the machine and the versions. Raises BenchError without a PostgreSQL."""
    program = find_pgbouncer()
    with _scratch() as directory:
        versions = [
            run([command, "--version"], directory / "version.log", seconds_max=10).split("\n")[0]
            for command in (find_binaries() / "postgres", program)
            if command is not None
        ]
    return machine(versions[0], versions[1] if program else "MISSING")


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


if __name__ == "__main__":
    sys.exit(main())
