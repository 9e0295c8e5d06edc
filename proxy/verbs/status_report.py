"""What `/status` and `/sessions` say, as lines of text for a terminal.

For: `status` without --json. Not for: asking (`admin_client`).

Invariants: what a client has sent cannot control the terminal: only printable characters are shown.
What a proxy of another version does not say is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, Final

# A longer word would push the rest of a terminal's line away.
CELL_CHARACTERS_MAX: Final = 28
_GAP: Final = "  "
_UNITS: Final = (("d", 86_400), ("h", 3_600), ("min", 60))
_BYTE_UNITS: Final = ("B", "kB", "MB", "GB", "TB")

Table = Mapping[str, Any]
_Columns = Mapping[str, Callable[[Table], str]]


def status_lines(status: Table, width: int | None = None) -> Iterator[str]:
    """Yield what a proxy is doing: health, state, sessions, targets, tokens, errors, warnings.

    Tables fit the `width` of a terminal; without one nothing is cut.
    """
    for part in (_health, _state_of_proxy, _addresses, _sessions, _tokens, _warnings):
        with suppress(KeyError):
            yield from part(status)
    for name, columns in (("targets", _TARGET), ("errors", _ERROR)):
        if status.get(name):
            yield ""
            yield from _table(columns, status[name], width)


def session_lines(sessions: Sequence[Table], width: int | None = None) -> Iterator[str]:
    """Yield a table of open connections; a column that is empty in every row is left out.

    `sent` and `received` are bytes, as the client sees them. `width` is as in `status_lines`.
    """
    yield from _table(_SESSION, sessions, width) if sessions else ("no client is connected",)


def duration(seconds: float) -> str:
    """Return a time in one or two units, as in `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left, parts = int(seconds), list[str]()
    for unit, size in _UNITS:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2]) or f"{left} s"


def size(count: float) -> str:
    """Return a number of bytes in a unit of which there are few."""
    for unit in _BYTE_UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_BYTE_UNITS[-1]}"


# -- lines, each of which raises KeyError for what is not known ------------------------------------


def _health(status: Table) -> Iterator[str]:
    yield status["health"]["text"]


def _state_of_proxy(status: Table) -> Iterator[str]:
    yield f"{status['state']}, up for {duration(status['uptime_seconds'])}, {status['version']}"


def _addresses(status: Table) -> Iterator[str]:
    yield f"listens on {status['listen'] or 'nothing yet'}"


def _sessions(status: Table) -> Iterator[str]:
    opening = f", {status['sessions_opening']} waiting" if status["sessions_opening"] else ""
    yield f"{status['sessions']} of {status['sessions_max']} sessions{opening}"


def _tokens(status: Table) -> Iterator[str]:
    for api in status["workspace_apis"]:
        if api["failing_since"]:
            since = duration(api["failing_seconds"])
            yield f"no token from {api['workspace']} for {since}: {api['reason']}"


def _warnings(status: Table) -> Iterator[str]:
    for warning in status["warnings"]:
        yield f"warning: {warning}"


# -- tables: the columns that matter most come first -----------------------------------------------


def _client(row: Table) -> str:
    return row["client"] or ("unix socket" if row["pid"] else "")


def _process(row: Table) -> str:
    return " ".join(str(one) for one in (row["command"], row["pid"]) if one)


def _state(row: Table) -> str:
    words = f"{row['state']} for {row['waits_for']}" if row["waits_for"] else row["state"]
    seconds = row["state_seconds"]
    return words if seconds is None else f"{words}, {duration(seconds)}"


_TARGET: Final[_Columns] = {
    "target": lambda row: row["name"],
    "sessions": lambda row: str(row["sessions"]),
    "started": lambda row: str(row["sessions_started"]),
    "sent": lambda row: size(row["client_bytes"]),
    "received": lambda row: size(row["upstream_bytes"]),
    "host": lambda row: row["host"],
}
_ERROR: Final[_Columns] = {
    "failure": lambda row: row["reason"],
    "times": lambda row: str(row["count"]),
    "last": lambda row: row["at"],
}
_SESSION: Final[_Columns] = {
    "id": lambda row: str(row["id"]),
    "state": _state,
    "age": lambda row: duration(row["age_seconds"]),
    "client": _client,
    "process": _process,
    "application": lambda row: row["application_name"],
    "target": lambda row: row["target"],
    "key": lambda row: row["shard_key"] or "",
    "user": lambda row: row["user"],
    "database": lambda row: row["database"],
    "sent": lambda row: size(row["client_bytes"]),
    "received": lambda row: size(row["upstream_bytes"]),
}


def _table(columns: _Columns, rows: Iterable[Table], width: int | None) -> Iterator[str]:
    """Yield the rows in columns below their names.

    Of a terminal's width the columns are shown that have room for their names; the last one is cut.
    """
    longest = None if width is None else CELL_CHARACTERS_MAX
    shown = [{name: _cell(cell, row, longest) for name, cell in columns.items()} for row in rows]
    lines = [{name: name.upper() for name in columns}, *shown]
    names = [name for name in columns if any(row[name] for row in shown)]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    if width is not None:
        ends = accumulate(widths[name] + len(_GAP) for name in names)
        starts = dict(zip(names, (0, *ends), strict=False))
        names = [name for name in names if starts[name] + len(name) <= width]
    for line in lines:
        yield _GAP.join(line[name].ljust(widths[name]) for name in names)[:width].rstrip()


def _cell(cell: Callable[[Table], str], row: Table, longest: int | None) -> str:
    try:
        text = cell(row)
    except KeyError:
        return ""
    printable = "".join(one if one.isprintable() else "?" for one in text)
    if longest is None or len(printable) <= longest:
        return printable
    return printable[: longest - 3] + "..."
