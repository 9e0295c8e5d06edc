"""What `/status` and `/sessions` say, as lines of text for a terminal.

For: `status` without --json. Not for: asking (`admin_client`).

Invariant: what a client has sent cannot control the terminal: only printable characters are shown.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

# A longer word would push the rest of the line away.
CELL_CHARACTERS_MAX: Final = 28
_UNITS: Final = (("d", 86_400), ("h", 3_600), ("min", 60))
_BYTE_UNITS: Final = ("B", "kB", "MB", "GB", "TB")

Table = Mapping[str, Any]


def status_lines(status: Table) -> Iterator[str]:
    """Yield what a proxy is doing: state, sessions, targets, tokens, errors, warnings."""
    yield f"{status['state']}, up for {duration(status['uptime_seconds'])}, {status['version']}"
    yield f"listens on {status['listen'] or 'nothing yet'}"
    opening = f", {status['sessions_opening']} waiting" if status["sessions_opening"] else ""
    yield f"{status['sessions']} of {status['sessions_max']} sessions{opening}"
    if status["drain"]["draining"]:
        left = status["drain"]["seconds_left"]
        yield f"drains; what is left is cut in {duration(left or 0)}"
    for api in status["workspace_apis"]:
        if api["failing_since"]:
            since = duration(api["failing_seconds"])
            yield f"no token from {api['workspace']} for {since}: {api['reason']}"
    for warning in status["warnings"]:
        yield f"warning: {warning}"
    if status["targets"]:
        yield ""
        yield from _table(map(_target_row, status["targets"]))
    if status["errors"]:
        yield ""
        yield from _table(map(_error_row, status["errors"]))


def session_lines(sessions: Sequence[Table]) -> Iterator[str]:
    """Yield a table of open connections; a column that is empty in every row is left out.

    `sent` and `received` are bytes, as the client sees them.
    """
    yield from _table(map(_session_row, sessions)) if sessions else ("no client is connected",)


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


def _target_row(row: Table) -> dict[str, str]:
    return {
        "target": row["name"],
        "sessions": str(row["sessions"]),
        "started": str(row["sessions_started"]),
        "sent": size(row["client_bytes"]),
        "received": size(row["upstream_bytes"]),
        "host": row["host"],
    }


def _error_row(row: Table) -> dict[str, str]:
    return {"failure": row["reason"], "times": str(row["count"]), "last": row["at"]}


def _session_row(row: Table) -> dict[str, str]:
    pid, command = row["pid"], row["command"]
    return {
        "id": str(row["id"]),
        "client": row["client"] or ("unix socket" if pid else ""),
        "process": " ".join(filter(None, (command, str(pid) if pid else ""))),
        "application": row["application_name"],
        "user": row["user"],
        "database": row["database"],
        "target": row["target"],
        "key": row["shard_key"] or "",
        "age": duration(row["age_seconds"]),
        "state": _state(row),
        "sent": size(row["client_bytes"]),
        "received": size(row["upstream_bytes"]),
    }


def _state(row: Table) -> str:
    words = f"{row['state']} for {row['waits_for']}" if row["waits_for"] else row["state"]
    seconds = row["state_seconds"]
    return words if seconds is None else f"{words}, {duration(seconds)}"


def _table(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Yield the rows in columns below their names."""
    shown = [{name: _cell(text) for name, text in row.items()} for row in rows]
    names = [name for name in shown[0] if any(row[name] for row in shown)]
    lines = [{name: name.upper() for name in names}, *shown]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    for line in lines:
        yield "  ".join(line[name].ljust(widths[name]) for name in names).rstrip()


def _cell(text: str) -> str:
    printable = "".join(one if one.isprintable() else "?" for one in text)
    if len(printable) <= CELL_CHARACTERS_MAX:
        return printable
    return printable[: CELL_CHARACTERS_MAX - 3] + "..."
