"""Every metric that is counted, each declared once; those read at a scrape are `scraped_metrics`.

For: counting, and the text that Prometheus scrapes. An error that is counted is also recorded among
the recent errors, so that both agree. Not for: decisions; no code reads a metric back. Metrics
belong to an instance, never to the library's global registry, so that two proxies in one process
(as in tests) count separately.

Invariants: names begin with `lakebase_proxy_`, units are base units, and the values of every label
are a closed set: never a user, a database, a shard key or SQL. The code that owns a set of words
passes it in; the names of targets, maps and workspaces come from the configuration. A word outside
its set is counted as `other`, because a metric must neither grow without bound nor end a session.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
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

from proxy.observe.aggregation import Sample, SummedCollector, samples_of
from proxy.observe.pool_stats import PoolStats
from proxy.observe.recent_errors import RecentErrors
from proxy.observe.scraped_metrics import PREFIX, ScrapedMetrics
from proxy.observe.shard_map_metrics import ShardMapMetrics
from proxy.observe.status import StatusSource
from proxy.observe.target_stats import OTHER, ByteTotals, TargetStats

EXPOSITION_CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# The library adds a series with the creation time to each counter. That doubles their number and
# says nothing that the start time of the process does not. (The function has no type annotation.)
disable_created_metrics()  # type: ignore[no-untyped-call]

# From a cached DNS answer to a database that resumes: 1 ms to 60 s, the default of
# upstream.connect_timeout_seconds.
_CONNECT_SECONDS_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

# From an idle loop to one that misses its probes.
_LAG_SECONDS_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


# Families that are the same in every process. The process that is scraped exposes its own alone.
_SAME_IN_EVERY_PROCESS: Final = frozenset(
    f"{PREFIX}_{name}"
    for name in (
        *("build_info", "shard_map_mappings"),
        *("process_start_time_seconds", "process_max_fds"),
    )
)


def _known(word: str, words: Collection[str]) -> str:
    """Return the word, or `other` if it is outside of its closed set."""
    return word if word in words else OTHER


class _WordCounter:
    """A counter with one label from a closed set. Every series exists from the start, at 0."""

    def __init__(self, counter: Counter, words: Iterable[str]) -> None:
        # If a series appeared with its first event, rate() would miss that event.
        self._counters = {word: counter.labels(word) for word in (*words, OTHER)}

    def count(self, word: str) -> None:
        self._counters.get(word, self._counters[OTHER]).inc()


class _CountedConnection:
    """Counts a client connection while a `with` block runs. One object serves all connections."""

    def __init__(self, accepted: Counter, now: Gauge) -> None:
        self._accepted = accepted
        self._now = 0  # on the event loop alone: it needs none of the gauge's locks
        now.set_function(lambda: self._now)

    def __enter__(self) -> None:
        self._accepted.inc()
        self._now += 1

    def __exit__(self, *_: object) -> None:
        self._now -= 1


class Metrics:
    """The metrics of one proxy."""

    def __init__(
        self,
        *,
        version: str,
        session_end_outcomes: Mapping[str, str],
        startup_failure_reasons: Iterable[str],
        session_end_errors: Collection[str] = (),
        cancel_results: Iterable[str] = (),
        connect_phases: Iterable[str] = (),
        lookup_results: Collection[str] = (),
        route_results: Collection[str] = (),
        target_names: Iterable[str] = (),
        shard_map_words: Mapping[str, Iterable[str]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`session_end_outcomes` gives each reason for the end of a session its outcome.

        `session_end_errors` are those of them that are recorded as errors. `shard_map_words` are
        those of `ShardMapMetrics`. `clock` is the wall clock, in seconds.
        """
        self.targets = TargetStats(target_names)
        self.pools = PoolStats()
        self.recent_errors = RecentErrors(clock)
        self._registry = CollectorRegistry(auto_describe=True)
        self._scraped = ScrapedMetrics(self.targets.rows, self.pools.rows)
        self._registry.register(self._scraped)
        # Memory, CPU time and open files, where the system provides them (Linux).
        ProcessCollector(namespace=PREFIX, registry=self._registry)
        self._session_end_errors = session_end_errors
        self._declare_sessions(session_end_outcomes, startup_failure_reasons, cancel_results)
        self._declare_upstream(connect_phases)
        self._declare_routing(lookup_results, route_results)
        self.shard_maps = ShardMapMetrics(self._registry, PREFIX, shard_map_words or {})
        self._declare_program(version)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _declare_sessions(
        self,
        outcomes: Mapping[str, str],
        failures: Iterable[str],
        cancel_results: Iterable[str],
    ) -> None:
        connections = Gauge(
            f"{PREFIX}_connections", "Client connections open now.", registry=self._registry
        )
        accepted = self._counter("connections_accepted", "Client connections.")
        self._connection = _CountedConnection(accepted, connections)
        ended = self._counter(
            "sessions_ended",
            "Sessions that had started, by outcome and first cause of end.",
            *("outcome", "reason"),
        )
        self._sessions_ended = {
            reason: ended.labels(outcome, reason)
            for reason, outcome in {OTHER: OTHER, **outcomes}.items()
        }
        self._startup_failures = _WordCounter(
            self._counter("startup_failures", "Clients that were not served, by reason.", "reason"),
            failures,
        )
        self._cancel_requests = _WordCounter(
            self._counter("cancel_requests", "CancelRequests received, by result.", "result"),
            cancel_results,
        )

    def _declare_upstream(self, phases: Iterable[str]) -> None:
        connect_seconds = Histogram(
            f"{PREFIX}_upstream_connect_seconds",
            "Time spent on each phase of reaching a ready upstream, in seconds.",
            ["phase"],
            buckets=_CONNECT_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._connect_seconds = {phase: connect_seconds.labels(phase) for phase in phases}
        self._other_connect_seconds = partial(connect_seconds.labels, OTHER)
        self._tokens_minted = self._counter("tokens_minted", "Tokens issued by the credential API.")
        self._mint_failures = self._counter(
            "token_mint_failures", "Attempts to get a token that failed."
        )

    def _declare_routing(
        self, lookup_results: Collection[str], route_results: Collection[str]
    ) -> None:
        self._names: tuple[str, ...] = ()
        self._target_names: tuple[str, ...] = ()
        self._shard_names: tuple[str, ...] = ()
        self._lookup_results, self._route_results = lookup_results, route_results
        self._routes = self._counter(
            "route",
            "Clients that a shard map routed or refused, by shard.",
            *("map", "shard", "result"),
        )
        self._lookups = self._counter("lookup", "Shard keys looked up.", "map", "result")
        self._mappings = Gauge(
            f"{PREFIX}_shard_map_mappings",
            "Mappings of the shard map in use.",
            ["map"],
            registry=self._registry,
        )

    def _declare_program(self, version: str) -> None:
        self._lag_seconds = Histogram(
            f"{PREFIX}_event_loop_lag_seconds",
            "How late the event loop ran a timer, in seconds.",
            buckets=_LAG_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._reload_failures = self._counter(
            "reload_failures", "Reloads that were refused or failed and changed nothing."
        )
        self._admin_errors = self._counter(
            "admin_errors", "Requests to the admin address that failed with 500."
        )
        self._admin_restarts = self._counter(
            "admin_restarts", "Times that the admin address died and was opened again."
        )
        self._worker_deaths = self._counter("worker_deaths", "Workers that died and were replaced.")
        self._version = version
        self._build = Gauge(
            f"{PREFIX}_build_info",
            "Always 1; the labels identify the build.",
            ["version", "acceleration"],
            registry=self._registry,
        )
        self.set_acceleration("")

    # -- what the configuration sets -------------------------------------------------------------

    def set_acceleration(self, acceleration: str) -> None:
        """Show what new sessions get from now on: a word of `native.Acceleration`."""
        self._build.clear()
        self._build.labels(self._version, acceleration).set(1)

    def configure(
        self,
        targets: Iterable[str],
        shard_map: str = "",
        mappings: int = 0,
        *,
        in_catalogue: bool = False,
    ) -> None:
        """Count by these targets and this shard map from now on.

        If the names change, the routing counters start again, so that old names do not accumulate.
        The shards of a map in the catalogue are set by `configure_shards`.
        """
        names = (shard_map, *targets)
        self._target_names = names[1:]
        self._configure_targets()
        if names != self._names:
            self._names = names
            for family in (self._routes, self._lookups, self._mappings):
                family.clear()
            self.shard_maps.configure(shard_map if in_catalogue else "")
        if shard_map:
            if not in_catalogue:
                self._mappings.labels(shard_map).set(mappings)
            for result in self._lookup_results:
                self._lookups.labels(shard_map, result)

    def configure_shards(self, shard_map: str, mappings: int, names: Iterable[str] | None) -> None:
        """Count by these shards of a map in the catalogue; None: by the same as before.

        No counter begins anew: shards come and go.
        """
        self._mappings.labels(shard_map).set(mappings)
        if names is not None:
            self._shard_names = tuple(names)
            self._configure_targets()

    def _configure_targets(self) -> None:
        names = (*self._target_names, *self._shard_names)
        self.targets.configure(names)
        self.pools.configure(names)

    def set_source(self, source: StatusSource) -> None:
        """Read tokens, drain and bounds from this source at each scrape."""
        self._scraped.source = source

    # -- connections and sessions ----------------------------------------------------------------

    def connection(self) -> AbstractContextManager[None]:
        """Return a context that counts a client connection: in total, and as open meanwhile."""
        return self._connection

    def byte_totals(self, target: str) -> ByteTotals:
        """Return what a session of this target adds its bytes to, while it is counted."""
        return self.targets.byte_totals(target)

    def session(self, target: str) -> AbstractContextManager[None]:
        """Return a context that counts a session: in total, and as open meanwhile."""
        return self.targets.session(target)

    def session_ended(self, reason: str, target: str = "") -> None:
        """Count a session that had reached ReadyForQuery, by the first cause of its end."""
        reason = reason if reason in self._sessions_ended else OTHER
        self._sessions_ended[reason].inc()
        if reason in self._session_end_errors:
            self.record_error(reason, target=target)

    def startup_failed(self, reason: str) -> None:
        """Count a client that was lost or closed before ReadyForQuery, with no error to record."""
        self._startup_failures.count(reason)

    def session_refused(self, reason: str, sqlstate: str = "", target: str = "") -> None:
        """Count a client that got an ErrorResponse in place of a session, and record the error."""
        self._startup_failures.count(reason)
        self.targets.refused += 1
        self.record_error(reason, sqlstate, target)

    def record_error(
        self, reason: str, sqlstate: str = "", target: str = "", *, message: str = ""
    ) -> None:
        """Record a recent error without counting it, as `RecentErrors.record` does."""
        label = self.targets.label(target) if target else ""
        self.recent_errors.record(reason, sqlstate, label, message=message)

    def cancel_requested(self, result: str) -> None:
        """Count a CancelRequest by its result."""
        self._cancel_requests.count(result)

    # -- routing, upstream, workspace ------------------------------------------------------------

    def key_looked_up(self, shard_map: str, result: str) -> None:
        """Count a shard key by the result of its look-up."""
        self._lookups.labels(shard_map, _known(result, self._lookup_results)).inc()

    def client_routed(self, shard_map: str, result: str, shard: str = "") -> None:
        """Count a client by what the shard map did with it, and by its shard if it has one.

        A shard of a map in the catalogue is a target called MAP/SHARD.
        """
        label = self.targets.label(shard).removeprefix(f"{shard_map}/") if shard else ""
        self._routes.labels(shard_map, label, _known(result, self._route_results)).inc()

    def connect_phase_took(self, phase: str, seconds: float, target: str = OTHER) -> None:
        """Record a completed phase of connecting to an upstream."""
        known = self._connect_seconds.get(phase) or self._other_connect_seconds()
        known.observe(seconds)
        self.targets.connect_phase_took(target, phase, seconds)

    def token_minted(self) -> None:
        """Count a token that the credential API issued."""
        self._tokens_minted.inc()

    def token_mint_failed(self, reason: str = "") -> None:
        """Count a failed attempt to get a token, whether or not an older token was used instead."""
        self._mint_failures.inc()
        if reason:
            self.record_error(reason)

    # -- the process -----------------------------------------------------------------------------

    def loop_lagged(self, seconds: float) -> None:
        """Record how late the event loop was."""
        self._lag_seconds.observe(seconds)

    def worker_died(self) -> None:
        """Count a worker that ended unexpectedly."""
        self._worker_deaths.inc()

    def reload_failed(self) -> None:
        """Count a reload that failed and changed nothing."""
        self._reload_failures.inc()

    def admin_failed(self) -> None:
        """Count a request to the admin address that was answered with 500."""
        self._admin_errors.inc()

    def admin_restarted(self) -> None:
        """Count a death of the admin address."""
        self._admin_restarts.inc()

    # -- reading ---------------------------------------------------------------------------------

    def exposition(self, others: Sequence[Sample] = ()) -> bytes:
        """Return all metrics in the text format, of type `EXPOSITION_CONTENT_TYPE`.

        The samples of the proxy's other processes, `others`, are added to this process's own.
        """
        if not others:
            return generate_latest(self._registry)
        whole = CollectorRegistry()
        whole.register(SummedCollector(self._registry, others))
        return generate_latest(whole)

    def samples(self) -> list[Sample]:
        """Return the samples that another process adds to its exposition."""
        return [
            sample
            for sample in samples_of(self._registry)
            if sample.family not in _SAME_IN_EVERY_PROCESS
        ]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels, 0 if there are none. For tests."""
        return sum(
            sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == f"{PREFIX}_{name}" and labels.items() <= sample.labels.items()
        )
