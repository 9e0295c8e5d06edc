"""Bulk transfer: COPY out of and into Postgres by psql, the leanest client at hand.

Binary rows of 8 kB that are neither read from a table nor stored in one, so that Postgres takes
part with little more than its TLS. A single large value and small rows: `results.py`.
"""

import re
from pathlib import Path
from typing import Final

from bench.accounting import CPU
from bench.children import run
from bench.errors import BenchError
from bench.postgres import Postgres
from bench.readings import Quantity, Readings
from bench.systems import Contender

_ROW_BYTES: Final = 8000
_BYTES_PER_SECOND_MIN: Final = 5e6  # slower is a hang
_TIME: Final = re.compile(r"^Time: ([\d.]+) ms", re.MULTILINE)


def keep(
    case: str,
    contender: Contender,
    before: CPU | None,
    seconds: float,
    *,
    size_bytes: int,
    readings: Readings,
) -> None:
    """Keep the speed of a transfer, and what was spent on it since `before`."""
    now = contender.cpu()
    spent = None if now is None or before is None else now - before
    speed = Quantity(case, "speed", "MB/s")
    readings.add(contender.name, speed, size_bytes / 1e6 / seconds)
    readings.add_cpu(contender.name, case, "s/GB", spent, 1e9 / size_bytes)


class Bulk:
    """A number of megabytes, copied out and in."""

    def __init__(self, megabytes: int, upstream: Postgres) -> None:
        self._upstream = upstream
        self._megabytes = megabytes
        rows = megabytes * 1_000_000 // _ROW_BYTES
        self._select = f"SELECT repeat('x', {_ROW_BYTES}) FROM generate_series(1, {rows})"  # noqa: S608
        self._seconds_max = 30 + megabytes * 1e6 / _BYTES_PER_SECOND_MIN

    @property
    def file(self) -> Path:
        """What is copied in; `prepare` makes it."""
        return self._upstream.scratch / "rows.copy"

    def prepare(self, contender: Contender) -> None:
        """Make the file, once for all rounds."""
        self.copy_out(contender, self.file)

    def measure(self, contender: Contender, readings: Readings) -> None:
        """Copy out and in once and keep speed and CPU time. Raises BenchError."""
        self._measure(f"COPY out, {self._megabytes} MB", contender, self._out(), readings)
        self._measure(f"COPY in, {self._megabytes} MB", contender, self._in(), readings)

    def copy_in(self, contender: Contender) -> float:
        """Copy in and return the seconds that it took."""
        return self._psql(contender, self._in())

    def copy_out(self, contender: Contender, to: Path = Path("/dev/null")) -> float:
        """Copy out and return the seconds that it took."""
        return self._psql(contender, self._out(to))

    def _in(self) -> str:
        return f"\\copy copy_sink from '{self.file}' with (format binary) where false"

    def _out(self, to: Path = Path("/dev/null")) -> str:
        return f"\\copy ({self._select}) to '{to}' with (format binary)"

    def _measure(self, case: str, contender: Contender, copy: str, readings: Readings) -> None:
        before = contender.cpu()
        seconds = self._psql(contender, copy)
        size_bytes = self.file.stat().st_size
        keep(case, contender, before, seconds, size_bytes=size_bytes, readings=readings)

    def _psql(self, contender: Contender, copy: str) -> float:
        """Run a \\copy and return psql's own time for it: without connecting."""
        output = run(
            [self._upstream.binaries / "psql", "-X", "-c", "\\timing on", "-c", copy],
            self._upstream.scratch / "copy.log",
            environment=contender.environment,
            seconds_max=self._seconds_max,
        )
        time = _TIME.search(output)
        if time is None:
            raise BenchError(f"psql gave no time: {output}")
        return float(time[1]) / 1e3
