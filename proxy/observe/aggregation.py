"""What several processes of one proxy have counted, added up.

For: one exposition and one status of a proxy that serves with several workers. Not for: asking the
workers (`workers`), or what is counted (`metrics`, `live`, `failures`).

Invariant: a total never falls, whoever dies: of a dead process the counts stay, and what is only
of now (its sessions, its memory) goes with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from proxy.observe.recent_errors import FAILURES_MAX, Failure
from proxy.observe.samples import Sample
from proxy.observe.target_stats import TargetReading

_OF_NOW: Final = frozenset({"gauge", "info", "stateset"})


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process has counted, and the hosts that it knows of its targets."""

    samples: Sequence[Sample] = ()
    targets: Sequence[TargetReading] = ()
    failures: Sequence[Failure] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON is made of."""
        return asdict(self) | {"samples": list(self.samples)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Reading":
        """Return what `as_dict` was made of."""
        samples = [
            Sample(family, kind, name, tuple((label, word) for label, word in labels), value)
            for family, kind, name, labels, value in content["samples"]
        ]
        targets = [TargetReading(**one) for one in content["targets"]]
        return cls(
            samples, targets, [Failure(**one) for one in content["failures"]], content["hosts"]
        )

    def left_behind(self) -> "Reading":
        """Return what stays of it when its process has died."""
        samples = [sample for sample in self.samples if sample.kind not in _OF_NOW]
        targets = [replace(target, sessions=0) for target in self.targets]
        return Reading(samples, targets, self.failures)


def total(readings: Sequence[Reading]) -> Reading:
    """Return the sum of readings."""
    return Reading(
        _samples(sample for reading in readings for sample in reading.samples),
        _targets(target for reading in readings for target in reading.targets),
        _failures(failure for reading in readings for failure in reading.failures),
        {name: host for reading in readings for name, host in reading.hosts.items() if host},
    )


def _samples(samples: Iterable[Sample]) -> list[Sample]:
    sums: dict[tuple[object, ...], Sample] = {}
    for sample in samples:
        key = sample[:-1]
        before = sums[key].value if key in sums else 0.0
        sums[key] = sample._replace(value=before + sample.value)
    return list(sums.values())


def _targets(targets: Iterable[TargetReading]) -> list[TargetReading]:
    found: dict[str, TargetReading] = {}
    for one in targets:
        before = found.get(one.target)
        found[one.target] = one if before is None else _both(before, one)
    return list(found.values())


def _both(one: TargetReading, other: TargetReading) -> TargetReading:
    return TargetReading(
        one.target,
        one.sessions + other.sessions,
        one.sessions_started + other.sessions_started,
        one.client_bytes + other.client_bytes,
        one.upstream_bytes + other.upstream_bytes,
        {**one.connect_seconds, **other.connect_seconds},
    )


def _failures(failures: Iterable[Failure]) -> list[Failure]:
    """Return the newest of all, the newest first."""
    found: dict[tuple[str, str, str], Failure] = {}
    for one in failures:
        cause = (one.reason, one.sqlstate, one.target)
        before = found.get(cause, replace(one, count=0))
        found[cause] = replace(one, at=max(one.at, before.at), count=one.count + before.count)
    return sorted(found.values(), key=lambda one: one.at, reverse=True)[:FAILURES_MAX]
