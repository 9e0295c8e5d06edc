"""A page of the open connections, as `/sessions` shows it, and the page of several processes.

For: its shape. Not for: where a row comes from (`session.session_rows`).
"""

from collections.abc import Sequence
from typing import Final, NotRequired, TypedDict

# Rows of one answer: its JSON is made in one piece, which takes some milliseconds.
SESSIONS_PAGE_MAX: Final = 500


class SessionRow(TypedDict):
    """An open connection, as `/sessions` shows it. Empty or None: not known, or not yet."""

    id: int
    """The `connection` of the log's lines."""
    client: str
    """Address and port; empty for a unix socket."""
    pid: int | None
    command: str | None
    application_name: str
    user: str
    database: str
    """As the client asked for them; no database that may contain a shard key."""
    target: str
    shard: str
    """The target, if a shard map chose it."""
    shard_key: str | None
    """Its fingerprint."""
    age_seconds: float
    state: str
    """starting, waiting, idle, in transaction, busy, streaming, closing"""
    waits_for: str | None
    """route, mapping, slot, session, or a phase of the dial: dns, mint, tcp, tls, login"""
    state_seconds: float | None
    """Since the client's last request, if busy; else since the last answer."""
    client_bytes: int
    upstream_bytes: int
    worker: NotRequired[int]


class SessionPage(TypedDict):
    """Some of the open connections, in the order of their ids."""

    total: int
    sessions: list[SessionRow]
    next: int | None
    """The id after which the next page begins; None if there is none."""
    complete: bool
    """Whether all workers have answered."""


def merge_pages(pages: Sequence[SessionPage | None], limit: int) -> SessionPage:
    """Return the first `limit` connections of all processes, from such a page of each.

    None is a page of a process that has not answered.
    """
    answered = [page for page in pages if page is not None]
    rows = sorted((row for page in answered for row in page["sessions"]), key=lambda row: row["id"])
    shown = rows[:limit]
    follows = len(rows) > limit or any(page["next"] is not None for page in answered)
    return {
        "total": sum(page["total"] for page in answered),
        "sessions": shown,
        "next": shown[-1]["id"] if follows and shown else None,
        "complete": len(answered) == len(pages),
    }
