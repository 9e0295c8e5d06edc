"""An admin address to look at without a proxy, and a client that asks it.

For: a state that each test sets as it likes, and one HTTP request told byte by byte. Not for: what
a real proxy shows there (`tests/e2e/test_observation.py`).
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.admin_state import NOT_SERVING, ReloadOutcome
from proxy.observe.facts import Facts
from proxy.observe.history import History, Totals
from proxy.observe.metrics import Metrics
from proxy.observe.session_page import SessionPage, SessionRow
from proxy.observe.status import CatalogueFacts, ShardMapStatus, Status, Token, WorkspaceApi, report
from proxy.server.lifecycle import State
from proxy.upstream.phases import ConnectPhase

LOOPBACK: Final = "127.0.0.1"
NOW: Final = 1_790_000_000.0

# Far more than an answer on loopback takes; only a hang gets here.
ANSWER_SECONDS_MAX: Final = 5
SHOWN_SECONDS_MAX: Final = 30


@dataclass
class ScriptedAdminState:
    """A proxy as the admin address sees it (`AdminState`, `StatusSource`), set by each test."""

    started: bool = True
    ready: bool = True
    state: State = State.SERVING
    hosts: dict[str, str] = field(default_factory=lambda: {"upstream": "ep-a.example.com"})
    shown_tokens: list[Token] = field(default_factory=list)
    shown_apis: list[WorkspaceApi] = field(default_factory=list)
    shown_map: ShardMapStatus | None = None
    shown_warnings: list[str] = field(default_factory=list)
    shown_facts: Facts = field(default_factory=Facts)
    history: History = field(default_factory=History)
    uptime_seconds: float = 3.5
    acceleration: str = "used"
    drain_seconds_left: float | None = None
    session_slots_used: int = 0
    quits: int = 0
    reconnects: int = 0
    reconnect_succeeds: bool = True
    shown_sessions: list[SessionRow] = field(default_factory=list)
    asked_for_sessions: list[tuple[int, int, bool]] = field(default_factory=list)
    ended_sessions: list[int] = field(default_factory=list)
    reload_outcome: ReloadOutcome = NOT_SERVING
    version: str = "1.2.3"
    listen_address: str = "127.0.0.1:5432"
    sessions_max: int = 1000
    metrics: Metrics = field(
        default_factory=lambda: Metrics(
            version="1",
            session_end_outcomes={},
            startup_failure_reasons=[],
            connect_phases=list(ConnectPhase),
            target_names=["upstream"],
            clock=lambda: NOW,
        )
    )

    @property
    def lifecycle(self) -> "ScriptedAdminState":
        """The object itself, which has the fields of a lifecycle."""
        return self

    @property
    def draining(self) -> bool:
        """Whether its state says so."""
        return self.state is State.DRAINING

    def target_names(self) -> list[str]:
        """Return the configured targets: those that have a host."""
        return list(self.hosts)

    def tokens(self) -> list[Token]:
        """Return the tokens that the test has set."""
        return self.shown_tokens

    def workspace_apis(self) -> list[WorkspaceApi]:
        """Return the workspaces' APIs that the test has set."""
        return self.shown_apis

    def warnings(self) -> list[str]:
        """Return the warnings that the test has set."""
        return self.shown_warnings

    def shard_map(self) -> ShardMapStatus | None:
        """Return the shard map that the test has set."""
        return self.shown_map

    def catalogue_facts(self) -> CatalogueFacts:
        """Return what is so without a catalogue."""
        return CatalogueFacts()

    def facts(self) -> Facts:
        """Return the facts that the test has set."""
        return self.shown_facts

    async def refresh(self) -> None:
        """Do nothing: it has no other processes."""

    def exposition(self) -> bytes:
        """Return the metrics."""
        return self.metrics.exposition()

    def status(self) -> Status:
        """Return what `/status` shows."""
        targets = self.metrics.targets.rows(self.hosts)
        errors = self.metrics.recent_errors.latest()
        minute = self.history.last_minute(self.totals())
        pools = self.metrics.pools.rows()
        return report(self, targets, errors, NOW, pools=pools, last_minute=minute)

    def totals(self) -> Totals:
        """Return the sums for the history."""
        stats, errors = self.metrics.targets, self.metrics.recent_errors.latest()
        return Totals.of(stats.rows(), errors, stats.refused, stats.connects)

    def look_up(self, key: str) -> dict[str, object]:
        """Return the key that was asked for, unless there is none."""
        if not key:
            raise ProxyError(ErrorKind.KEY_MISSING)
        return {"canonical_key": key}

    async def reconnect(self) -> bool:
        """Count that it was asked to; return what the test has set."""
        self.reconnects += 1
        return self.reconnect_succeeds

    async def sessions(self, after: int, limit: int, *, processes: bool) -> SessionPage:
        """Return the first of what the test has set, and keep what it was asked for."""
        self.asked_for_sessions.append((after, limit, processes))
        rows = self.shown_sessions[:limit]
        following = rows[-1]["id"] if len(self.shown_sessions) > limit else None
        total = len(self.shown_sessions)
        return {"total": total, "sessions": rows, "next": following, "complete": True}

    async def end_session(self, number: int) -> bool:
        """Keep what was to be ended; there is a session with an even number."""
        self.ended_sessions.append(number)
        return number % 2 == 0

    async def reload_configuration(self) -> ReloadOutcome:
        """Return what the test has set."""
        return self.reload_outcome

    def quit(self) -> None:
        """Count that it was asked to end."""
        self.quits += 1


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; the names of its headers in lower case, their values as they came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


async def ask(
    port: int,
    path: str,
    method: str = "GET",
    host: str = LOOPBACK,
    headers: str = "Host: localhost\r\n",
) -> Answer:
    """Send one request on a connection of its own; `headers` is whole lines."""
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            request = f"{method} {path} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n"
            writer.write(request.encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
    status_line, *header_lines = head.decode().split("\r\n")
    split = [line.split(": ", 1) for line in header_lines]
    return Answer(
        int(status_line.split(" ")[1]), {name.lower(): value for name, value in split}, body
    )


async def metrics_once(port: int, shows: Callable[[str], bool]) -> str:
    """Return the metrics as soon as they show something: it happens in another process."""
    async with asyncio.timeout(SHOWN_SECONDS_MAX):
        while not shows(text := (await ask(port, "/metrics")).body.decode()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return text
