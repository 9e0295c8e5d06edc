"""The open connections as rows of a table: who is connected, to what, since when, doing what.

For: `GET /sessions`. Not for: the processes that connected (`observe.client_processes`), or ending
one (`drain`).

Invariants: nothing is recorded for it, so that a session pays nothing: a row is what the session
has anyway, and what the kernel knows of its sockets. No row has SQL, a key or a token; of a shard
key it has the fingerprint. The event loop runs between two slices.
"""

import asyncio
from typing import Final

from proxy.observe.logs import mask
from proxy.observe.session_page import SESSIONS_PAGE_MAX, SessionPage, SessionRow
from proxy.session.drain import OpenSession, OpenSessions, Stage
from proxy.transport.sockets import peer_name, peer_pid, quiet_seconds
from proxy.upstream.phases import DialPhases

# A slice takes 2 ms, and the pause after it leaves 96 % of the time to sessions, however many list:
# the admin address makes one page at a time.
# Each slice delays the transactions of its moment, so that many short ones would delay more of
# them. A page of 500 takes a quarter of a second, the shortest one a pause.
SLICE_ROWS: Final = 100
PAUSE_SECONDS: Final = 0.05
# PostgreSQL cuts names at 63 bytes. A client may send more, which must not fill the page.
TEXT_CHARACTERS_MAX: Final = 64


async def page_of(sessions: OpenSessions, after: int, limit: int) -> SessionPage:
    """Return up to `limit` connections whose number is higher than `after`."""
    limit = min(limit, SESSIONS_PAGE_MAX)
    entries = sessions.after(after, limit + 1)
    loop, rows = asyncio.get_running_loop(), list[SessionRow]()
    shown = entries[:limit]
    for begin in range(0, len(shown), SLICE_ROWS):
        rows += [row_of(entry, loop.time()) for entry in shown[begin : begin + SLICE_ROWS]]
        await asyncio.sleep(PAUSE_SECONDS)
    following = rows[-1]["id"] if len(entries) > limit else None
    return {"total": len(sessions), "sessions": rows, "next": following, "complete": True}


def row_of(entry: OpenSession, now: float) -> SessionRow:
    """Return what is known of a connection at `now`, the loop's time."""
    age_seconds = now - entry.started_at
    state, waits_for, seconds = _state(entry, age_seconds)
    route, mapped, relay, transport = entry.route, entry.mapped, entry.relay, entry.transport
    asked = {} if route is None else dict(route.message.parameters)
    peer = None if transport is None else peer_name(transport)
    client_bytes, upstream_bytes = (0, 0) if relay is None else relay.carried()
    target = "" if route is None else route.target
    if mapped is not None:
        target = mapped.target  # the key may have moved since the route
    return {
        "id": entry.number,
        "client": "" if peer is None else _address(*peer),
        "pid": None if transport is None else peer_pid(transport),
        "command": None,
        "application_name": _text(asked.get(b"application_name", b"")),
        "user": _text(asked.get(b"user", b"")),
        "database": "" if route is None else _text(route.database),
        "target": target,
        "shard": target if route is not None and route.shard_map else "",
        "shard_key": None if route is None else route.key,
        "age_seconds": round(age_seconds, 3),
        "state": state,
        "waits_for": waits_for,
        "state_seconds": None if seconds is None else round(min(seconds, age_seconds), 3),
        "client_bytes": client_bytes,
        "upstream_bytes": upstream_bytes,
    }


def _state(entry: OpenSession, age_seconds: float) -> tuple[str, str | None, float | None]:
    """Return the state in a word or two, what is waited for, and since when the state is so."""
    relay = entry.relay
    if entry.stage is Stage.STARTING:
        return "starting", None, age_seconds
    if entry.stage is Stage.OPENING:
        return "waiting", _waits_for(entry.phases, is_routed=entry.route is not None), age_seconds
    if entry.stage is Stage.CLOSING or relay is None or relay.over:
        return "closing", None, None
    since_request, since_answer = quiet_seconds(relay.from_upstream.source) or (None, None)
    if relay.idle:
        return "idle", None, since_answer
    if relay.in_transaction:
        return "in transaction", None, since_answer
    if relay.may_end:
        return "streaming", None, since_request
    return "busy", None, since_request


def _waits_for(phases: DialPhases | None, *, is_routed: bool) -> str:
    """Return what a client waits for, in one word."""
    if not is_routed or phases is None:
        return "route"
    if phases.waits_for_slot:
        return "slot"
    if phases.current is not None:
        return phases.current.value
    return "mapping" if phases.is_parked else "session"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(value: bytes) -> str:
    return mask(value.decode(errors="replace"))[:TEXT_CHARACTERS_MAX]
