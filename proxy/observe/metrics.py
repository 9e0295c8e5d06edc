"""Every metric of the proxy, each declared once.

For: counting, and the text that Prometheus scrapes; what is counted as a failure is remembered as
one of the last, too, so that both agree. Not for: deciding anything; no code reads a metric back.
Metrics are kept per instance, never in the library's global registry, so that two proxies in one
process (as in tests) count apart.

Invariants: names begin with `lakebase_proxy_`, units are base units, and every label takes its
values from a closed set: never a user, a database, a shard key or SQL. Names of targets, maps and
workspaces are such a set: the configuration's. A word outside its set is counted as `other`,
because a metric must neither grow without bound nor end a session.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum, unique
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.observe.recent_errors import CANCEL_NOT_DELIVERED, RecentErrors
from proxy.observe.samples import AddedSamples, Sample, samples_of
from proxy.observe.status import State, StatusSource
from proxy.observe.target_stats import OTHER, Carried, TargetRow, TargetStats

EXPOSITION_CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# The library adds to each counter a series with the time at which it was made: twice as many, and
# nothing in them that the start time of the process does not say. (It has no type of its own.)
disable_created_metrics()  # type: ignore[no-untyped-call]

_PREFIX: Final = "lakebase_proxy"

# From a local DNS answer to a database that wakes up: 1 ms to 60 s, which is also the default of
# upstream.connect_timeout_seconds.
_CONNECT_SECONDS_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


# From a loop that has nothing to do to one that probes give up on.
_LAG_SECONDS_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


@unique
class CancelResult(StrEnum):
    """What became of a CancelRequest."""

    FORWARDED = "forwarded"
    UNKNOWN_KEY = "unknown_key"
    SESSION_ENDED = "session_ended"
    TOO_MANY = "too_many"
    FAILED = "failed"


@unique
class Lookup(StrEnum):
    """What a shard map said of a session's key."""

    HIT = "hit"
    MISS = "miss"


@unique
class RouteResult(StrEnum):
    """What became of a client where a shard map decides."""

    ROUTED = "routed"
    REFUSED = "refused"


@unique
class Outcome(StrEnum):
    """How a session that had started ended, in one word for alerts; the reason says more."""

    COMPLETED = "completed"
    LOST = "lost"
    CUT = "cut"
    FAILED = "failed"


# Any other reason is one for which the proxy itself ends sessions: a drain, a timeout.
_OUTCOMES: Final = {
    "client_closed": Outcome.COMPLETED,
    "client_lost": Outcome.LOST,
    "upstream_closed": Outcome.LOST,
    "upstream_lost": Outcome.LOST,
    "internal_error": Outcome.FAILED,
    OTHER: Outcome.FAILED,
}
# An upstream that closes ends many sessions at once: the failures worth showing.
_FAILED_ENDS: Final = frozenset({"upstream_lost", "internal_error"})


def outcome_of(reason: str) -> Outcome:
    """Return the outcome that a reason of a session's end stands for."""
    return _OUTCOMES.get(reason, Outcome.CUT)


# What is not the more for more processes: the one that is asked speaks for all.
_SAME_IN_EVERY_PROCESS: Final = frozenset(
    f"{_PREFIX}_{name}"
    for name in (
        *("build_info", "shard_map_mappings"),
        *("process_start_time_seconds", "process_max_fds"),
    )
)


class _WordCounter:
    """A counter with one label of closed values, each of them shown from the start, at 0."""

    def __init__(self, counter: Counter, words: Iterable[str]) -> None:
        # A series that appears with its first failure hides that failure from rate().
        self._counters = {word: counter.labels(word) for word in (*words, OTHER)}

    def count(self, word: str) -> None:
        self._counters.get(word, self._counters[OTHER]).inc()


class _Connection:
    """Counts a client connection while a `with` block runs: one object for all of them."""

    def __init__(self, accepted: Counter, now: Gauge) -> None:
        self._accepted = accepted
        self._now = now

    def __enter__(self) -> None:
        self._accepted.inc()
        self._now.inc()

    def __exit__(self, *_: object) -> None:
        self._now.dec()


class _ScrapedMetrics(Collector):
    """What is read at the moment of a scrape instead of being counted as it happens."""

    def __init__(self, rows: Callable[[], list[TargetRow]]) -> None:
        self._rows = rows
        self.source: StatusSource | None = None

    def collect(self) -> Iterable[Metric]:
        yield from _target_metrics(self._rows())
        if self.source is not None:
            yield from _proxy_metrics(self.source)


def _target_metrics(rows: list[TargetRow]) -> Iterable[Metric]:
    active = GaugeMetricFamily(
        f"{_PREFIX}_sessions_active", "Sessions that are served now.", labels=["target"]
    )
    started = CounterMetricFamily(
        f"{_PREFIX}_sessions_started", "Sessions that reached their relay.", labels=["target"]
    )
    relayed = CounterMetricFamily(
        f"{_PREFIX}_relayed_bytes",
        "Bytes relayed, those of sessions that still live among them.",
        labels=["target", "direction"],
    )
    for one in rows:
        active.add_metric([one.target], one.sessions)
        started.add_metric([one.target], one.sessions_started)
        relayed.add_metric([one.target, "to_upstream"], one.client_bytes)
        relayed.add_metric([one.target, "to_client"], one.upstream_bytes)
    return active, started, relayed


