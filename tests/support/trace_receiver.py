"""A receiver of OTLP over HTTP: what a collector is to a proxy that sends traces."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATH: Final = "/v1/traces"


class TraceReceiver:
    """The spans that were received, in the order in which they ended."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    def received(self, path: str, body: bytes) -> None:
        """Keep what came in one request."""
        assert path == PATH
        self.bodies.append(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            self.resources.append(values(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def starts(self) -> list[Any]:
        """Return the spans that are whole session starts."""
        return [span for span in self.spans if not span.parent_span_id]

    def names_within(self, parent: Any) -> list[str]:
        """Return the names of a span's children, in the order in which they began."""
        within = [span for span in self.spans if span.parent_span_id == parent.span_id]
        assert all(span.trace_id == parent.trace_id for span in within)
        for span in within:
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
        return [span.name for span in sorted(within, key=lambda one: one.start_time_unix_nano)]

    def named(self, name: str) -> Any:
        """Return the only span of this name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found


def values(attributes: Any) -> dict[str, Any]:
    """Return attributes by their names."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def receiving_traces() -> Iterator[TraceReceiver]:
    """Receive traces while the block runs."""

    class Request(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            receiver.received(self.path, self.rfile.read(length))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    receiver = TraceReceiver(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
