"""What is counted of a shard map that is in the catalogue, each metric declared once.

For: admissions, parked clients, questions to the catalogue, changes. Not for: what is read at a
scrape (`scraped_metrics`), or the routes of every kind of map (`metrics`).
"""

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from proxy.observe.target_stats import OTHER

# From a warm backend in the same zone to one that waits for a fence.
_ADMIT_SECONDS_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0),
)
# Kinds of changes of the cache.
MAPPING_CHANGED: Final = "mapping"
SHARD_CHANGED: Final = "shard"
RELOADED: Final = "reload"
# The gauge of clients that are parked, which each process has its own part of.
PARKED: Final = "lakebase_proxy_parked_sessions"
_CHANGES: Final = (MAPPING_CHANGED, SHARD_CHANGED, RELOADED)


class ShardMapMetrics:
    """The counters. `words` has the closed sets of labels by the label's name."""

    def __init__(
        self, registry: CollectorRegistry, prefix: str, words: Mapping[str, Iterable[str]]
    ) -> None:
        self._words = {name: tuple(values) for name, values in words.items()}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{prefix}_{name}", text, labels, registry=registry)

        self._admits = counter("admit", "Answers of shards to admissions.", "map", "verdict")
        self._changes = counter("cache_changes", "Changes of the map.", "map", "change")
        self._queries = counter("catalogue_queries", "Questions to the catalogue.", "purpose")
        self._parks = counter("park", "Waits for mappings that were offline.", "result")
        self._stale = counter("stale_retries", "Second dials because a mapping had changed.")
        self._gaps = counter("feed_gaps", "Notifications that led to a reload of the map.")
        self._admit_seconds = Histogram(
            f"{prefix}_admit_seconds",
            "Time until a shard has answered to an admission, in seconds.",
            buckets=_ADMIT_SECONDS_BUCKETS,
            registry=registry,
        )
        self._parked = Gauge(
            PARKED,
            "Clients that wait for a mapping that is offline.",
            registry=registry,
        )
        for purpose in self._words.get("purpose", ()):
            self._queries.labels(purpose)
        for result in self._words.get("result", ()):
            self._parks.labels(result)

    def configure(self, shard_map: str) -> None:
        """Count for this map from now on; empty: for none."""
        self._admits.clear()
        self._changes.clear()
        if shard_map:
            for verdict in self._words.get("verdict", ()):
                self._admits.labels(shard_map, verdict)
            for change in _CHANGES:
                self._changes.labels(shard_map, change)

    def admitted(self, shard_map: str, verdict: str, seconds: float) -> None:
        """Count a verdict, and the time that it took."""
        self._admits.labels(shard_map, self._known("verdict", verdict)).inc()
        self._admit_seconds.observe(seconds)

    def stale_retried(self, shard_map: str) -> None:
        """Count a second dial because a mapping was not as it was known."""
        self._stale.inc()

    def parked(self, now: int) -> None:
        """Show how many clients wait now."""
        self._parked.set(now)

    def park_ended(self, result: str) -> None:
        """Count a wait that has ended."""
        self._parks.labels(self._known("result", result)).inc()

    def queried(self, purpose: str) -> None:
        """Count a question to the catalogue."""
        self._queries.labels(self._known("purpose", purpose)).inc()

    def changed(self, shard_map: str, change: str, count: int = 1) -> None:
        """Count changes of the map."""
        self._changes.labels(shard_map, change).inc(count)

    def feed_had_gaps(self, count: int) -> None:
        """Count notifications that led to a reload."""
        self._gaps.inc(count)

    def _known(self, label: str, word: str) -> str:
        return word if word in self._words.get(label, ()) else OTHER