def _proxy_metrics(source: StatusSource) -> Iterable[Metric]:
    age = GaugeMetricFamily(
        f"{_PREFIX}_token_age_seconds", "Age of the newest token.", labels=["workspace"]
    )
    expiry = GaugeMetricFamily(
        f"{_PREFIX}_token_expires_in_seconds",
        "Time until the newest token expires; below zero, since when it has.",
        labels=["workspace"],
    )
    for token in source.tokens():
        age.add_metric([token.workspace], token.age_seconds)
        expiry.add_metric([token.workspace], token.expires_in_seconds)
    yield age
    yield expiry
    yield GaugeMetricFamily(
        f"{_PREFIX}_draining",
        "1 while the proxy drains.",
        value=source.state() is State.DRAINING,
    )
    yield GaugeMetricFamily(
        f"{_PREFIX}_session_slots_used",
        "Sessions that are served or whose upstream is being opened.",
        value=source.session_slots_used(),
    )
    yield GaugeMetricFamily(
        f"{_PREFIX}_sessions_max",
        "The bound of session slots used: listen.max_connections.",
        value=source.sessions_max(),
    )


class Metrics:
    """The metrics of one proxy. The reasons of ends and of failures and the phases of connecting
    are given by the floors that own these words; `target_names` are those of the configuration."""

    def __init__(
        self,
        *,
        version: str,
        session_end_reasons: Iterable[str],
        startup_failure_reasons: Iterable[str],
        connect_phases: Iterable[str],
        target_names: Iterable[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.targets = TargetStats(target_names)
        self.recent_errors = RecentErrors(clock)
        self._registry = CollectorRegistry(auto_describe=True)
        self._scraped = _ScrapedMetrics(self.targets.rows)
        self._registry.register(self._scraped)
        # Memory, processor time and open files, where the system tells (Linux).
        ProcessCollector(namespace=_PREFIX, registry=self._registry)
        self._declare_sessions(list(session_end_reasons), startup_failure_reasons)
        self._declare_upstream(connect_phases)
        self._declare_routing()
        self._declare_program(version)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self._registry)

    def _declare_sessions(self, ends: list[str], failures: Iterable[str]) -> None:
        connections = Gauge(
            f"{_PREFIX}_connections", "Client connections open now.", registry=self._registry
        )
        accepted = self._counter("connections_accepted", "Client connections.")
        self._connection = _Connection(accepted, connections)
        ended = self._counter(
            "sessions_ended",
            "Sessions that had started, by outcome and first cause of end.",
            *("outcome", "reason"),
        )
        self._sessions_ended = {
            reason: ended.labels(outcome_of(reason), reason) for reason in (*ends, OTHER)
        }
        self._startup_failures = _WordCounter(
            self._counter("startup_failures", "Clients that were not served, by reason.", "reason"),
            failures,
        )
        self._cancel_requests = _WordCounter(
            self._counter("cancel_requests", "CancelRequests received, by result.", "result"),
            CancelResult,
        )

    def _declare_upstream(self, phases: Iterable[str]) -> None:
        connect_seconds = Histogram(
            f"{_PREFIX}_upstream_connect_seconds",
            "Time spent on each phase of reaching a ready upstream, in seconds.",
            ["phase"],
            buckets=_CONNECT_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._connect_seconds = {phase: connect_seconds.labels(phase) for phase in phases}
        self._tokens_minted = self._counter("tokens_minted", "Tokens issued by the credential API.")
        self._mint_failures = self._counter(
            "token_mint_failures", "Attempts to get a token that failed."
        )

    def _declare_routing(self) -> None:
        self._names: tuple[str, ...] = ()
        self._routes = self._counter(
            "route",
            "Clients for whom a shard map decides, by the shard that they were sent to.",
            *("map", "shard", "result"),
        )
        self._lookups = self._counter("lookup", "Shard keys looked up.", "map", "result")
        self._mappings = Gauge(
            f"{_PREFIX}_shard_map_mappings",
            "Mappings of the shard map in use.",
            ["map"],
            registry=self._registry,
        )

    def _declare_program(self, version: str) -> None:
        self._lag_seconds = Histogram(
            f"{_PREFIX}_event_loop_lag_seconds",
            "How late the event loop came to a timer, in seconds.",
            buckets=_LAG_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._reload_failures = self._counter(
            "reload_failures", "Reloads that were asked for and changed nothing."
        )
        self._admin_errors = self._counter(
            "admin_errors", "Requests to the admin address that failed with 500."
        )
        self._admin_restarts = self._counter(
            "admin_restarts", "Times that the admin address died and was opened anew."
        )
        self._worker_deaths = self._counter("worker_deaths", "Workers that died and were replaced.")
        self._version = version
        self._build = Gauge(
            f"{_PREFIX}_build_info",
            "Always 1; the labels say which program this is.",
            ["version", "acceleration"],
            registry=self._registry,
        )
        self.set_acceleration("")

    def set_acceleration(self, acceleration: str) -> None:
        """Show what new sessions get from now on, one of the words of `native.Acceleration`."""
        self._build.clear()
        self._build.labels(self._version, acceleration).set(1)

    def configure(self, targets: Iterable[str], shard_map: str = "", mappings: int = 0) -> None:
        """Count for these targets and this shard map from now on.

        With other names than before the counts of routing begin anew: old names must not pile up.
        """
        names = (shard_map, *targets)
        self.targets.configure(names[1:])
        if names != self._names:
            self._names = names
            for family in (self._routes, self._lookups, self._mappings):
                family.clear()
        if shard_map:
            self._mappings.labels(shard_map).set(mappings)
            for result in Lookup:
                self._lookups.labels(shard_map, result)

    def routed(self, shard_map: str, shard: str) -> None:
        """Count a client whose key led to a shard."""
        self._lookups.labels(shard_map, Lookup.HIT).inc()
        self._routes.labels(shard_map, self.targets.label(shard), RouteResult.ROUTED).inc()

    def route_refused(self, shard_map: str, *, missed: bool) -> None:
        """Count a client that has no shard; `missed`: no mapping covers its key."""
        if missed:
            self._lookups.labels(shard_map, Lookup.MISS).inc()
        self._routes.labels(shard_map, "", RouteResult.REFUSED).inc()

    def set_source(self, source: StatusSource) -> None:
        """Read tokens, drain and bounds from here at each scrape."""
        self._scraped.source = source

    def connection(self) -> AbstractContextManager[None]:
        """Count one client connection: in total, and among the open ones until the block ends."""
        return self._connection

    def session(self, target: str, carried: Callable[[], Carried]) -> AbstractContextManager[None]:
        """Count a session that is served while the block runs, and the bytes that it carries."""
        return self.targets.session(target, carried)

    def session_ended(self, reason: str, target: str = "") -> None:
        """Count a session that had reached ReadyForQuery, by the first cause of its end."""
        reason = reason if reason in self._sessions_ended else OTHER
        self._sessions_ended[reason].inc()
        if reason in _FAILED_ENDS:
            self._record_error(reason, target=target)

    def startup_failed(self, reason: str) -> None:
        """Count a client that was lost, or whose like is no news, before ReadyForQuery."""
        self._startup_failures.count(reason)

    def session_refused(self, reason: str, sqlstate: str = "", target: str = "") -> None:
        """Count a client that was told that it is not served, and remember why."""
        self._startup_failures.count(reason)
        self._record_error(reason, sqlstate, target)

    def connect_phase_took(self, phase: str, seconds: float, target: str = OTHER) -> None:
        """Record one completed phase of reaching an upstream; the caller has the clock."""
        self._connect_seconds[phase].observe(seconds)
        self.targets.connect_phase_took(target, phase, seconds)

    def token_minted(self) -> None:
        """Count a token that the credential API issued."""
        self._tokens_minted.inc()

    def token_mint_failed(self, reason: str = "") -> None:
        """Count an attempt to get a token that failed, whether or not an older one was used."""
        self._mint_failures.inc()
        if reason:
            self._record_error(reason)

    def cancel_requested(self, result: CancelResult) -> None:
        """Count a CancelRequest by what became of it."""
        self._cancel_requests.count(result)
        if result is CancelResult.FAILED:
            self._record_error(CANCEL_NOT_DELIVERED)

    def loop_lagged(self, seconds: float) -> None:
        """Record how late the event loop was."""
        self._lag_seconds.observe(seconds)

    def worker_died(self) -> None:
        """Count a worker that ended though nobody told it to."""
        self._worker_deaths.inc()

    def admin_failed(self) -> None:
        """Count a request to the admin address that a bug of ours left without an answer."""
        self._admin_errors.inc()

    def reload_failed(self) -> None:
        """Count a reload that was asked for and changed nothing."""
        self._reload_failures.inc()

    def admin_restarted(self) -> None:
        """Count a death of the admin address."""
        self._admin_restarts.inc()

    def exposition(self, others: Sequence[Sample] = ()) -> bytes:
        """Return all metrics in the text format, of type `EXPOSITION_CONTENT_TYPE`.

        `others` are samples of the proxy's other processes, which are added.
        """
        if not others:
            return generate_latest(self._registry)
        whole = CollectorRegistry()
        whole.register(AddedSamples(self._registry, others))
        return generate_latest(whole)

    def samples(self) -> list[Sample]:
        """Return what another process's exposition is to add of this one's."""
        return [
            sample
            for sample in samples_of(self._registry)
            if sample.family not in _SAME_IN_EVERY_PROCESS
        ]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels, 0 if there are none:
        `value("tokens_minted_total")`. For tests."""
        return sum(
            sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == f"{_PREFIX}_{name}" and labels.items() <= sample.labels.items()
        )

    def _record_error(self, reason: str, sqlstate: str = "", target: str = "") -> None:
        self.recent_errors.record(reason, sqlstate, self.targets.label(target) if target else "")
