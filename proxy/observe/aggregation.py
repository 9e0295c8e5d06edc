"""What several processes of one proxy have counted, added up.

For: one exposition and one status of a proxy that serves with several workers. Not for: asking the
workers (`workers`), or what is counted (`metrics`, `live`, `failures`).

Invariant: a total never falls, whoever dies: of a dead process the counts stay, and what is only
of now (its sessions, its memory) goes with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from proxy.observe.recent_errors import RECENT_ERRORS_MAX, RecentError
from proxy.observe.samples import Sample
from proxy.observe.target_stats import TargetRow

_OF_NOW: Final = frozenset({"gauge", "info", "stateset"})


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process has counted, and the hosts that it knows of its targets."""

    samples: Sequence[Sample] = ()
    targets: Sequence[TargetRow] = ()
    errors: Sequence[RecentError] = ()
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
        targets = [TargetRow(**one) for one in content["targets"]]
        return cls(
            samples, targets, [RecentError(**one) for one in content["errors"]], content["hosts"]
        )

    def after_exit(self) -> "Reading":
        """Return what stays of it when its process has died."""
        samples = [sample for sample in self.samples if sample.kind not in _OF_NOW]
        targets = [replace(target, sessions=0) for target in self.targets]
        return Reading(samples, targets, self.errors)


def total(readings: Sequence[Reading]) -> Reading:
    """Return the sum of readings."""
    return Reading(
        _samples(sample for reading in readings for sample in reading.samples),
        _targets(target for reading in readings for target in reading.targets),
        _errors(error for reading in readings for error in reading.errors),
        {name: host for reading in readings for name, host in reading.hosts.items() if host},
    )


def _samples(samples: Iterable[Sample]) -> list[Sample]:
    sums: dict[tuple[object, ...], Sample] = {}
    for sample in samples:
        key = sample[:-1]
        before = sums[key].value if key in sums else 0.0
        sums[key] = sample._replace(value=before + sample.value)
    return list(sums.values())


def _targets(targets: Iterable[TargetRow]) -> list[TargetRow]:
    found: dict[str, TargetRow] = {}
    for one in targets:
        before = found.get(one.target)
        found[one.target] = one if before is None else _added(before, one)
    return list(found.values())


def _added(one: TargetRow, other: TargetRow) -> TargetRow:
    return TargetRow(
        one.target,
        one.sessions + other.sessions,
        one.sessions_started + other.sessions_started,
        one.client_bytes + other.client_bytes,
        one.upstream_bytes + other.upstream_bytes,
        {**one.connect_seconds, **other.connect_seconds},
    )


def _errors(errors: Iterable[RecentError]) -> list[RecentError]:
    """Return the newest of all, the newest first."""
    found: dict[tuple[str, str, str], RecentError] = {}
    for one in errors:
        cause = (one.reason, one.sqlstate, one.target)
        before = found.get(cause, replace(one, count=0))
        found[cause] = replace(one, at=max(one.at, before.at), count=one.count + before.count)
    return sorted(found.values(), key=lambda one: one.at, reverse=True)[:RECENT_ERRORS_MAX]
