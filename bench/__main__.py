"""`python -m bench`: measures, prints, writes.

What is started is ended again on every way out: at the end, on a failure, on Ctrl-C and SIGTERM.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from bench import comparison, plan, publish, shard_maps
from bench.accounting import others_seconds
from bench.children import run
from bench.comparison import say
from bench.errors import BenchError
from bench.plan import Outputs, Plan
from bench.postgres import find_binaries
from bench.record import Record, from_json, to_json
from bench.report import machine, table
from bench.starting import find
from bench.systems import HAPROXY, PGBOUNCER

_MISSING: Final = "PgBouncer is MISSING, nothing is compared with it: apt-get install pgbouncer"
# Cores that others took, on average: the kernel's own work and a terminal stay below.
_DISTURBED_CORES: Final = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    planned, outputs = plan.read(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    if plan.SHARD_MAPS in planned.subjects:
        sys.stdout.write(shard_maps.report() + "\n\n")
        if len(planned.subjects) == 1:
            return 0
    record, status = Record(planned.rounds), 0
    try:
        _measure(planned, record)
    except BenchError as error:
        say(f"bench: {error}")
        status = 1
    except KeyboardInterrupt:
        say("bench: stopped; nothing is left running")
        status = 130
    if record.readings.values:  # those of an interrupted run are no worse for that
        _show(record, outputs, whole=status == 0)
    return status


def _measure(planned: Plan, record: Record) -> None:
    if not find(PGBOUNCER):
        say(_MISSING)
    with _scratch() as directory:
        record.machine |= machine(_versions(directory, planned.floor))
        record.machine["run"] = planned.sizes()
        begun, others = time.monotonic(), others_seconds()
        comparison.hold(planned, directory, record.readings)
    seconds = time.monotonic() - begun
    cores = max(0.0, (others_seconds() - others) / seconds)
    say(f"took {seconds // 60:.0f} min {seconds % 60:.0f} s")
    record.machine["disturbance"] = f"other programs took {cores:.2f} cores meanwhile"
    if cores > _DISTURBED_CORES:
        record.machine["disturbance"] += ": DISTURBED, not to be relied on"


def _show(record: Record, outputs: Outputs, *, whole: bool) -> None:
    text = to_json(record)
    kept = from_json(text)  # its digits, so that all that is shown is the same
    sys.stdout.write(table(kept) + "\n")
    if outputs.json:
        outputs.json.write_text(text)
    if outputs.publish and whole:
        publish.publish(text)
    elif outputs.publish:
        say("bench: not published, since it did not run to its end")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave once: what is under way then is the tidying up, each step of which is bounded."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _scratch() -> Iterator[Path]:
    """Give a directory for the run, with a name short enough for a socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    directory.chmod(0o711)  # servers of another user reach their own part of it
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _versions(directory: Path, floor: bool) -> dict[str, str]:
    """Return the version of each program. Raises BenchError without a PostgreSQL."""
    programs: dict[str, tuple[str | Path | None, str]] = {
        "postgres": (find_binaries() / "postgres", "--version"),
        PGBOUNCER: (find(PGBOUNCER), "--version"),
    }
    if floor:
        programs[HAPROXY] = (find(HAPROXY), "-v")
    versions = {}
    for name, (program, flag) in programs.items():
        versions[name] = "MISSING"
        if program is not None:
            words = run([program, flag], directory / "version.log", seconds_max=10)
            versions[name] = words.split("\n")[0].partition(" - ")[0]
    return versions


if __name__ == "__main__":
    sys.exit(main())
