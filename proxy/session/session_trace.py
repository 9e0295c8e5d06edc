"""What a session's start was spent on, for a trace.

For: the phases of its dials, and what else it waits for, with begin and end. Not for: metrics,
which have the phases (`upstream/phases.py`), or sending anything (`observe/traces.py`).
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from proxy.errors import ProxyError
from proxy.observe.traces import SESSION_START, Step, Traces, Value
from proxy.upstream.phases import ConnectPhase, DialPhases, StartStep


class TracedPhases(DialPhases):
    """The phases of one session's start, each of which becomes a span."""

    __slots__ = ("_connection", "_now", "_open", "_steps", "_traces", "_within")

    def __init__(self, traces: Traces, connection: int) -> None:
        """`connection` is its id in the log."""
        super().__init__()
        self._traces = traces
        self._connection = connection
        # The wall clock is read once, so that one that is set meanwhile moves no step.
        self._now = time.time_ns() - time.perf_counter_ns()
        self._steps = [Step(SESSION_START, self._time())]
        self._within: Step | None = None
        self._open: Step | None = None
        """The phase that has not ended."""

    def start(self, phase: ConnectPhase) -> None:
        """Start a phase."""
        super().start(phase)
        if phase is ConnectPhase.DNS and self._open is not None:
            self._open.name = "lookup"  # the workspace was asked for the host, not for a token
        self._end_open()
        self._open = self._begin(phase.value)

    def finish(self) -> None:
        """Measure the current phase, which succeeded."""
        super().finish()
        self._end_open()

    def failed(self, error: ProxyError) -> None:
        """End the current phase, if it has not ended, with the reason of its failure."""
        self._end_open(error.reason)

    def wait_for_slot(self) -> None:
        """Leave the phase: other dials are waited for."""
        super().wait_for_slot()
        self._end_open()
        self._open = self._begin("slot")

    @contextmanager
    def step(self, step: StartStep) -> Iterator[None]:
        """Record the block, and the phases inside it as parts of it."""
        outer, begun = self._within, self._begin(step.value)
        self._within = begun
        try:
            yield
        except BaseException as error:
            begun.error = _word(error)
            raise
        finally:
            self._end_open(begun.error)
            begun.ended_at, self._within = self._time(), outer

    def over(
        self, target: str, host: str = "", port: int = 0, error: str = "", sqlstate: str = ""
    ) -> None:
        """Send the trace: the client has its welcome, or is refused. Only the first call counts."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        self._end_open(error)
        steps[0].ended_at, steps[0].error = self._time(), error
        attributes: dict[str, Value] = {
            "db.system.name": "postgresql",
            "lakebase_proxy.connection": self._connection,
        }
        if target:
            attributes["lakebase_proxy.target"] = target
        if host:
            attributes |= {"server.address": host, "server.port": port}
        if sqlstate:
            attributes["db.response.status_code"] = sqlstate
        self._traces.record(steps, attributes)

    def _time(self) -> int:
        return self._now + time.perf_counter_ns()

    def _begin(self, name: str) -> Step:
        step = Step(name, self._time(), self._within)
        self._steps.append(step)
        return step

    def _end_open(self, error: str = "") -> None:
        if self._open is not None:
            self._open.ended_at, self._open.error = self._time(), error
            self._open = None


def _word(error: BaseException) -> str:
    """Return what a step ended with: a reason, or the exception's name."""
    if isinstance(error, ProxyError):
        return error.reason
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
