"""Traces of session starts: one span for each, with its steps as children, sent by OTLP.

For: turning what was measured of a start into spans, in OpenTelemetry's own words. Not for:
measuring it (`session/session_trace.py`). The SDK reads its own environment variables, and sends
from a thread of its own.

Invariants: without the extra `otel`, or without an endpoint in the environment, nothing is
imported. As in metrics, no user, database, key or SQL is in a span.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from proxy.observe.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE: Final = "lakebase-auth-proxy"
SESSION_START: Final = "session start"
# For what is not sent yet when the process ends. A collector that does not answer gets no more.
CLOSE_SECONDS_MAX: Final = 2.0

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"

Value = str | int | bool

_log = get_logger(__name__)


@dataclass(slots=True)
class Step:
    """A part of a session's start. Times are nanoseconds since the epoch."""

    name: str
    began_at: int
    within: "Step | None" = None
    """The step that it is a part of; None for the start as a whole."""
    ended_at: int = 0
    error: str = ""
    """The reason of a failure; empty if it succeeded."""


class Traces:
    """Sends session starts as spans."""

    def __init__(self, provider: "TracerProvider", version: str) -> None:
        from opentelemetry.trace import (  # noqa: PLC0415 - only with the extra
            SpanKind,
            Status,
            StatusCode,
            set_span_in_context,
        )

        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE, version)
        self._in_context = set_span_in_context
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def record(self, steps: Sequence[Step], attributes: Mapping[str, Value]) -> None:
        """Send a start: its first step is the whole, and each other one comes after its own."""
        spans: dict[int, Span] = {}
        first, *others = steps
        whole = self._tracer.start_span(
            SESSION_START, kind=self._kind, attributes=attributes, start_time=first.began_at
        )
        if whole.is_recording():  # else the sampler has left it out
            spans[id(first)] = whole
            for step in others:
                parent = spans[id(step.within or first)]
                spans[id(step)] = self._tracer.start_span(
                    step.name, self._in_context(parent), start_time=step.began_at
                )
        for step in reversed(steps):
            if (span := spans.get(id(step))) is None:
                continue
            if step.error:
                span.set_attribute("error.type", step.error)
                span.set_status(self._failed)
            span.end(step.ended_at)

    def close(self) -> None:
        """Send what is left. It blocks for CLOSE_SECONDS_MAX at most, if its caller abandons it."""
        self._provider.shutdown()


def open_traces(version: str) -> Traces | None:
    """Return where session starts are sent; None unless the environment names an endpoint."""
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"  # an empty one counts as not set
    if named is None or is_off or exporter != "otlp":
        return None
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name))), _PROTOCOL)
    if protocol != _PROTOCOL:
        _log.warning("no traces: the only protocol is http/protobuf", protocol=protocol)
        return None
    if not _is_installed():
        _log.warning("no traces: the extra otel is not installed", variable=named)
        return None
    try:
        return Traces(_provider(version), version)
    except ValueError as error:  # of a number that it cannot use
        _log.warning("no traces: the SDK refuses its environment", error=str(error))
        return None


def _is_installed() -> bool:
    try:
        return find_spec(_EXPORTER) is not None and find_spec("opentelemetry.sdk") is not None
    except ModuleNotFoundError:  # a package that it is in
        return False


def _provider(version: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # What the environment says of the resource goes before these.
    name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE
    own = {SERVICE_NAME: name, "service.version": version}
    resource = Resource(own).merge(Resource.create())
    if "service.name" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        resource = resource.merge(Resource({SERVICE_NAME: name}))
    # Not at the interpreter's exit, which would wait for a collector that does not answer.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
