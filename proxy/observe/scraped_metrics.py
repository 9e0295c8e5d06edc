"""The metrics that are read at each scrape, in place of being counted as things happen.

For: numbers that other parts keep anyway. Not for: counters and histograms (`metrics`).
"""

from collections.abc import Callable, Iterable
from functools import reduce
from itertools import accumulate
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from proxy.observe.logs import log_lines_dropped
from proxy.observe.pool_stats import DURATION_BOUNDS, Durations, PoolRow
from proxy.observe.status import StatusSource
from proxy.observe.target_stats import TargetRow

# What every metric's name begins with.
PREFIX: Final = "lakebase_proxy"


class ScrapedMetrics(Collector):
    """Reads the targets, and the proxy's status where it has a source for it."""

    def __init__(
        self, rows: Callable[[], list[TargetRow]], pools: Callable[[], list[PoolRow]]
    ) -> None:
        self._rows = rows
        self._pools = pools
        self.source: StatusSource | None = None

    def collect(self) -> Iterable[Metric]:
        """Yield the metric families as they are now."""
        yield from _target_metrics(self._rows())
        yield from _pool_metrics(self._pools())
        yield CounterMetricFamily(
            f"{PREFIX}_log_lines_dropped",
            "Log lines that found the queue full or could not be written.",
            value=log_lines_dropped(),
        )
        if self.source is not None:
            yield from _token_metrics(self.source)
            yield from _proxy_metrics(self.source)
            yield from _catalogue_metrics(self.source)


def _target_metrics(rows: list[TargetRow]) -> Iterable[Metric]:
    active = GaugeMetricFamily(
        f"{PREFIX}_sessions_active", "Sessions that are served now.", labels=["target"]
    )
    started = CounterMetricFamily(
        f"{PREFIX}_sessions_started", "Sessions that reached their relay.", labels=["target"]
    )
    relayed = CounterMetricFamily(
        f"{PREFIX}_relayed_bytes",
        "Bytes relayed, including those of open sessions.",
        labels=["target", "direction"],
    )
    for row in rows:
        active.add_metric([row.name], row.sessions)
        started.add_metric([row.name], row.sessions_started)
        relayed.add_metric([row.name, "to_upstream"], row.client_bytes)
        relayed.add_metric([row.name, "to_client"], row.upstream_bytes)
    return active, started, relayed


def _pool_metrics(rows: list[PoolRow]) -> Iterable[Metric]:
    """Return the state and the counts of pools; no samples where no target has one."""
    sessions = GaugeMetricFamily(
        f"{PREFIX}_pool_sessions", "Sessions of pools now.", labels=["target", "state"]
    )
    waiting = GaugeMetricFamily(
        f"{PREFIX}_pool_waiting", "Clients that wait for a session of a pool.", labels=["target"]
    )
    triggers = GaugeMetricFamily(
        f"{PREFIX}_pool_login_triggers",
        "Databases whose sessions are not kept because of login event triggers.",
        labels=["target"],
    )
    for row in rows:
        present = row.present
        for state in ("in_use", "idle", "resetting", "dialling"):
            sessions.add_metric([row.target, state], getattr(present, state))
        waiting.add_metric([row.target], present.waiting)
        triggers.add_metric([row.target], present.login_triggers)
    yield from (sessions, waiting, triggers, *_pool_counters(rows))
    waits, resets = [row.waits for row in rows], [row.resets for row in rows]
    yield _histogram("pool_wait_seconds", "Time that clients waited for a session.", waits)
    yield _histogram("pool_reset_seconds", "Time that resets took.", resets)


def _pool_counters(rows: list[PoolRow]) -> Iterable[Metric]:
    takes = CounterMetricFamily(
        f"{PREFIX}_pool_takes", "Sessions given to clients.", labels=["target", "source"]
    )
    retired = CounterMetricFamily(
        f"{PREFIX}_pool_retired", "Sessions closed, by reason.", labels=["target", "reason"]
    )
    spares = CounterMetricFamily(
        f"{PREFIX}_pool_spares", "Sessions dialled ahead, by result.", labels=["target", "result"]
    )
    for row in rows:
        counted = ((takes, row.takes), (retired, row.retired), (spares, row.spares))
        for family, counts in counted:
            for word, count in counts.items():
                family.add_metric([row.target, word], count)
    return takes, retired, spares


