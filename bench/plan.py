"""What a run measures and how much of it: the flags of the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.queries import Load
from bench.starting import installed_in

PGBENCH: Final = "pgbench"
BULK: Final = "bulk"
CONNECT: Final = "connect"
STORM: Final = "storm"
WORKERS: Final = "workers"
MEMORY: Final = "memory"
START: Final = "start"
SOAK: Final = "soak"
SHARD_MAPS: Final = "shardmap"  # the one subject that needs no PostgreSQL, and a minute
SUBJECTS: Final = (PGBENCH, BULK, CONNECT, STORM, WORKERS, START, MEMORY, SOAK, SHARD_MAPS)

_EPILOGUE: Final = """\
The run of five rounds takes about six minutes, that of --full half an hour. What is published
comes from `--full --publish --soak 60` on a machine that does nothing else: 90 minutes. It writes
docs/performance.json and the generated part of docs/performance.md.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """The subjects, and the size of each."""

    subjects: frozenset[str]
    rounds: int
    loads: tuple[Load, ...]
    megabytes: int
    connects: int
    delayed_connects: int
    storm_sessions: int
    storm_rounds: int
    idle_sessions: int  # on PostgreSQL, where each is used as well
    scripted_sessions: tuple[int, ...]  # on a scripted upstream
    soak_minutes: float
    floor: bool
    base: Path | None  # a checkout whose proxy is measured as well

    def sizes(self) -> str:
        """Return in words what is measured."""
        loads = f"pgbench {self.loads[0].seconds:g} s a load"
        connects = f"{self.connects} and {self.delayed_connects} (delayed) sessions"
        return f"{loads}, COPY {self.megabytes} MB, {connects} a round"


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the results go beside the terminal."""

    json: Path | None
    publish: bool


def read(arguments: Sequence[str] | None) -> tuple[Plan, Outputs]:
    """Return what the command line asks for; leave with code 2 when it makes no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    subjects = frozenset(options.only.split(",")) if options.only else _default(options.full)
    if subjects - set(SUBJECTS):
        parser.error(f"--only takes some of {','.join(SUBJECTS)}")
    sizes = (options.rounds, options.megabytes if options.megabytes is not None else 1)
    if min(sizes) < 1 or options.soak < 0.1:
        parser.error("--rounds and --megabytes are at least 1, --soak 0.1")
    if options.publish and (options.only or options.base):
        parser.error("--publish shows one whole run: it does not go with --only and --base")
    if options.base and not installed_in(options.base).exists():
        parser.error(f"--base needs what `make setup` makes there: {installed_in(options.base)}")
    return _plan(options, subjects), Outputs(options.json, options.publish)


def _default(full: bool) -> frozenset[str]:
    return frozenset(SUBJECTS if full else SUBJECTS[:-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the proxy beside PgBouncer and a direct TLS connection.",
        epilog=_EPILOGUE,
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--only", metavar="SUBJECTS", help=f"some of {','.join(SUBJECTS)}")
    parser.add_argument("--full", action="store_true", help="longer, COPY of 1 GB")
    parser.add_argument("--megabytes", type=int, help="size of a COPY (256; with --full 1024)")
    parser.add_argument("--soak", type=float, default=0.5, metavar="MINUTES", help="(%(default)s)")
    parser.add_argument("--floor", action="store_true", help="with HAProxy, which takes no TLS")
    parser.add_argument("--base", type=Path, metavar="CHECKOUT", help="with the proxy of another")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--publish", action="store_true", help="write docs/performance.*")
    return parser


def _plan(options: argparse.Namespace, subjects: frozenset[str]) -> Plan:
    full: bool = options.full
    seconds = 3 if full else 1
    return Plan(
        subjects=subjects,
        rounds=options.rounds,
        loads=tuple(
            Load(protocol, clients, seconds)
            for protocol in ("simple", "extended", "prepared")
            for clients in (1, 8, 32)
        ),
        megabytes=options.megabytes or (1024 if full else 256),
        connects=500 if full else 100,
        delayed_connects=100 if full else 30,
        storm_sessions=500,
        storm_rounds=options.rounds if full else min(options.rounds, 2),
        idle_sessions=1000,
        scripted_sessions=(1000, 5000),
        soak_minutes=options.soak,
        floor=options.floor or full,
        base=options.base,
    )
