"""The options of a run: what is measured and how much of it, from the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.launch import installed_in
from bench.pgbench import Load

PGBENCH: Final = "pgbench"
BULK: Final = "bulk"
CONNECT: Final = "connect"
CONNECT_STORM: Final = "storm"
WORKERS: Final = "workers"
LOG: Final = "log"
MEMORY: Final = "memory"
START: Final = "start"
SOAK: Final = "soak"
POOL: Final = "pool"
SHARD_MAPS: Final = "shardmap"  # the only subject that needs no PostgreSQL; takes a minute
SUBJECTS: Final = (
    *(PGBENCH, BULK, CONNECT, CONNECT_STORM, POOL),
    *(WORKERS, LOG, START, MEMORY, SOAK, SHARD_MAPS),
)

_EPILOGUE: Final = """\
Five rounds take about twenty minutes, with --full half an hour. --publish writes
docs/performance.json and the generated part of docs/performance.md; use it on a machine that does
nothing else. --base compares with another checkout, in which `make setup` was run, in the same
rounds: the column proxy/base is the ratio of this checkout to that one.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """The subjects, and the size of each."""

    subjects: frozenset[str]
    rounds: int
    loads: tuple[Load, ...]
    megabytes: int
    connects: int
    delayed_connects: int
    connect_storm_sessions: int
    connect_storm_rounds: int
    idle_sessions: int  # on PostgreSQL, where each is used as well
    scripted_sessions: tuple[int, ...]  # on a scripted upstream
    pool_sessions: int  # one after the other, for a count of logins
    pool_idle_sessions: int
    soak_minutes: float
    floor: bool
    base: Path | None  # a checkout whose proxy is measured as well

    def sizes(self) -> str:
        """Return the sizes as text."""
        loads = f"pgbench {self.loads[0].seconds:g} s a load"
        connects = f"{self.connects} and {self.delayed_connects} (delayed) sessions, or whole turns"
        return f"{loads}, COPY {self.megabytes} MB, {connects} a round"


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the results are written besides standard output."""

    json: Path | None
    publish: bool


def parse(arguments: Sequence[str] | None) -> tuple[Options, Outputs]:
    """Return what the command line asks for; exit with code 2 if it is invalid."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    subjects = frozenset(flags.only.split(",")) if flags.only else _default(flags.full)
    if subjects - set(SUBJECTS):
        parser.error(f"--only takes some of {','.join(SUBJECTS)}")
    sizes = (flags.rounds, flags.megabytes if flags.megabytes is not None else 1)
    if min(sizes) < 1 or flags.soak < 0.1:
        parser.error("--rounds and --megabytes are at least 1, --soak 0.1")
    if flags.publish and (flags.only or flags.base):
        parser.error("--publish shows one whole run: it does not go with --only and --base")
    if flags.base and not installed_in(flags.base).exists():
        parser.error(f"--base needs what `make setup` makes there: {installed_in(flags.base)}")
    return _options(flags, subjects), Outputs(flags.json, flags.publish)


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
    parser.add_argument(
        "--base", type=Path, metavar="CHECKOUT", help="with the proxy installed there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--publish", action="store_true", help="write docs/performance.*")
    return parser


def _options(flags: argparse.Namespace, subjects: frozenset[str]) -> Options:
    full: bool = flags.full
    seconds = 3 if full else 1
    return Options(
        subjects=subjects,
        rounds=flags.rounds,
        loads=tuple(
            Load(protocol, clients, seconds)
            for protocol in ("simple", "extended", "prepared")
            for clients in (1, 8, 32)
        ),
        megabytes=flags.megabytes or (1024 if full else 256),
        connects=500 if full else 100,
        delayed_connects=100 if full else 30,
        connect_storm_sessions=500,
        connect_storm_rounds=flags.rounds if full else min(flags.rounds, 2),
        idle_sessions=1000,
        scripted_sessions=(1000, 5000),
        pool_sessions=10_000,
        pool_idle_sessions=500,
        soak_minutes=flags.soak,
        floor=flags.floor or full,
        base=flags.base,
    )