def _histogram(name: str, text: str, durations: list[Durations]) -> Metric:
    whole = reduce(Durations.plus, durations, Durations())
    bounds = [*map(str, DURATION_BOUNDS), "+Inf"]
    buckets = list(zip(bounds, accumulate(whole.counts), strict=True))
    family = HistogramMetricFamily(f"{PREFIX}_{name}", text)
    family.add_metric([], buckets, whole.seconds)
    return family


def _token_metrics(source: StatusSource) -> Iterable[Metric]:
    age = GaugeMetricFamily(
        f"{PREFIX}_token_age_seconds", "Age of the newest token.", labels=["workspace"]
    )
    expiry = GaugeMetricFamily(
        f"{PREFIX}_token_expires_in_seconds",
        "Time until the newest token expires; negative after its expiry.",
        labels=["workspace"],
    )
    accepted = GaugeMetricFamily(
        f"{PREFIX}_token_accepted_age_seconds",
        "Age up to which a token is used; longer than set while the API limits the rate.",
        labels=["workspace"],
    )
    failing = GaugeMetricFamily(
        f"{PREFIX}_workspace_api_failing_seconds",
        "Time since which every mint, or read of the password file, has failed; 0 while it works.",
        labels=["workspace"],
    )
    for api in source.workspace_apis():
        failing.add_metric([api.workspace], api.failing_seconds)
    for token in source.tokens():
        age.add_metric([token.workspace], token.age_seconds)
        expiry.add_metric([token.workspace], token.expires_in_seconds)
        accepted.add_metric([token.workspace], token.accepted_age_seconds)
    return age, expiry, accepted, failing


def _proxy_metrics(source: StatusSource) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        f"{PREFIX}_draining", "1 while the proxy drains.", value=source.lifecycle.draining
    )
    yield GaugeMetricFamily(
        f"{PREFIX}_session_slots_used",
        "Sessions that are served or whose upstream is being opened.",
        value=source.session_slots_used,
    )
    yield GaugeMetricFamily(
        f"{PREFIX}_sessions_max",
        "The bound of session slots used: listen.max_connections, or what open files allow.",
        value=source.sessions_max,
    )


def _catalogue_metrics(source: StatusSource) -> Iterable[Metric]:
    """Return the state of a shard map that is in the catalogue; no samples for any other."""
    version = GaugeMetricFamily(
        f"{PREFIX}_shard_map_version", "Version of the shard map that is used.", labels=["map"]
    )
    unvalidated = GaugeMetricFamily(
        f"{PREFIX}_shard_map_unvalidated",
        "1 where shards do not admit each session: catalogue.validate is false.",
        labels=["map"],
    )
    connected = GaugeMetricFamily(
        f"{PREFIX}_feed_connected",
        "0 if the proxy does not hear of changes of the map.",
    )
    age = GaugeMetricFamily(
        f"{PREFIX}_catalogue_age_seconds", "Time since the map was last known to be current."
    )
    backoff = GaugeMetricFamily(
        f"{PREFIX}_refresh_backoff_seconds",
        "Longest back-off in which failed dials to shards ask the catalogue nothing.",
    )
    operations = GaugeMetricFamily(
        f"{PREFIX}_shard_map_operations",
        "Operations of `shards` verbs that hold mappings or shards now.",
        labels=["map"],
    )
    shard_map = source.shard_map()
    if shard_map is not None and shard_map.validate is not None:
        version.add_metric([shard_map.name], shard_map.version or 0)
        unvalidated.add_metric([shard_map.name], not shard_map.validate)
        connected.add_metric([], shard_map.feed != "down")
        if shard_map.age_seconds is not None:
            age.add_metric([], shard_map.age_seconds)
        facts = source.catalogue_facts()
        backoff.add_metric([], facts.dial_backoff_seconds)
        operations.add_metric([shard_map.name], facts.operations)
    return version, unvalidated, connected, age, backoff, operations
