"""What `shards` prints: a JSON object or tables and sentences, and the progress of long work.

For: standard output, which has the answer alone, and standard error. Not for: what an answer says.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, Final

from proxy.catalogue.errors import CatalogueError
from proxy.exit_codes import EXIT_FAILURE, EXIT_PENDING

# Work that takes longer says what it does, no more often than this, and again if it stays the same.
PROGRESS_SECONDS: Final = 2.0
PROGRESS_REPEAT_SECONDS: Final = 10.0
# Rows of a large answer are kept until it is complete, in memory up to this size.
_SPOOL_BYTES_MAX: Final = 8 << 20
_COPY_CHARACTERS: Final = 1 << 20

Facts = Mapping[str, object]
Cell = str | int


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return lines with aligned columns; without rows, the header alone."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    return [_line(row, widths) for row in cells]


def described(facts: Facts) -> list[str]:
    """Return a line for each fact: its name, and its value unless it is empty."""
    width = max(map(len, facts), default=0)
    return [
        f"{name.replace('_', ' ').ljust(width)}  {value}"
        for name, value in facts.items()
        if value not in ("", None)
    ]


class Progress:
    """Says on standard error what takes long. Give it each thing that begins."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = self._said_at = clock()
        self._text = ""
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, text: str) -> None:
        """Print the text if PROGRESS_SECONDS have passed since the begin or the last one."""
        self.stop()
        self._text = text
        seconds = PROGRESS_SECONDS - (self._clock() - self._said_at)
        if seconds <= 0:
            self._say()
        else:
            self._later(seconds)

    def stop(self) -> None:
        """Stop printing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self) -> None:
        self._said_at = self._clock()
        elapsed = self._said_at - self._began_at
        _print_error(f"{self._text} ({elapsed:.0f} s)")
        self._later(PROGRESS_REPEAT_SECONDS)

    def _later(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._say)


class Rows:
    """The rows of an answer that may be too many for the memory."""

    def __init__(self, spool: IO[str], *, as_json: bool) -> None:
        self._spool = spool
        self._as_json = as_json
        self._widths: list[int] = []
        self._is_first = True

    def add(self, rows: Sequence[Facts]) -> None:
        """Add rows. For people, the first ones give the widths of the columns."""
        if not self._as_json:
            self._add_lines(rows)
            return
        for row in rows:
            self._spool.write(("" if self._is_first else ", ") + json.dumps(row))
            self._is_first = False

    def _add_lines(self, rows: Sequence[Facts]) -> None:
        cells = [[_cell(value) for value in row.values()] for row in rows]
        if rows and self._is_first:
            self._is_first = False
            cells.insert(0, [name.replace("_", " ") for name in rows[0]])
            self._widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
        for row in cells:
            self._spool.write(_line(row, self._widths) + "\n")


class Output:
    """The answer of one verb."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self.progress = Progress()

    def answer(self, facts: Facts, lines: Sequence[str]) -> None:
        """Print the answer: these facts, or these lines for people."""
        self.progress.stop()
        if self._as_json:
            print(json.dumps({"ok": True, **facts}))
        else:
            for line in lines:
                print(line)

    def warn(self, text: str) -> None:
        """Print a warning on standard error."""
        self.progress.stop()
        _print_error(f"lakebase-auth-proxy: warning: {text}")

    def plan(self, sentences: Sequence[str], facts: Facts | None = None) -> None:
        """Print what would be done."""
        lines = list(sentences) or ["nothing: it is done already"]
        dry = {**(facts or {}), "dry_run": True, "plan": list(sentences)}
        self.answer(dry, ["would do, in this order:", *(f"  {line}" for line in lines)])

    @contextmanager
    def many(self, facts: Facts, name: str, lines: Sequence[str]) -> Iterator[Rows]:
        """Print an answer with many rows as its last fact, `name`; if the block succeeds."""
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES_MAX, "w+", encoding="utf-8") as spool:
            yield Rows(spool, as_json=self._as_json)
            self.progress.stop()
            spool.seek(0)
            if self._as_json:
                sys.stdout.write(json.dumps({"ok": True, **facts})[:-1] + f', "{name}": [')
                _copy(spool, sys.stdout)
                sys.stdout.write("]}\n")
            else:
                for line in lines:
                    print(line)
                _copy(spool, sys.stdout)

    def refuse(self, error: CatalogueError) -> int:
        """Print why it was refused; the text names an operation that is left pending.

        Return the exit code.
        """
        self.progress.stop()
        if self._as_json:
            refusal = {
                "ok": False,
                "sqlstate": error.sqlstate,
                "reason": error.reason,
                "error": error.message,
                "hint": error.hint,
            }
            print(json.dumps(refusal))
        else:
            text = f"{error.message} (SQLSTATE {error.sqlstate}, reason={error.reason})"
            _print_error(f"lakebase-auth-proxy: {text}")
            if error.hint:
                _print_error(f"  {error.hint}")
        return EXIT_FAILURE if error.op_id is None else EXIT_PENDING


def _print_error(text: str) -> None:
    """Print on standard error. If nothing reads it any more, the operation goes on all the same."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _copy(spool: IO[Any], out: IO[str]) -> None:
    while part := spool.read(_COPY_CHARACTERS):
        out.write(part)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
    return str(value)
