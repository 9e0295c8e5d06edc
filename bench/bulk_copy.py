"""Bulk transfer: COPY out of and into PostgreSQL by psql, a client with little work of its own.

The rows are binary, 8 kB each, and are neither read from a table nor stored in one, so PostgreSQL
does little besides TLS. A single large value and many small rows are in `large_results.py`.
"""

import re
from pathlib import Path
from typing import Final

from bench.child_processes import run
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity
from bench.postgres import Postgres
from bench.process_usage import CPUTime
from bench.systems import System

_ROW_BYTES: Final = 8000
_BYTES_PER_SECOND_MIN: Final = 5e6  # slower is a hang
_TIME: Final = re.compile(r"^Time: ([\d.]+) ms", re.MULTILINE)


def record_transfer(
    case: str,
    system: System,
    before: CPUTime | None,
    seconds: float,
    *,
    size_bytes: int,
    measurements: Measurements,
) -> None:
    """Record the speed of a transfer, and the CPU time that it took since `before`."""
    now = system.cpu_time()
    used = None if now is None or before is None else now - before
    speed = Quantity(case, "speed", "MB/s")
    measurements.add(system.name, speed, size_bytes / 1e6 / seconds)
    measurements.add_cpu(system.name, case, "s/GB", used, 1e9 / size_bytes)


class BulkCopy:
    """A number of megabytes, copied out and in."""

    def __init__(self, megabytes: int, upstream: Postgres) -> None:
        self._upstream = upstream
        self._megabytes = megabytes
        rows = megabytes * 1_000_000 // _ROW_BYTES
        self._select = f"SELECT repeat('x', {_ROW_BYTES}) FROM generate_series(1, {rows})"  # noqa: S608
        self._seconds_max = 30 + megabytes * 1e6 / _BYTES_PER_SECOND_MIN

    @property
    def file(self) -> Path:
        """The file that is copied in; `prepare` makes it."""
        return self._upstream.scratch / "rows.copy"

    def prepare(self, system: System) -> None:
        """Make the file, once for all rounds."""
        self.copy_out(system, self.file)

    def measure(self, system: System, measurements: Measurements) -> None:
        """Copy out and in once; record speed and CPU time. Raises BenchError."""
        self._measure(f"COPY out, {self._megabytes} MB", system, self._out(), measurements)
        self._measure(f"COPY in, {self._megabytes} MB", system, self._in(), measurements)

    def copy_in(self, system: System) -> float:
        """Copy in and return the seconds that it took."""
        return self._psql(system, self._in())

    def copy_out(self, system: System, to: Path = Path("/dev/null")) -> float:
        """Copy out and return the seconds that it took."""
        return self._psql(system, self._out(to))

    def _in(self) -> str:
        return f"\\copy copy_sink from '{self.file}' with (format binary) where false"

    def _out(self, to: Path = Path("/dev/null")) -> str:
        return f"\\copy ({self._select}) to '{to}' with (format binary)"

    def _measure(self, case: str, system: System, copy: str, measurements: Measurements) -> None:
        before = system.cpu_time()
        seconds = self._psql(system, copy)
        size_bytes = self.file.stat().st_size
        record_transfer(
            case, system, before, seconds, size_bytes=size_bytes, measurements=measurements
        )

    def _psql(self, system: System, copy: str) -> float:
        """Run a \\copy and return psql's own time for it, which leaves connecting out."""
        output = run(
            [self._upstream.binaries / "psql", "-X", "-c", "\\timing on", "-c", copy],
            self._upstream.scratch / "copy.log",
            environment=system.environment,
            seconds_max=self._seconds_max,
        )
        time = _TIME.search(output)
        if time is None:
            raise BenchError(f"psql gave no time: {output}")
        return float(time[1]) / 1e3
