"""`python -m bench`: measures the systems, prints a table, writes the files that were asked for.

Every process that it starts is ended on every way out: normal end, failure, Ctrl-C and SIGTERM.
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

from bench import comparison, options, publish, shard_maps
from bench.child_processes import run
from bench.comparison import print_progress
from bench.errors import BenchError
from bench.launch import find_program
from bench.options import Options, Outputs
from bench.postgres import find_binaries
from bench.process_usage import other_programs_cpu_seconds
from bench.record import Record, from_json, to_json
from bench.report import describe_machine, table
from bench.systems import HAPROXY, PGBOUNCER

_MISSING: Final = "PgBouncer is MISSING, nothing is compared with it: apt-get install pgbouncer"
# Cores that other programs took, on average. The kernel's own work and a terminal stay below.
_DISTURBED_CORES: Final = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    wanted, outputs = options.parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    if options.SHARD_MAPS in wanted.subjects:
        sys.stdout.write(shard_maps.report() + "\n\n")
        if len(wanted.subjects) == 1:
            return 0
    record, status = Record(wanted.rounds), 0
    try:
        _measure(wanted, record)
    except BenchError as error:
        print_progress(f"bench: {error}")
        status = 1
    except KeyboardInterrupt:
        print_progress("bench: stopped; no process is left running")
        status = 130
    if record.measurements.values:  # those of an interrupted run are valid, too
        _write(record, outputs, complete=status == 0)
    return status


def _measure(wanted: Options, record: Record) -> None:
    if not find_program(PGBOUNCER):
        print_progress(_MISSING)
    with _scratch_directory() as directory:
        record.machine |= describe_machine(_versions(directory, wanted.floor))
        record.machine["run"] = wanted.sizes()
        started_at, others = time.monotonic(), other_programs_cpu_seconds()
        comparison.run(wanted, directory, record.measurements)
    seconds = time.monotonic() - started_at
    cores = max(0.0, (other_programs_cpu_seconds() - others) / seconds)
    print_progress(f"took {seconds // 60:.0f} min {seconds % 60:.0f} s")
    record.machine["disturbance"] = f"other programs took {cores:.2f} cores meanwhile"
    if cores > _DISTURBED_CORES:
        record.machine["disturbance"] += ": DISTURBED, not to be relied on"


def _write(record: Record, outputs: Outputs, *, complete: bool) -> None:
    text = to_json(record)
    rounded = from_json(text)  # the table shows the digits that the file has
    sys.stdout.write(table(rounded) + "\n")
    if outputs.json:
        outputs.json.write_text(text)
    if outputs.publish and complete:
        publish.publish(text)
    elif outputs.publish:
        print_progress("bench: not published, because the run did not complete")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once: what runs after it is cleaning up, and each step is bounded."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _scratch_directory() -> Iterator[Path]:
    """Make a directory for the run, with a name short enough for a socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    directory.chmod(0o711)  # servers that run as another user reach their own part of it
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _versions(directory: Path, floor: bool) -> dict[str, str]:
    """Return the version of each program. Raises BenchError without a PostgreSQL."""
    programs: dict[str, tuple[str | Path | None, str]] = {
        "postgres": (find_binaries() / "postgres", "--version"),
        PGBOUNCER: (find_program(PGBOUNCER), "--version"),
    }
    if floor:
        programs[HAPROXY] = (find_program(HAPROXY), "-v")
    versions = {}
    for name, (program, flag) in programs.items():
        versions[name] = "MISSING"
        if program is not None:
            output = run([program, flag], directory / "version.log", seconds_max=10)
            versions[name] = output.split("\n")[0].partition(" - ")[0]
    return versions


if __name__ == "__main__":
    sys.exit(main())
