"""Adding up what the processes of one proxy have counted.

For: one exposition and one status of a proxy with several workers. Not for: asking the workers
(`workers.supervisor`), or which metrics there are (`metrics`).

Invariants: a total never falls when a process ends, because its counts are kept; what describes
only the present (its sessions, its memory) ends with it. An exposition has this process's families
alone, so that another process cannot add a name or a text to it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from proxy.observe.connect_times import NO_CONNECTS, Counts, add_counts
from proxy.observe.history import Totals
from proxy.observe.pool_stats import PoolRow, add_pools
from proxy.observe.recent_errors import RECENT_ERRORS_MAX, RecentError
from proxy.observe.target_stats import TargetRow

# Kinds of metrics that describe the present.
_PRESENT: Final = frozenset({"gauge", "info", "stateset"})


class Sample(NamedTuple):
    """One number of an exposition; `labels` are pairs in the order in which they are shown."""

    family: str
    kind: str
    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def samples_of(registry: CollectorRegistry) -> Iterator[Sample]:
    """Yield every number that a registry exposes now."""
    for family in registry.collect():
        for one in family.samples:
            yield Sample(family.name, family.type, one.name, tuple(one.labels.items()), one.value)


class SummedCollector(Collector):
    """The families of a registry, with the samples of other processes added to its own."""

    def __init__(self, registry: CollectorRegistry, others: Iterable[Sample]) -> None:
        self._registry = registry
        self._others: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for family, _kind, name, labels, value in others:
            of_family = self._others.setdefault(family, {})
            of_family[name, labels] = of_family.get((name, labels), 0.0) + value

    def collect(self) -> Iterable[Metric]:
        """Yield each family, with the series that only other processes have."""
        for family in self._registry.collect():
            others = self._others.get(family.name, {})
            own = {(one.name, tuple(one.labels.items())): one.value for one in family.samples}
            total = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in {**others, **own}.items():
                number = value + (others.get((name, labels), 0.0) if (name, labels) in own else 0.0)
                total.add_sample(name, dict(labels), number)
            yield total


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process has counted."""

    samples: Sequence[Sample] = ()
    targets: Sequence[TargetRow] = ()
    errors: Sequence[RecentError] = ()
    pools: Sequence[PoolRow] = ()
    refused: int = 0
    connects: Counts = NO_CONNECTS

    @property
    def totals(self) -> Totals:
        """The sums over targets and errors, for the history."""
        return Totals.of(self.targets, self.errors, self.refused, self.connects)

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON has."""
        return asdict(self) | {"samples": list(self.samples)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Reading":
        """Return the reading that `as_dict` returned as a dict."""
        samples = [
            Sample(family, kind, name, tuple((label, word) for label, word in labels), value)
            for family, kind, name, labels, value in content["samples"]
        ]
        targets = [
            TargetRow(**{**row, "connects": tuple(row["connects"])}) for row in content["targets"]
        ]
        errors = [RecentError(**error) for error in content["errors"]]
        pools = list(map(PoolRow.from_dict, content["pools"]))
        return cls(samples, targets, errors, pools, content["refused"], tuple(content["connects"]))

    def after_exit(self) -> "Reading":
        """Return what remains of it when its process has ended."""
        samples = [sample for sample in self.samples if sample.kind not in _PRESENT]
        targets = [replace(row, host="", sessions=0, connects=()) for row in self.targets]
        pools = [row.closed() for row in self.pools]
        return replace(self, samples=samples, targets=targets, pools=pools)


def total(readings: Sequence[Reading]) -> Reading:
    """Return the sum of readings."""
    return Reading(
        _add_samples(sample for reading in readings for sample in reading.samples),
        _add_targets(row for reading in readings for row in reading.targets),
        _add_errors(error for reading in readings for error in reading.errors),
        add_pools(row for reading in readings for row in reading.pools),
        sum(reading.refused for reading in readings),
        reduce(add_counts, (reading.connects for reading in readings), NO_CONNECTS),
    )


def _add_samples(samples: Iterable[Sample]) -> list[Sample]:
    sums: dict[tuple[object, ...], Sample] = {}
    for sample in samples:
        key = sample[:-1]
        before = sums[key].value if key in sums else 0.0
        sums[key] = sample._replace(value=before + sample.value)
    return list(sums.values())


def _add_targets(rows: Iterable[TargetRow]) -> list[TargetRow]:
    found: dict[str, TargetRow] = {}
    for row in rows:
        before = found.get(row.name)
        found[row.name] = row if before is None else _added(before, row)
    return list(found.values())


def _added(one: TargetRow, other: TargetRow) -> TargetRow:
    return TargetRow(
        one.name,
        one.host or other.host,
        one.sessions + other.sessions,
        one.sessions_started + other.sessions_started,
        one.client_bytes + other.client_bytes,
        one.upstream_bytes + other.upstream_bytes,
        {**one.connect_seconds, **other.connect_seconds},
        (*one.connects, *other.connects),
    )


def _add_errors(errors: Iterable[RecentError]) -> list[RecentError]:
    """Return the most recent errors of all processes, the newest first."""
    found: dict[tuple[str, str, str], RecentError] = {}
    for error in errors:
        before = found.get(error.key, replace(error, count=0))
        at, count = max(error.at, before.at), error.count + before.count
        since = min(error.since, before.since)
        found[error.key] = replace(error, at=at, count=count, since=since)
    return sorted(found.values(), key=lambda error: error.at, reverse=True)[:RECENT_ERRORS_MAX]
