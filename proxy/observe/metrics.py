"""Every metric of the proxy, each declared once.

For: counting, and the text that Prometheus scrapes. Not for: deciding anything; no code reads a
metric back. Metrics are kept per instance, never in the library's global registry, so that two
proxies in one process (as in tests) count apart.

Invariants: names begin with `lakebase_proxy_`, units are base units, and every label takes its
values from a closed set: never a user, a database, a shard key or SQL. A word outside its set is
counted as `other`, because a metric must neither grow without bound nor end a session.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum, unique
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

EXPOSITION_CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

OTHER: Final = "other"

# From a local DNS answer to a database that wakes up: 1 ms to 60 s, which is also the default of
# upstream.connect_timeout_seconds.
_CONNECT_SECONDS_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


@unique
class ConnectPhase(StrEnum):
    """What the time until an upstream is ready is spent on, in this order."""

    MINT = "mint"
    DNS = "dns"
    TCP = "tcp"
    TLS = "tls"
    LOGIN = "login"


@unique
class CancelResult(StrEnum):
    """What became of a CancelRequest."""

    FORWARDED = "forwarded"
    UNKNOWN_KEY = "unknown_key"
    SESSION_ENDED = "session_ended"
    TOO_MANY = "too_many"
    FAILED = "failed"


class _Words:
    """A counter with one label of closed values, each of them shown from the start, at 0."""

    def __init__(self, counter: Counter, words: Iterable[str]) -> None:
        # A series that appears with its first failure hides that failure from rate().
        self._counters = {word: counter.labels(word) for word in (*words, OTHER)}

    def count(self, word: str) -> None:
        self._counters.get(word, self._counters[OTHER]).inc()


class Metrics:
    """The metrics of one proxy. The reasons that sessions end and startups fail with are given
    by the floors that own these words."""

    def __init__(
        self,
        *,
        version: str,
        session_end_reasons: Iterable[str],
        startup_failure_reasons: Iterable[str],
    ) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lakebase_proxy_{name}", text, labels, registry=registry)

        self._connections = Gauge(
            "lakebase_proxy_connections",
            "Client connections open now.",
            registry=registry,
        )
        self._connections_accepted = counter("connections_accepted", "Client connections.")
        self._sessions_ended = _Words(
            counter(
                "sessions_ended", "Sessions that had started, by first cause of end.", "reason"
            ),
            session_end_reasons,
        )
        self._startup_failures = _Words(
            counter("startup_failures", "Clients that were not served, by reason.", "reason"),
            startup_failure_reasons,
        )
        self._connect_seconds = Histogram(
            "lakebase_proxy_upstream_connect_seconds",
            "Time spent on each phase of reaching a ready upstream, in seconds.",
            ["phase"],
            buckets=_CONNECT_SECONDS_BUCKETS,
            registry=registry,
        )
        for phase in ConnectPhase:
            self._connect_seconds.labels(phase)
        self._tokens_minted = counter("tokens_minted", "Tokens issued by the credential API.")
        self._mint_failures = counter("token_mint_failures", "Attempts to get a token that failed.")
        self._cancel_requests = _Words(
            counter("cancel_requests", "CancelRequests received, by result.", "result"),
            CancelResult,
        )
        build = Gauge(
            "lakebase_proxy_build_info",
            "Always 1; the labels say which program this is.",
            ["version"],
            registry=registry,
        )
        build.labels(version).set(1)

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Count one client connection: in total, and among the open ones until the block ends."""
        self._connections_accepted.inc()
        with self._connections.track_inprogress():
            yield

    def session_ended(self, reason: str) -> None:
        """Count a session that had reached ReadyForQuery, by the first cause of its end."""
        self._sessions_ended.count(reason)

    def startup_failed(self, reason: str) -> None:
        """Count a client that was refused or lost before ReadyForQuery."""
        self._startup_failures.count(reason)

    def connect_phase_took(self, phase: ConnectPhase, seconds: float) -> None:
        """Record one completed phase of reaching an upstream; the caller has the clock."""
        self._connect_seconds.labels(phase).observe(seconds)

    def token_minted(self) -> None:
        """Count a token that the credential API issued."""
        self._tokens_minted.inc()

    def token_mint_failed(self) -> None:
        """Count an attempt to get a token that failed, whether or not an older one was used."""
        self._mint_failures.inc()

    def cancel_requested(self, result: CancelResult) -> None:
        """Count a CancelRequest by what became of it."""
        self._cancel_requests.count(result)

    def exposition(self) -> bytes:
        """Return all metrics in the text format, of type `EXPOSITION_CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def value(self, name: str, **labels: str) -> float:
        """Return one sample, 0 if there is none: `value("tokens_minted_total")`."""
        return self._registry.get_sample_value(f"lakebase_proxy_{name}", labels) or 0.0
