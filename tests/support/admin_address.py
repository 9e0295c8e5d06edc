"""An admin address to look at without a proxy behind it, and a client that asks it.

For: a state that each test sets as it likes, and one HTTP request told byte by byte. Not for: what
a real proxy shows there (`tests/e2e/test_observation.py`).
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Final

from proxy.observe.admin import AdminState
from proxy.observe.metrics import Metrics
from proxy.observe.status import State, Status, StatusSource, Token, report
from proxy.upstream.phases import ConnectPhase

LOOPBACK: Final = "127.0.0.1"
NOW: Final = 1_790_000_000.0

# Far more than an answer on loopback takes; only a hang gets here.
ANSWER_SECONDS_MAX: Final = 5


@dataclass
class Shown:
    """What the admin address shows, set by each test."""

    started: bool = True
    ready: bool = True
    state: State = State.SERVING
    hosts: dict[str, str] = field(default_factory=lambda: {"upstream": "ep-a.example.com"})
    tokens: list[Token] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    uptime_seconds: float = 3.5
    acceleration: str = "used"
    drain_seconds_left: float | None = None
    session_slots_used: int = 0
    quits: int = 0
    metrics: Metrics = field(
        default_factory=lambda: Metrics(
            version="1",
            session_end_reasons=[],
            startup_failure_reasons=[],
            connect_phases=list(ConnectPhase),
            target_names=["upstream"],
            clock=lambda: NOW,
        )
    )

    def admin_state(self, *, quit: bool = False) -> AdminState:
        """Return the callables that tell what is set now, and later."""
        return AdminState(
            started=lambda: self.started,
            ready=lambda: self.ready,
            metrics=self.metrics.exposition,
            status=self.status,
            failed=self.metrics.admin_failed,
            restarted=self.metrics.admin_restarted,
            quit=self._quit if quit else None,
        )

    def source(self) -> StatusSource:
        """Return the seam that an application fills."""
        return StatusSource(
            version="1.2.3",
            acceleration=lambda: self.acceleration,
            state=lambda: self.state,
            uptime_seconds=lambda: self.uptime_seconds,
            listen=lambda: "127.0.0.1:5432",
            sessions_max=lambda: 1000,
            session_slots_used=lambda: self.session_slots_used,
            hosts=lambda: self.hosts,
            tokens=lambda: self.tokens,
            drain_seconds_left=lambda: self.drain_seconds_left,
            warnings=lambda: self.warnings,
        )

    def status(self) -> Status:
        """Return what `/status` is to show."""
        metrics = self.metrics
        return report(self.source(), metrics.targets.rows(), metrics.recent_errors.latest(), NOW)

    def _quit(self) -> None:
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
